"""Networks of the model language on shares against the same networks in the clear."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, TensorColumn
from cloister.wire.private_inputs import private_inputs
from cloister.wire.shares import encode
from cloister_privacy.architecture import build
from cloister_privacy.mpc import (
    LayerNotShared,
    ScaleRefused,
    SharedNetwork,
    SharesOfAnother,
    choose_scale,
    measure_error,
    split_weights,
)
from cloister_privacy.mpc.layers import RUNS
from cloister_privacy.mpc.rehearsal import outputs_of, rehearse
from families import FAMILIES, converted

NOT_SHARED = {
    "scattering": "features on the client",
    "audio": "features on the client",
    "hashed text": "embedding",
    "joined": "bins=0",
}


def _rows(name: str, count: int) -> dict[str, Any]:
    return {key: each for key, each in converted(FAMILIES[name], count).items() if not key.startswith("kind")}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_SHARED])
def test_each_family_gives_the_same_answers_on_shares(name: str) -> None:
    measured = measure_error(build(FAMILIES[name].architecture).eval(), _rows(name, 6))
    assert measured.max_error < 1e-4
    assert measured.equal_argmax == 1


@pytest.mark.parametrize("name", NOT_SHARED)
def test_a_layer_that_cannot_be_shared_is_refused_with_the_alternative(name: str) -> None:
    with pytest.raises(LayerNotShared, match=NOT_SHARED[name]):
        SharedNetwork(FAMILIES[name].architecture)
    with pytest.raises(LayerNotShared, match=NOT_SHARED[name]):
        choose_scale(build(FAMILIES[name].architecture).eval(), _rows(name, 2))


def test_every_layer_of_the_language_is_shared_or_refused_by_name() -> None:
    from typing import get_args

    from cloister_privacy.mpc.network import INSTEAD

    kinds = get_args(get_args(wire.Layer)[0])
    assert {kind for kind in kinds if kind not in RUNS and kind is not wire.Encode} == {
        kind for kind in kinds if kind.model_fields["type"].default in INSTEAD
    }


def _network(shape: tuple[int, ...], *layers: wire.Layer) -> Any:
    architecture = Architecture(
        inputs={"x": TensorColumn(shape=shape, low=-1, high=1)}, layers=layers, target="kind",
        output=CategoryColumn(values=("a", "b")), loss="cross_entropy",
    )  # fmt: skip
    torch.manual_seed(0)
    network = build(architecture).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


def _linear(entering: int) -> wire.Linear:
    return wire.Linear(in_features=entering, out_features=2)


LAYERS: dict[str, tuple[tuple[int, ...], tuple[wire.Layer, ...]]] = {
    "convolution in groups, strided, dilated and padded": (
        (4, 9, 9),
        (
            wire.Conv2d(
                in_channels=4,
                out_channels=6,
                kernel_size=(3, 2),
                stride=(2, 1),
                padding=(1, 0),
                dilation=(1, 2),
                groups=2,
            ),
            wire.Flatten(),
            _linear(210),
        ),
    ),
    "convolution over a length": (
        (3, 9),
        (
            wire.Conv1d(in_channels=3, out_channels=4, kernel_size=3, stride=2, padding=1, bias=False),
            wire.Flatten(),
            _linear(20),
        ),
    ),
    "padded max pooling": (
        (2, 6, 6),
        (wire.MaxPool(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)), wire.Flatten(), _linear(18)),
    ),
    "max pooling over a length": ((2, 7), (wire.MaxPool(kernel_size=(2,)), wire.Flatten(), _linear(6))),
    "max pooling behind relu": (
        (1, 6, 6),
        (
            wire.Conv2d(in_channels=1, out_channels=2, kernel_size=(3, 3)),
            wire.ReLU(name="active"),
            wire.MaxPool(kernel_size=(2, 2), name="pooled"),
            wire.Flatten(),
            _linear(8),
        ),
    ),
    "relu that two read": (
        (1, 4, 4),
        (
            wire.Conv2d(in_channels=1, out_channels=2, kernel_size=(1, 1)),
            wire.ReLU(name="active"),
            wire.MaxPool(kernel_size=(2, 2)),
            wire.Flatten(name="a"),
            wire.AveragePool(kernel_size=(2, 2), reads=("active",)),
            wire.Flatten(name="b"),
            wire.Add(reads=("a", "b")),
            _linear(8),
        ),
    ),
    "padded average pooling": (
        (2, 6, 6),
        (wire.AveragePool(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)), wire.Flatten(), _linear(18)),
    ),
    "average pooling over a length": ((2, 8), (wire.AveragePool(kernel_size=(2,)), wire.Flatten(), _linear(8))),
    "norms": (
        (4, 6),
        (
            wire.GroupNorm(num_groups=2, num_channels=4),
            wire.LayerNorm(normalized_shape=(4, 6)),
            wire.RMSNorm(normalized_shape=(6,)),
            wire.LayerNorm(normalized_shape=(6,), affine=False),
            wire.Flatten(),
            _linear(24),
        ),
    ),
    "lstm of two layers": (
        (5, 4),
        (wire.LSTM(input_size=4, hidden_size=3, num_layers=2, bias=False), wire.SequencePool(how="last"), _linear(3)),
    ),
    "gru in both directions": (
        (5, 4),
        (wire.GRU(input_size=4, hidden_size=3, bidirectional=True, output="last"), _linear(6)),
    ),
    "rnn with relu": ((5, 4), (wire.RNN(input_size=4, hidden_size=3, nonlinearity="relu", output="last"), _linear(3))),
    "transformer with gelu, norm last": (
        (5, 8),
        (
            wire.PositionalEmbedding(length=6, embedding_dim=8),
            wire.TransformerLayer(d_model=8, nhead=2, dim_feedforward=8, activation="gelu", causal=True),
            wire.SequencePool(how="max"),
            _linear(8),
        ),
    ),
    "attention without bias": (
        (5, 8),
        (wire.MultiheadAttention(embed_dim=8, num_heads=4, bias=False), wire.SequencePool(how="mean"), _linear(8)),
    ),
    "joins": (
        (6,),
        (
            wire.Rescale(low=-1, high=1, to_low=0, to_high=3, name="a"),
            wire.Tanh(name="b"),
            wire.Sigmoid(name="c"),
            wire.Multiply(reads=("a", "b", "c"), name="d"),
            wire.Concatenate(reads=("d", "a")),
            wire.Reshape(shape=(3, 4)),
            wire.Permute(dims=(1, 0)),
            wire.Softmax(),
            wire.ELU(alpha=0.5),
            wire.LeakyReLU(),
            wire.Dropout(),
            wire.Flatten(),
            _linear(12),
        ),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_shares_is_the_layer(name: str) -> None:
    shape, layers = LAYERS[name]
    network = _network(shape, *layers)
    rows = {"x": np.random.default_rng(1).uniform(-1, 1, (5, *shape)).astype(np.float32)}
    assert measure_error(network, rows).max_error < 2e-4


JOINED: dict[str, Any] = LAYERS | {
    name: FAMILIES[name].architecture for name in FAMILIES if name not in (*NOT_SHARED, "lstm")
}


@pytest.mark.parametrize("name", JOINED)
def test_what_is_joined_changes_no_row_beside_it_whatever_it_holds(name: str) -> None:
    """Words that no client would encode, the least and the largest among them, stand before, between and behind two rows."""
    if isinstance(JOINED[name], Architecture):
        network, rows = build(JOINED[name]).eval(), _rows(name, 2)
    else:
        shape, layers = JOINED[name]
        network = _network(shape, *layers)
        rows = {"x": np.random.default_rng(1).uniform(-1, 1, (2, *shape)).astype(np.float32)}
    words = {}
    for key, each in private_inputs(network.architecture, rows).items():
        one, other = encode(key, each)[:, None]
        noise = np.random.default_rng(2).integers(0, 2**64, (2, *one.shape[1:]), np.uint64)
        ends = [np.full_like(one, 2**63 - 1), np.full_like(one, 2**63)]
        words[key] = np.concatenate([noise[:1], one, *ends, other, noise[1:]])
    joined = rehearse(SharedNetwork(network.architecture), network.state_dict(), words).outputs[[1, 4]]
    assert np.abs(joined - outputs_of(network, rows)).max() < 2e-4


def test_every_layer_that_is_shared_was_joined() -> None:
    found = [each.layers if isinstance(each, Architecture) else each[1] for each in JOINED.values()]
    assert {type(layer) for layers in found for layer in layers} >= set(RUNS)


def _grown(*layers: wire.Layer, by: dict[int, float]) -> tuple[Any, dict[str, Any]]:
    """A network whose weights are multiplied, of some layers, and rows for it."""
    network = _network((16,), *layers)
    with torch.no_grad():
        for position, factor in by.items():
            for parameter in network.layers[position].parameters():
                parameter.mul_(factor)
    return network, {"x": np.random.default_rng(1).uniform(0, 1, (32, 16)).astype(np.float32)}


def _linear_16() -> wire.Linear:
    return wire.Linear(in_features=16, out_features=16)


def _measured(network: Any, rows: dict[str, Any]) -> Any:
    bits, layer_bits = choose_scale(network, rows)
    return measure_error(network, rows, fraction_bits=bits, layer_bits=layer_bits)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_SHARED])
def test_ordinary_numbers_take_one_scale(name: str) -> None:
    assert choose_scale(build(FAMILIES[name].architecture).eval(), _rows(name, 6)) == (20, ())


@pytest.mark.parametrize("factor", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("active", [wire.ReLU(), wire.LeakyReLU(slope=0.1), wire.GELU()])
def test_a_layer_of_large_numbers_has_a_scale_of_its_own(active: wire.Layer, factor: float) -> None:
    layers = (_linear_16(), active, _linear_16(), active, _linear(16))
    network, rows = _grown(*layers, by={2: factor, 4: 1 / factor})
    bits, layer_bits = choose_scale(network, rows)
    assert bits == 20 and layer_bits[0] == (20, 20) and layer_bits[4][1] > 20
    measured = _measured(network, rows)
    assert measured.max_error < 5e-4 and measured.equal_argmax >= 31 / 32
    one_scale = measure_error(network, rows, fraction_bits=20 if factor == 1e4 else 14)
    assert one_scale.max_error > 10 * measured.max_error


@pytest.mark.parametrize("active", [wire.Tanh(), wire.Sigmoid()])
def test_what_no_one_scale_takes_is_right_with_one_for_each_layer(active: wire.Layer) -> None:
    network, rows = _grown(_linear_16(), wire.ReLU(), _linear_16(), active, _linear(16), by={2: 2e9})
    assert float(network.layers[2].weight.detach().abs().max()) > 2**28
    assert _measured(network, rows).max_error < 1e-4


def test_large_inputs_and_branches_of_different_sizes_have_their_own_scales() -> None:
    network, rows = _grown(wire.Rescale(low=0, high=2**22, to_low=0, to_high=1), _linear(16), by={})
    rows["x"] *= 2**22
    assert choose_scale(network, rows)[0] == 16
    assert _measured(network, rows).max_error < 1e-4
    small, large = (
        _linear_16().model_copy(update={"name": "s"}),
        _linear_16().model_copy(update={"name": "l", "reads": ("x",)}),
    )
    for joined in (wire.Add(reads=("s", "l")), wire.Concatenate(reads=("s", "l"), dim=0)):
        width = 16 if isinstance(joined, wire.Add) else 32
        network, rows = _grown(small, large, joined, _linear(width), by={1: 1e7, 3: 1e-7})
        measured = _measured(network, rows)
        assert measured.max_error < 1e-3, joined.type


def test_numbers_that_fit_no_scale_are_refused_by_name() -> None:
    for layers, by, words in (
        ((_linear(16),), {0: 1e13}, r"layer 0 \(linear\) .*put a norm before it"),
        ((_linear_16(), wire.GELU(), _linear(16)), {0: 2e10}, "layer 1"),
    ):
        with pytest.raises(ScaleRefused, match=words):
            choose_scale(*_grown(*layers, by=by))
    network, rows = _grown(_linear(16), by={})
    with pytest.raises(ScaleRefused, match="inputs have numbers"):
        choose_scale(network, {"x": rows["x"] * 1e12})


def test_shares_of_another_network_or_shape_are_refused_by_name() -> None:
    network, other = (_network((k,), _linear(k)) for k in (3, 4))
    shared = SharedNetwork(network.architecture)
    with pytest.raises(SharesOfAnother, match="another network"):
        split_weights(shared, other.state_dict())
    for inputs in ({"x": np.zeros((2, 4), np.uint64)}, {"y": np.zeros((2, 3), np.uint64)}):
        with pytest.raises(SharesOfAnother, match=r"takes x \[rows, 3\]"):
            shared.check_inputs(inputs)
    with pytest.raises(SharesOfAnother, match="numbers of rows"):
        shared.check_inputs({"x": np.zeros((0, 3), np.uint64)})


def test_a_weight_share_alone_is_uniform() -> None:
    network = _network((256,), wire.Linear(in_features=256, out_features=256), _linear(256))
    for shares in split_weights(SharedNetwork(network.architecture), network.state_dict()):
        counts = np.bincount(
            np.concatenate([each.reshape(-1).view(np.uint8) for each in shares.values()]), minlength=256
        )
        expected = counts.sum() / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 12 * (2 * 255) ** 0.5


def test_the_program_and_its_digest_depend_on_public_facts_alone() -> None:
    one, two = (SharedNetwork(FAMILIES["gru"].architecture) for _ in range(2))
    assert (one.program(3), one.digest) == (two.program(3), two.digest)
    assert one.program(3) != one.program(4)
    assert one.digest != SharedNetwork(FAMILIES["gru"].architecture, fraction_bits=16).digest
    scaled = SharedNetwork(
        FAMILIES["gru"].architecture, layer_bits=[(20, 20)] * len(FAMILIES["gru"].architecture.layers)
    )
    assert scaled.digest != one.digest, "roles and clients that know of no scale for each layer refuse the statement"
