"""Networks as data: shapes refused by name, encodings by hand, predictions validated, weights that are only ever tensors."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, InputColumn, NumberColumn, TensorColumn
from cloister.wire.layers import Encode, Flatten, Layer, Linear, ReLU, Rescale, Softmax, Tanh
from cloister_privacy.architecture import build, check, from_bytes, to_bytes, validate_inputs
from cloister_privacy.errors import ArchitectureRefused, InputRefused, WeightsRefused

IMAGE = TensorColumn(shape=(2, 3), low=0, high=16)
LABEL = CategoryColumn(values=("a", "b", "c"))
PRICE = NumberColumn(low=-10, high=30)


def network_spec(*layers: Layer, inputs: dict[str, InputColumn] | None = None, **fields: Any) -> Architecture:
    defaults = {"target": "label", "output": LABEL, "loss": "cross_entropy"}
    return Architecture(inputs=inputs or {"image": IMAGE}, layers=layers, **(defaults | fields))


def linear(in_features: int, out_features: int) -> Linear:
    return Linear(in_features=in_features, out_features=out_features)


def test_the_parameters_are_counted_without_making_any() -> None:
    assert check(network_spec(Flatten(), linear(6, 5), ReLU(), Linear(in_features=5, out_features=3, bias=False))) == 50
    with pytest.raises(ArchitectureRefused, match="over 100000000 parameters by layer 2"):
        check(network_spec(Flatten(), linear(6, 2**20), linear(2**20, 2**20), linear(2**20, 3)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            network_spec(linear(6, 3)),
            r"layer 0 \(linear\) reads vectors but gets shape \(2, 3\); put flatten before it",
        ),
        (network_spec(Flatten(), linear(7, 3)), "has in_features 7 but gets 6; set in_features=6"),
        (network_spec(Flatten(), linear(6, 4)), r"needs \(3,\); end with a linear layer of out_features=3"),
        (network_spec(Flatten(), Encode(), linear(6, 3)), "joins columns, and reads a layer|nothing reads layer 0"),
        (network_spec(Flatten(), ReLU()), "nothing to learn"),
        (
            network_spec(Flatten(), linear(6, 3), Softmax()),
            r"the last layer is a softmax, and cross_entropy applies its own",
        ),
        (network_spec(linear(3, 3)), "put sequence_pool, average_pool or flatten before"),
        (
            network_spec(Flatten(), linear(6, 3), inputs={"image": IMAGE, "age": PRICE}),
            "there are 2 inputs; put encode first to join them",
        ),
        (network_spec(linear(3, 3), inputs={"colour": LABEL}), "reads numbers but gets indices"),
        (network_spec(Flatten(), linear(6, 3), target="image"), "both an input and the target"),
        (network_spec(Flatten(), linear(6, 3), loss="mean_squared_error"), "categories take cross_entropy"),
        (network_spec(Flatten(), linear(6, 1), output=PRICE), "numbers take mean_squared_error"),
        (
            network_spec(Flatten(), linear(6, 1), output=NumberColumn(low=-3e38, high=3e38), loss="mean_squared_error"),
            "declare a narrower one",
        ),
        (network_spec(Rescale(low=0, high=1e-300, to_high=3e38), Flatten(), linear(6, 3)), "slope that is not finite"),
        (
            network_spec(Encode(), linear(6, 3), inputs={"a": TensorColumn(shape=(2**20,), low=0, high=1), "b": PRICE}),
            "leave inputs out",
        ),
    ],
)
def test_a_network_whose_parts_do_not_fit_is_refused_by_name(spec: Architecture, message: str) -> None:
    with pytest.raises(ArchitectureRefused, match=message):
        check(spec)


def test_encode_maps_bounds_to_minus_one_and_one_and_categories_to_one_hot_in_the_declared_order() -> None:
    inputs: dict[str, InputColumn] = {"price": PRICE, "colour": LABEL, "image": IMAGE}
    network = build(network_spec(Encode(), linear(10, 3), inputs=inputs))
    encoded = network.layers[0](
        torch.tensor([[-10.0], [30.0]]),
        torch.tensor([2, 0]),
        torch.tensor([0.0, 16.0]).repeat(2, 3).reshape(2, 2, 3),
    )
    assert encoded.tolist() == [
        [-1, 0, 0, 1, -1, 1, -1, 1, -1, 1],
        [1, 1, 0, 0, -1, 1, -1, 1, -1, 1],
    ]


def test_encode_takes_the_widest_bounds_that_a_column_may_declare() -> None:
    wide = NumberColumn(low=-3.4e38, high=3.4e38)
    network = build(network_spec(Encode(), linear(1, 3), inputs={"x": wide}))
    assert network.layers[0](torch.tensor([[-3.4e38], [0.0], [3.4e38]])).flatten().tolist() == [-1, 0, 1]


def test_rescale_maps_its_range_and_an_explicit_network_reads_its_input_as_it_is() -> None:
    network = build(network_spec(Rescale(low=0, high=255, to_low=-1, to_high=1), Flatten(), linear(6, 3)))
    assert network.layers[0](torch.tensor([0.0, 127.5, 255.0])).tolist() == [-1, 0, 1]
    with torch.no_grad():
        network.layers[2].weight.zero_()
        network.layers[2].bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    answer = network.predict({"image": np.full((4, 2, 3), 7, dtype=np.float32)})
    assert answer["index"].tolist() == [2] * 4


def test_probabilities_are_float32_that_sum_to_one_and_the_index_is_their_largest() -> None:
    answer = build(network_spec(Flatten(), linear(6, 3))).predict({"image": np.ones((5, 2, 3), dtype=np.float32)})
    assert (answer["probabilities"].dtype, answer["probabilities"].shape) == (np.float32, (5, 3))
    assert (answer["index"].dtype, answer["index"].shape) == (np.int64, (5,))
    assert answer["probabilities"].sum(axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    assert (answer["probabilities"].argmax(axis=1) == answer["index"]).all()


def test_a_number_is_predicted_in_its_own_units_and_its_loss_is_told_in_units_of_its_range() -> None:
    network = build(network_spec(linear(1, 1), inputs={"x": PRICE}, output=PRICE, loss="mean_squared_error"))
    with torch.no_grad():
        network.layers[0].weight.fill_(0.25)
        network.layers[0].bias.zero_()
    answer = network.predict({"x": np.array([0, 1], dtype=np.float32)})
    assert answer["value"].tolist() == [10, 20]  # the middle of [-10, 30], and a quarter of its range above it
    loss = network.losses(torch.tensor([10.0, 20.0]), torch.tensor([10.0, 30.0])).sum()
    assert loss.item() == pytest.approx((10 / 40) ** 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(0, 39))
def test_an_examples_output_does_not_depend_on_its_batch_mates(count: int, chosen: int) -> None:
    network = build(network_spec(Flatten(), linear(6, 5), Tanh(), linear(5, 3)))
    rows = np.random.default_rng(count).uniform(0, 16, (count, 2, 3)).astype(np.float32)
    alone = network.predict({"image": rows[chosen % count][None]})["probabilities"][0]
    assert network.predict({"image": rows})["probabilities"][chosen % count] == pytest.approx(alone, abs=1e-6)


GOOD: dict[str, np.ndarray] = {
    "image": np.ones((2, 2, 3), dtype=np.float32),
    "colour": np.array([0, 2], dtype=np.int64),
    "price": np.ones(2, dtype=np.float32),
}


@pytest.mark.parametrize(
    ("change", "column", "problem"),
    [
        ({"image": np.ones((2, 3, 2), dtype=np.float32)}, "image", r"shape \(2, 3, 2\) where \[rows, 2, 3\]"),
        ({"image": np.ones((2, 2, 3))}, "image", "is float64; send float32"),
        ({"image": np.ones((2, 2, 3), dtype=np.uint8)}, "image", "is uint8; send float32"),
        ({"image": np.full((2, 2, 3), np.nan, dtype=np.float32)}, "image", "not finite"),
        ({"price": np.array([1, np.inf], dtype=np.float32)}, "price", "not finite"),
        ({"price": np.ones((2, 1), dtype=np.float32)}, "price", r"where \[rows\] is expected"),
        ({"price": np.float32(1)}, "price", r"shape \(\)"),
        ({"price": np.ones(3, dtype=np.float32)}, "price", "has 3 rows where other inputs have 2"),
        ({"colour": np.array([0, 3])}, "colour", r"outside 0..2"),
        ({"colour": np.array([-1, 0])}, "colour", r"outside 0..2"),
        ({"colour": np.array([0.0, 1.0], dtype=np.float32)}, "colour", "is float32; send int64"),
        ({"colour": np.array(["red", "blue"])}, "colour", "send int64"),
        ({name: array[:0] for name, array in GOOD.items()}, "image", "no rows"),
        (
            {"weight": np.ones(2, dtype=np.float32)},
            "weight",
            "is not read by this model; it reads image, colour, price",
        ),
    ],
)
def test_an_input_that_its_column_does_not_allow_is_refused_with_the_column_and_the_problem(
    change: dict[str, Any], column: str, problem: str
) -> None:
    spec = network_spec(Encode(), linear(10, 3), inputs={"image": IMAGE, "colour": LABEL, "price": PRICE})
    assert set(validate_inputs(spec, GOOD)) == set(GOOD)
    with pytest.raises(InputRefused, match=problem) as refused:
        validate_inputs(spec, GOOD | change)
    assert refused.value.column == column


def test_a_missing_input_is_named() -> None:
    with pytest.raises(InputRefused, match="input 'image' is missing"):
        validate_inputs(network_spec(Flatten(), linear(6, 3)), {})


def test_a_column_of_bytes_may_be_sent_as_bytes_or_floats() -> None:
    pixels = TensorColumn(shape=(2,), low=0, high=255, dtype="uint8")
    spec = network_spec(linear(2, 3), inputs={"pixels": pixels})
    for dtype in (np.uint8, np.float32):
        sent = validate_inputs(spec, {"pixels": np.array([[1, 255]], dtype=dtype)})
        assert sent["pixels"].dtype == np.float32


def test_an_input_that_drives_the_network_out_of_float32_is_refused() -> None:
    network = build(network_spec(linear(1, 3), inputs={"x": PRICE}))
    with torch.no_grad():
        network.layers[0].weight.fill_(1e10)
    with pytest.raises(InputRefused, match="nearer to the declared bounds"):
        network.predict({"x": np.array([3e38], dtype=np.float32)})


def test_weights_come_back_as_the_network_that_was_written() -> None:
    network = build(network_spec(Flatten(), linear(6, 5), Tanh(), linear(5, 3)))
    again = from_bytes(memoryview(to_bytes(network)))
    assert again.architecture == network.architecture
    assert again.initial_digest == network.initial_digest
    rows = {"image": np.random.default_rng(0).uniform(0, 16, (9, 2, 3)).astype(np.float32)}
    assert (again.predict(rows)["probabilities"] == network.predict(rows)["probabilities"]).all()


def test_every_network_starts_from_its_own_weights_and_their_digest_is_of_the_safetensors() -> None:
    before = torch.random.get_rng_state()
    one, other = (build(network_spec(Flatten(), linear(6, 3))) for _ in range(2))
    assert one.initial_digest != other.initial_digest
    assert one.initial_digest == hashlib.sha256(safetensors.torch.save(one.state_dict())).hexdigest()
    assert torch.equal(before, torch.random.get_rng_state())  # and the caller's random state is left alone


def bodies() -> dict[str, bytes]:
    network = build(network_spec(Flatten(), linear(6, 3)))
    good = to_bytes(network)
    state = network.state_dict()
    spec = network.architecture.model_dump_json()

    def made(tensors: dict[str, torch.Tensor], **metadata: str) -> bytes:
        return bytes(safetensors.torch.save(tensors, metadata={"format": "cloister.weights/1"} | metadata))

    header = json.dumps({"__metadata__": {"format": "cloister.weights/1"}}).encode()
    return {
        "pickle": pickle.dumps({"layers.1.weight": 1}),
        "empty": b"",
        "truncated": good[:-5],
        "trailing": good + b"x",
        "huge header": struct.pack("<Q", 2**60) + header,
        "another format": made(state, format="cloister.checkpoint/1", architecture=spec),
        "no format": bytes(safetensors.torch.save(state)),
        "no architecture": made(state),
        "an architecture of another language": made(state, architecture='{"layers": ["os.system"]}'),
        "an architecture that does not fit": made(
            state, architecture=spec.replace('"in_features":6', '"in_features":7')
        ),
        "a tensor too many": made({**state, "extra": torch.ones(1)}, architecture=spec),
        "a tensor too few": made({"layers.1.weight": state["layers.1.weight"]}, architecture=spec),
        "another shape": made({**state, "layers.1.bias": torch.ones(4)}, architecture=spec),
        "another type": made({**state, "layers.1.bias": torch.ones(3, dtype=torch.float64)}, architecture=spec),
        "not a number": made({**state, "layers.1.bias": torch.full((3,), torch.nan)}, architecture=spec),
    }


@pytest.mark.parametrize("kind", list(bodies()))
def test_bytes_that_are_not_our_weights_are_refused_by_name(kind: str) -> None:
    with pytest.raises(WeightsRefused):
        from_bytes(bodies()[kind])
