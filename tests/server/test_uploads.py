"""Uploads that were cut short: gone on with if they hold the same, told apart if not, deleted with all that they left."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx2 import Response
from pydantic import SecretStr, TypeAdapter
from sqlalchemy import Engine, func, select, update
from starlette.testclient import TestClient

from asked import asked_writing
from cloister.wire.columns import Schema
from cloister.wire.rows import encode_rows
from cloister_privacy.sealing import LocalKeyProvider
from cloister_server import audit, grants, tenants, vault
from cloister_server.errors import Unavailable
from cloister_server.keyring import KeyRing
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store.blobs import Blobs
from cloister_server.store.key_record import KeyRecord
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, Dataset, Grant, IdempotencyKey, Part, SealedObject

COLUMNS: dict[str, Any] = {"x": {"type": "tensor", "shape": [16384], "low": 0.0, "high": 1.0}}
"""64 KiB a row: 64 rows a part."""
SCHEMA = TypeAdapter(Schema).validate_python(COLUMNS)


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> Service:
    """A deployment on either database."""
    keys = LocalKeyProvider.create(tmp_path / "keystore", key_file=tmp_path / "root.key")
    given = {"kind": "local", "directory": tmp_path / "keystore", "root_key": keys.root_key}
    ring = KeyRing("local", {"local": given}, record=KeyRecord(tmp_path / "record"))
    with asked_writing(None, engine=engine, keys=ring) as session:
        vault.new_tenant_key(session, provider="local", tenant_id=vault.SYSTEM)
        session.flush()
        for purpose in ("token", "certificate", "pepper"):
            vault.new_signing_key(session, purpose)  # type: ignore[arg-type]  # mypy widens the tuple to str
    url = SecretStr(engine.url.render_as_string(hide_password=False))
    settings = Settings(data_dir=tmp_path / "data", key_dir=tmp_path / "keystore", database_url=url)
    return Service(settings, engine, ring, Blobs.open_at(settings))


class Uploader:
    """One client's requests, as raw as they go over the wire."""

    def __init__(self, http: TestClient, bearer: dict[str, str]) -> None:
        self.http, self.bearer, self.source = http, bearer, ""

    def ask(self, method: str, path: str, *, key: str = "", **more: Any) -> Response:
        headers = {**self.bearer, **({"Idempotency-Key": key} if key else {}), **more.pop("headers", {})}
        return self.http.request(method, f"/v1{path}", headers={**headers, "X-Request-Id": "request-of-a-test"}, **more)

    def declare(self, name: str = "scans", *, capacity: int = 150) -> str:
        body = {"source": self.source, "name": name, "columns": COLUMNS, "nominal_size": 64, "capacity": capacity}
        answer = self.ask("POST", "/datasets", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def put(self, dataset: str, number: int, value: float, *, rows: int = 2, key: str = "") -> Response:
        body = encode_rows(SCHEMA, {"x": np.full((rows, 16384), value, np.float32)})
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = {"Content-Digest": f"sha-256=:{digest}:"}
        return self.ask("PUT", f"/datasets/{dataset}/parts/{number}", content=body, headers=headers, key=key)


@pytest.fixture
def uploader(http: TestClient, bearer: dict[str, str]) -> Uploader:
    made = Uploader(http, bearer)
    made.source = made.ask("POST", "/sources", json={"name": "people", "epsilon": 3, "delta": 1e-5}).json()["id"]
    return made


@pytest.fixture
def other(http: TestClient, make_client: Callable[..., Any], bearer_of: Callable[[Any], dict[str, str]]) -> Uploader:
    """Another client of the same tenant, that may upload to every dataset of it."""
    return Uploader(http, bearer_of(make_client()))


def count(service: Service, table: type[Any], *where: Any) -> int:
    with reading(service.engine) as session:
        return int(session.scalar(select(func.count()).select_from(table).where(*where)) or 0)


def blobs(service: Service) -> list[Path]:
    return sorted(path for path in (service.settings.data_dir / "objects").rglob("*") if path.is_file())


def test_a_part_that_is_there_is_told_apart_from_other_content(uploader: Uploader, service: Service) -> None:
    dataset = uploader.declare()
    assert uploader.put(dataset, 0, 0.5).status_code == 201
    for value, rows, is_same in ((0.5, 2, True), (0.25, 2, False), (0.5, 3, False)):
        again = uploader.put(dataset, 0, value, rows=rows)
        assert again.status_code == 409 and again.json()["code"] == "conflict"
        assert again.json()["details"] == {"part_exists": True, "same_content": is_same}
        assert ("delete the dataset" in again.json()["error"]) == (not is_same)
    assert count(service, Part) == 1


def test_rows_of_nothing_but_zeros_are_not_an_empty_slot(uploader: Uploader) -> None:
    dataset = uploader.declare()
    uploader.put(dataset, 0, 0.0, rows=1)
    assert uploader.put(dataset, 0, 0.0, rows=2).json()["details"]["same_content"] is False


def test_nobody_but_the_uploader_is_told_whether_content_is_the_same(uploader: Uploader, other: Uploader) -> None:
    dataset = uploader.declare()
    uploader.put(dataset, 0, 0.5)
    same, different = other.put(dataset, 0, 0.5), other.put(dataset, 0, 0.25)
    assert same.status_code == 409 and same.json()["details"] == {}
    assert same.content == different.content


def test_of_a_part_from_before_digests_nobody_is_told(uploader: Uploader, service: Service) -> None:
    dataset = uploader.declare()
    uploader.put(dataset, 0, 0.5)
    with writing(service.engine) as session:
        session.execute(update(Part).values(uploader_id=None, content_mac=None))
    again = uploader.put(dataset, 0, 0.5)
    assert again.status_code == 409 and again.json()["details"] == {}


def test_parts_that_hold_the_same_have_no_digest_in_common(
    uploader: Uploader, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = uploader.declare(capacity=300)  # five parts: two of rows, three empty, all but the last of one size
    sealed: list[bytes] = []
    seal = vault.seal_object
    monkeypatch.setattr(vault, "seal_object", lambda *a, **k: (sealed.append(a[2]), seal(*a, **k))[1])
    for number in (0, 1):
        uploader.put(dataset, number, 0.5)
    assert uploader.ask("POST", f"/datasets/{dataset}/complete").status_code == 200
    assert sealed[0] == sealed[1] and sealed[2] == sealed[3]
    with reading(service.engine) as session:
        macs = list(session.scalars(select(Part.content_mac).order_by(Part.number)))
    assert len(macs) == len(set(macs)) == 5
    assert not {hashlib.sha256(body).digest() for body in sealed} & set(macs)


def test_rows_for_a_part_that_was_filled_as_empty_are_other_content(
    uploader: Uploader, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = uploader.declare()
    uploader.put(dataset, 0, 0.5)
    with monkeypatch.context() as cut:  # the completion dies behind the empty parts that it sealed
        cut.setattr("cloister_server.datasets.complete", _fail)
        assert uploader.ask("POST", f"/datasets/{dataset}/complete").status_code == 503
    assert uploader.put(dataset, 1, 0.5).json()["details"] == {"part_exists": True, "same_content": False}


def _fail(*_: Any, **__: Any) -> Any:
    raise Unavailable("a fault of this test's")


def test_an_upload_that_was_cut_short_is_deleted_with_all_that_it_left(uploader: Uploader, service: Service) -> None:
    dataset = uploader.declare()
    for number in (0, 1):
        assert uploader.put(dataset, number, 0.5, key=f"part-{number}").status_code == 201
    of_parts = IdempotencyKey.route.contains("/parts/")
    assert len(blobs(service)) == 2 and count(service, IdempotencyKey, of_parts) == 2
    deleted = uploader.ask("DELETE", f"/datasets/{dataset}")
    assert deleted.status_code == 200 and (deleted.json()["id"], deleted.json()["status"]) == (dataset, "deleted")
    assert blobs(service) == []
    assert count(service, Dataset) == count(service, Part) == count(service, SealedObject) == 0
    assert count(service, Grant, Grant.resource_id == dataset) == count(service, IdempotencyKey, of_parts) == 0
    assert count(service, AuditRow, AuditRow.verb == "dataset.delete", AuditRow.resource_id == dataset) == 1
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/complete")):
        assert uploader.ask(method, f"/datasets/{dataset}{path}").status_code == 404
    assert uploader.put(dataset, 0, 0.5).status_code == 404


def test_a_name_that_is_free_again_means_the_new_dataset_whatever_the_keys(
    uploader: Uploader, service: Service
) -> None:
    uploader.declare()
    assert uploader.put("scans", 0, 0.5, key="the-same").status_code == 201
    assert uploader.ask("DELETE", "/datasets/scans").status_code == 200
    uploader.declare()
    again = uploader.put("scans", 0, 0.5, key="the-same")
    assert again.status_code == 201 and "idempotency-replayed" not in again.headers
    assert count(service, Part) == 1
    replay = uploader.put("scans", 0, 0.5, key="the-same")
    assert replay.content == again.content and replay.headers["idempotency-replayed"] == "true"
    assert uploader.put("scans", 0, 0.25, key="the-same").json()["code"] == "idempotency_mismatch"


def test_another_upload_of_the_tenant_is_left_alone(uploader: Uploader, service: Service) -> None:
    kept, dataset = uploader.declare("kept"), uploader.declare()
    for each in (kept, dataset):
        uploader.put(each, 0, 0.5, key=f"of-{each}")
    grants_on_kept = count(service, Grant, Grant.resource_id == kept)
    uploader.ask("DELETE", f"/datasets/{dataset}")
    assert count(service, Part) == count(service, SealedObject) == len(blobs(service)) == 1
    assert count(service, Grant, Grant.resource_id == kept) == grants_on_kept > 0
    assert uploader.put(kept, 0, 0.5, key=f"of-{kept}").headers["idempotency-replayed"] == "true"
    assert uploader.ask("POST", f"/datasets/{kept}/complete").status_code == 200


def test_a_deletion_is_answered_once_for_each_key(uploader: Uploader) -> None:
    dataset = uploader.declare()
    first, again = (uploader.ask("DELETE", f"/datasets/{dataset}", key="delete-it") for _ in range(2))
    assert first.status_code == again.status_code == 200 and first.content == again.content
    assert again.headers["idempotency-replayed"] == "true"


def test_a_complete_dataset_is_not_deleted(uploader: Uploader, service: Service) -> None:
    dataset = uploader.declare()
    uploader.put(dataset, 0, 0.5)
    assert uploader.ask("POST", f"/datasets/{dataset}/complete").status_code == 200
    before = blobs(service)
    refused = uploader.ask("DELETE", f"/datasets/{dataset}")
    assert refused.status_code == 409 and refused.json()["code"] == "conflict"
    assert "is complete" in refused.json()["error"]
    assert blobs(service) == before and count(service, Part) == 3
    assert uploader.ask("GET", f"/datasets/{dataset}").json()["status"] == "ready"


def test_only_who_may_upload_may_delete(
    uploader: Uploader,
    service: Service,
    http: TestClient,
    steward: Any,
    make_client: Callable[..., Any],
    bearer_of: Callable[[Any], dict[str, str]],
) -> None:
    dataset = uploader.declare()
    reader, stranger, friend = make_client(role="trainer"), make_client("other"), make_client("other", role="none")
    with asked_writing(service) as session:
        tenant = tenants.find_tenant(session, "acme")
        operator = tenants.operator_of(tenant, request_id="request-of-a-test")
        grants.add(session, operator, to=friend.id, verb="dataset.upload", resource_id=dataset)
    told = {
        each.id: Uploader(http, bearer_of(each)).ask("DELETE", f"/datasets/{dataset}") for each in (reader, stranger)
    }
    assert (told[reader.id].status_code, told[stranger.id].status_code) == (403, 404)
    for each in (reader, stranger):
        denied = (AuditRow.principal_id == each.id, AuditRow.outcome.startswith("denied"))
        assert count(service, AuditRow, *denied) == 1
    assert count(service, Dataset) == 1
    assert Uploader(http, bearer_of(friend)).ask("DELETE", f"/datasets/{dataset}").status_code == 200


def test_a_deletion_that_fails_leaves_every_part_readable(
    uploader: Uploader, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = uploader.declare()
    uploader.put(dataset, 0, 0.5)
    before = blobs(service)
    with monkeypatch.context() as fault:
        fault.setattr(audit, "allowed", _fail)
        assert uploader.ask("DELETE", f"/datasets/{dataset}").status_code == 503
    assert blobs(service) == before and count(service, Part) == count(service, SealedObject) == 1
    assert uploader.put(dataset, 0, 0.5).json()["details"]["same_content"] is True


def test_parts_that_come_while_the_dataset_is_deleted_leave_no_row(uploader: Uploader, service: Service) -> None:
    dataset = uploader.declare(capacity=640)
    with ThreadPoolExecutor(6) as pool:
        parts = [pool.submit(uploader.put, dataset, number, 0.5, rows=1) for number in range(4)]
        deletion = pool.submit(uploader.ask, "DELETE", f"/datasets/{dataset}")
        parts += [pool.submit(uploader.put, dataset, number, 0.5, rows=1) for number in range(4, 10)]
    assert deletion.result().status_code == 200, deletion.result().text
    assert {part.result().status_code for part in parts} <= {201, 404, 503}
    assert count(service, Dataset) == count(service, Part) == count(service, SealedObject) == 0


def test_of_a_deletion_and_a_completion_at_the_same_time_one_wins(uploader: Uploader, service: Service) -> None:
    dataset = uploader.declare()
    uploader.put(dataset, 0, 0.5)
    with ThreadPoolExecutor(2) as pool:
        completion = pool.submit(uploader.ask, "POST", f"/datasets/{dataset}/complete")
        deletion = pool.submit(uploader.ask, "DELETE", f"/datasets/{dataset}")
    told = (completion.result().status_code, deletion.result().status_code)
    if told[1] == 200:
        assert told[0] in (404, 409, 503) and count(service, Dataset) == count(service, SealedObject) == 0
    else:
        assert told == (200, 409) and count(service, Part) == 3
