"""One start of a job, training or query, from its keys to its settlement. Knows SQL, the vault and processes; trains nothing.

Whoever runs an attempt holds the job's lock, and the training child inherits it: as long as any child of a job lives,
no other can start. Every start takes a new fencing number, and only the newest may write.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister.wire.jobs import FINAL
from cloister.wire.plans import TrainingSpec
from cloister.wire.queries import Evaluation, QueryRequest
from cloister_server import budgets, datasets, models, processes, vault
from cloister_server.service import Service
from cloister_server.store.acting import for_tenants
from cloister_server.store.queries import is_suspended
from cloister_server.store.session import writing
from cloister_server.store.tables import Attempt, Dataset, Job, ModelVersion, SealedObject, Weights
from cloister_server.work.template import Template

__all__ = ["GRACE_S", "abandon", "run_attempt"]

log = logging.getLogger(__name__)

MAX_DEATHS = 8
"""Attempts that may die one after the other without a new checkpoint before the job fails."""

MAX_CHUNKS = 200
"""A job has at most about this many chunks, each with a checkpoint under a key of its own."""

GRACE_S = 6.0
"""How long a training child may take to reach a chunk boundary when the worker stops."""

_LOOK_S = 0.05


def run_attempt(
    service: Service, tenant_id: str, job_id: str, *, template: Template, stopping: threading.Event
) -> Literal["over", "again"]:
    """Conclude the job if its last attempt allows it, else start the next attempt and see it through."""
    path = service.settings.data_dir / "locks" / f"{job_id}.lock"
    with processes.locked(path, wait_s=30, what=f"job {job_id}") as lock:
        if _conclude(service, tenant_id, job_id):
            path.unlink(missing_ok=True)
            return "over"
        if stopping.is_set():
            return "again"
        child = template.fork(lock=lock)  # first: an attempt that began and got no child would count as died
        try:
            message = None if stopping.is_set() else _begin(service, tenant_id, job_id)
            if message is not None:
                log.info("attempt.started", extra={"job_id": job_id, "attempt": message["attempt"]})
                child.tell(message)
                while child.poll() is None and not stopping.wait(_LOOK_S):
                    pass
        finally:
            processes.end_group(child, grace_s=GRACE_S if stopping.is_set() else 0)
        if message is None:
            return "again"
        log.info("attempt.ended", extra={"job_id": job_id, "attempt": message["attempt"], "exit": child.returncode})
        return "over" if _conclude(service, tenant_id, job_id) else "again"


def abandon(service: Service, tenant_id: str, job_id: str) -> None:
    """Fail a job that cannot be run or published for a reason that trying again does not mend; what it opened is charged."""
    path = service.settings.data_dir / "locks" / f"{job_id}.lock"
    with (
        processes.locked(path, wait_s=30, what=f"job {job_id}"),
        writing(service.engine, for_tenants(tenant_id)) as session,
    ):
        job = session.get_one(Job, (tenant_id, job_id), with_for_update=True)
        if job.status not in FINAL:
            _close(session, service, job, "failed", error_code="internal")


def _conclude(service: Service, tenant_id: str, job_id: str) -> bool:
    """Publish or settle, if the last attempt said how it ended; True when the job is over. No child of it is alive."""

    def concluded(session: Session) -> bool:
        job = session.get_one(Job, (tenant_id, job_id), with_for_update=True)
        if job.status in FINAL:
            return True
        attempts = list(
            session.scalars(
                select(Attempt)
                .where(Attempt.tenant_id == tenant_id, Attempt.job_id == job_id)
                .order_by(Attempt.number.desc())
                .limit(MAX_DEATHS)
            )
        )
        outcome = attempts[0].outcome if attempts else None
        if outcome == "trained":
            spec = TrainingSpec.model_validate_json(_spec(session, service, job))
            vault.certificate_signer(
                session, service.keys
            )  # asked for before the job is closed, which is told in the log
            _close(session, service, job, "done", left=attempts[0])
            job.version = models.publish(session, service, job, attempt=attempts[0], spec=spec)
        elif outcome == "answered":
            assert attempts[0].result is not None  # noqa: S101 (an 'answered' attempt has left one)
            _close(session, service, job, "done", left=attempts[0])
            job.result_id = attempts[0].result["answer_id"]
        elif job.cancel_requested or outcome == "cancelled":
            _close(session, service, job, "cancelled")
        elif outcome in ("budget", "diverged", "internal"):
            _close(session, service, job, "failed", error_code=outcome)
        elif len(attempts) == MAX_DEATHS and all(a.outcome is None and a.from_step == job.steps_done for a in attempts):
            _close(session, service, job, "failed", error_code="gave_up")
        return job.status in FINAL

    return service.write(for_tenants(tenant_id), concluded)


def _close(
    session: Session,
    service: Service,
    job: Job,
    status: str,
    *,
    error_code: str | None = None,
    left: Attempt | None = None,
) -> None:
    """Settle the job. Of its objects those that the attempt `left` stay; nobody resumes it, so its checkpoint goes."""
    charged = budgets.settle(session, job)
    job.status, job.error_code = status, error_code
    if left is not None and left.result is not None and "sealed_bytes" in left.result:
        kept = left.result.get("weights_id") or left.result["answer_id"]
        session.get_one(SealedObject, (job.tenant_id, kept)).size = left.result["sealed_bytes"]
    if job.checkpoint_id is not None:
        vault.forget_objects(session, service.blobs, [job.checkpoint_id], tenant_id=job.tenant_id)
        job.checkpoint_id = None
    log.info("job.over", extra={"job_id": job.id, "status": status, "charged": charged})


def _spec(session: Session, service: Service, job: Job) -> bytes:
    return vault.open_object(session, service.blobs, tenant_id=job.tenant_id, object_id=job.spec_id)


def _begin(service: Service, tenant_id: str, job_id: str) -> dict[str, Any] | None:
    """Take the next fencing number and mint the keys that this attempt may use; the message for its child.

    None where the job was cancelled since it was last looked at. Raises TenantSuspended where nothing is to begin.
    """

    def begun(session: Session) -> dict[str, Any] | None:
        job = session.get_one(Job, (tenant_id, job_id), with_for_update=True)
        if job.cancel_requested or job.status in FINAL:
            return None
        if is_suspended(session, tenant_id):
            raise budgets.TenantSuspended("the tenant is suspended; the job waits until it is resumed")
        job.attempt += 1
        job.status = "running"
        session.add(Attempt(tenant_id=tenant_id, job_id=job_id, number=job.attempt, from_step=job.steps_done))
        keys = _Keys(session, service, job)
        return {
            "settings": service.settings.dump_with_secrets(),
            "tenant": tenant_id,
            "job": job_id,
            "attempt": job.attempt,
            "kind": job.kind,
            "spec": keys.of(job.spec_id),
            **(_for_query(keys, job) if job.kind == "query" else _for_training(keys, job)),
        }

    return service.write(for_tenants(tenant_id), begun)


def _for_training(keys: _Keys, job: Job) -> dict[str, Any]:
    """What a training child is given besides: the dataset's keys, those of where it starts, and fresh ones for what it leaves."""
    session, service, tenant_id = keys.session, keys.service, job.tenant_id
    spec = TrainingSpec.model_validate_json(_spec(session, service, job))
    chunk_steps = max(service.settings.chunk_steps, -(-job.steps // MAX_CHUNKS))
    checkpoints = -(-(job.steps - job.steps_done) // chunk_steps)
    weights = keys.fresh("weights")  # before the many: what a run takes before its last question is made anew
    initial = session.get_one(Weights, (tenant_id, spec.initial.id)).object_id if spec.initial is not None else None
    return {
        "chunk_steps": chunk_steps,
        "initial": keys.of(initial) if initial else None,
        "parts": [part for each in (spec.dataset, *spec.with_datasets) for part in keys.of_parts(each)],
        "resume": keys.of(job.checkpoint_id) if job.checkpoint_id else None,
        "checkpoints": keys.fresh("checkpoint", checkpoints),
        "weights": weights[0],
    }


def _for_query(keys: _Keys, job: Job) -> dict[str, Any]:
    """What a child that answers a query is given besides: the dataset's keys, those of the models it evaluates, and a fresh one."""
    query = QueryRequest.model_validate_json(_spec(keys.session, keys.service, job))
    versions = {(each.model, each.version) for each in query.queries if isinstance(each, Evaluation)}
    return {
        "parts": keys.of_parts(job.dataset_id),
        "models": [
            {
                "model": model,
                "version": version,
                "weights": keys.of(keys.session.get_one(ModelVersion, (job.tenant_id, model, version)).weights_id),
            }
            for model, version in sorted(versions)
        ],
        "answer": keys.fresh("answer")[0],
    }


@dataclass(frozen=True, slots=True)
class _Keys:
    """The data keys for one attempt of a job, as a child's message has them."""

    session: Session
    service: Service
    job: Job

    def of(self, object_id: str) -> dict[str, str]:
        return vault.data_key(self.session, tenant_id=self.job.tenant_id, object_id=object_id).to_message()

    def of_parts(self, dataset_id: str) -> list[dict[str, str]]:
        dataset = self.session.get_one(Dataset, (self.job.tenant_id, dataset_id))
        parts = datasets.part_objects(self.session, self.service, dataset)
        return [key.to_message() for key in vault.data_keys(self.session, parts, tenant_id=self.job.tenant_id)]

    def fresh(self, kind: vault.Kind, count: int = 1) -> list[dict[str, str]]:
        made = vault.new_data_keys(self.session, tenant_id=self.job.tenant_id, kind=kind, count=count, job=self.job)
        return [key.to_message() for key in made]
