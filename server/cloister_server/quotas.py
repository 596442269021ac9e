"""What a tenant may take and do at most: bytes of sealed objects, jobs at once, requests a minute. Counts from public numbers alone.

Bytes and jobs are asked for under the lock of the tenant's row, which is a transaction's last: of two that would both just fit one is
refused. A dataset counts whole from its declaration on, a job for all that it may come to store from when it is queued: so what was
begun always ends within the quota. Requests are counted elsewhere (`request_rate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cloister.wire.columns import Schema
from cloister.wire.jobs import FINAL
from cloister.wire.plans import TrainingSpec
from cloister.wire.rows import arrays_of, row_bytes
from cloister_privacy.sealing.chunks import CHUNK_BYTES, Header
from cloister_server import audit, policy, request_rate, vault
from cloister_server.errors import Conflict, Invalid
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.tables import Dataset, Job, RequestCount, SealedObject, Tenant

__all__ = [
    "Kind",
    "Quota",
    "Usage",
    "dataset_bytes",
    "require",
    "require_job",
    "require_sealed",
    "sealed_bytes",
    "set_quotas",
    "training_bytes",
    "usage",
]

Kind = Literal["storage", "jobs", "requests_per_minute"]

_SCHEMA: TypeAdapter[dict[str, Any]] = TypeAdapter(Schema)
_LARGEST: Mapping[Kind, int] = {"storage": 2**60, "jobs": 10**6, "requests_per_minute": 10**9}
_COLUMNS: Mapping[Kind, str] = {
    "storage": "quota_bytes",
    "jobs": "quota_jobs",
    "requests_per_minute": "quota_requests",
}

_FORM_BYTES, _ARRAY_BYTES = 160, 128
"""The most that the header of a part takes beside names and shapes, altogether and for each array."""
_MANIFEST_BYTES, _ENTRY_BYTES = 160, 96
"""The most that a manifest takes, and each part in it."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant uses of something, and the most that it may; None is without a bound."""

    used: int
    allowed: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Storage in bytes, jobs that are queued or running, and requests that are taken of this minute's."""

    storage: Quota
    jobs: Quota
    requests_per_minute: Quota


def usage(session: Session, tenant_id: str) -> Usage:
    """All of it at one moment: it is one statement.

    Datasets count whole from their declaration on, whatever of them is uploaded, and jobs by what is reserved for them until they are
    over; all else counts as it is stored.
    """
    under_way = (Job.tenant_id == tenant_id, Job.status.not_in(FINAL))
    # Of a job that has a reservation what it has stored so far is within that.
    reserving = select(Job.id).where(*under_way, Job.reserved_bytes > 0, Job.id == SealedObject.job_id).exists()
    stored = select(func.coalesce(func.sum(SealedObject.size), 0)).where(
        SealedObject.tenant_id == tenant_id, SealedObject.kind.not_in(("part", "manifest")), ~reserving
    )
    reserved = select(func.coalesce(func.sum(Job.reserved_bytes), 0)).where(*under_way)
    rows = session.execute(
        select(
            Tenant.quota_bytes,
            Tenant.quota_jobs,
            Tenant.quota_requests,
            stored.scalar_subquery().label("stored"),
            reserved.scalar_subquery().label("reserved"),
            select(func.count()).select_from(Job).where(*under_way).scalar_subquery().label("jobs"),
            request_rate.taken(tenant_id).scalar_subquery().label("requests"),
            Dataset.columns,
            Dataset.capacity_rows,
            Dataset.part_rows,
        )
        .outerjoin(Dataset, Dataset.tenant_id == Tenant.id)
        .where(Tenant.id == tenant_id)
    ).all()
    declared = sum(dataset_bytes(row.columns, row.capacity_rows, row.part_rows) for row in rows if row.part_rows)
    told = rows[0]
    return Usage(
        storage=Quota(declared + int(told.stored) + int(told.reserved), told.quota_bytes),
        jobs=Quota(int(told.jobs), told.quota_jobs),
        requests_per_minute=Quota(int(told.requests), told.quota_requests),
    )


def dataset_bytes(columns: Mapping[str, Any], capacity_rows: int, part_rows: int) -> int:
    """What a dataset takes sealed, parts and manifest, however many rows it has: at most some hundred bytes a part too much."""
    schema = _SCHEMA.validate_python(columns)
    full, rest = divmod(capacity_rows, part_rows)
    parts = full + (1 if rest else 0)
    return (
        full * _part_bytes(schema, part_rows)
        + (_part_bytes(schema, rest) if rest else 0)
        + sealed_bytes(_MANIFEST_BYTES + parts * _ENTRY_BYTES)
    )


def training_bytes(spec: TrainingSpec) -> int:
    """The most that a run has sealed at any moment: its last checkpoint beside the next one, or beside the weights."""
    from cloister_privacy.training.stored import stored

    told = stored(spec)
    return sealed_bytes(told.checkpoint) + max(sealed_bytes(told.checkpoint), sealed_bytes(told.weights))


def sealed_bytes(length: int) -> int:
    """What so many bytes take sealed."""
    return Header.fresh(length, chunk_bytes=CHUNK_BYTES).sealed_length


def require(session: Session, principal: Principal, *, tenant_id: str) -> None:
    """Raise Conflict `quota_exceeded` unless the tenant's storage quota admits what this transaction has added and flushed.

    It locks the tenant's row, as the chain does at the transaction's end: whatever else is locked must be locked before.
    """
    _lock(session, principal, tenant_id)
    if session.scalars(select(Tenant.quota_bytes).where(Tenant.id == tenant_id)).one() is None:
        return
    if _is_over(usage(session, tenant_id).storage):
        # Without a figure: it would tell of datasets that the client may not see.
        raise Conflict(
            "the tenant that this is stored for has no room left in its quota; delete uploads that were not completed, or ask the "
            "server's operator, who sees the figures, for a larger one",
            code="quota_exceeded",
        )


def require_sealed(session: Session, principal: Principal, service: Service, *, tenant_id: str, object_id: str) -> None:
    """As `require`, of an object that this transaction sealed; where it is refused its blob is deleted."""
    session.flush()
    try:
        require(session, principal, tenant_id=tenant_id)
    except Conflict:
        vault.abandon_object(service.blobs, object_id, tenant_id=tenant_id)
        raise


def require_job(session: Session, principal: Principal, service: Service, job: Job) -> None:
    """Raise Conflict `job_quota_exceeded` or `quota_exceeded` unless the quotas of the job's tenant admit it and all it may store.

    For the transaction that queues the job, which is rolled back then: nothing is charged. It locks as `require` does.
    """
    session.flush()
    _lock(session, principal, job.tenant_id)
    if session.scalars(select(Tenant.quota_jobs).where(Tenant.id == job.tenant_id)).one() is not None and _is_over(
        usage(session, job.tenant_id).jobs
    ):
        vault.abandon_object(service.blobs, job.spec_id, tenant_id=job.tenant_id)
        raise Conflict(
            "the tenant that this would run for has as many jobs queued and running as its quota allows; wait until one is over, "
            "cancel one, or ask the server's operator for a larger quota",
            code="job_quota_exceeded",
        )
    require_sealed(session, principal, service, tenant_id=job.tenant_id, object_id=job.spec_id)


def set_quotas(session: Session, principal: Principal, quotas: Mapping[Kind, int | None]) -> Usage:
    """Bound what the operator's tenant may take from now on; None lifts a bound, and what is not named stays as it is.

    What the tenant has stays, and what it has begun ends.
    """
    for kind, allowed in quotas.items():
        if allowed is not None and not 0 <= allowed <= _LARGEST[kind]:
            raise Invalid(f"a quota of {kind} is 0 to {_LARGEST[kind]}, not {allowed}; or none")
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    tenant = authorized.resource
    for kind, allowed in quotas.items():
        setattr(tenant, _COLUMNS[kind], allowed)
    if tenant.quota_requests is not None and session.get(RequestCount, tenant.id) is None:
        session.add(RequestCount(tenant_id=tenant.id, minute=0, taken=0))
    audit.allowed(session, authorized, "tenant.quota", tenant.id)
    session.flush()  # it is asked for next
    return usage(session, tenant.id)


def _lock(session: Session, principal: Principal, tenant_id: str) -> None:
    # The audit row of a principal from another tenant locks that one's: both are locked, in the order in which chains are.
    for each in sorted({tenant_id, principal.tenant_id}):
        session.execute(select(Tenant.id).where(Tenant.id == each).with_for_update())


def _is_over(quota: Quota) -> bool:
    return quota.allowed is not None and quota.used > quota.allowed


def _part_bytes(schema: dict[str, Any], rows: int) -> int:
    """The sealed form of a part of so many rows, whose header tells of each array its name, dtype, shape and place."""
    arrays = arrays_of(schema)
    header = _FORM_BYTES + sum(_ARRAY_BYTES + 6 * len(name) + 20 * len(shape) for name, _, shape in arrays)
    return sealed_bytes(header + 8 + rows * row_bytes(schema))
