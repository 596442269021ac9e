"""How much a tenant's sealed objects may take, and do. Counts from public numbers alone: of a dataset what it declares.

It is asked under the lock of the tenant's row, which is a transaction's last: of two that would both just fit one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cloister.wire.columns import Schema
from cloister.wire.rows import arrays_of, row_bytes
from cloister_privacy.sealing.chunks import CHUNK_BYTES, Header
from cloister_server import audit, policy, vault
from cloister_server.errors import Conflict, Invalid
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.tables import Dataset, SealedObject, Tenant

__all__ = ["Usage", "dataset_bytes", "require", "require_sealed", "set_quota", "usage"]

_SCHEMA: TypeAdapter[dict[str, Any]] = TypeAdapter(Schema)
_LARGEST = 2**60

_FORM_BYTES, _ARRAY_BYTES = 160, 128
"""The most that the header of a part takes beside names and shapes, altogether and for each array."""
_MANIFEST_BYTES, _ENTRY_BYTES = 160, 96
"""The most that a manifest takes, and each part in it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant's sealed objects take, in bytes, and the most that they may; None is without a bound."""

    used: int
    allowed: int | None


def usage(session: Session, tenant_id: str) -> Usage:
    """Datasets count whole from their declaration on, whatever of them is uploaded; all else counts as it is stored."""
    declared = session.execute(
        select(Dataset.columns, Dataset.capacity_rows, Dataset.part_rows).where(Dataset.tenant_id == tenant_id)
    )
    datasets = sum(dataset_bytes(columns, rows, part_rows) for columns, rows, part_rows in declared)
    of_datasets = ("part", "manifest")
    stored = select(func.coalesce(func.sum(SealedObject.size), 0)).where(
        SealedObject.tenant_id == tenant_id, SealedObject.kind.not_in(of_datasets)
    )
    allowed = session.scalars(select(Tenant.quota_bytes).where(Tenant.id == tenant_id)).one()
    return Usage(datasets + int(session.scalar(stored) or 0), allowed)


def dataset_bytes(columns: Mapping[str, Any], capacity_rows: int, part_rows: int) -> int:
    """What a dataset takes sealed, parts and manifest, however many rows it has: at most some hundred bytes a part too much."""
    schema = _SCHEMA.validate_python(columns)
    full, rest = divmod(capacity_rows, part_rows)
    parts = full + (1 if rest else 0)
    return (
        full * _part_bytes(schema, part_rows)
        + (_part_bytes(schema, rest) if rest else 0)
        + _sealed_bytes(_MANIFEST_BYTES + parts * _ENTRY_BYTES)
    )


def require(session: Session, principal: Principal, *, tenant_id: str) -> None:
    """Raise Conflict `quota_exceeded` unless the tenant's quota admits what this transaction has added and flushed.

    It locks the tenant's row, as the chain does at the transaction's end: whatever else is locked must be locked before.
    """
    # The audit row of a principal from another tenant locks that one's: both are locked, in the order in which chains are.
    for each in sorted({tenant_id, principal.tenant_id}):
        session.execute(select(Tenant.id).where(Tenant.id == each).with_for_update())
    if session.scalars(select(Tenant.quota_bytes).where(Tenant.id == tenant_id)).one() is None:
        return
    now = usage(session, tenant_id)
    if now.allowed is None or now.used <= now.allowed:
        return
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


def set_quota(session: Session, principal: Principal, quota_bytes: int | None) -> Usage:
    """Let the operator's tenant take so much from now on; None lifts the bound. What it has stays, and what it has begun ends."""
    if quota_bytes is not None and not 0 <= quota_bytes <= _LARGEST:
        raise Invalid(f"a quota is 0 to {_LARGEST} bytes, not {quota_bytes}; or none")
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    tenant = authorized.resource
    tenant.quota_bytes = quota_bytes
    audit.allowed(session, authorized, "tenant.quota", tenant.id)
    session.flush()  # it is asked for next
    return usage(session, tenant.id)


def _part_bytes(schema: dict[str, Any], rows: int) -> int:
    """The sealed form of a part of so many rows, whose header tells of each array its name, dtype, shape and place."""
    arrays = arrays_of(schema)
    header = _FORM_BYTES + sum(_ARRAY_BYTES + 6 * len(name) + 20 * len(shape) for name, _, shape in arrays)
    return _sealed_bytes(header + 8 + rows * row_bytes(schema))


def _sealed_bytes(length: int) -> int:
    return Header.fresh(length, chunk_bytes=CHUNK_BYTES).sealed_length
