"""Noisy answers and signed statements through the SDK, on a real server: what they cost, and what they tell."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import cloister
from cloister import queries
from cloister.wire.certificate import digest_of
from cloister.wire.statements import verify_audit, verify_deployment
from harness import App, Deployment
from journeys import COLUMNS, SQLITE, upload

pytestmark = pytest.mark.parametrize("deployment", [SQLITE], indirect=True)


@pytest.mark.long
def test_a_model_is_evaluated_on_rows_that_were_held_back(
    client: cloister.Cloister, deployment: Deployment, app: App, digits: dict[str, np.ndarray]
) -> None:
    data = upload(client, {name: column[:1200] for name, column in digits.items()})
    held = {name: column[1200:] for name, column in digits.items()}
    test = client.datasets.upload("held-out", held, source=data.source, columns=COLUMNS, nominal_size=600, capacity=600)
    model = client.train(client.plan(data, target="digit", privacy=cloister.DP(epsilon=10)), model="reader").wait()

    assert isinstance(model, cloister.Model)
    exact = float(np.mean(model.predict(held["scan"]) == held["digit"]))
    evaluation = [queries.Evaluation(model=model.id, version=model.version)]
    price = client.queries.price(test, evaluation, epsilon=4.0)
    before = client.sources.get(data.source).budget.spent
    job = client.queries.evaluate(model, test, epsilon=4.0)
    (result,) = job.wait()
    spent = client.sources.get(data.source).budget.spent
    assert spent == pytest.approx(price.quote.after) and spent > before
    assert result.type == "class_evaluation" and result.accuracy is not None
    assert abs(result.accuracy - exact) < 0.1
    assert np.asarray(result.confusion).shape == (10, 10)

    found = client.jobs.get(job.id)
    assert isinstance(found, cloister.QueryJob) and found.wait() == (result,), (
        "answered once, and told again for nothing"
    )

    async def ask_async() -> int:
        async with cloister.AsyncCloister(
            deployment.url, client_id=app.client_id, client_secret=app.client_secret, allow_insecure=True
        ) as other:
            asked = await other.queries.ask(test, [queries.Count()], epsilon=1.0)
            (counted,) = await asked.wait()
            return int(counted.count)

    assert abs(asyncio.run(ask_async()) - len(held["digit"])) < 40


def test_an_audit_is_signed_of_a_public_source_and_refused_of_any_other(
    client: cloister.Cloister, digits: dict[str, np.ndarray]
) -> None:
    private = upload(client, {name: column[:300] for name, column in digits.items()})
    with pytest.raises(cloister.InvalidRequest, match="not declared public") as refused:
        client.plan(private, target="digit", audit=True)
    assert refused.value.code == "audit_needs_public_source"

    source = client.sources.create("open-digits", epsilon=20, delta=1e-5, public=True)
    rows = {name: column[:300] for name, column in digits.items()}
    data = client.datasets.upload("open", rows, source=source, columns=COLUMNS, nominal_size=300, capacity=600)
    plan = client.plan(data, target="digit", privacy=cloister.DP(epsilon=3), epochs=2, audit=True)
    model = client.train(plan, model="open").wait()
    assert isinstance(model, cloister.Model)

    keys = client.certificate_keys()
    certificate = model.verify(keys)
    assert certificate.sampler == "poisson" and certificate.datasets == (data.id,)
    assert certificate.events is not None and [each.block for each in certificate.events] == [0, 0]
    assert certificate.sealed_digest and certificate.environment_digest

    audit = verify_audit(model.audit_statement(), keys)
    served = verify_deployment(model.deployment_statement(), keys)
    assert audit.certificate_digest == served.certificate_digest == digest_of(model.certificate)
    assert audit.claimed_epsilon == pytest.approx(certificate.epsilon, rel=1e-3)
    assert not audit.contradicts_claim
    assert served.weights_digest == certificate.weights_digest


def test_all_that_is_left_can_be_asked_for(client: cloister.Cloister, digits: dict[str, np.ndarray]) -> None:
    data = upload(client, {name: column[:300] for name, column in digits.items()}, epsilon=2.0)
    plan = client.plan(data, target="digit", privacy=cloister.DP(all_left=True), epochs=1)
    assert plan.quote.fits and plan.quote.left < 0.01
    client.train(plan, model="all").wait()
    assert not client.plan(data, target="digit", privacy=cloister.DP(epsilon=0.5), epochs=1).quote.fits
