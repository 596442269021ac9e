"""Uploads: any source of rows becomes the same parts, in bounded memory; what does not fit is refused by column and row."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

import cloister
from cloister._uploads import RowData, windows
from cloister.wire.columns import Column
from cloister.wire.rows import decode_rows, part_rows
from fake_server import Server, refusal

SOURCE = "src_" + "0" * 32
DATASET = "ds_" + "1" * 32
COLUMNS: dict[str, Column] = {
    "scan": cloister.Tensor(shape=(64, 64), low=0, high=1),
    "digit": cloister.Category(values=tuple("0123456789")),
}
SIZE = part_rows(COLUMNS)
TABLE: dict[str, Column] = {
    "age": cloister.Number(low=0, high=120),
    "region": cloister.Category(values=("north", "south")),
    "note": cloister.Bytes(max_length=8),
    "who": cloister.Unit(),
}
PUBLIC = {"nominal_size": 500, "capacity": 1000}


class Datasets:
    """The dataset routes of a server: keeps parts, never overwrites one, closes."""

    def __init__(self, server: Server, columns: dict[str, Column]) -> None:
        self.server, self.columns, self.declared, self.status = server, columns, {}, ""
        self.parts: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
        server.on("/v1/datasets", self.declare).on("/v1/datasets/d", self.view)
        server.on(f"/v1/datasets/{DATASET}/complete", self.complete)
        for number in range(10):
            server.on(f"/v1/datasets/{DATASET}/parts/{number}", self.part)

    def declare(self, request: httpx2.Request) -> Any:
        if self.declared:
            return refusal(409, "conflict", "a dataset named 'd' is already there")
        self.declared, self.status = httpx2.Response(200, content=request.content).json(), "uploading"
        return self.view(request)

    def view(self, _: httpx2.Request) -> Any:
        rest = {"id": DATASET, "status": self.status, "part_rows": 1, "parts": 9, "created": "2026-01-01T00:00:00Z"}
        return {"capacity_rows": self.declared["capacity"], **self.declared, **rest}

    def part(self, request: httpx2.Request) -> Any:
        number = int(request.url.path.rsplit("/", 1)[1])
        digest = base64.b64encode(hashlib.sha256(request.content).digest()).decode()
        assert request.headers["content-digest"] == f"sha-256=:{digest}:"
        assert request.headers["content-type"] == "application/vnd.cloister.rows"
        if number in self.parts:
            return refusal(409, "conflict", "stored already", part_exists=True)
        self.parts[number] = decode_rows(self.columns, request.content)
        return {"part": number, "rows": len(next(iter(self.parts[number].values())))}

    def complete(self, request: httpx2.Request) -> Any:
        self.status = "ready"
        return self.view(request)

    def rows(self, column: str) -> np.ndarray[Any, Any]:
        return np.concatenate([self.parts[number][column] for number in sorted(self.parts)])


def upload(server: Server, data: RowData, columns: dict[str, Column] = COLUMNS, **changed: Any) -> cloister.Dataset:
    with server.client() as client:
        return client.datasets.upload("d", data, source=SOURCE, columns=columns, **{**PUBLIC, **changed})


def digits(count: int) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(count)
    return {"scan": rng.random((count, 64, 64), dtype=np.float32), "digit": rng.integers(0, 10, count)}


def refused(columns: dict[str, Column], data: RowData) -> str:
    with pytest.raises(cloister.RowsNotFit) as refusal:
        list(windows(columns, data))
    return str(refusal.value)


def table(**changed: Any) -> dict[str, Any]:
    rows = {"age": [1.5, 2], "region": ["north", "south"], "note": ["a", b"\xff"], "who": ["x", 7]}
    return {**rows, **changed}


def test_rows_travel_in_parts_of_the_size_that_the_schema_gives(server: Server) -> None:
    store, data = Datasets(server, COLUMNS), digits(2 * SIZE + 3)
    assert upload(server, data).status == "ready"
    assert [len(part["digit"]) for part in store.parts.values()] == [SIZE, SIZE, 3]
    assert np.array_equal(store.rows("scan"), data["scan"])
    assert np.array_equal(store.rows("digit"), data["digit"])
    assert store.declared["nominal_size"] == 500 and store.declared["capacity"] == 1000


def test_the_async_client_sends_the_same_parts(server: Server) -> None:
    store, data = Datasets(server, COLUMNS), digits(SIZE + 1)

    async def journey() -> cloister.Dataset:
        async with server.async_client() as client:
            return await client.datasets.upload("d", data, source=SOURCE, columns=COLUMNS, **PUBLIC)

    assert asyncio.run(journey()).status == "ready"
    assert np.array_equal(store.rows("scan"), data["scan"])


def test_the_public_numbers_must_be_given_and_never_follow_the_rows(server: Server) -> None:
    with server.client() as client:
        for missing in ("nominal_size", "capacity"):
            given = {name: number for name, number in PUBLIC.items() if name != missing}
            with pytest.raises(TypeError, match=missing):
                client.datasets.upload("d", digits(1), source=SOURCE, columns=COLUMNS, **given)


def test_a_memory_mapped_file_is_read_a_part_at_a_time(server: Server, tmp_path: Path) -> None:
    data = digits(6 * SIZE)
    for name, column in data.items():
        np.save(tmp_path / f"{name}.npy", column)
    size = data["scan"].nbytes
    del data
    tracemalloc.start()
    try:
        paths = {"scan": str(tmp_path / "scan.npy"), "digit": tmp_path / "digit.npy"}
        parts = sum(1 for _ in windows(COLUMNS, paths))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert parts == 6 and peak < size / 2


def test_a_csv_is_read_a_part_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    columns: dict[str, Column] = {"note": cloister.Bytes(max_length=2**17)}
    with path.open("w") as stream:
        stream.write("note\n" + ("x" * 2**17 + "\n") * 160)
    tracemalloc.start()
    try:
        counts = [len(rows["note"]) for rows in windows(columns, path)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(counts) == 160 and max(counts) == part_rows(columns)
    assert peak < path.stat().st_size


@pytest.mark.parametrize("packed", [False, True])
def test_a_csv_gives_the_same_rows_as_arrays(tmp_path: Path, packed: bool) -> None:
    text = '\ufeffwho,note,region,age\nx,"a, b",north,1.5\n\n7,"2\nlines",south,2\n'.encode()
    path = tmp_path / ("rows.csv.gz" if packed else "rows.csv")
    path.write_bytes(gzip.compress(text) if packed else text)
    (read,) = windows(TABLE, path)
    (expected,) = windows(TABLE, table(note=["a, b", "2\nlines"]))
    assert read.keys() == expected.keys()
    assert all(np.array_equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing: age, region, note, who"),
        ("age,region,note\n1,north,a\n", "missing: who"),
        ("age,region,note,who,more\n", "not declared: more"),
        ("age,age,region,note,who\n", "once"),
        ("age,region,note,who\n1,north,a,x\n2,south,b\n", "row 1: 3 values"),
        ("age,region,note,who\n1,north,a,x,y\n", "row 0: 5 values"),
        ("age,region,note,who\n1,north,a,x\n,south,a,x\n", "column 'age' row 1: .* is not a number"),
        (
            "age,region,note,who\n1,north,a,x\n1,west,a,x\n",
            "column 'region' row 1: .*west.* is not one of the declared",
        ),
        ("age,region,note,who\n1,north,a,\n", "column 'who' row 0: no user id"),
        ('age,region,note,who\n1,north,"a,x\n', "cannot be read as a CSV"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused_by_column_and_row(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(cloister.RowsNotFit, match=words):
        list(windows(TABLE, path))


def test_a_csv_that_is_no_text_or_cut_short_is_refused(tmp_path: Path) -> None:
    for name, content in (
        ("a.csv", b"age,region,note,who\n\xff\xfe\n"),
        ("b.csv.gz", gzip.compress(b"age,region,note,who\n" * 2)[:-9]),
        ("c.csv.gz", b"age,region"),
    ):
        (tmp_path / name).write_bytes(content)
        assert "cannot be read" in refused(TABLE, tmp_path / name)


def test_a_csv_row_is_counted_over_all_parts(tmp_path: Path) -> None:
    path, columns = tmp_path / "rows.csv", {"note": cloister.Bytes(max_length=2**17)}
    size = part_rows(columns)
    path.write_text("note\n" + "a\n" * (size + 1) + "b,c\n")
    assert f"row {size + 1}: 2 values" in refused(columns, path)
    path.write_text("region\n" + "north\n" * 65_537 + "west\n")
    assert "row 65537: 'west'" in refused({"region": TABLE["region"]}, path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"age": [1, "x"]}, "column 'age' row 1: .*x.* is not a number"),
        ({"age": [[1], [2]]}, r"shape \(1,\)"),
        ({"age": [[1], 2]}, "different shapes"),
        ({"age": [1 + 1j, 2]}, "complex"),
        ({"region": ["north", "west"]}, "column 'region' row 1: .*west"),
        ({"region": [0, 2]}, "column 'region' row 1: .*2"),
        ({"region": [0, -1]}, "column 'region' row 1: .*-1"),
        ({"region": [0.0, 1.0]}, "column 'region' row 0"),
        ({"note": ["a", "123456789"]}, "column 'note' row 1: 9 bytes, and at most 8"),
        ({"note": ["a", 7]}, "column 'note' row 1: a int is neither text nor bytes"),
        ({"note": ["a", None]}, "column 'note' row 1: a NoneType"),
        ({"who": ["x", ""]}, "column 'who' row 1: no user id"),
        ({"who": ["x", "y" * 65]}, "column 'who' row 1: 65 bytes"),
        ({"who": ["x", 1.0]}, "column 'who' row 1: a float"),
        ({"age": [1]}, "different lengths"),
        ({"more": [1, 2]}, "not declared: more"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_column_and_row(
    server: Server, changed: dict[str, Any], words: str
) -> None:
    Datasets(server, TABLE)
    with pytest.raises(cloister.RowsNotFit, match=words):
        upload(server, table(**changed), TABLE)
    assert not any(request.method == "PUT" for request in server.asked)


def test_values_and_indices_of_a_category_are_the_same_rows() -> None:
    columns = {"region": TABLE["region"]}
    spellings: list[Any] = [["north", "south"], [b"north", b"south"], [0, 1], np.array([0, 1], np.uint64)]
    for spelling in spellings:
        (rows,) = windows(columns, {"region": spelling})
        assert rows["region"].tolist() == [0, 1] and rows["region"].dtype == np.int32


def test_integers_that_could_be_values_or_indices_are_refused_rather_than_guessed() -> None:
    columns: dict[str, Column] = {"grade": cloister.Category(values=("1", "2", "3"))}
    assert "Give the values as text" in refused(columns, {"grade": [1, 2]})
    (rows,) = windows(columns, {"grade": ["1", "3"]})
    assert rows["grade"].tolist() == [0, 2]


def test_bytes_that_are_no_uint8_are_not_rounded() -> None:
    columns: dict[str, Column] = {"x": cloister.Tensor(shape=(2,), low=0, high=255, dtype="uint8")}
    for wrong in ([[1.5, 2]], [[256, 0]], [[-1, 0]], [[np.nan, 0]]):
        assert "uint8" in refused(columns, {"x": np.array(wrong)})
    (rows,) = windows(columns, {"x": np.array([[1.0, 255.0]])})
    assert rows["x"].tolist() == [[1, 255]]


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_npy_file_that_holds_objects_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "age.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "cannot be read as plain numbers" in refused({"age": TABLE["age"]}, {"age": tmp_path / "age.npy"})
    (tmp_path / "age.npy").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "cannot be read as plain numbers" in refused({"age": TABLE["age"]}, {"age": tmp_path / "age.npy"})
    assert not (tmp_path / "sprung").exists()
    assert ".npy" in refused({"age": TABLE["age"]}, {"age": "age.pkl"})


def test_more_rows_than_the_capacity_are_refused_before_anything_is_sent(server: Server) -> None:
    with pytest.raises(cloister.RowsNotFit, match="capacity"):
        upload(server, digits(SIZE), nominal_size=5, capacity=SIZE - 1)
    assert server.asked == []


def test_a_file_of_unknown_length_stops_at_the_capacity(server: Server, tmp_path: Path) -> None:
    columns: dict[str, Column] = {"age": TABLE["age"]}
    store, path = Datasets(server, columns), tmp_path / "rows.csv"
    path.write_text("age\n" + "1\n" * 11)
    with pytest.raises(cloister.RowsNotFit, match="capacity"):
        upload(server, path, columns, nominal_size=5, capacity=10)
    assert store.parts == {} and store.status == "uploading"


def test_an_interrupted_upload_is_taken_up_where_the_server_stands(server: Server, pauses: list[float]) -> None:
    store, data = Datasets(server, COLUMNS), digits(3 * SIZE)
    second = f"/v1/datasets/{DATASET}/parts/1"
    server.on(second, httpx2.ConnectError("cut"))
    with pytest.raises(cloister.ConnectionFailed):
        upload(server, data)
    assert sorted(store.parts) == [0]
    server.on(second, store.part)
    assert upload(server, data).status == "ready"
    assert np.array_equal(store.rows("scan"), data["scan"])


@pytest.mark.parametrize(
    "changed",
    [
        {"nominal_size": 499},
        {"capacity": 1001},
        {"source": "src_" + "9" * 32},
        {"columns": {"digit": COLUMNS["digit"]}},
    ],
)
def test_a_dataset_of_another_declaration_is_not_taken_up(server: Server, changed: dict[str, Any]) -> None:
    store = Datasets(server, COLUMNS)
    upload(server, digits(1))
    store.status = "uploading"
    given = {"source": SOURCE, "columns": COLUMNS, **PUBLIC, **changed}
    data = {name: column for name, column in digits(2).items() if name in given["columns"]}
    with server.client() as client, pytest.raises(cloister.Conflict, match="already there"):
        client.datasets.upload("d", data, **given)


def test_a_complete_dataset_takes_no_more_rows(server: Server) -> None:
    Datasets(server, COLUMNS)
    upload(server, digits(1))
    with pytest.raises(cloister.Conflict, match="already there"):
        upload(server, digits(1))


def test_a_row_that_the_server_refuses_is_named_by_its_place_in_the_data(server: Server) -> None:
    Datasets(server, COLUMNS)
    bad = refusal(422, "rows_refused", "column 'scan' row 2: holds NaN", column="scan", row=2, problem="holds NaN")
    server.on(f"/v1/datasets/{DATASET}/parts/1", bad)
    with pytest.raises(cloister.RowsRefused) as told:
        upload(server, digits(2 * SIZE))
    assert (told.value.column, told.value.row) == ("scan", SIZE + 2)
    assert f"row {SIZE + 2} of the data" in str(told.value)
