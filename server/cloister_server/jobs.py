"""Training jobs: started with their whole reservation in one transaction, watched, cancelled. Knows SQL; trains nothing."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister.wire import jobs as wire
from cloister_server import audit, budgets, grants, ledger, plans, policy, quotas, vault, weights
from cloister_server.errors import Conflict, Forbidden, RevisionMoved
from cloister_server.policy import Authorized
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.paging import page_of
from cloister_server.store.tables import Dataset, Job, Model, Source, new_id

__all__ = ["FAILURES", "cancel", "get", "listed", "require_revision", "require_start", "start", "view"]

FAILURES = {
    "budget": "the steps that were left to run do not fit the budget any more; nothing was published; ask an owner to raise it",
    "diverged": "the noisy weights are no longer finite; nothing was published; lower the learning rate",
    "gave_up": "the job's process died repeatedly without progress; nothing was released; tell the operator the request id",
    "internal": "the job's process failed; nothing was released; tell the operator the request id",
}
"""Why a job can fail, in words that say nothing of rows."""


def require_start(session: Session, principal: Principal, service: Service, body: wire.StartJob) -> int:
    """Refuse a run whose network could not start as its spec says; the most bytes that any other comes to store.

    What it looks at never changes, and it writes nothing.
    """
    spec = body.training
    read = plans.readable(session, principal, spec)
    plans.check_spec(read, spec)
    start = weights.usable(session, principal, spec.initial.id if spec.initial else None, dataset=read.first)
    weights.require_start(session, service, spec.architecture, spec.lora, start)
    return quotas.training_bytes(spec)


def start(
    session: Session, principal: Principal, service: Service, body: wire.StartJob, *, reserved_bytes: int
) -> wire.Job:
    """Reserve the whole run and queue it, in one transaction; `require_start` has let it pass, and told `reserved_bytes`.

    Raises BudgetExceeded, RevisionMoved, or Conflict where a quota does not admit it, with the ledger unchanged. A worker picks the
    job up from its row.
    """
    spec = body.training
    read = plans.readable(session, principal, spec)
    dataset, source = read.first, budgets.lock(session, read.source)
    plan = plans.check_spec(read, spec)
    read.require_epsilon(session, plan.epsilon())
    start = weights.usable(session, principal, spec.initial.id if spec.initial else None, dataset=dataset)
    weights.require_named(start, spec.initial)
    if any(each.status != "ready" for each in read.datasets):
        raise Conflict("the dataset is not ready; complete its upload, then train", code="dataset_not_ready")
    require_revision(session, source, body.require_revision)
    job = Job(
        tenant_id=dataset.tenant_id,
        id=new_id("job"),
        source_id=source.id,
        dataset_id=dataset.id,
        principal_id=principal.id,
        request_id=principal.request_id,
        spec_id="",
        status="queued",
        steps=plan.steps,
        epsilon=plan.epsilon(),
        delta=plan.delta,
        reserved_bytes=reserved_bytes,
    )
    budgets.reserve(session, source, job_id=job.id, principal_id=principal.id, event=plan.event(), blocks=read.blocks)
    job.model_id = _claim_model(session, read.authorized[0], name=body.model).id
    job.spec_id = vault.seal_object(
        session,
        service.blobs,
        spec.model_dump_json().encode(),
        tenant_id=dataset.tenant_id,
        kind="spec",
    )
    session.add(job)
    session.flush()  # the grants name the row
    grants.grant_to_creator(session, principal, job)
    quotas.require_job(session, principal, service, job)
    for authorized in read.authorized:
        audit.allowed(session, authorized, "dataset.train", authorized.resource.id)
    if start is not None:
        audit.allowed(session, start, "weights.use", start.resource.id)
    return view(job)


def require_revision(session: Session, source: Source, asked: int | None) -> None:
    """Raise RevisionMoved where the ledger is not at the revision that a plan was quoted at. The caller holds its lock."""
    revision = ledger.newest(session, source)
    if asked is not None and asked != revision:
        raise RevisionMoved(
            f"the source's ledger moved from revision {asked} to {revision} since the plan was made; plan again",
            details={"revision": revision},
        )


def get(session: Session, principal: Principal, job_id: str) -> wire.Job:
    return view(policy.find(session, principal, "job.read", Job, job_id).resource)


def listed(session: Session, principal: Principal, *, cursor: str | None, limit: int) -> wire.Page:
    """The jobs that the principal may see."""
    return page_of(session, principal, Job, cursor=cursor, limit=limit, view=view)


def cancel(session: Session, principal: Principal, job_id: str) -> wire.Job:
    """Ask a job to stop at its next chunk boundary. It publishes nothing; steps that ran stay charged.

    A job that is over already stays as it is.
    """
    authorized = policy.find(session, principal, "job.cancel", Job, job_id)
    key = (authorized.resource.tenant_id, authorized.resource.id)
    job = session.get_one(Job, key, populate_existing=True, with_for_update=True)
    if job.status not in wire.FINAL and not job.cancel_requested:
        job.cancel_requested = True
        if job.status == "running":
            job.status = "cancelling"
        elif job.attempt == 0:
            # No attempt ever started, so nothing was opened and nothing runs: the reservation is free at once.
            budgets.settle(session, job)
            job.status = "cancelled"
        audit.allowed(session, authorized, "job.cancel", job.id)
    return view(job)


def view(job: Job) -> wire.Job:
    return wire.Job(
        id=job.id,
        kind=job.kind,
        model=job.model_id,
        dataset=job.dataset_id,
        status=job.status,
        steps=job.steps,
        steps_done=job.steps_done,
        epsilon=job.epsilon,
        delta=job.delta,
        version=job.version,
        error=FAILURES.get(job.error_code) if job.error_code else None,
        error_code=job.error_code,
        request_id=job.request_id,
        created=job.created,
    )


def _claim_model(session: Session, authorized: Authorized[Dataset], *, name: str) -> Model:
    """The model that the job will publish to: made where there is none, else the principal must be let publish to it."""
    principal, tenant_id = authorized.principal, authorized.resource.tenant_id
    model = session.scalars(select(Model).where(Model.tenant_id == tenant_id, Model.name == name)).one_or_none()
    if model is not None:
        try:
            return policy.authorize(session, principal, "model.publish", model).resource
        except Forbidden:
            raise Conflict(
                f"the model name {name!r} cannot be used; choose another, or ask its owner for a grant of model.publish"
            ) from None
    model = Model(tenant_id=tenant_id, id=new_id("mdl"), name=name, champion=0)
    session.add(model)
    session.flush()  # the grants name the row
    grants.grant_to_creator(session, principal, model)
    audit.allowed(session, authorized, "model.create", model.id)
    return model
