"""Uploads: any source of rows becomes the same parts, in bounded memory; what does not fit is refused by column and row."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
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
    "note": cloister.Text(max_length=8),
    "who": cloister.Unit(),
}
PUBLIC = {"nominal_size": 500, "capacity": 1000}


class Datasets:
    """The dataset routes of a server: keeps parts, never overwrites one, closes."""

    def __init__(self, server: Server, columns: dict[str, Column]) -> None:
        self.server, self.columns, self.declared, self.status = server, columns, {}, ""
        self.parts: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
        self.contents: dict[int, bytes] = {}
        self.tells_content = True
        server.on(f"/v1/datasets/{DATASET}", self.delete)
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
            told = {"same_content": self.contents[number] == request.content} if self.tells_content else {}
            return refusal(409, "conflict", "stored already", part_exists=True, **told)
        self.parts[number] = decode_rows(self.columns, request.content)
        self.contents[number] = request.content
        return {"part": number, "rows": len(next(iter(self.parts[number].values())))}

    def delete(self, request: httpx2.Request) -> Any:
        assert request.method == "DELETE"
        self.declared, self.status = {}, ""
        self.parts.clear()
        return httpx2.Response(204)

    def complete(self, request: httpx2.Request) -> Any:
        self.status = "ready"
        return self.view(request)

    def rows(self, column: str) -> np.ndarray[Any, Any]:
        return np.concatenate([self.parts[number][column] for number in sorted(self.parts)])


def upload(server: Server, data: RowData, columns: dict[str, Column] = COLUMNS, **changed: Any) -> cloister.Dataset:
    with server.client() as client:
        return client.datasets.upload("d", data, columns=columns, **{"source": SOURCE, **PUBLIC, **changed})


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
    columns: dict[str, Column] = {"note": cloister.Text(max_length=2**17)}
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
    path, columns = tmp_path / "rows.csv", {"note": cloister.Text(max_length=2**17)}
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
    assert not store.declared and server.asked == []


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
    assert str(told.value).startswith(f"row {SIZE + 2} of the data, column 'scan': holds NaN; correct the rows")
    assert "row 2:" not in str(told.value) and "req-12345678" in str(told.value)


def spoiled(**wrong: Any) -> dict[str, Any]:
    return {**digits(SIZE + 5), **wrong}


def at_the_end(name: str, value: Any) -> dict[str, Any]:
    """Rows of which only the very last does not fit."""
    data = digits(SIZE + 5)
    data[name][-1] = value
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("nope.csv", "nope.csv cannot be opened: No such file"),
        (Path("nope.csv.gz"), "nope.csv.gz cannot be opened: No such file"),
        (spoiled(scan="nope.npy"), "column 'scan': nope.npy cannot be opened: No such file"),
        ({"scan": digits(1)["scan"]}, "missing: digit"),
        (spoiled(more=[1]), "not declared: more; ignore_undeclared=True leaves those out"),
        (spoiled(scan=np.zeros((SIZE + 5, 8, 8))), "shape"),
        (spoiled(scan=np.zeros(SIZE + 5, "M8[s]")), "column 'scan'"),
        (spoiled(scan=np.float32(3)), "column 'scan' is no array of rows"),
        (spoiled(digit=3), "column 'digit' is no array of rows"),
        (spoiled(digit=np.zeros(3, int)), "different lengths"),
        (spoiled(digit=np.full(SIZE + 5, "x")), "column 'digit' row 0: 'x' is not one of the declared categories: 0, 1"),
        (at_the_end("digit", 10), f"column 'digit' row {SIZE + 4}: 10 is not"),
        (at_the_end("scan", np.nan), f"column 'scan' row {SIZE + 4}: holds a value that is not finite"),
        (at_the_end("scan", 1.5), f"column 'scan' row {SIZE + 4}: holds a value outside the declared bounds"),
    ],
    ids=[
        "no file", "no packed file", "no npy", "no column", "one column more", "shape", "dtype", "one tensor", "one value",
        "lengths", "text", "index", "nan", "bounds",
    ],
)  # fmt: skip
def test_whatever_can_be_checked_here_is_checked_before_anything_is_created(
    server: Server, data: Any, words: str
) -> None:
    store = Datasets(server, COLUMNS if isinstance(data, dict) else TABLE)
    with pytest.raises(cloister.RowsNotFit, match=words):
        upload(server, data, store.columns)
    assert server.asked == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("age,region,note\n1,north,a\n", "missing: who"),
        ("age;region;note;who\n1;north;a;x\n", "separates its columns by semicolons"),
        ("age,region,note,who\n" + "1,north,a,x\n" * 70_000 + "1,west,a,x\n", "row 70000: 'west' is not one"),
        ("age,region,note,who\n" + "1,north,a,x\n" * 70_000 + "121,north,a,x\n", "column 'age' row 70000: .*bounds"),
    ],
)
def test_all_rows_of_a_csv_are_checked_before_anything_is_created(
    server: Server, tmp_path: Path, text: str, words: str
) -> None:
    Datasets(server, TABLE)
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(cloister.RowsNotFit, match=words):
        upload(server, tmp_path / "rows.csv", TABLE, capacity=100_000)
    assert server.asked == []


def test_the_async_client_checks_first_too(server: Server) -> None:
    Datasets(server, COLUMNS)

    async def journey() -> None:
        async with server.async_client() as client:
            await client.datasets.upload("d", at_the_end("digit", 10), source=SOURCE, columns=COLUMNS, **PUBLIC)

    with pytest.raises(cloister.RowsNotFit, match=f"row {SIZE + 4}"):
        asyncio.run(journey())
    assert server.asked == []


@pytest.mark.parametrize(
    "data", [[{"scan": 1}], io.StringIO("scan,digit"), None, 3], ids=["list", "file", "none", "int"]
)
def test_what_is_no_source_of_rows_is_refused_by_its_type(server: Server, data: Any) -> None:
    with pytest.raises(cloister.InvalidArgument, match=f"data is a {type(data).__name__}; give a dict"):
        upload(server, data)
    assert server.asked == []


def test_an_upload_goes_under_a_source_by_its_name(server: Server) -> None:
    store = Datasets(server, COLUMNS)
    budget = {"epsilon": 1, "delta": 1e-5, "spent": 0, "left": 1, "revision": 0}
    told = {"id": SOURCE, "name": "people", "unit": "row", "adjacency": "add_remove", "public": False}
    server.on("/v1/sources/people", {**told, "budget": budget, "created": "2026-01-01T00:00:00Z"})
    assert upload(server, digits(3), source="people").status == "ready"
    assert store.declared["source"] == SOURCE
    with pytest.raises(cloister.InvalidArgument, match="neither a name"):
        upload(server, digits(3), source="the people")
    with pytest.raises(cloister.NotFound):
        upload(server, digits(3), source="nobody")


def test_rows_that_differ_from_an_earlier_upload_s_are_refused_and_never_mixed(
    server: Server, pauses: list[float]
) -> None:
    store, second = Datasets(server, COLUMNS), f"/v1/datasets/{DATASET}/parts/1"
    server.on(second, httpx2.ConnectError("cut"))
    with pytest.raises(cloister.ConnectionFailed):
        upload(server, digits(SIZE + 1))
    server.on(second, store.part)
    other = spoiled(scan=np.zeros((SIZE + 5, 64, 64), np.float32))
    with pytest.raises(cloister.UploadDiffers, match=r"client\.datasets\.delete\('d'\), then upload again") as told:
        upload(server, other)
    assert isinstance(told.value, cloister.Conflict) and told.value.request_id == "req-12345678"
    assert sorted(store.parts) == [0], "nothing more was sent"
    with server.client() as client:
        assert client.datasets.delete("d") is None  # type: ignore[func-returns-value]  (that is the test)
    assert upload(server, other).status == "ready"
    assert np.array_equal(store.rows("scan"), other["scan"])


def test_a_server_that_does_not_compare_is_believed(server: Server, pauses: list[float]) -> None:
    store, second = Datasets(server, COLUMNS), f"/v1/datasets/{DATASET}/parts/1"
    store.tells_content = False
    server.on(second, httpx2.ConnectError("cut"))
    with pytest.raises(cloister.ConnectionFailed):
        upload(server, digits(SIZE + 1))
    server.on(second, store.part)
    assert upload(server, digits(SIZE + 1)).status == "ready"


def test_a_dataset_is_deleted_by_name_id_or_itself(server: Server) -> None:
    Datasets(server, COLUMNS)
    there = upload(server, digits(1))
    server.on(f"/v1/datasets/{DATASET}", lambda _: httpx2.Response(204))

    async def journey() -> None:
        async with server.async_client() as client:
            await client.datasets.delete("d")

    with server.client() as client:
        for given in ("d", DATASET, there):
            client.datasets.delete(given)
    asyncio.run(journey())
    sent = [request for request in server.asked if request.method == "DELETE"]
    assert len(sent) == 4 and {request.url.path for request in sent} == {f"/v1/datasets/{DATASET}"}
    assert all(request.headers["idempotency-key"] for request in sent)


def test_an_unfinished_upload_of_another_declaration_says_what_differs_and_how_to_be_rid_of_it(server: Server) -> None:
    store = Datasets(server, COLUMNS)
    upload(server, digits(1))
    store.status = "uploading"
    with pytest.raises(cloister.Conflict, match=r"already there.*\(capacity, .*client\.datasets\.delete\('d'\)"):
        upload(server, digits(1), capacity=2000)


def test_undeclared_columns_are_left_out_where_that_is_said(server: Server, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("more,who,note,region,age,more\n1,x,a,north,1.5,3\n2,7,b,south,2,4\n")
    store = Datasets(server, TABLE)
    upload(server, tmp_path / "rows.csv", TABLE, ignore_undeclared=True)
    assert store.rows("age").tolist() == [1.5, 2]
    (read,) = windows(TABLE, {**table(), "more": object()}, ignore_undeclared=True)
    assert read["age"].tolist() == [1.5, 2]
    with pytest.raises(cloister.RowsNotFit, match="missing: Age"):
        list(windows({"Age": TABLE["age"]}, tmp_path / "rows.csv", ignore_undeclared=True))


def test_blanks_around_values_are_no_part_of_them_but_in_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('age , region, note, who\n 30 , north , "  a ", x \n 4,south,"b, c",7\n')
    (read,) = windows(TABLE, tmp_path / "rows.csv")
    (expected,) = windows(TABLE, table(age=[30, 4], note=["  a ", "b, c"]))
    assert all(np.array_equal(read[name], expected[name]) for name in expected)


def test_categories_declared_with_their_blanks_are_found_too(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("work\n State-gov\n Private\n")
    (read,) = windows({"work": cloister.Category(values=(" Private", " State-gov"))}, tmp_path / "rows.csv")
    assert read["work"].tolist() == [1, 0]
    with pytest.raises(cloister.RowsNotFit, match="blanks alone"):
        list(windows({"work": cloister.Category(values=("a", " a"))}, tmp_path / "rows.csv"))


def test_a_census_file_loads_as_it_is_published(server: Server, tmp_path: Path) -> None:
    """Adult (UCI): a blank after every comma, '?' for what is unknown, a blank line at the end."""
    (tmp_path / "adult.csv.gz").write_bytes(gzip.compress(ADULT.encode()))
    columns: dict[str, Column] = {
        "age": cloister.Number(low=17, high=90),
        "workclass": cloister.Category(values=("?", "Private", "Self-emp-not-inc", "State-gov")),
        "education-num": cloister.Number(low=1, high=16),
        "classification": cloister.Category(values=("<=50K", ">50K")),
    }
    store = Datasets(server, columns)
    assert upload(server, tmp_path / "adult.csv.gz", columns, ignore_undeclared=True).status == "ready"
    assert store.rows("age").tolist() == [39, 50, 52] and store.rows("workclass").tolist() == [3, 2, 0]
    assert store.rows("classification").tolist() == [0, 0, 1]


ADULT = """\
age, workclass, fnlwgt, education, education-num, native-country, classification
39, State-gov, 77516, Bachelors, 13, United-States, <=50K
50, Self-emp-not-inc, 83311, Bachelors, 13, United-States, <=50K
52, ?, 287927, HS-grad, 9, United-States, >50K

"""
