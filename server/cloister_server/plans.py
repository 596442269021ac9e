"""Plans: what a run would cost, from public numbers only. Free; writes nothing; knows no row."""

from __future__ import annotations

import math

from sqlalchemy.orm import Session

from cloister.wire.architecture import Architecture
from cloister.wire.plans import Guarantee, Initial, NetworkView, Plan, PlanRequest, TrainingSpec
from cloister_privacy.architecture import picture, summary
from cloister_privacy.errors import PlanImpossible
from cloister_privacy.plan import DPPlan
from cloister_privacy.recipes import require_fit, resolve
from cloister_server import budgets, datasets, policy, weights
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.tables import Dataset, Source

_MOST_LINES = 4096

__all__ = ["check_spec", "make", "view_network"]


def make(session: Session, principal: Principal, service: Service, body: PlanRequest) -> Plan:
    """Fill the request's blanks by the public recipe and quote the event that training it would be charged."""
    dataset = policy.find(session, principal, "dataset.train", Dataset, body.dataset).resource
    source = session.get_one(Source, (dataset.tenant_id, dataset.source_id))
    start = weights.usable(session, principal, body.initial, dataset=dataset)
    spec = resolve(
        body,
        columns=datasets.schema_of(dataset),
        nominal_size=dataset.nominal_size,
        capacity=dataset.capacity,
        delta=source.delta,
        unit=source.unit,
        guarantee=_guarantee(source),
        initial=Initial(id=start.resource.id, digest=start.resource.digest) if start is not None else None,
    )
    plan = check_spec(dataset, source, spec)
    weights.require_start(session, service, spec.architecture, spec.lora, start)
    event = plan.event()
    return Plan(
        training=spec,
        network=view_network(spec.architecture),
        event=event,
        epsilon=plan.epsilon(),
        epsilon_pld=plan.epsilon_by_pld(),
        delta=spec.delta,
        source=source.id,
        quote=budgets.quote(session, source, event),
    )


def view_network(architecture: Architecture) -> NetworkView:
    """A network as a table and, where its lines do not run into thousands, as a picture."""
    lines = sum(len(layer.reads or ()) for layer in architecture.layers)
    return NetworkView(summary=summary(architecture), picture=picture(architecture) if lines <= _MOST_LINES else "")


def check_spec(dataset: Dataset, source: Source, spec: TrainingSpec) -> DPPlan:
    """The plan of a spec that may come from anyone: it must be about this dataset, in its public numbers."""
    require_fit(
        spec,
        columns=datasets.schema_of(dataset),
        nominal_size=dataset.nominal_size,
        capacity=dataset.capacity,
        unit=source.unit,
        guarantee=_guarantee(source),
    )
    plan = DPPlan.of(spec, unit=source.unit, adjacency=source.adjacency)
    if not 0 < plan.epsilon() < math.inf:
        raise PlanImpossible(
            f"this run's epsilon at delta {plan.delta:g} is {plan.epsilon():g}, which no certificate can state; "
            "change noise_multiplier, delta or epochs"
        )
    return plan


def _guarantee(source: Source) -> Guarantee:
    return Guarantee(epsilon=source.epsilon, delta=source.delta)
