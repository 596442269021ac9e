"""Every family of networks through the SDK against a real server: uploaded, planned, charged, trained, sealed, served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import cloister
from families import FAMILIES, Family
from harness import App, Deployment
from journeys import SQLITE

pytestmark = pytest.mark.parametrize("deployment", [SQLITE], indirect=True)  # what is the same on every database

ROWS = 60
IN_MAKE_TEST = ("audio", "joined")


def _uploaded(client: cloister.Cloister, family: Family) -> cloister.Dataset:
    source = client.sources.create("people", epsilon=20, delta=1e-4)
    return client.datasets.upload(
        "rows", family.rows(ROWS), source=source, columns={**family.inputs, "kind": family.output},
        nominal_size=ROWS, capacity=80,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_MAKE_TEST else pytest.mark.long) for name in FAMILIES]
)
def test_a_family_is_uploaded_trained_charged_and_served(client: cloister.Cloister, name: str) -> None:
    family = FAMILIES[name]
    data = _uploaded(client, family)
    plan = client.plan(
        data, target="kind", layers=family.layers, loss=family.loss, privacy=cloister.DP(epsilon=8), epochs=2, batch_size=30
    )  # fmt: skip
    model = client.train(plan, model="learner").wait()
    assert client.sources.get("people").budget.spent == pytest.approx(plan.quote.after)
    asked = {name: values for name, values in family.rows(6).items() if name != "kind"}
    answer = model.predict(asked)
    assert answer.shape == (6,)
    if family.loss == "huber":
        assert np.isfinite(answer).all()
    else:
        np.testing.assert_allclose(model.predict_proba(asked).sum(1), 1, atol=1e-5)
    assert cloister.verify(model.certificate, client.certificate_keys()).event.steps == plan.event.steps


@dataclass(frozen=True)
class Brought:
    """A network with its weights, as an importer gives it."""

    layers: tuple[Any, ...]
    weights: dict[str, NDArray[np.float32]]


def brought() -> Brought:
    from cloister_privacy.architecture import build

    family = FAMILIES["attention"]
    layers = tuple(
        layer.model_copy(update={"name": f"word-{place}"}) if layer.type == "embedding" else layer
        for place, layer in enumerate(family.layers)
    )
    network = build(family.architecture.model_copy(update={"layers": layers}))
    return Brought(layers, {name: each.numpy() for name, each in network.state_dict().items()})


def test_a_brought_network_is_tuned_through_adapters_and_its_digest_is_certified(client: cloister.Cloister) -> None:
    from safetensors.numpy import save

    from cloister_privacy.training.start import digest_of

    network = brought()
    data = _uploaded(client, FAMILIES["attention"])
    plan = client.plan(
        data, target="kind", network=network, freeze=["word*", "encoded"], lora=cloister.LoRA(rank=2),
        privacy=cloister.DP(epsilon=5), epochs=2, batch_size=30,
    )  # fmt: skip
    assert plan.training.initial is not None
    assert plan.training.initial.digest == digest_of(save(network.weights))
    model = client.train(plan, model="tuned").wait()
    certificate = cloister.verify(model.certificate, client.certificate_keys())
    assert certificate.initial_digest == plan.training.initial.digest
    assert model.predict(["good", "bad"]).shape == (2,)
    assert certificate.initial == "uploaded"
    with pytest.raises(cloister.InvalidArgument, match="no layer is called so"):
        client.plan(data, target="kind", network=network, freeze=["nothing"])
    large = {
        **network.weights,
        "more": np.zeros(400_000, np.float32),
    }  # over what a document may have, and no limit to weights
    with pytest.raises(cloister.InvalidRequest, match="made from another spec"):
        client.plan(data, target="kind", network=Brought(network.layers, large))
    other = Brought(network.layers, {**network.weights, "layers.4.bias": np.zeros(3, np.float32)})
    with pytest.raises(cloister.InvalidRequest, match="another shape"):
        client.plan(data, target="kind", network=other)


def test_a_network_is_shown_to_whoever_makes_it_and_to_nobody_else(
    client: cloister.Cloister, deployment: Deployment, app: App
) -> None:
    data = _uploaded(client, FAMILIES["regression"])
    plan = client.plan(data, target="kind", privacy=cloister.DP(epsilon=8), epochs=1, batch_size=30)
    assert plan.network is not None
    assert "linear" in str(plan.network)
    assert "<svg" in plan._repr_html_()
    model = client.train(plan, model="shown").wait()
    assert model.network() == plan.network
    with deployment.client(deployment.app(app.tenant, "partner", "predictor")) as partner:
        seen = partner.models.get("shown")
        assert seen.predict({"x": [0.5]}).shape == (1,)
        with pytest.raises(cloister.PermissionDenied):
            seen.network()
