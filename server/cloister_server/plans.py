"""Plans: what a run would cost, from public numbers only. Free; writes nothing; knows no row."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sqlalchemy.orm import Session

from cloister.wire.architecture import Architecture
from cloister.wire.plans import Guarantee, Initial, NetworkView, Plan, PlanRequest, TrainingSpec
from cloister_privacy.architecture import picture, summary
from cloister_privacy.errors import PlanImpossible
from cloister_privacy.plan import DPPlan
from cloister_privacy.recipes import require_fit, resolve
from cloister_server import budgets, datasets, policy, sources, weights
from cloister_server.errors import Invalid
from cloister_server.policy import Authorized
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.tables import Dataset, Source, Weights

_MOST_LINES = 4096

__all__ = ["Read", "check_spec", "make", "readable", "view_network"]


@dataclass(frozen=True, slots=True)
class Read:
    """The datasets that a run reads, each with the proof that it may be trained on, and what they declare together."""

    source: Source
    authorized: tuple[Authorized[Dataset], ...]

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        return tuple(each.resource for each in self.authorized)

    @property
    def first(self) -> Dataset:
        return self.authorized[0].resource

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(each.block for each in self.datasets)

    @property
    def nominal_size(self) -> int:
        """In units: blocks have none in common."""
        return sum(each.nominal_size for each in self.datasets)

    @property
    def capacity(self) -> int:
        return sum(each.capacity for each in self.datasets)

    def require_epsilon(self, session: Session, epsilon: float) -> None:
        """Raise Forbidden where a grant that the run is allowed by is bound to less."""
        for each in self.authorized:
            policy.require_epsilon(session, each, "dataset.train", epsilon)


def make(session: Session, principal: Principal, service: Service, body: PlanRequest) -> Plan:
    """Fill the request's blanks by the public recipe and quote the event that training it would be charged."""
    read = readable(session, principal, body)
    dataset, source = read.first, read.source
    start = weights.usable(session, principal, body.initial, dataset=dataset)
    spec = _resolved(body, read, start)
    if body.privacy is not None and body.privacy.all_left:
        event = DPPlan.of(spec, unit=source.unit, adjacency=source.adjacency).event()
        noise = budgets.least_noise(
            session,
            source,
            principal_id=principal.id,
            blocks=read.blocks,
            sampling_rate=event.sampling_rate,
            steps=event.steps,
        )
        spec = _resolved(_with_noise(body, noise), read, start)
    plan = check_spec(read, spec)
    read.require_epsilon(session, plan.epsilon())
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
        quote=budgets.quote(
            session,
            source,
            event,
            principal_id=principal.id,
            blocks=read.blocks,
            is_of_all=sources.is_owned(session, principal, source),
        ),
    )


def _resolved(body: PlanRequest, read: Read, start: Authorized[Weights] | None) -> TrainingSpec:
    source = read.source
    return resolve(
        body,
        columns=datasets.schema_of(read.first),
        nominal_size=read.nominal_size,
        capacity=read.capacity,
        delta=source.delta,
        unit=source.unit,
        guarantee=_guarantee(source),
        initial=Initial(id=start.resource.id, digest=start.resource.digest) if start is not None else None,
    )


def _with_noise(body: PlanRequest, noise_multiplier: float) -> PlanRequest:
    assert body.privacy is not None  # noqa: S101 (it asked for all that is left)
    privacy = body.privacy.model_copy(update={"all_left": None, "noise_multiplier": noise_multiplier})
    return body.model_copy(update={"privacy": privacy})


def view_network(architecture: Architecture) -> NetworkView:
    """A network as a table and, where its lines do not run into thousands, as a picture."""
    lines = sum(len(layer.reads or ()) for layer in architecture.layers)
    return NetworkView(summary=summary(architecture), picture=picture(architecture) if lines <= _MOST_LINES else "")


def readable(session: Session, principal: Principal, body: PlanRequest | TrainingSpec) -> Read:
    """The datasets that a run would read, if the principal may train on each.

    Raises Invalid where they are not of one source and one schema, or two of them of one block: whoever is in both would count
    twice.
    """
    found = [
        policy.find(session, principal, "dataset.train", Dataset, each) for each in (body.dataset, *body.with_datasets)
    ]
    read = Read(session.get_one(Source, _source_of(found[0].resource)), tuple(found))
    if any(_source_of(each) != _source_of(read.first) or each.columns != read.first.columns for each in read.datasets):
        raise Invalid("the datasets are not of one source with the same columns; train on those that are")
    if len(set(read.blocks)) != len(read.blocks):
        raise Invalid(
            "two of the datasets belong to the same block, whose people would then count twice; give one of each block"
        )
    return read


def check_spec(read: Read, spec: TrainingSpec) -> DPPlan:
    """The plan of a spec that may come from anyone: it must be about these datasets, in their public numbers."""
    source = read.source
    require_fit(
        spec,
        columns=datasets.schema_of(read.first),
        nominal_size=read.nominal_size,
        capacity=read.capacity,
        unit=source.unit,
        guarantee=_guarantee(source),
    )
    if spec.audit and not source.public:
        raise Invalid(
            f"an audit trains on rows that may be told, and source {source.name!r} is not declared public; leave audit out, or let "
            "the operator run `cloister-admin doctor --audit`, which tries the same engine on synthetic rows",
            code="audit_needs_public_source",
        )
    if spec.delta * read.nominal_size >= 1:
        raise PlanImpossible(
            f"delta {spec.delta:g} is not below 1 / nominal_size = {1 / read.nominal_size:g}, so that revealing one row "
            "whole would be within the promise; leave delta out, or give a smaller one"
        )
    plan = DPPlan.of(spec, unit=source.unit, adjacency=source.adjacency)
    if not 0 < plan.epsilon() < math.inf:
        raise PlanImpossible(
            f"this run's epsilon at delta {plan.delta:g} is {plan.epsilon():g}, which no certificate can state; "
            "change noise_multiplier, delta or epochs"
        )
    return plan


def _source_of(dataset: Dataset) -> tuple[str, str]:
    return dataset.tenant_id, dataset.source_id


def _guarantee(source: Source) -> Guarantee:
    return Guarantee(epsilon=source.epsilon, delta=source.delta)
