"""Fixed-point shares in the ring of 2^64, and `cloister.shares/1`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.wire.architecture import Architecture
from cloister.wire.columns import AudioColumn, CategoryColumn, NumberColumn, TensorColumn, TextColumn
from cloister.wire.layers import Add, Embedding, Encode, Linear, LogMel, SequencePool
from cloister.wire.private_inputs import PrivateLayer, prediction_of, private_inputs
from cloister.wire.shares import NotFinite, OutOfRange, Shares, SharesRefused, decode, encode, join, limit, split
from uniformity import deviation_of, require_uniform

_IMAGE = np.arange(6, dtype=np.uint64).reshape(2, 3)
_SHARES = Shares(
    "dep_1",
    bytes(range(16)),
    1,
    {"image": _IMAGE, "x": np.zeros((2, 0), np.uint64)},
)
_BODY = _SHARES.to_bytes()


@given(st.lists(st.floats(-(2.0**21), 2.0**21), max_size=20), st.integers(2, 5))
def test_shares_join_to_what_was_shared(numbers: list[float], parties: int) -> None:
    found = decode(join(split(encode("x", np.array(numbers)), parties=parties)))
    assert np.abs(found - numbers).max(initial=0) <= 2.0**-21


def test_each_share_alone_is_uniform() -> None:
    """Chi-square of the bytes of a constant's shares: 255 degrees of freedom, within 12 standard deviations."""
    ring = encode("x", np.full(2**16, 3.25))
    for share in split(ring, parties=3):
        require_uniform(share.tobytes())
    assert deviation_of(ring.tobytes()) > 4e4


def test_the_same_numbers_are_never_shared_alike() -> None:
    ring = encode("x", np.zeros(4))
    assert len({share.tobytes() for _ in range(50) for share in split(ring)}) == 100


@pytest.mark.parametrize(
    ("value", "refusal"),
    [(np.nan, NotFinite), (np.inf, NotFinite), (-np.inf, NotFinite), (limit() * 1.01, OutOfRange), (-3e9, OutOfRange)],
)
def test_what_fixed_point_cannot_take_is_refused_by_name(value: float, refusal: type[Exception]) -> None:
    with pytest.raises(refusal, match="'age' holds"):
        encode("age", np.array([1.0, value]))


def test_a_share_is_read_as_it_was_written() -> None:
    read = Shares.from_bytes(_BODY)
    assert (read.deployment, read.request, read.party, read.fraction_bits) == ("dep_1", bytes(range(16)), 1, 20)
    assert {name: share.tolist() for name, share in read.tensors.items()} == {
        "image": [[0, 1, 2], [3, 4, 5]],
        "x": [[], []],
    }
    assert "image" not in repr(read)


def test_another_version_is_refused_by_name() -> None:
    with pytest.raises(SharesRefused, match="another version than 1"):
        Shares.from_bytes(_BODY.replace(b"shares/1\n", b"shares/2\n"))
    with pytest.raises(SharesRefused, match="no shares"):
        Shares.from_bytes(b"\x93NUMPY" + _BODY)


@pytest.mark.parametrize("length", range(len(_BODY)))
def test_shares_cut_short_are_refused(length: int) -> None:
    with pytest.raises(SharesRefused):
        Shares.from_bytes(_BODY[:length])


@settings(max_examples=300)
@given(st.integers(0, len(_BODY) - 1), st.integers(1, 255))
def test_changed_bytes_are_other_shares_or_refused(place: int, change: int) -> None:
    body = bytearray(_BODY)
    body[place] ^= change
    try:
        read = Shares.from_bytes(bytes(body))
    except SharesRefused:
        return
    assert read.to_bytes() == bytes(body)


def test_left_over_bytes_and_foreign_arrays_are_refused() -> None:
    with pytest.raises(SharesRefused, match="left over"):
        Shares.from_bytes(_BODY + b"x")
    with pytest.raises(ValueError, match="no share"):
        replace(_SHARES, tensors={"x": np.zeros(3)}).to_bytes()  # type: ignore[dict-item]  # that is what is refused
    with pytest.raises(SharesRefused, match="different shapes"):
        join((np.zeros(3, np.uint64), np.zeros(2, np.uint64)))


def _architecture(inputs: dict[str, object], *layers: object) -> Architecture:
    return Architecture(
        inputs=inputs, layers=layers, target="kind", output=CategoryColumn(values=("a", "b")), loss="cross_entropy"
    )


def test_a_client_prepares_what_the_network_reads() -> None:
    architecture = _architecture(
        {
            "age": NumberColumn(low=0, high=100),
            "image": TensorColumn(shape=(2,), low=0, high=1),
            "text": TextColumn(max_length=3),
        },
        Encode(reads=("age", "image"), name="told"),
        Linear(in_features=3, out_features=2, name="weighed"),
        Embedding(num_embeddings=257, embedding_dim=2, reads=("text",)),
        SequencePool(name="read"),
        Add(reads=("weighed", "read")),
    )
    rows = {
        "age": np.array([75], np.float32), "image": np.array([[0, 1]], np.float32), "text": np.array([[97, 0, 0]], np.uint8),
        "text.length": np.array([2]),
    }  # fmt: skip
    found = private_inputs(architecture, rows)
    assert found["told"].tolist() == [[0.5, -1, 1]]
    assert found["text"].argmax(axis=2).tolist() == [[98, 1, 0]]
    assert set(found) == {"told", "text"}


def test_what_a_client_cannot_prepare_is_refused_by_name() -> None:
    with pytest.raises(PrivateLayer, match="audio"):
        private_inputs(
            _architecture(
                {"s": AudioColumn(rate=8000, max_samples=800)}, LogMel(), Linear(in_features=16, out_features=2)
            ),
            {"s": np.zeros((1, 800), np.int16)},
        )
    with pytest.raises(PrivateLayer, match="bins"):
        private_inputs(
            _architecture({"x": NumberColumn(low=0, high=1)}, Encode(bins=4), Linear(in_features=8, out_features=2)),
            {"x": np.zeros(1, np.float32)},
        )


def test_outputs_become_a_prediction_as_in_the_clear() -> None:
    architecture = _architecture({"x": NumberColumn(low=0, high=1)}, Encode(), Linear(in_features=1, out_features=2))
    found = prediction_of(architecture, np.array([[0.0, np.log(3)]]))
    assert found["index"].tolist() == [1]
    assert np.allclose(found["probabilities"], [[0.25, 0.75]])
    one = architecture.model_copy(update={"loss": "binary_cross_entropy"})
    assert np.allclose(prediction_of(one, np.array([[np.log(3)]]))["probabilities"], [[0.25, 0.75]])
    number = architecture.model_copy(update={"output": NumberColumn(low=0, high=100)})
    assert prediction_of(number, np.array([[0.25]]))["value"].tolist() == [75]
