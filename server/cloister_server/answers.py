"""Charged questions about rows: priced, queued with their reservation, and answered once. Knows SQL and the vault; reads no row."""

from __future__ import annotations

import json

from sqlalchemy.orm import Session

from cloister.wire import answers as wire
from cloister.wire import jobs as jobs_wire
from cloister.wire.queries import Evaluation, QueryRequest
from cloister_privacy.queries import QueryPlan
from cloister_server import audit, budgets, datasets, grants, jobs, models, policy, quotas, sources, vault
from cloister_server.errors import Conflict
from cloister_server.policy import Authorized
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.tables import Dataset, Job, Model, ModelVersion, Source, new_id

__all__ = ["get", "padded", "price", "start"]

_PAGE = 4096
"""Sealed answers are filled up with blanks to multiples of so many bytes."""

_ANSWER_BYTES, _RESULT_BYTES, _BIN_BYTES = 512, 1024, 96
"""The most that an answer takes as JSON altogether; for each result with its single figures; and for each released integer: told
twice at most (20 digits), with a share and an edge (25 each)."""


def price(session: Session, principal: Principal, service: Service, query: QueryRequest) -> wire.QueryPrice:
    """What the answers would cost. Free, and nothing is stored."""
    dataset, source, plan, _ = _planned(session, principal, service, query)
    event = plan.event()
    return wire.QueryPrice(
        query=query,
        source=source.id,
        event=event,
        quote=budgets.quote(
            session,
            source,
            event,
            principal_id=principal.id,
            blocks=(dataset.resource.block,),
            is_of_all=sources.is_owned(session, principal, source),
        ),
        noise=tuple(tuple(part.noise for part in planned.parts) for planned in plan.queries),
    )


def start(session: Session, principal: Principal, service: Service, body: wire.StartQuery) -> jobs_wire.Job:
    """Reserve what the answers cost and queue the release, in one transaction. Raises BudgetExceeded or RevisionMoved."""
    authorized, source, plan, evaluated = _planned(session, principal, service, body.query)
    dataset, event = authorized.resource, plan.event()
    if dataset.status != "ready":
        raise Conflict("the dataset is not ready; complete its upload, then ask", code="dataset_not_ready")
    source = budgets.lock(session, source)
    jobs.require_revision(session, source, body.require_revision)
    job = Job(
        tenant_id=dataset.tenant_id,
        id=new_id("job"),
        kind="query",
        source_id=source.id,
        dataset_id=dataset.id,
        principal_id=principal.id,
        request_id=principal.request_id,
        spec_id="",
        status="queued",
        steps=event.steps,
        epsilon=event.epsilon,
        delta=source.delta,
        reserved_bytes=quotas.sealed_bytes(_most_bytes(plan)),
    )
    budgets.reserve(session, source, job_id=job.id, principal_id=principal.id, event=event, blocks=(dataset.block,))
    # As it is asked, with models by their ids: a name may come to mean another.
    query = body.query.model_copy(update={"dataset": dataset.id})
    job.spec_id = vault.seal_object(
        session,
        service.blobs,
        query.model_dump_json().encode(),
        tenant_id=dataset.tenant_id,
        kind="spec",
    )
    session.add(job)
    session.flush()  # the grants name the row
    grants.grant_to_creator(session, principal, job)
    quotas.require_job(session, principal, service, job)
    audit.allowed(session, authorized, "dataset.query", dataset.id)
    for model, version in evaluated:
        audit.allowed(session, model, "model.evaluate", f"{model.resource.id}/{version.version}")
    return jobs.view(job)


def get(session: Session, principal: Principal, service: Service, job_id: str) -> wire.Answer:
    """The answers of a query that is done, for whoever may see the job: they were released and charged for."""
    job = policy.find(session, principal, "job.read", Job, job_id).resource
    if job.kind != "query":
        raise Conflict("this job trains a model and answers no query; look at its model")
    if job.result_id is None:
        raise Conflict(f"the query is {job.status} and has no answer; wait until it is done", code="no_answer")
    sealed = vault.open_object(session, service.blobs, tenant_id=job.tenant_id, object_id=job.result_id)
    return wire.Answer.model_validate_json(sealed)


def padded(answer: wire.Answer) -> bytes:
    """An answer as it is sealed: a size on the disk tells no digits."""
    plain = answer.model_dump_json().encode()
    return plain.ljust(_pages(len(plain)))


def _most_bytes(plan: QueryPlan) -> int:
    """The most that `padded` gives of any answer to this plan."""
    length = _ANSWER_BYTES
    for planned in plan.queries:
        length += _RESULT_BYTES + sum(len(json.dumps(each)) + 1 for each in planned.classes)
        length += sum(_BIN_BYTES * getattr(part.vector, "size", 1) for part in planned.parts)
    return _pages(length)


def _pages(length: int) -> int:
    return -(-length // _PAGE) * _PAGE


def _planned(
    session: Session, principal: Principal, service: Service, query: QueryRequest
) -> tuple[Authorized[Dataset], Source, QueryPlan, list[tuple[Authorized[Model], ModelVersion]]]:
    """The dataset, its source and the plan, with the model versions that the query evaluates, if the principal may use them all."""
    authorized = policy.find(session, principal, "dataset.train", Dataset, query.dataset)
    dataset = authorized.resource
    source = session.get_one(Source, (dataset.tenant_id, dataset.source_id))
    evaluated, schemas = [], {}
    for each in query.queries:
        if not isinstance(each, Evaluation) or (each.model, each.version) in schemas:
            continue
        model, version = models.find_version(session, principal, each.model, each.version)
        if version.tenant_id != dataset.tenant_id:
            raise Conflict(
                "the model is another tenant's than the dataset; evaluate it as an app of the dataset's tenant"
            )
        evaluated.append((model, version))
        schemas[each.model, each.version] = models.schema_of(session, service, version)
    plan = QueryPlan.of(
        query, schema=datasets.schema_of(dataset), unit=source.unit, adjacency=source.adjacency, models=schemas
    )
    policy.require_epsilon(session, authorized, "dataset.train", plan.event().epsilon)
    return authorized, source, plan, evaluated
