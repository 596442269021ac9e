"""A user belongs to one source of a tenant and to one block of it, told by an HMAC; the uploader alone hears of a refusal."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, local
from typing import Any

import numpy as np
import pytest
from httpx2 import Response
from pydantic import TypeAdapter
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from asked import asked_reading, asked_writing
from cloister.wire.columns import Schema
from cloister.wire.rows import encode_rows
from cloister_server import grants, keys, tenants, units, vault
from cloister_server.errors import TenantKeyRefused
from cloister_server.service import Service
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import (
    AuditRow,
    Block,
    Dataset,
    IdempotencyKey,
    Part,
    SealedObject,
    Table,
    TenantKey,
    Unit,
)

COLUMNS: dict[str, Any] = {"age": {"type": "number", "low": 0.0, "high": 120.0}, "who": {"type": "unit"}}
PART_ROWS = 58_254
"""What a part of these columns takes."""

ANNA, BERT, CARL = "anna@example.org", "bert@example.org", "carl@example.org"


class Uploader:
    """One client's requests, as raw as they go over the wire."""

    def __init__(self, http: TestClient, bearer: dict[str, str]) -> None:
        self.http, self.bearer = http, bearer

    def ask(self, method: str, path: str, *, key: str = "", **more: Any) -> Response:
        headers = {**self.bearer, **({"Idempotency-Key": key} if key else {}), **more.pop("headers", {})}
        return self.http.request(method, f"/v1{path}", headers={**headers, "X-Request-Id": "request-of-a-test"}, **more)

    def source(self, name: str, *, unit: str = "user") -> str:
        answer = self.ask("POST", "/sources", json={"name": name, "unit": unit, "epsilon": 3, "delta": 1e-5})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def declare(self, source: str, name: str, *, rows: int = 2 * PART_ROWS, columns: dict[str, Any] = COLUMNS) -> str:
        is_of_users = any(column["type"] == "unit" for column in columns.values())
        size = {"nominal_size": 64, "capacity": 100, **({"capacity_rows": rows} if is_of_users else {})}
        answer = self.ask("POST", "/datasets", json={"source": source, "name": name, "columns": columns, **size})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def put(
        self,
        dataset: str,
        users: Sequence[str | bytes],
        *,
        number: int = 0,
        columns: dict[str, Any] = COLUMNS,
        **more: Any,
    ) -> Response:
        body = encode_rows(TypeAdapter(Schema).validate_python(columns), rows_of(users, columns))
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = {"Content-Digest": f"sha-256=:{digest}:"}
        return self.ask("PUT", f"/datasets/{dataset}/parts/{number}", content=body, headers=headers, **more)


def rows_of(users: Sequence[str | bytes], columns: dict[str, Any] = COLUMNS) -> dict[str, Any]:
    """Rows of these users, one each."""
    rows: dict[str, Any] = {}
    for name, column in columns.items():
        if column["type"] == "number":
            rows[name] = np.full(len(users), 30, np.float32)
            continue
        ids = [user.encode() if isinstance(user, str) else user for user in users]
        padded = b"".join(each.ljust(64, b"\0") for each in ids)
        rows[name] = np.frombuffer(padded, np.uint8).reshape(len(ids), 64)
        rows[f"{name}.length"] = np.array([len(each) for each in ids], np.int32)
    return rows


@pytest.fixture
def uploader(http: TestClient, bearer: dict[str, str]) -> Uploader:
    return Uploader(http, bearer)


def count(service: Service, table: type[Any], *where: Any) -> int:
    with reading(service.engine) as session:
        return int(session.scalar(select(func.count()).select_from(table).where(*where)) or 0)


def everything(service: Service) -> dict[str, list[Any]]:
    """Every row of every table, and the name of every blob."""
    with reading(service.engine) as session:
        tables = {table.name: session.execute(select(table)).all() for table in Table.metadata.sorted_tables}
    files = sorted(path.name for path in (service.settings.data_dir / "objects").rglob("*") if path.is_file())
    return {name: sorted(map(tuple, rows), key=repr) for name, rows in tables.items()} | {"blobs": files}


def told(service: Service) -> tuple[str, str, str]:
    """The newest row of the audit log: its verb, resource and outcome."""
    with reading(service.engine) as session:
        row = session.scalars(select(AuditRow).order_by(AuditRow.time.desc()).limit(1)).one()
        return row.verb, row.resource_id, row.outcome


def in_another_block(service: Service, dataset: str, source: str) -> None:
    """Move a dataset to block 1 of its source, which is made where it is not there."""
    with writing(service.engine) as session:
        tenant_id = session.scalars(select(Dataset.tenant_id).where(Dataset.id == dataset)).one()
        if session.get(Block, (tenant_id, source, 1)) is None:
            session.add(Block(tenant_id=tenant_id, source_id=source, number=1, name="second"))
        session.execute(update(Dataset).where(Dataset.id == dataset).values(block=1))


def refused(answer: Response, *, row: int) -> str:
    """What the refusal of a row says."""
    told = answer.json()
    assert (answer.status_code, told["code"]) == (422, "rows_refused"), answer.text
    assert (told["details"]["column"], told["details"]["row"]) == ("who", row)
    return str(told["error"])


def test_a_user_of_one_source_is_refused_in_another(uploader: Uploader) -> None:
    patients, staff = uploader.source("patients"), uploader.source("staff")
    first, second = uploader.declare(patients, "first"), uploader.declare(staff, "second")
    assert uploader.put(first, [ANNA, BERT, ANNA]).status_code == 201
    told = refused(uploader.put(second, [CARL, CARL, BERT, ANNA]), row=2)
    assert "another source" in told and "leave such rows out" in told
    assert patients not in told and "patients" not in told and "first" not in told and BERT not in told
    assert uploader.put(second, [CARL]).status_code == 201


def test_users_of_another_tenant_are_assumed_to_be_others(
    uploader: Uploader,
    http: TestClient,
    make_client: Callable[..., Any],
    bearer_of: Callable[[Any], dict[str, str]],
    service: Service,
) -> None:
    other = Uploader(http, bearer_of(make_client("other")))
    for each in (uploader, other):
        assert each.put(each.declare(each.source("people"), "d"), [ANNA]).status_code == 201
    with reading(service.engine) as session:
        assert len(set(session.scalars(select(Unit.mac)))) == 2, "of one id two tenants keep different MACs"


@pytest.mark.parametrize("first_is_later", [False, True])
def test_a_user_of_one_block_is_refused_in_another_of_the_source(
    uploader: Uploader, service: Service, first_is_later: bool
) -> None:
    source = uploader.source("people")
    first, second = uploader.declare(source, "first"), uploader.declare(source, "second")
    in_another_block(service, first if first_is_later else second, source)
    assert uploader.put(first, [ANNA]).status_code == 201
    assert "another block of this source" in refused(uploader.put(second, [CARL, ANNA]), row=1)
    assert uploader.put(second, [CARL]).status_code == 201


def test_a_copy_in_the_same_source_and_block_is_taken_and_changes_nothing(uploader: Uploader, service: Service) -> None:
    source, other = uploader.source("people"), uploader.source("others")
    for name in ("first", "renamed"):
        assert uploader.put(uploader.declare(source, name), [ANNA, BERT]).status_code == 201
    with reading(service.engine) as session:
        places = session.execute(select(Unit.source_id, Unit.block).distinct()).all()
    assert [tuple(place) for place in places] == [(source, 0)]
    refused(uploader.put(uploader.declare(other, "third"), [BERT]), row=0)


def test_a_user_may_come_in_several_parts_and_rows_of_a_dataset(uploader: Uploader, service: Service) -> None:
    dataset = uploader.declare(uploader.source("people"), "d")
    assert uploader.put(dataset, [ANNA, BERT, ANNA]).status_code == 201
    assert uploader.put(dataset, [BERT, CARL], number=1).status_code == 201
    assert count(service, Unit) == 3


def test_neither_the_column_nor_its_padding_hides_a_user(uploader: Uploader, service: Service, steward: Any) -> None:
    one, other = uploader.source("one"), uploader.source("other")
    renamed = {"patient": {"type": "unit"}, "age": COLUMNS["age"]}
    assert uploader.put(uploader.declare(one, "first"), [ANNA]).status_code == 201
    second = uploader.declare(other, "second", columns=renamed)
    told = uploader.put(second, [BERT, ANNA], columns=renamed).json()
    assert (told["code"], told["details"]["column"], told["details"]["row"]) == ("rows_refused", "patient", 1)
    for width in (16, 40, 64):  # however wide the column is, and whatever lies behind an id
        ids = np.full((1, width), 7, np.uint8)
        ids[0, : len(ANNA)] = np.frombuffer(ANNA.encode(), np.uint8)
        with asked_writing(service) as session:
            dataset = session.scalars(select(Dataset).where(Dataset.name == "first")).one()
            units.register(
                session,
                steward.principal,
                dataset,
                {"who": ids, "who.length": np.array([len(ANNA)], np.int32)},
            )
    assert count(service, Unit) == 1


def test_ids_that_zero_bytes_end_are_users_of_their_own(uploader: Uploader, service: Service) -> None:
    one, other = uploader.source("one"), uploader.source("other")
    assert uploader.put(uploader.declare(one, "first"), [b"a", b"a\0"]).status_code == 201
    second = uploader.declare(other, "second")
    assert uploader.put(second, [b"a\0\0", b"A"]).status_code == 201
    assert count(service, Unit) == 4
    refused(uploader.put(second, [b"a\0\0\0", b"a\0"], number=1), row=1)


def test_a_refused_part_leaves_nothing(uploader: Uploader, service: Service) -> None:
    one, other = uploader.source("one"), uploader.source("other")
    first, second = uploader.declare(one, "first"), uploader.declare(other, "second")
    assert uploader.put(first, [ANNA]).status_code == 201
    before = everything(service)
    refused(uploader.put(second, [BERT, ANNA], key="part-of-a-test"), row=1)
    after = everything(service)
    assert {name for name in after if after[name] != before[name]} == {"audit", "links"}
    assert told(service) == ("dataset.upload", second, "allowed: not done")
    assert uploader.put(second, [BERT], key="part-of-a-test").status_code == 201


def test_of_many_users_the_first_refused_row_is_named(uploader: Uploader) -> None:
    one, other = uploader.source("one"), uploader.source("other")
    many = [f"user-{number}" for number in range(1700)]
    assert uploader.put(uploader.declare(one, "first"), many).status_code == 201
    strangers = [f"stranger-{number}" for number in range(1300)]
    refused(uploader.put(uploader.declare(other, "second"), [*strangers, *reversed(many)]), row=1300)


def test_an_upload_that_is_deleted_frees_its_users_unless_another_holds_them(
    uploader: Uploader, service: Service
) -> None:
    one, other = uploader.source("one"), uploader.source("other")
    kept, deleted, later = (
        uploader.declare(one, "kept"),
        uploader.declare(one, "gone"),
        uploader.declare(other, "later"),
    )
    assert uploader.put(kept, [ANNA]).status_code == uploader.put(deleted, [ANNA, BERT]).status_code == 201
    refused(uploader.put(later, [BERT]), row=0)
    assert uploader.ask("DELETE", f"/datasets/{deleted}").status_code == 200
    assert count(service, Unit, Unit.dataset_id == deleted) == 0 and count(service, Unit) == 1
    refused(uploader.put(later, [BERT, ANNA]), row=1)
    assert uploader.put(later, [BERT]).status_code == 201


def test_rows_that_are_units_of_their_own_register_nothing(uploader: Uploader, service: Service) -> None:
    columns = {"age": COLUMNS["age"]}
    for name in ("one", "other"):
        dataset = uploader.declare(uploader.source(name, unit="row"), f"d-{name}", columns=columns)
        assert uploader.put(dataset, [ANNA], columns=columns).status_code == 201
    assert count(service, Unit) == count(service, SealedObject, SealedObject.kind == "units") == 0


def test_empty_parts_register_nobody(uploader: Uploader, service: Service) -> None:
    dataset = uploader.declare(uploader.source("people"), "d")
    assert uploader.put(dataset, [ANNA]).status_code == 201
    assert uploader.ask("POST", f"/datasets/{dataset}/complete").status_code == 200
    assert count(service, Part) == 2 and count(service, Unit) == 1


def test_of_one_user_in_two_sources_at_the_same_moment_one_is_taken(
    uploader: Uploader, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [uploader.declare(uploader.source(name), f"d-{name}") for name in ("one", "other")]
    assert uploader.put(datasets[0], [BERT], number=1).status_code == 201  # for their key, which a first upload makes
    if service.engine.dialect.name == "postgresql":  # on SQLite one transaction writes at a time
        both, insert = Barrier(2, timeout=120), units._insert
        monkeypatch.setattr(units, "_insert", lambda *given: (insert(*given), both.wait()))
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda dataset: uploader.put(dataset, [CARL, ANNA]), datasets))
    assert sorted(answer.status_code for answer in answers) == [201, 422]
    refused(next(answer for answer in answers if answer.status_code == 422), row=0)
    assert count(service, Unit) == 3 and count(service, Part) == 2


def test_first_uploads_at_the_same_moment_make_one_key(
    uploader: Uploader, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = uploader.source("people")
    datasets = [uploader.declare(source, f"d{number}") for number in range(3)]
    if service.engine.dialect.name == "postgresql":
        together, key, mine = Barrier(3, timeout=120), vault.units_key, local()

        def units_key(*given: Any, **of: Any) -> Any:
            mine.calls = getattr(mine, "calls", 0) + 1
            if mine.calls == 2:  # the provider has made a key for each of them by now
                together.wait()
            return key(*given, **of)

        monkeypatch.setattr(vault, "units_key", units_key)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda dataset: uploader.put(dataset, [ANNA]), datasets))
    assert {answer.status_code for answer in answers} == {201}
    assert count(service, SealedObject, SealedObject.kind == "units") == 1
    with reading(service.engine) as session:
        assert len(set(session.scalars(select(Unit.mac)))) == 1 and count(service, Unit) == 3


def test_parts_with_the_same_users_at_the_same_moment_wait_in_no_circle(uploader: Uploader, service: Service) -> None:
    dataset = uploader.declare(uploader.source("people"), "d", rows=6 * PART_ROWS)
    users = [f"user-{number}" for number in range(600)]
    with ThreadPoolExecutor(6) as pool:
        sent = [pool.submit(uploader.put, dataset, users[:: (-1) ** number], number=number) for number in range(6)]
    assert {each.result().status_code for each in sent} == {201}
    assert count(service, Unit) == 600


def test_nothing_of_an_id_is_in_the_database_or_on_the_disk(uploader: Uploader, service: Service) -> None:
    dataset = uploader.declare(uploader.source("people"), "d")
    assert uploader.put(dataset, [ANNA], key="part-of-a-test").status_code == 201
    assert count(service, IdempotencyKey) == count(service, Unit) == 1
    with reading(service.engine) as session:
        values = [
            value for table in Table.metadata.sorted_tables for row in session.execute(select(table)) for value in row
        ]
    there = b"\n".join(value if isinstance(value, bytes) else str(value).encode() for value in values)
    there += b"".join(path.read_bytes() for path in files(service))
    assert dataset.encode() in there
    for form in (ANNA.encode(), ANNA.encode().ljust(64, b"\0")):
        digests = [hashlib.new(name, form).digest() for name in ("sha256", "sha512", "blake2b", "md5")]
        for secret in (form, *digests):
            for spelled in (secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret)):
                assert spelled.rstrip(b"=") not in there


def files(service: Service) -> list[Path]:
    """Whatever the deployment has on the disk, SQLite's files included."""
    return [path for path in service.settings.data_dir.rglob("*") if path.is_file()]


def test_a_mac_is_hmac_sha256_under_a_key_derived_from_the_tenants_units_key(
    uploader: Uploader, service: Service
) -> None:
    dataset = uploader.declare(uploader.source("people"), "d")
    assert uploader.put(dataset, [ANNA]).status_code == 201
    with asked_reading(service) as session:
        unit = session.scalars(select(Unit)).one()
        key = vault.data_key(session, tenant_id=unit.tenant_id, object_id="units")
        again = vault.unit_macs(session, [ANNA.encode()], tenant_id=unit.tenant_id)
    context = b"".join(len(field).to_bytes(2) + field for field in (unit.tenant_id.encode(), b"units", b"units"))
    extracted = hmac.digest(bytes(64), key.secret, "sha512")  # RFC 5869, no salt
    derived = hmac.digest(extracted, b"cloister.units/1\n" + context + b"\x01", "sha512")[:32]
    assert unit.mac == hmac.digest(derived, ANNA.encode(), "sha256") == again[0]
    assert key.secret.hex() not in repr(key) and unit.mac != hmac.digest(key.secret, ANNA.encode(), "sha256")


def test_users_are_known_after_the_tenants_key_is_rotated_and_never_once_it_is_destroyed(
    uploader: Uploader, service: Service
) -> None:
    one, other = uploader.source("one"), uploader.source("other")
    first, second = uploader.declare(one, "first"), uploader.declare(other, "second")
    assert uploader.put(first, [ANNA]).status_code == 201
    old, new = rotate(service)
    service.keys.of("local").destroy_key(old)
    refused(uploader.put(second, [ANNA]), row=0)
    service.keys.of("local").destroy_key(new)
    with asked_reading(service) as session, pytest.raises(TenantKeyRefused):
        vault.unit_macs(session, [ANNA.encode()], tenant_id=session.scalars(select(Unit.tenant_id)).one())


def rotate(service: Service) -> tuple[str, str]:
    """Give the tenant a second key, and wrap the units' key anew under it."""
    with reading(service.engine) as session:
        tenant_id = session.scalars(select(SealedObject.tenant_id).where(SealedObject.kind == "units")).one()
        old = session.get_one(TenantKey, (tenant_id, 1)).key_id
    keys.rotate(service, tenant_id, request_id="request-of-a-test")
    with reading(service.engine) as session:
        return old, session.get_one(TenantKey, (tenant_id, 2)).key_id


def test_whoever_uploads_is_told_the_same_whether_they_may_see_the_other_source_or_not(
    uploader: Uploader,
    http: TestClient,
    service: Service,
    make_client: Callable[..., Any],
    bearer_of: Callable[[Any], dict[str, str]],
) -> None:
    first, second = (uploader.declare(uploader.source(name), f"d-{name}") for name in ("one", "other"))
    assert uploader.put(first, [ANNA]).status_code == 201
    guest = make_client(role="none")
    with asked_writing(service) as session:
        operator = tenants.operator_of(tenants.find_tenant(session, "acme"), request_id="request-of-a-test")
        grants.add(session, operator, to=guest.id, verb="dataset.upload", resource_id=second)
    answers = []
    for each in (uploader, Uploader(http, bearer_of(guest))):
        answers.append(each.put(second, [ANNA]))
        assert told(service) == ("dataset.upload", second, "allowed: not done")
    refused(answers[1], row=0)
    assert answers[0].content == answers[1].content
