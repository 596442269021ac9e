"""A network as a table: every layer with what it reads, gives and trains; never wide, never anything but ASCII."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, InputColumn, NumberColumn, TensorColumn, TextColumn
from cloister_privacy.architecture import check
from cloister_privacy.architecture.summary import options, summary
from cloister_privacy.errors import ArchitectureRefused
from families import FAMILIES

KIND = CategoryColumn(values=("a", "b", "c"))

TABLE = """\
input   what it holds
image   tensor (3, 8, 8) of uint8, 0 to 255
review  text of at most 12 bytes

layer  type and options                         reads       shape      parameters
------------------------------------------------------------------------------------------
#0     rescale low 0, high 255                  image       (3, 8, 8)              fixed
#1     conv2d 3 -> 4, kernel_size 3x3           #0          (4, 6, 6)         112  frozen
#2     relu                                     #1          (4, 6, 6)
seen   average_pool                             #2          (4,)
#4     embedding 257 -> 4                       review      (12, 4)         1,028  trained
read   lstm 4 -> 2, bidirectional, output last  #4          (4,)              128  trained
#6     concatenate                              seen, read  (8,)
#7     linear 8 -> 3, no bias                   #6          (3,)               24  trained
------------------------------------------------------------------------------------------
total  1,180 trained, 112 frozen                                            1,292

target  kind: one of 3: 'a', 'b', 'c', by cross_entropy
"""


def network(*layers: wire.Layer, inputs: dict[str, InputColumn], **fields: Any) -> Architecture:
    defaults = {"target": "kind", "output": KIND, "loss": "cross_entropy"}
    return Architecture(inputs=inputs, layers=layers, **(defaults | fields))


def joined() -> Architecture:
    return network(
        wire.Rescale(low=0, high=255, reads=("image",)),
        wire.Conv2d(in_channels=3, out_channels=4, kernel_size=(3, 3), frozen=True),
        wire.ReLU(),
        wire.AveragePool(name="seen"),
        wire.Embedding(num_embeddings=257, embedding_dim=4, reads=("review",)),
        wire.LSTM(input_size=4, hidden_size=2, bidirectional=True, output="last", name="read"),
        wire.Concatenate(reads=("seen", "read")),
        wire.Linear(in_features=8, out_features=3, bias=False),
        inputs={
            "image": TensorColumn(shape=(3, 8, 8), low=0, high=255, dtype="uint8"),
            "review": TextColumn(max_length=12),
        },
    )


def test_the_table_tells_every_layer_its_options_reads_shape_and_parameters() -> None:
    assert summary(joined()) == TABLE


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_has_a_table_whose_total_is_what_the_check_counts(family: str) -> None:
    architecture = FAMILIES[family].architecture
    table = summary(architecture)
    (total,) = [line for line in table.splitlines() if line.startswith("total")]
    assert total.endswith(f"{check(architecture):,}")
    for layer in architecture.layers:
        assert f"  {layer.type}" in table


def test_what_is_long_goes_on_in_the_next_line_and_nothing_is_wider_than_the_table() -> None:
    names = [f"{letter}{'x' * 62}" for letter in "abcdefgh"]
    table = summary(
        network(
            *(wire.Linear(in_features=1, out_features=2, name=name, reads=("age",)) for name in names),
            wire.Add(reads=tuple(names)),
            wire.Linear(in_features=2, out_features=3),
            inputs={"age": NumberColumn(low=-1.5, high=3.4e38)},
            target="t" * 63,
            output=CategoryColumn(values=("</table>" * 20, "\x00\n\u202e", "\U0001f600")),
        )
    )
    assert table.isascii() and table.replace("\n", "").isprintable()
    assert max(map(len, table.splitlines())) <= 120
    told = "".join(line.split("  ")[0] for line in table.splitlines())
    assert all(name in told for name in names)
    assert "and 4 more" in table


def test_many_inputs_are_told_by_their_number() -> None:
    inputs: dict[str, InputColumn] = {f"c{number}": NumberColumn(low=0, high=1) for number in range(1000)}
    table = summary(network(wire.Encode(), wire.Linear(in_features=1000, out_features=3), inputs=inputs))
    assert "and 977 more inputs" in table and "every input" in table
    assert len(table.splitlines()) < 40


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (wire.ReLU(), ()),
        (wire.Linear(in_features=2, out_features=3), ("2 -> 3",)),
        (wire.Linear(in_features=2, out_features=3, bias=False, init="zeros"), ("2 -> 3", "no bias", "init zeros")),
        (wire.LeakyReLU(slope=0.25, name="x", reads=("y",)), ("slope 0.25",)),
        (wire.Permute(dims=(1, 0)), ("dims 1,0",)),
        (wire.Reshape(shape=(2, 3)), ("shape 2x3",)),
        (wire.MaxPool(kernel_size=(2, 2), stride=(1, 1)), ("kernel_size 2x2", "stride 1x1")),
        (wire.GroupNorm(num_groups=2, num_channels=4, frozen=True), ("num_groups 2", "num_channels 4")),
        (wire.Embedding(num_embeddings=9, embedding_dim=2, padding_idx=0), ("9 -> 2", "padding_idx 0")),
    ],
)
def test_options_are_told_where_they_must_be_given_or_differ_from_the_default(
    layer: wire.Layer, told: tuple[str, ...]
) -> None:
    assert options(layer) == told


def test_a_network_whose_parts_do_not_fit_has_no_table() -> None:
    with pytest.raises(ArchitectureRefused, match="set in_features=1"):
        summary(network(wire.Linear(in_features=2, out_features=3), inputs={"age": NumberColumn(low=0, high=1)}))


def test_tables_and_pictures_load_no_torch() -> None:
    code = "import sys, cloister_privacy.architecture.summary, cloister_privacy.architecture.picture; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "False\n"
