"""The rows codec: what is encoded comes back, and what a schema does not allow is refused by column and row."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import numpy as safetensors

from cloister.wire.columns import CategoryColumn, Column, NumberColumn, TensorColumn, TextColumn, UnitColumn
from cloister.wire.rows import RowsRefused, decode_rows, encode_rows, open_form, part_rows, row_bytes, seal_form

COLUMNS: dict[str, Column] = {
    "scan": TensorColumn(shape=(2, 3), low=0, high=255, dtype="uint8"),
    "heat": TensorColumn(shape=(2,), low=-1, high=1),
    "age": NumberColumn(low=0, high=120),
    "region": CategoryColumn(values=("north", "south")),
    "note": TextColumn(max_length=4),
    "who": UnitColumn(),
}


def rows(count: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    who = np.zeros((count, 64), np.uint8)
    who[:, 0] = 65
    return {
        "scan": np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3),
        "heat": np.linspace(-1, 1, count * 2, dtype=np.float32).reshape(count, 2),
        "age": np.linspace(0, 120, count, dtype=np.float32),
        "region": np.arange(count, dtype=np.int32) % 2,
        "note": np.zeros((count, 4), np.uint8),
        "note.length": np.zeros(count, np.int32),
        "who": who,
        "who.length": np.ones(count, np.int32),
    }


def refused(body: bytes) -> RowsRefused:
    with pytest.raises(RowsRefused) as refusal:
        decode_rows(COLUMNS, body)
    return refusal.value


def test_what_is_encoded_comes_back() -> None:
    back = decode_rows(COLUMNS, memoryview(encode_rows(COLUMNS, rows())))
    assert list(back) == list(rows())
    for name, column in rows().items():
        assert back[name].dtype == column.dtype
        assert np.array_equal(back[name], column)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(2)), elements=st.floats(-1, 1, width=32)))
def test_any_rows_within_the_bounds_come_back(heat: np.ndarray[Any, Any]) -> None:
    columns = {"heat": COLUMNS["heat"]}
    assert np.array_equal(decode_rows(columns, encode_rows(columns, {"heat": heat}))["heat"], heat)


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [
        ("heat", 1, np.nan),
        ("heat", 2, np.inf),
        ("age", 2, -np.inf),
        ("age", 0, -0.5),
        ("age", 1, 120.5),
        ("region", 1, 2),
        ("region", 2, -1),
        ("note.length", 0, 5),
        ("note.length", 0, -1),
        ("note", 1, 7),
        ("who.length", 2, 0),
        ("who.length", 2, 65),
    ],
)
def test_a_value_outside_the_schema_is_refused_by_column_and_row(column: str, row: int, value: float) -> None:
    bad = rows()
    bad[column][row] = value
    refusal = refused(encode_rows(COLUMNS, bad))
    assert (refusal.column, refusal.row) == (column.removesuffix(".length"), row)
    assert f"row {row}" in str(refusal)


def test_the_bounds_themselves_are_allowed_though_float32_rounds_them() -> None:
    columns: dict[str, Column] = {"x": NumberColumn(low=0.1, high=0.3)}
    decode_rows(columns, encode_rows(columns, {"x": np.array([0.1, 0.3], np.float32)}))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("age", np.zeros(3, np.float64)),
        ("region", np.zeros(3, np.int64)),
        ("heat", np.zeros((3, 3), np.float32)),
        ("heat", np.zeros((3, 2, 1), np.float32)),
        ("scan", np.zeros((3, 2, 3), np.float32)),
        ("age", np.zeros(2, np.float32)),
        ("age", np.float32(1)),
    ],
)
def test_a_tensor_of_another_type_shape_or_length_is_refused(name: str, changed: Any) -> None:
    body = safetensors.save({**rows(), name: np.asarray(changed)}, metadata={"format": "cloister.rows/1"})
    assert refused(body).row is None


def test_missing_and_extra_columns_are_refused() -> None:
    for tensors in ({**rows(), "more": np.zeros(3)}, {name: t for name, t in rows().items() if name != "age"}):
        assert "columns" in str(refused(safetensors.save(tensors, metadata={"format": "cloister.rows/1"})))


def test_a_body_of_another_format_is_refused() -> None:
    assert "cloister.rows/1" in str(refused(safetensors.save(rows(), metadata={"format": "cloister.rows/2"})))
    assert "cloister.rows/1" in str(refused(safetensors.save(rows())))


def test_no_rows_and_too_many_rows_are_refused() -> None:
    columns: dict[str, Column] = {"x": NumberColumn(low=0, high=1)}
    for count in (0, part_rows(columns) + 1):
        with pytest.raises(RowsRefused, match="1 to 65536 rows"):
            decode_rows(columns, encode_rows(columns, {"x": np.zeros(count, np.float32)}))


def test_a_body_that_is_cut_short_prolonged_or_nonsense_is_refused_by_name() -> None:
    body = encode_rows(COLUMNS, rows())
    nonsense = (b"null", b"[]", b'{"__metadata__":"x"}', b'{"__metadata__":[1]}', b"\xff\xfe{", b"[" * 100_000)
    for broken in (
        *(body[:length] for length in range(0, len(body), 97)),
        body + b"more",
        struct.pack("<Q", 2**63) + body[8:],
        *(struct.pack("<Q", len(header)) + header for header in nonsense),
        safetensors.save({"x": np.zeros(1)}, metadata={"format": "cloister.rows/1"})[:-1],
    ):
        refused(broken)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_body_is_refused_or_still_within_the_schema(data: st.DataObject) -> None:
    body = bytearray(encode_rows(COLUMNS, rows()))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_rows(COLUMNS, bytes(body))
    except RowsRefused:
        return
    assert np.isfinite(decoded["age"]).all() and (decoded["region"] < 2).all()


def test_a_header_that_claims_what_the_body_does_not_hold_is_refused() -> None:
    body = encode_rows(COLUMNS, rows())
    length = struct.unpack("<Q", body[:8])[0]
    header = json.loads(body[8 : 8 + length])
    header["age"]["shape"] = [2**40]
    forged = json.dumps(header).encode()
    refused(struct.pack("<Q", len(forged)) + forged + body[8 + length :])


def test_the_sealed_form_has_one_length_for_any_number_of_rows() -> None:
    assert len({len(seal_form(COLUMNS, rows(count) if count else {}, 7)) for count in (0, 1, 4, 7)}) == 1


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_sealed_form_gives_the_rows_back_without_the_padding(count: int) -> None:
    given_rows = rows(count) if count else {}
    back = open_form(COLUMNS, memoryview(seal_form(COLUMNS, given_rows, 7)))
    assert all(len(column) == count for column in back.values())
    assert all(np.array_equal(back[name], column) for name, column in given_rows.items())


def test_the_size_of_a_part_follows_from_the_schema_alone() -> None:
    assert row_bytes(COLUMNS) == 6 + 8 + 4 + 4 + (4 + 4) + (64 + 4)
    assert part_rows(COLUMNS) == 4 * 2**20 // row_bytes(COLUMNS)
    assert part_rows({"x": TensorColumn(shape=(2**10, 2**12), low=0, high=1)}) == 1
    assert part_rows({"x": NumberColumn(low=0, high=1)}) == 65_536
