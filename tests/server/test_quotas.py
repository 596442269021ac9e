"""A tenant's quota: declared datasets count whole, races do not exceed it, and nobody from elsewhere is told a figure."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import save
from sqlalchemy import func, select
from starlette.testclient import TestClient

from accounts import COLUMNS, Person, grant
from asked import asked_writing
from cloister.wire.columns import Schema
from cloister.wire.rows import arrays_of, encode_rows
from cloister.wire.sources import CreateDataset
from cloister.wire.weights import WEIGHTS_TYPE
from cloister_server import datasets, quotas
from cloister_server.errors import Conflict, Invalid
from cloister_server.policy import Denied
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, Dataset, LedgerEntry, SealedObject

WEIGHTS = save({"0.weight": np.zeros((4, 4), np.float32)})


@pytest.fixture
def person(http: TestClient, steward: Any, bearer: dict[str, str]) -> Person:
    return Person(http, steward, bearer)


def allow(service: Service, tenant_id: str, quota_bytes: int | None) -> quotas.Usage:
    with writing(service.engine) as session:
        return quotas.set_quota(session, Principal.operator(tenant_id, request_id="r"), quota_bytes)


def used(service: Service, tenant_id: str) -> int:
    with reading(service.engine) as session:
        return quotas.usage(session, tenant_id).used


def on_disk(service: Service, tenant_id: str) -> int:
    return sum(each.size for page in service.blobs.pages() for each in page if each.tenant_id == tenant_id)


def refused(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 409, answer.text
    body: dict[str, Any] = answer.json()
    assert body["code"] == "quota_exceeded"
    return body


def declaration(source: str, name: str, **more: Any) -> dict[str, Any]:
    return {"source": source, "name": name, "columns": COLUMNS, "nominal_size": 1000, "capacity": 2000, **more}


ALL_COLUMNS: dict[str, Any] = {
    **COLUMNS,
    "an_image_with_a_rather_long_name": {"type": "tensor", "shape": [3, 31, 17], "low": 0, "high": 1},
    "words": {"type": "text", "max_length": 257},
    "sound": {"type": "audio", "max_samples": 1001, "rate": 16000},
}


@pytest.mark.parametrize("columns", [COLUMNS, ALL_COLUMNS], ids=["two columns", "every kind"])
@pytest.mark.parametrize("capacity", [7, 2000])
def test_a_dataset_counts_from_its_declaration_on_what_it_will_take_however_many_rows_come(
    service: Service, person: Person, columns: dict[str, Any], capacity: int
) -> None:
    tenant_id, source = person.client.tenant_id, person.source()
    before = used(service, tenant_id)
    given = declaration(source, "d", columns=columns, nominal_size=5, capacity=capacity)
    dataset = person.told("POST", "/datasets", given)["id"]
    declared = used(service, tenant_id) - before
    assert declared > 0 and on_disk(service, tenant_id) == 0
    schema = TypeAdapter(Schema).validate_python(columns)
    rows = {name: np.zeros((3, *shape), dtype) for name, dtype, shape in arrays_of(schema)}
    with asked_writing(service) as session:
        datasets.add_part(
            session, person.client.principal, service, dataset_id=dataset, number=0, rows=rows
        )  # three rows, of which nobody learns
    assert encode_rows(schema, rows)
    assert used(service, tenant_id) - before == declared
    person.told("POST", f"/datasets/{dataset}/complete")
    assert used(service, tenant_id) - before == declared
    with reading(service.engine) as session:
        parts = session.get_one(Dataset, (tenant_id, dataset)).parts
    assert 0 <= declared - on_disk(service, tenant_id) < 1200 * (parts + 1), "what it takes, and some bytes a part"


def test_what_does_not_fit_is_refused_without_a_figure_and_leaves_nothing(service: Service, person: Person) -> None:
    tenant_id, source = person.client.tenant_id, person.source()
    person.dataset(source, "first")
    one = used(service, tenant_id)
    allow(service, tenant_id, 2 * one - 1)
    body = refused(person.ask("POST", "/datasets", declaration(source, "second")))
    assert body["details"] == {} and not any(digit in body["error"] for digit in "0123456789")
    assert "operator" in body["error"]
    assert used(service, tenant_id) == one
    with reading(service.engine) as session:
        assert session.scalars(select(Dataset.name)).all() == ["first"]
    allow(service, tenant_id, 2 * one)
    second = person.told("POST", "/datasets", declaration(source, "second"))["id"]
    person.told("DELETE", f"/datasets/{second}")
    assert used(service, tenant_id) == one, "what was never completed and is deleted counts no more"
    person.dataset(source, "third")


def test_uploaded_weights_count_and_refused_ones_leave_no_bytes(service: Service, person: Person) -> None:
    tenant_id = person.client.tenant_id

    def upload() -> Any:
        headers = {**person.bearer, "Content-Type": WEIGHTS_TYPE}
        return person.http.post("/v1/weights", content=WEIGHTS, headers=headers)

    assert upload().status_code == 201
    one = used(service, tenant_id)
    assert one == on_disk(service, tenant_id) > len(WEIGHTS)
    allow(service, tenant_id, 2 * one - 1)
    refused(upload())
    assert on_disk(service, tenant_id) == one == used(service, tenant_id)
    allow(service, tenant_id, None)
    assert upload().status_code == 201


def test_a_job_or_a_query_starts_only_within_the_quota_and_what_is_refused_is_not_charged(
    service: Service, person: Person
) -> None:
    tenant_id, source = person.client.tenant_id, person.source()
    dataset = person.dataset(source)
    plan = person.plan(dataset)
    query = {"query": {"dataset": dataset, "epsilon": 0.1, "queries": [{"type": "count"}]}}
    held = on_disk(service, tenant_id)
    allow(service, tenant_id, used(service, tenant_id))
    for answer in (person.start(plan), person.ask("POST", "/queries", query)):
        refused(answer)
    with reading(service.engine) as session:
        assert session.scalar(select(func.count()).select_from(LedgerEntry)) == 0
    assert on_disk(service, tenant_id) == held
    allow(service, tenant_id, used(service, tenant_id) + 100_000)
    person.train(plan)
    assert person.ask("POST", "/queries", query).status_code == 201
    allow(service, tenant_id, 0)
    refused(person.start(plan))


def test_a_grantee_of_another_tenant_is_told_no_figure(
    service: Service, http: TestClient, person: Person, make_client: Callable[..., Any], bearer_of: Callable[..., Any]
) -> None:
    tenant_id, source = person.client.tenant_id, person.source()
    dataset = person.dataset(source)
    grantee = make_client("partner")
    partner = Person(http, grantee, bearer_of(grantee))
    grant(service, tenant_id, grantee, "dataset.train", on=dataset)
    grant(service, tenant_id, grantee, "dataset.create", on=source)
    plan = partner.plan(dataset)
    allow(service, tenant_id, 12_345)
    allow(service, grantee.tenant_id, 54_321)
    for answer in (partner.start(plan), partner.ask("POST", "/datasets", declaration(source, "theirs"))):
        body = refused(answer)
        assert body["details"] == {} and not any(digit in body["error"] for digit in "0123456789")


def test_declarations_at_the_same_moment_never_exceed_the_quota(service: Service, person: Person) -> None:
    tenant_id, source = person.client.tenant_id, person.source()
    person.told("POST", "/datasets", declaration(source, "first"))
    one = used(service, tenant_id)
    allow(service, tenant_id, 5 * one)
    tries, barrier = 12, Barrier(12)

    def declare(number: int) -> bool:
        barrier.wait()
        body = CreateDataset.model_validate(declaration(source, f"d{number}"))
        try:
            with writing(service.engine) as session:
                datasets.create(session, person.client.principal, body)
        except Conflict as refusal:
            assert refusal.code == "quota_exceeded"
            return False
        return True

    with ThreadPoolExecutor(tries) as pool:
        admitted = list(pool.map(declare, range(tries)))
    assert sum(admitted) == 4
    assert used(service, tenant_id) == 5 * one


def test_the_operator_sets_it_in_the_audit_log_and_nobody_else_does(service: Service, person: Person) -> None:
    tenant_id = person.client.tenant_id
    assert allow(service, tenant_id, 1000) == quotas.Usage(used=0, allowed=1000)
    with reading(service.engine) as session:
        (row,) = session.scalars(select(AuditRow).where(AuditRow.verb == "tenant.quota")).all()
        assert (row.tenant_id, row.principal_id, row.outcome) == (tenant_id, "operator", "allowed")
    with pytest.raises(Denied), writing(service.engine) as session:
        quotas.set_quota(session, person.client.principal, None)
    for wrong in (-1, 2**63):
        with pytest.raises(Invalid, match="a quota is"):
            allow(service, tenant_id, wrong)
    assert allow(service, tenant_id, None).allowed is None


def test_objects_of_no_known_size_count_nothing(service: Service, person: Person) -> None:
    with writing(service.engine) as session:
        session.add(SealedObject(
            tenant_id=person.client.tenant_id, id="obj_old", kind="weights", key_version=1, wrapped_key=b"",
        ))  # fmt: skip
    assert used(service, person.client.tenant_id) == 0
