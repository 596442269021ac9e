"""Noisy answers about rows: priced for nothing, charged before a row is read, answered once, and told to nobody else."""

from __future__ import annotations

import base64
import hashlib
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from httpx2 import Response
from pydantic import TypeAdapter
from sqlalchemy import select
from starlette.testclient import TestClient

from cloister.wire.columns import Schema
from cloister.wire.rows import encode_rows
from cloister_server import budgets
from cloister_server.errors import StartRefused
from cloister_server.processes import Child
from cloister_server.service import Service
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import Attempt, Job, LedgerEntry
from cloister_server.work.attempts import run_attempt
from cloister_server.work.template import Template

COLUMNS: dict[str, Any] = {
    "age": {"type": "number", "low": 0.0, "high": 100.0},
    "kind": {"type": "category", "values": ["a", "b"]},
}
SCHEMA = TypeAdapter(Schema).validate_python(COLUMNS)
AGES = np.array([10.0] * 30 + [50.0] * 10, np.float32)
KINDS = np.array([0] * 30 + [1] * 10, np.int32)
QUERIES = [{"type": "count"}, {"type": "mean", "column": "age"}, {"type": "label_balance", "column": "kind"}]


class Asker:
    """One client's requests."""

    def __init__(self, http: TestClient, bearer: dict[str, str]) -> None:
        self.http, self.bearer = http, bearer

    def ask(self, method: str, path: str, *, key: str = "", **more: Any) -> Response:
        headers = {**self.bearer, **({"Idempotency-Key": key} if key else {}), **more.pop("headers", {})}
        return self.http.request(method, f"/v1{path}", headers=headers, **more)

    def budget(self) -> dict[str, Any]:
        return dict(self.ask("GET", "/sources/people").json()["budget"])

    def query(self, dataset: str, epsilon: float = 10.0, queries: Any = QUERIES) -> dict[str, Any]:
        return {"dataset": dataset, "queries": queries, "epsilon": epsilon}

    def start(self, dataset: str, epsilon: float = 10.0, *, key: str = "", **more: Any) -> Response:
        return self.ask("POST", "/queries", json={"query": self.query(dataset, epsilon), **more}, key=key)


@pytest.fixture
def asker(http: TestClient, bearer: dict[str, str]) -> Asker:
    made = Asker(http, bearer)
    made.ask("POST", "/sources", json={"name": "people", "epsilon": 30, "delta": 1e-5})
    return made


@pytest.fixture
def dataset(asker: Asker) -> str:
    """Forty rows, complete."""
    source = asker.ask("GET", "/sources/people").json()["id"]
    body = {"source": source, "name": "survey", "columns": COLUMNS, "nominal_size": 50, "capacity": 100}
    made = str(asker.ask("POST", "/datasets", json=body).json()["id"])
    rows = encode_rows(SCHEMA, {"age": AGES, "kind": KINDS})
    digest = base64.b64encode(hashlib.sha256(rows).digest()).decode()
    headers = {"Content-Digest": f"sha-256=:{digest}:"}
    assert asker.ask("PUT", f"/datasets/{made}/parts/0", content=rows, headers=headers).status_code == 201
    done = asker.ask("POST", f"/datasets/{made}/complete")
    assert done.status_code == 200, done.text
    return made


def run(service: Service, job_id: str, template: Template) -> str:
    for _ in range(3):
        if attempt(service, job_id, template) == "over":
            break
    with reading(service.engine) as session:
        return session.scalars(select(Job.status).where(Job.id == job_id)).one()


def attempt(service: Service, job_id: str, template: Template, stopping: threading.Event | None = None) -> str:
    with reading(service.engine) as session:
        tenant_id = session.scalars(select(Job.tenant_id).where(Job.id == job_id)).one()
    return run_attempt(service, tenant_id, job_id, template=template, stopping=stopping or threading.Event())


def test_a_price_is_what_is_charged_and_costs_nothing(asker: Asker, dataset: str) -> None:
    before = asker.budget()
    price = asker.ask("POST", "/queries/price", json=asker.query(dataset))
    assert price.status_code == 200, price.text
    told = price.json()
    assert told["event"]["epsilon"] == 10.0 and told["quote"]["fits"]
    assert [len(each) for each in told["noise"]] == [1, 2, 1]
    assert asker.budget() == before
    assert asker.start(dataset).status_code == 201
    assert asker.budget()["spent"] == told["quote"]["after"] > 0


def test_answers_are_near_the_truth_and_shaped_by_public_numbers(
    asker: Asker, dataset: str, service: Service, template: Template
) -> None:
    job = asker.start(dataset).json()
    assert job["kind"] == "query" and job["model"] is None
    assert asker.ask("GET", f"/queries/{job['id']}/answer").json()["code"] == "no_answer"
    assert run(service, job["id"], template) == "done"
    answer = asker.ask("GET", f"/queries/{job['id']}/answer").json()
    count, mean, balance = answer["results"]
    assert abs(count["count"] - 40) <= 20
    assert abs(mean["mean"] - 20.0) <= 15.0
    assert balance["values"] == ["a", "b"] and abs(balance["counts"][0] - 30) <= 20
    with reading(service.engine) as session:
        kinds = session.scalars(select(LedgerEntry.kind).order_by(LedgerEntry.revision)).all()
    assert kinds == ["freeze", "reserve", "chunk", "settle"], "charged ahead of the first row, and settled"


def test_a_retried_query_is_charged_once(asker: Asker, dataset: str) -> None:
    first, again = asker.start(dataset, key="k1"), asker.start(dataset, key="k1")
    assert first.json() == again.json()
    assert asker.budget()["revision"] == 2


def test_a_query_that_does_not_fit_is_refused_and_leaves_nothing(asker: Asker, dataset: str) -> None:
    assert asker.start(dataset, 20.0).status_code == 201
    before = asker.budget()
    refused = asker.start(dataset, 20.0)
    assert refused.status_code == 409 and refused.json()["code"] == "budget_exceeded"
    assert "query of epsilon 20.000 does not fit" in refused.json()["error"]
    assert asker.budget() == before
    assert asker.start(dataset, 1.0, require_revision=0).json()["code"] == "revision_moved"


@contextmanager
def no_descriptor() -> Iterator[None]:
    """This process opens nothing more; what it has open stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("lacks_from", ["the job's lock on", "the child on"])
def test_without_a_descriptor_for_its_child_no_attempt_begins_and_the_next_one_ends_the_job(
    asker: Asker, dataset: str, service: Service, template: Template, monkeypatch: pytest.MonkeyPatch, lacks_from: str
) -> None:
    job_id = asker.start(dataset).json()["id"]
    fork = template.fork

    def starved(*, lock: int) -> Child:
        with no_descriptor():
            return fork(lock=lock)

    with monkeypatch.context() as patched, pytest.raises(StartRefused, match="Too many open files"):
        if lacks_from == "the child on":
            patched.setattr(template, "fork", starved)
            attempt(service, job_id, template)
        else:
            with no_descriptor():
                attempt(service, job_id, template)
    _require_untouched(service, job_id)
    assert run(service, job_id, template) == "done"


def test_of_a_template_that_does_not_answer_no_attempt_begins_and_the_next_one_has_another(
    asker: Asker, dataset: str, service: Service, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = asker.start(dataset).json()["id"]
    template._prepare()
    held = template._process
    assert held is not None
    held.send_signal(signal.SIGSTOP)
    monkeypatch.setattr("cloister_server.work.template._FORK_S", 0.2)
    with pytest.raises(StartRefused, match="does not answer"):
        attempt(service, job_id, template)
    _require_untouched(service, job_id)
    assert held.returncode == -signal.SIGKILL
    monkeypatch.undo()
    assert run(service, job_id, template) == "done"


def test_a_stop_that_comes_while_the_child_is_made_begins_no_attempt_and_leaves_no_child(
    asker: Asker, dataset: str, service: Service, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, stopping, made = asker.start(dataset).json()["id"], threading.Event(), list[Child]()
    fork = template.fork

    def stopped(*, lock: int) -> Child:
        made.append(fork(lock=lock))
        stopping.set()
        return made[0]

    with monkeypatch.context() as patched:
        patched.setattr(template, "fork", stopped)
        assert attempt(service, job_id, template, stopping) == "again"
    assert made[0].returncode is not None
    _require_untouched(service, job_id)
    assert run(service, job_id, template) == "done"


def _require_untouched(service: Service, job_id: str) -> None:
    with reading(service.engine) as session:
        assert session.scalars(select(Attempt)).all() == []
        job = session.scalars(select(Job).where(Job.id == job_id)).one()
        assert (job.status, job.attempt, job.error_code) == ("queued", 0, None)


def test_an_attempt_that_died_after_its_charge_is_charged_again(
    asker: Asker, dataset: str, service: Service, template: Template
) -> None:
    job_id = asker.start(dataset, 5.0).json()["id"]
    with writing(service.engine) as session:
        job = session.scalars(select(Job).where(Job.id == job_id)).one()
        job.attempt, job.status = 1, "running"
        session.add(Attempt(tenant_id=job.tenant_id, job_id=job.id, number=1, from_step=0))
        budgets.open_chunk(
            session, tenant_id=job.tenant_id, job_id=job.id, attempt=1, first_step=0, steps=1
        )  # and there it died
    once = asker.budget()["spent"]
    assert run(service, job_id, template) == "done"
    assert asker.budget()["spent"] > once
    with reading(service.engine) as session:
        settled = session.scalars(select(LedgerEntry.steps).where(LedgerEntry.kind == "settle")).all()
    assert settled == [2]


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ({"type": "mean", "column": "kind"}, "number columns"),
        ({"type": "histogram", "column": "age"}, "give edges"),
        ({"type": "label_balance", "column": "nothing"}, "no column 'nothing'"),
        ({"type": "histogram", "column": "age", "edges": [0.0, 200.0]}, "within its bounds"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_by_name(
    asker: Asker, dataset: str, query: dict[str, Any], problem: str
) -> None:
    refused = asker.ask("POST", "/queries/price", json=asker.query(dataset, queries=[query]))
    assert refused.status_code == 422 and problem in refused.json()["error"]
    assert asker.budget()["revision"] == 0


def test_another_tenant_asks_of_what_is_not_there(
    asker: Asker,
    dataset: str,
    http: TestClient,
    make_client: Callable[..., Any],
    bearer_of: Callable[[Any], dict[str, str]],
) -> None:
    stranger = Asker(http, bearer_of(make_client("other")))
    absent = dataset[:-32] + "0" * 32
    for path, body in (("/queries/price", stranger.query), ("/queries", lambda d: {"query": stranger.query(d)})):
        answers = [stranger.ask("POST", path, json=body(each)) for each in (dataset, absent)]
        assert [each.status_code for each in answers] == [404, 404]
        assert answers[0].json()["error"] == answers[1].json()["error"]
    job_id = asker.start(dataset).json()["id"]
    assert stranger.ask("GET", f"/queries/{job_id}/answer").status_code == 404
