"""Specs that mean harm are refused by name, and before they cost anything: as JSON, the way that they come over the wire.

Every one is at most 1 MiB, as much as the server reads. The cost is of reading and checking alone, without the network around it.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cloister.wire.architecture import LAYER_LIMIT, Architecture
from cloister_privacy.architecture import check
from cloister_privacy.errors import ArchitectureRefused

MOST_BYTES = 2**20
TIMES_AN_HONEST_SPEC = 5  # of as many layers as there may be, read by the same process: 10 ms on an idle core
MEMORY_BYTES = 50_000_000

Layer = dict[str, Any]
NUMBERS = {"x": {"type": "tensor", "shape": [8], "low": 0, "high": 1}}
IMAGE = {"x": {"type": "tensor", "shape": [3, 8, 8], "low": 0, "high": 1}}
TEXT = {"x": {"type": "text", "max_length": 2**22}}
WORDS = {"c": {"type": "category", "values": [f"value {number:05}" for number in range(60_000)]}}


def spec(*layers: Any, inputs: Any = NUMBERS, **fields: Any) -> str:
    output = {"type": "category", "values": ["a", "b"]}
    defaults = {"inputs": inputs, "layers": layers, "target": "y", "output": output, "loss": "cross_entropy"}
    return json.dumps(defaults | fields)


def linear(entering: Any, leaving: Any, **fields: Any) -> Layer:
    return {"type": "linear", "in_features": entering, "out_features": leaving} | fields


def of(kind: str, **fields: Any) -> Layer:
    return {"type": kind} | fields


def conv2d(kernel: Any, **fields: Any) -> Layer:
    return of("conv2d", in_channels=3, out_channels=4, kernel_size=kernel) | fields


LAST = linear(8, 2)
FLAT = (of("flatten"), LAST)
PLAIN = spec(LAST)


def instead(text: str) -> str:
    """A spec in which raw text, which need not be JSON that anybody would write, stands for a width."""
    return PLAIN.replace('"out_features": 2', f'"out_features": {text}')


def tree_of(count: int) -> list[Layer]:
    """Sums of 64, of so many layers named a0 and on, down to one."""
    names, layers = [f"a{number}" for number in range(count)], []
    while len(names) > 1:
        layers.append(of("add", reads=names[:64], name=f"s{len(layers)}"))
        names = [*names[64:], f"s{len(layers) - 1}"]
    return layers


TOO_LARGE = {
    "a linear layer of 10^12 parameters": spec(linear(8, 2**20), linear(2**20, 2**20), linear(2**20, 2)),
    "a thousand linear layers of 67 million": spec(linear(8, 8192), *[linear(8192, 8192)] * 1000, linear(8192, 2)),
    "a table of 10^12 numbers": spec(
        of("embedding", num_embeddings=2**20, embedding_dim=2**20),
        linear(2**20, 2),
        inputs={"c": {"type": "category", "values": ["a", "b"]}},
    ),
    "an lstm of 16 wide layers": spec(
        of("reshape", shape=[1, 8]),
        of("lstm", input_size=8, hidden_size=2**14, num_layers=16, bidirectional=True, output="last"),
        linear(2**15, 2),
    ),
    "a transformer of 10^12 parameters": spec(
        of("reshape", shape=[1, 8]),
        of("transformer_layer", d_model=8, nhead=1, dim_feedforward=2**20),
        linear(8, 2**20),
        of("transformer_layer", d_model=2**20, nhead=1, dim_feedforward=2**20),
        of("sequence_pool"),
        linear(2**20, 2),
    ),
    "60,000 values one-hot into 2^20": spec(of("encode"), linear(60_000, 2**20), linear(2**20, 2), inputs=WORDS),
    "60,000 values read as numbers": spec(linear(60_000, 2), inputs=WORDS),
    "activations of 10^10 numbers": spec(
        of("embedding", num_embeddings=257, embedding_dim=4096), of("sequence_pool"), linear(4096, 2), inputs=TEXT
    ),
    "activations of 10^12 numbers by padding": spec(
        conv2d([1, 1], out_channels=2**20, padding=[1024, 1024]), *FLAT, inputs=IMAGE
    ),
    "a thousand layers of 16 million numbers": spec(
        of("embedding", num_embeddings=257, embedding_dim=4),
        *[of("relu")] * 1000,
        of("sequence_pool"),
        linear(4, 2),
        inputs=TEXT,
    ),
    "a row of 10^24 numbers": spec(*FLAT, inputs={"x": {"type": "tensor", "shape": [2**20] * 4, "low": 0, "high": 1}}),
    "a text of 10^18 bytes": spec(LAST, inputs={"x": {"type": "text", "max_length": 10**18}}),
    "columns that encode to over a million": spec(
        of("encode"),
        linear(2**20, 2),
        inputs={f"c{number}": {"type": "tensor", "shape": [2**20], "low": 0, "high": 1} for number in range(1000)},
    ),
    "bins for a thousand numbers": spec(
        of("encode", bins=10**9),
        LAST,
        inputs={f"c{number}": {"type": "number", "low": 0, "high": 1} for number in range(1000)},
    ),
}

WRONG_GRAPHS = {
    "a layer that reads itself": spec(linear(8, 8, name="a", reads=["a"]), LAST),
    "two layers that read each other": spec(
        of("add", name="a", reads=["x", "b"]), of("add", name="b", reads=["x", "a"]), LAST
    ),
    "a layer that reads a later one": spec(linear(8, 8, reads=["b"]), linear(8, 2, name="b")),
    "a name that is not there": spec(linear(8, 2, reads=["nobody"])),
    "the output's name": spec(linear(8, 2, reads=["y"])),
    "a place by its key": spec(linear(8, 8), linear(8, 2, reads=["#0"])),
    "a name given twice": spec(linear(8, 8, name="a"), linear(8, 2, name="a")),
    "a column's name": spec(linear(8, 8, name="x"), LAST),
    "a name of blanks and lines": spec(linear(8, 2, name="a\n b")),
    "a name of a million letters": spec(linear(8, 2, name="a" * 1_000_000)),
    "half of a letter": spec(linear(8, 2, name="\ud800")),
    "thousands of reads": spec(of("add", reads=["x"] * 100_000), LAST),
    "64 reads of a thousand layers": spec(
        *(of("add", name=f"a{number}", reads=["x"] * 64) for number in range(LAYER_LIMIT - 1)), LAST
    ),
    "no reads": spec(linear(8, 2, reads=[])),
    "one summand": spec(of("add"), LAST),
    "two inputs of one": spec(of("relu", reads=["x", "x"]), LAST),
    "layers that nothing reads": spec(*(linear(8, 8, name=f"a{number}", reads=["x"]) for number in range(1000)), LAST),
    "a thousand layers that read 64 and end wrong": spec(
        *(linear(8, 8, name=f"a{number}", reads=["x"]) for number in range(900)), *tree_of(900), linear(8, 3)
    ),
    "5,000 columns": spec(
        of("encode"), LAST, inputs={f"c{number}": {"type": "number", "low": 0, "high": 1} for number in range(5000)}
    ),
    "no layers": spec(),
    "no columns": spec(LAST, inputs={}),
    "the target among the inputs": spec(LAST, target="x"),
    "nothing to learn": spec(of("reshape", shape=[4, 2]), of("average_pool"), of("reshape", shape=[2, 2])),
}

DEEP = 100_000
WRONG_JSON = {
    "arrays in arrays for layers": '{"layers": ' + "[" * DEEP + "]" * DEEP + "}",
    "objects in objects for layers": '{"layers": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}",
    "arrays in arrays for a width": instead("[" * DEEP + "]" * DEEP),
    "arrays in arrays that never end": "[" * MOST_BYTES,
    "50,000 layers": spec(*[of("relu")] * 50_000),
    "a number of 100,000 digits": instead("9" * 100_000),
    "a number beyond float64": instead("1e999"),
    "a number of 100,000 places": instead("0." + "1" * 100_000),
    "nothing": "",
    "no text": "\x00\xff",
    "null": "null",
    "an array": "[]",
    "an object for layers": PLAIN.replace('"layers": [', '"layers": {"0": ').replace("}], ", "}}, "),
    "text for layers": spec(LAST, layers="linear"),
    "an array for inputs": spec(LAST, inputs=["x"]),
    "an array for a type": spec(of([])),  # type: ignore[arg-type]  # what no set can hold
    "an object for a type": spec(of({})),  # type: ignore[arg-type]
    "null for a type": spec(of(None)),  # type: ignore[arg-type]
    "no type": spec({}),
    "another type": spec(of("os.system", command="true")),
    "a field more": spec(linear(8, 2, code="import os")),
    "another language": spec(LAST, format="cloister.architecture/2"),
    "pickle": spec(LAST, format="pickle"),
    "an array for a name": spec(linear(8, 2, name=["a"])),
    "an object for reads": spec(linear(8, 2, reads={"x": 1})),
    "text for reads": spec(linear(8, 2, reads="x")),
    "arrays for reads": spec(linear(8, 2, reads=[["x"]])),
    "an object for a width": spec(linear(8, {})),
    "another loss": spec(LAST, loss="__import__"),
    "10,000 dims": spec(of("permute", dims=list(range(10_000))), LAST),
    "200,000 equal values": spec(LAST, inputs={"c": {"type": "category", "values": ["a"] * 200_000}}),
    "50,000 columns of nothing": spec(LAST, inputs={f"c{number}": 0 for number in range(50_000)}),
}

WRONG_NUMBERS = {
    **{
        f"{told} for {field}": spec(of(kind, **(rest | {field: value})), LAST)
        for kind, field, rest in (
            ("rescale", "low", {"high": 1}),
            ("rescale", "high", {"low": 0}),
            ("rescale", "to_high", {"low": 0, "high": 1}),
            ("leaky_relu", "slope", {}),
            ("elu", "alpha", {}),
            ("dropout", "p", {}),
            ("layer_norm", "eps", {"normalized_shape": [8]}),
            ("linear", "out_features", {"in_features": 8}),
            ("reshape", "shape", {}),
        )
        for told, value in (("nan", math.nan), ("infinity", math.inf), ("minus infinity", -math.inf), ("text", "NaN"))
    },
    **{
        f"a bound of {bound}": spec(LAST, inputs={"x": {"type": "tensor", "shape": [8], "low": 0, "high": bound}})
        for bound in (math.nan, math.inf, 1e308, -1, 0)
    },
    **{
        f"{size} for {kind}.{field}": spec(of(kind, **(rest | {field: size})), *FLAT, inputs=IMAGE)
        for size in (0, -1, -(2**63), 2**31, 2**64, 0.5)
        for kind, field, rest in (
            ("linear", "in_features", {"out_features": 2}),
            ("conv2d", "groups", {"in_channels": 3, "out_channels": 4, "kernel_size": [1, 1]}),
            ("group_norm", "num_groups", {"num_channels": 3}),
            ("positional_embedding", "length", {"embedding_dim": 8}),
            ("gru", "num_layers", {"input_size": 8, "hidden_size": 8}),
            ("multihead_attention", "num_heads", {"embed_dim": 8}),
            ("conv1d", "kernel_size", {"in_channels": 3, "out_channels": 4}),
        )
    },
    **{
        f"{size} in {kind}.{field}": spec(of(kind, **(rest | {field: [size, size]})), *FLAT, inputs=IMAGE)
        for size in (-1, 2**31, 2**64, 0.5)
        for kind, field, rest in (
            ("max_pool", "kernel_size", {}),
            ("average_pool", "kernel_size", {}),
            ("max_pool", "stride", {"kernel_size": [2, 2]}),
            ("max_pool", "padding", {"kernel_size": [2, 2]}),
            ("conv2d", "kernel_size", {"in_channels": 3, "out_channels": 4}),
            ("conv2d", "padding", {"in_channels": 3, "out_channels": 4, "kernel_size": [1, 1]}),
            ("conv2d", "dilation", {"in_channels": 3, "out_channels": 4, "kernel_size": [1, 1]}),
            ("permute", "dims", {}),
            ("reshape", "shape", {}),
        )
    },
}

WRONG_SHAPES = {
    "a kernel larger than the image": spec(conv2d([1024, 1024]), *FLAT, inputs=IMAGE),
    "a dilation larger than the image": spec(conv2d([2, 2], dilation=[1024, 1024]), *FLAT, inputs=IMAGE),
    "a pool larger than the image": spec(of("max_pool", kernel_size=[1024, 1024]), *FLAT, inputs=IMAGE),
    "padding over half of the pool": spec(of("max_pool", kernel_size=[2, 2], padding=[2, 2]), *FLAT, inputs=IMAGE),
    "a pool of another rank": spec(of("max_pool", kernel_size=[2]), *FLAT, inputs=IMAGE),
    "strides of another rank": spec(of("max_pool", kernel_size=[2, 2], stride=[2]), *FLAT, inputs=IMAGE),
    "groups that divide nothing": spec(conv2d([1, 1], groups=2), *FLAT, inputs=IMAGE),
    "dims out of range": spec(of("permute", dims=[0, 9]), LAST),
    "dims that come twice": spec(of("permute", dims=[0, 0]), LAST),
    "dims of another rank": spec(of("permute", dims=[1, 0]), LAST),
    "a shape whose size overflows 64 bits": spec(of("reshape", shape=[2**20] * 4), LAST),
    "a shape of 10,000 dimensions": spec(of("reshape", shape=[1] * 10_000), LAST),
    "a dimension left open": spec(of("reshape", shape=[-1]), LAST),
    "a join along a dimension that is not there": spec(of("concatenate", reads=["x", "x"], dim=3), LAST),
    "a join past the last dimension": spec(of("concatenate", reads=["x", "x"], dim=2**40), LAST),
    "a norm over more dimensions than there are": spec(of("layer_norm", normalized_shape=[1, 1, 1, 8]), LAST),
    "a padding_idx beyond the table": spec(
        of("embedding", num_embeddings=300, embedding_dim=8, padding_idx=300),
        of("sequence_pool"),
        LAST,
        inputs={"x": {"type": "text", "max_length": 9}},
    ),
    "numbers read as indices": spec(of("embedding", num_embeddings=300, embedding_dim=8), LAST),
    "numbers read as audio": spec(of("log_mel"), *FLAT),
    "numbers read as text": spec(of("hashed_text"), LAST),
    "a slope beyond float64": spec(of("rescale", low=0, high=1e-300, to_high=1e300), LAST),
    "an image of one point scattered": spec(
        of("scattering"), *FLAT, inputs={"x": {"type": "tensor", "shape": [1, 1], "low": 0, "high": 1}}
    ),
}

CASES = TOO_LARGE | WRONG_GRAPHS | WRONG_JSON | WRONG_NUMBERS | WRONG_SHAPES

HONEST = spec(*[linear(8, 8)] * (LAYER_LIMIT - 1), LAST)


def read(text: str) -> int:
    return check(Architecture.model_validate_json(text))


def peak_bytes() -> int:
    """The most memory that this process has held, of Python and of what pydantic holds outside of it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def cpu_s(text: str) -> float:
    start = time.process_time()
    with contextlib.suppress(ValidationError, ArchitectureRefused):
        read(text)
    return time.process_time() - start


def costs_at_most(text: str, *, times: float, of: str) -> bool:
    """Whether ten turns at most cost that many times the best of another, taken in turns: machine and load cancel out."""
    spent = []
    for _ in range(10):
        spent.append((cpu_s(text), cpu_s(of)))
        if min(ours for ours, _ in spent) <= times * min(theirs for _, theirs in spent):
            return True
    return False


def memory_of(text: str) -> int:
    """Bytes beyond those that were held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    tracemalloc.start()
    try:
        with pytest.raises((ValidationError, ArchitectureRefused)):
            read(text)
        traced = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return max(traced, peak_bytes() - before)


@pytest.mark.parametrize("case", list(CASES))
def test_a_hostile_spec_is_refused_by_name_and_for_next_to_nothing(case: str) -> None:
    text = CASES[case]
    assert len(text) <= MOST_BYTES
    assert memory_of(text) < MEMORY_BYTES
    assert costs_at_most(text, times=TIMES_AN_HONEST_SPEC, of=HONEST)


@pytest.mark.parametrize("case", list(TOO_LARGE | WRONG_SHAPES))
def test_the_refusal_is_short_whatever_was_sent(case: str) -> None:
    with pytest.raises((ValidationError, ArchitectureRefused)) as refused:
        read(CASES[case])
    assert len(str(refused.value)) < 1000


def test_the_spec_that_the_hostile_ones_are_made_from_is_not_refused() -> None:
    assert read(PLAIN) == read(instead("2")) == 18


def test_the_most_layers_cost_what_they_are_many_and_not_their_square() -> None:
    names = [linear(8, 8, name=f"a{number}", reads=["x"]) for number in range(900)]
    tree = spec(*names, *tree_of(900), LAST)
    assert read(tree) > 60_000 and read(HONEST) > 60_000
    assert costs_at_most(tree, times=TIMES_AN_HONEST_SPEC, of=HONEST)
    few = spec(*[linear(8, 8)] * (LAYER_LIMIT // 8 - 1), LAST)
    assert costs_at_most(HONEST, times=32, of=few), "eight times the layers at half of their square"
