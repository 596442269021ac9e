"""The main job through the SDK against a real server: upload, plan, train, predict, be refused, verify."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
import numpy as np
import pytest

import cloister
from harness import App, Deployment
from journeys import COLUMNS, POSTGRES_LONG, SQLITE, upload

BOTH_IN_LONG = pytest.mark.parametrize("deployment", [SQLITE, POSTGRES_LONG], indirect=True)


@dataclass(frozen=True)
class Trained:
    """A tenant that has trained one model, and left it to several tests."""

    app: App
    client: cloister.Cloister
    data: cloister.Dataset
    plan: cloister.Plan
    job: cloister.Job
    model: cloister.Model


@pytest.fixture(scope="session")
def trained(deployment: Deployment, digits: dict[str, np.ndarray]) -> Iterator[Trained]:
    app = deployment.app(deployment.tenant("trained"), "steward")
    with deployment.client(app) as client:
        data = upload(client, {name: column[:1200] for name, column in digits.items()})
        plan = client.plan(data, target="digit", privacy=cloister.DP(epsilon=12))
        assert client.sources.get("digits-people").budget.spent == 0.0, "a plan spends nothing"
        job = client.train(plan, model="reader")
        yield Trained(app, client, data, plan, job, job.wait())


def test_a_partner_trains_pays_and_predicts(trained: Trained, digits: dict[str, np.ndarray]) -> None:
    budget = trained.client.sources.get("digits-people").budget
    assert budget.spent == pytest.approx(trained.plan.quote.after), "what was quoted is what is charged"
    test = {name: column[1200:] for name, column in digits.items()}
    assert np.mean(trained.model.predict(test["scan"]) == test["digit"]) >= 0.6
    probabilities = trained.model.predict_proba(test["scan"][:5])
    assert probabilities.shape == (5, 10)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)


def test_what_does_not_fit_is_refused_and_the_ledger_is_unchanged(trained: Trained) -> None:
    client = trained.client
    plan = client.plan(trained.data, target="digit", privacy=cloister.DP(epsilon=19), epochs=1)
    assert not plan.quote.fits
    before = client.sources.get("digits-people").budget
    with pytest.raises(cloister.BudgetExceeded) as refusal:
        client.train(plan, model="greedy")
    assert f"{refusal.value.left:.3f}" in str(refusal.value)
    assert str(refusal.value.request_id) in str(refusal.value)
    assert client.sources.get("digits-people").budget == before
    largest = client.plan(
        trained.data, target="digit", privacy=cloister.DP(epsilon=refusal.value.largest_epsilon), epochs=1
    )
    assert largest.quote.fits, "the largest that the refusal names would be admitted"


def test_another_tenant_sees_neither_model_nor_data_nor_job(deployment: Deployment, trained: Trained) -> None:
    stranger = deployment.app(deployment.tenant("stranger"), "steward")
    with deployment.client(stranger) as other:
        for ask in (
            lambda: other.datasets.get(trained.data.id),
            lambda: other.jobs.get(trained.job.id),
            lambda: other.models.get(trained.model.id),
            lambda: other.sources.get(trained.data.source),
            lambda: other.plan(trained.data, target="digit"),
            lambda: other.train(trained.plan, model="reader"),
        ):
            with pytest.raises(cloister.NotFound):
                ask()
        assert list(other.datasets.list()) == []


def test_a_predictor_may_predict_and_nothing_else(
    deployment: Deployment, trained: Trained, digits: dict[str, np.ndarray]
) -> None:
    with deployment.client(deployment.app(trained.app.tenant, "predictor", role="predictor")) as predictor:
        assert predictor.models.get("reader").predict(digits["scan"][:3]).shape == (3,)
        with pytest.raises(cloister.NotFound):
            predictor.datasets.get(trained.data.id)


def test_a_certificate_verifies_offline_and_a_forged_one_does_not(trained: Trained) -> None:
    keys = trained.client.certificate_keys()
    statement = cloister.verify(trained.model.certificate, keys)
    assert statement.epsilon == pytest.approx(trained.plan.epsilon)
    assert statement.event == trained.plan.event
    assert (statement.capacity, statement.rows_per_unit) == (trained.data.capacity, 1)
    forged = {**trained.model.certificate, "payload": trained.model.certificate["payload"][:-4] + "AAAA"}
    with pytest.raises(cloister.InvalidCertificate):
        cloister.verify(forged, keys)


def test_predictions_refuse_what_the_columns_do_not_allow(trained: Trained) -> None:
    for bad in (np.zeros((2, 3)), np.full((1, 8, 8), np.nan), np.zeros((8, 8))):
        with pytest.raises(cloister.CloisterError):
            trained.model.predict(bad)


def test_a_job_is_reattached_by_its_id_and_waiting_for_a_finished_one_returns_at_once(trained: Trained) -> None:
    again = trained.client.jobs.get(trained.job.id)
    assert again.status == "done"
    assert again.wait(timeout_s=60).name == "reader"


@BOTH_IN_LONG
def test_a_cancelled_job_publishes_nothing_and_stays_charged_for_what_ran(
    client: cloister.Cloister, digits: dict[str, np.ndarray]
) -> None:
    data = upload(client, digits)
    plan = client.plan(data, target="digit", privacy=cloister.DP(noise_multiplier=4.0), epochs=300, batch_size=100)
    job = client.train(plan, model="stopped")
    while client.jobs.get(job.id).steps_done == 0:
        time.sleep(0.05)
    job.cancel()
    with pytest.raises(cloister.JobCancelled):
        job.wait(timeout_s=300)
    spent = client.sources.get("digits-people").budget.spent
    assert 0 < spent < plan.quote.after
    with pytest.raises(cloister.NotFound):
        client.models.get("stopped").predict(digits["scan"][:1])


def test_require_revision_refuses_when_the_ledger_moved(
    client: cloister.Cloister, digits: dict[str, np.ndarray]
) -> None:
    data = upload(client, digits)
    plan = client.plan(data, target="digit", privacy=cloister.DP(epsilon=2), epochs=1)
    first = client.train(plan, model="first", require_revision=True)
    with pytest.raises(cloister.RevisionMoved):
        client.train(plan, model="second", require_revision=True)
    second = client.train(plan, model="second")
    for job in (first, second):
        job.cancel()


def test_a_retried_start_never_spends_twice(
    deployment: Deployment, client: cloister.Cloister, app: App, digits: dict[str, np.ndarray]
) -> None:
    data = upload(client, digits)
    plan = client.plan(data, target="digit", privacy=cloister.DP(epsilon=2), epochs=1)
    with httpx2.Client(base_url=deployment.url, timeout=60) as raw:
        headers = {"Authorization": f"Bearer {deployment.token(app)}", "Idempotency-Key": "one-and-only"}
        body = {"training": plan.training.model_dump(mode="json"), "model": "once"}
        answers = [raw.post("/v1/jobs", json=body, headers=headers) for _ in range(3)]
        other = raw.post("/v1/jobs", json={**body, "model": "twice"}, headers=headers)
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert other.status_code == 422 and other.json()["code"] == "idempotency_mismatch"
    assert len(list(client.jobs.list())) == 1
    client.jobs.get(answers[0].json()["id"]).cancel()


@BOTH_IN_LONG
def test_the_async_client_does_the_same(deployment: Deployment, app: App, digits: dict[str, np.ndarray]) -> None:
    async def journey() -> np.ndarray:
        async with cloister.AsyncCloister(
            deployment.url, client_id=app.client_id, client_secret=app.client_secret
        ) as client:
            source = await client.sources.create("async-people", epsilon=20, delta=1e-5)
            data = await client.datasets.upload(
                "async", digits, source=source, columns=COLUMNS, nominal_size=1000, capacity=2000
            )
            plan = await client.plan(data, target="digit", privacy=cloister.DP(epsilon=3), epochs=1)
            job = await client.train(plan, model="async")
            model = await job.wait()
            return await model.predict(digits["scan"][:4])

    assert asyncio.run(journey()).shape == (4,)


@BOTH_IN_LONG
def test_a_tabular_regression_trains_on_bounds_and_categories(client: cloister.Cloister) -> None:
    rng = np.random.default_rng(1)
    age, region = rng.uniform(18, 90, 1500).astype(np.float32), rng.integers(0, 3, 1500).astype(np.int32)
    cost = (age * 10 + region * 200 + rng.normal(0, 20, 1500)).clip(0, 2000).astype(np.float32)
    source = client.sources.create("patients", epsilon=30, delta=1e-5)
    data = client.datasets.upload(
        "costs",
        {"age": age, "region": region, "cost": cost},
        source=source,
        columns={
            "age": cloister.Number(low=0, high=120),
            "region": cloister.Category(values=("north", "middle", "south")),
            "cost": cloister.Number(low=0, high=2000),
        },
        nominal_size=1500,
        capacity=2000,
    )
    model = client.train(client.plan(data, target="cost", privacy=cloister.DP(epsilon=15)), model="cost").wait()
    predicted = model.predict({"age": age, "region": region})
    assert predicted.dtype == np.float32
    assert np.abs(predicted - cost).mean() < np.abs(cost - cost.mean()).mean() * 0.7
