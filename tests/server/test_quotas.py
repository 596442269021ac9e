"""A tenant's storage and jobs: datasets and jobs count whole ahead, races exceed nothing, and nobody is told another's figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, Event
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import save
from sqlalchemy import event, func, select
from starlette.testclient import TestClient

from accounts import COLUMNS, Person, grant, requests_passed
from asked import asked_writing
from cloister.wire.answers import Answer
from cloister.wire.columns import Schema
from cloister.wire.jobs import StartJob
from cloister.wire.queries import QueryRequest
from cloister.wire.rows import arrays_of, encode_rows
from cloister.wire.sources import CreateDataset
from cloister.wire.weights import WEIGHTS_TYPE
from cloister_privacy.queries import QueryPlan, release
from cloister_server import answers, datasets, deployment, jobs, quotas
from cloister_server.errors import Conflict, Invalid
from cloister_server.policy import Denied
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import shares
from cloister_server.store.acting import for_principal
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, Dataset, Job, LedgerEntry, SealedObject
from cloister_server.work import attempts, child

WEIGHTS = save({"0.weight": np.zeros((4, 4), np.float32)})


@pytest.fixture
def person(http: TestClient, steward: Any, bearer: dict[str, str]) -> Person:
    return Person(http, steward, bearer)


def bound(service: Service, tenant_id: str, allowed: Mapping[quotas.Kind, int | None]) -> quotas.Usage:
    with writing(service.engine) as session:
        return quotas.set_quotas(session, Principal.operator(tenant_id, request_id="r"), allowed)


def allow(service: Service, tenant_id: str, quota_bytes: int | None) -> quotas.Quota:
    return bound(service, tenant_id, {"storage": quota_bytes}).storage


def used(service: Service, tenant_id: str) -> int:
    with reading(service.engine) as session:
        return quotas.usage(session, tenant_id).storage.used


def on_disk(service: Service, tenant_id: str) -> int:
    return sum(each.size for page in service.blobs.pages() for each in page if each.tenant_id == tenant_id)


def refused(answer: Any, code: str = "quota_exceeded") -> dict[str, Any]:
    """A refusal by a quota, which never tells a figure."""
    assert answer.status_code == 409, answer.text
    body: dict[str, Any] = answer.json()
    assert body["code"] == code and body["details"] == {} and "operator" in body["error"]
    assert not any(digit in body["error"] for digit in "0123456789")
    return body


def charged(service: Service) -> int:
    with reading(service.engine) as session:
        return session.scalar(select(func.count()).select_from(LedgerEntry)) or 0


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
    refused(person.ask("POST", "/datasets", declaration(source, "second")))
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
    assert charged(service) == 0
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
        refused(answer)
    allow(service, tenant_id, None)
    bound(service, tenant_id, {"jobs": 0})
    refused(partner.start(plan), "job_quota_exceeded")
    bound(service, tenant_id, {"jobs": 1})
    bound(service, grantee.tenant_id, {"jobs": 0, "storage": 0})
    partner.train(plan)  # it runs, and is stored, for the tenant of the data
    refused(person.start(plan), "job_quota_exceeded")


def at_once(tries: int, work: Callable[[int], object]) -> int:
    """How many of so many transactions at the same moment are admitted; the others are refused by a quota."""
    barrier = Barrier(tries)

    def attempt(number: int) -> bool:
        barrier.wait()
        try:
            work(number)
        except Conflict as refusal:
            assert refusal.code in ("quota_exceeded", "job_quota_exceeded")
            return False
        return True

    with ThreadPoolExecutor(tries) as pool:
        return sum(pool.map(attempt, range(tries)))


def test_declarations_at_the_same_moment_never_exceed_the_quota(service: Service, person: Person) -> None:
    tenant_id, source = person.client.tenant_id, person.source()
    person.told("POST", "/datasets", declaration(source, "first"))
    one = used(service, tenant_id)
    allow(service, tenant_id, 5 * one)

    def declare(number: int) -> None:
        body = CreateDataset.model_validate(declaration(source, f"d{number}"))
        with writing(service.engine) as session:
            datasets.create(session, person.client.principal, body)

    assert at_once(12, declare) == 4
    assert used(service, tenant_id) == 5 * one


@pytest.mark.parametrize("kind", ["jobs", "storage"])
def test_jobs_started_at_the_same_moment_never_exceed_a_quota(
    service: Service, person: Person, kind: quotas.Kind
) -> None:
    tenant_id = person.client.tenant_id
    plan = person.plan(person.dataset(person.source(epsilon=100)))
    body = StartJob.model_validate({"training": plan["training"], "model": "m"})
    empty = used(service, tenant_id)
    person.train(plan)
    one = used(service, tenant_id) - empty
    bound(service, tenant_id, {kind: 4 if kind == "jobs" else empty + 4 * one + one // 2})
    before = charged(service)

    def start(_: int) -> None:
        principal = person.client.principal
        room = service.read(
            for_principal(principal), lambda session: jobs.require_start(session, principal, service, body)
        )
        service.write(
            for_principal(principal), lambda session: jobs.start(session, principal, service, body, reserved_bytes=room)
        )

    assert at_once(8, start) == 3
    with reading(service.engine) as session:
        now = quotas.usage(session, tenant_id)
    assert now.jobs.used == 4 and now.storage.used == empty + 4 * one
    assert charged(service) == before + 3, "one reservation each, and nothing of those that were refused"
    assert on_disk(service, tenant_id) < empty + 4 * one, "what is reserved is not stored yet"


@pytest.mark.parametrize("allowed", [0, 300])
def test_processes_that_ask_at_once_pass_just_as_many_requests_as_are_allowed(
    service: Service, steward: Any, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    monkeypatch.setattr(shares, "_now", lambda: 1.8e9)  # within one minute
    tenant_id, barrier = steward.tenant_id, Barrier(6)
    bound(service, tenant_id, {"requests_per_minute": allowed})
    others = [deployment.open_service(service.settings) for _ in range(2)]

    def ask(process: Service) -> int:
        barrier.wait()
        return requests_passed(process, tenant_id)

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(ask, [service, *others] * 2)) == allowed
    with reading(service.engine) as session:
        assert quotas.usage(session, tenant_id).requests_per_minute == quotas.Quota(allowed, allowed)
    for each in others:
        each.engine.dispose()


def test_a_job_reserves_what_it_will_store_and_so_ends_within_the_quota(service: Service, person: Person) -> None:
    tenant_id = person.client.tenant_id
    service = replace(service, settings=service.settings.model_copy(update={"chunk_steps": 4}))
    plan = person.plan(person.dataset(person.source()))
    empty, stored = used(service, tenant_id), on_disk(service, tenant_id)
    job_id = person.train(plan)
    queued = used(service, tenant_id)
    with reading(service.engine) as session:
        job = session.get_one(Job, (tenant_id, job_id))
        spec_bytes = session.get_one(SealedObject, (tenant_id, job.spec_id)).size
    assert spec_bytes is not None and queued == empty + spec_bytes + job.reserved_bytes
    allow(service, tenant_id, queued)
    refused(person.start(plan))
    looks: list[tuple[int, int]] = []

    def look() -> bool:
        looks.append((used(service, tenant_id), on_disk(service, tenant_id) - stored))
        return False

    message = attempts._begin(service, tenant_id, job_id)
    assert message is not None
    running = child._Running(message)  # in this process, so that it can be looked at between its chunks
    running.end("trained", running.train(stop_asked=look))
    running._engine.dispose()
    assert len(looks) == 2 and {now for now, _ in looks} == {queued}, "nothing that it stores counts twice"
    assert all(spec_bytes < now <= spec_bytes + job.reserved_bytes // 2 for _, now in looks), "one checkpoint at a time"
    assert attempts._conclude(service, tenant_id, job_id)
    kept = on_disk(service, tenant_id) - stored
    assert used(service, tenant_id) == empty + kept < queued, "from now on it counts as it is stored"
    allow(service, tenant_id, 2 * queued)
    again = person.train(plan)
    assert used(service, tenant_id) == queued + kept
    person.told("POST", f"/jobs/{again}/cancel")
    assert used(service, tenant_id) == empty + kept + spec_bytes, (
        "who is cancelled reserves no more, and keeps its spec"
    )


def test_no_answer_takes_more_than_was_reserved_for_it() -> None:
    values = ["\N{GRINNING FACE}" * 8, 'quoted " \\ \x01', "plain"]
    columns = {**COLUMNS, "word": {"type": "category", "values": values}}
    edges = [each / 1000 for each in range(1001)]
    queries: list[dict[str, Any]] = [
        {"type": "count"},
        {"type": "sum", "column": "x"},
        {"type": "mean", "column": "x"},
        {"type": "label_balance", "column": "word"},
        {"type": "histogram", "column": "x", "edges": edges},
    ]
    schema = TypeAdapter(Schema).validate_python(columns)
    rows = {name: np.zeros((3, *shape), dtype) for name, dtype, shape in arrays_of(schema)}
    dataset, job = f"ds_{'0' * 32}", f"job_{'0' * 32}"
    for asked in (*([each] for each in queries), queries):
        request = QueryRequest.model_validate({"dataset": dataset, "epsilon": 1e-3, "queries": asked})
        plan = QueryPlan.of(request, schema=schema)
        answer = Answer(job=job, dataset=dataset, epsilon=plan.epsilon, results=release(plan, rows))
        assert len(answers.padded(answer)) <= answers._most_bytes(plan)


def test_jobs_queued_and_running_are_counted_and_a_place_is_free_when_one_is_over(
    service: Service, person: Person
) -> None:
    tenant_id, source = person.client.tenant_id, person.source()
    dataset = person.dataset(source)
    plan = person.plan(dataset, noise=20.0)
    query = {"query": {"dataset": dataset, "epsilon": 0.1, "queries": [{"type": "count"}]}}
    bound(service, tenant_id, {"jobs": 2})
    first = person.train(plan)
    assert person.ask("POST", "/queries", query).status_code == 201
    before, held = charged(service), on_disk(service, tenant_id)
    for answer in (person.start(plan), person.ask("POST", "/queries", query)):
        refused(answer, "job_quota_exceeded")
    assert charged(service) == before and on_disk(service, tenant_id) == held
    bound(service, tenant_id, {"jobs": 0})
    person.dataset(source, "more")  # whatever is no job goes on
    bound(service, tenant_id, {"jobs": 2})
    person.told("POST", f"/jobs/{first}/cancel")
    person.train(plan)
    refused(person.start(plan), "job_quota_exceeded")
    bound(service, tenant_id, {"jobs": None})
    person.train(plan)


def test_usage_is_read_at_one_moment(service: Service, person: Person) -> None:
    """What is reserved becomes what is stored in one transaction, and whoever looks meanwhile sees the one or the other."""
    tenant_id = person.client.tenant_id
    job_id = person.train(person.plan(person.dataset(person.source())))
    with writing(service.engine) as session:
        job = session.get_one(Job, (tenant_id, job_id))
        job.reserved_bytes = 1000
        session.add(SealedObject(
            tenant_id=tenant_id, id="obj_of_job", kind="weights", key_version=1, wrapped_key=b"", job_id=job_id, size=1,
        ))  # fmt: skip
    total, statements, done = used(service, tenant_id), [], Event()

    def move() -> None:
        for number in range(20):
            is_over = number % 2 == 0
            with writing(service.engine) as session:
                session.get_one(Job, (tenant_id, job_id)).status = "done" if is_over else "running"
                session.get_one(SealedObject, (tenant_id, "obj_of_job")).size = 1000 if is_over else 1
        done.set()

    def look(_: int) -> set[int]:
        seen = {used(service, tenant_id)}
        while not done.is_set():
            seen.add(used(service, tenant_id))
        return seen

    with ThreadPoolExecutor(3) as pool:
        seen = [pool.submit(look, number) for number in range(2)]
        pool.submit(move).result()
        assert set().union(*(each.result() for each in seen)) == {total}
    with reading(service.engine) as session:
        event.listen(session.connection(), "before_cursor_execute", lambda *told: statements.append(told[2]))
        quotas.usage(session, tenant_id)
    assert len(statements) == 1


def test_the_operator_sets_it_in_the_audit_log_and_nobody_else_does(service: Service, person: Person) -> None:
    tenant_id = person.client.tenant_id
    assert allow(service, tenant_id, 1000) == quotas.Quota(used=0, allowed=1000)
    with reading(service.engine) as session:
        (row,) = session.scalars(select(AuditRow).where(AuditRow.verb == "tenant.quota")).all()
        assert (row.tenant_id, row.principal_id, row.outcome) == (tenant_id, "operator", "allowed")
    with pytest.raises(Denied), writing(service.engine) as session:
        quotas.set_quotas(session, person.client.principal, {"storage": None})
    kinds: tuple[quotas.Kind, ...] = ("storage", "jobs", "requests_per_minute")
    for kind in kinds:
        for wrong in (-1, 2**63):
            with pytest.raises(Invalid, match=f"a quota of {kind} is"):
                bound(service, tenant_id, {kind: wrong})
        assert getattr(bound(service, tenant_id, {kind: 7}), kind).allowed == 7
    told = bound(service, tenant_id, {"jobs": None})
    assert [getattr(told, kind).allowed for kind in kinds] == [7, None, 7], "what is not named stays"


def test_objects_of_no_known_size_count_nothing_and_older_jobs_by_what_they_have_stored(
    service: Service, person: Person
) -> None:
    tenant_id = person.client.tenant_id
    job_id = person.train(person.plan(person.dataset(person.source())))
    with writing(service.engine) as session:
        session.get_one(Job, (tenant_id, job_id)).reserved_bytes = 0
    before = used(service, tenant_id)
    with writing(service.engine) as session:
        for name, size in (("obj_old", None), ("obj_checkpoint", 500)):
            session.add(SealedObject(
                tenant_id=tenant_id, id=name, kind="checkpoint", key_version=1, wrapped_key=b"", job_id=job_id, size=size,
            ))  # fmt: skip
    assert used(service, tenant_id) == before + 500
