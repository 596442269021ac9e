"""All that a tenant has here, as the members of a bundle that the tenant alone opens. Knows SQL and the vault; no files.

The operator makes it, for a key that the tenant gave: what lies in the bundle's file is sealed for that key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister.wire.bundles import CONTENTS, Contents, contents_digest, public_line, seal_members, sign_contents
from cloister.wire.rows import encode_rows, open_form
from cloister_server import audit, datasets, policy, vault
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.tables import (
    App,
    AuditRow,
    Balance,
    Block,
    Dataset,
    Grant,
    Job,
    LedgerEntry,
    Link,
    Model,
    ModelVersion,
    PrivateDeployment,
    Source,
    Table,
    Tenant,
    Weights,
    now,
)

__all__ = ["note", "sealed"]

_TABLES: tuple[type[Table], ...] = (
    Source, Block, Dataset, Model, Job, Grant, LedgerEntry, Balance, Link, AuditRow, Weights, PrivateDeployment
)  # fmt: skip
_AT_ONCE = 1000


def note(session: Session, principal: Principal) -> None:
    """Tell in the audit log that a bundle is made, before it is. Raises Denied."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    audit.allowed(session, authorized, "tenant.export", tenant.id)


def sealed(session: Session, principal: Principal, service: Service, *, recipient: X25519PublicKey) -> Iterator[bytes]:
    """The bundle's bytes, one member at a time in memory; for a snapshot. Raises TenantKeyRefused, InvalidSeal."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    return seal_members(_signed(session, service, tenant, recipient), recipient=recipient)


def _signed(
    session: Session, service: Service, tenant: Tenant, recipient: X25519PublicKey
) -> Iterator[tuple[str, bytes]]:
    digests: list[tuple[str, str]] = []
    for name, content in _members(session, service, tenant):
        digests.append((name, hashlib.sha256(content).hexdigest()))
        yield name, content
    contents = Contents(
        tenant=tenant.id,
        tenant_name=tenant.name,
        members=len(digests),
        contents_digest=contents_digest(digests),
        recipient=public_line(recipient),
        issued=now(),
    )
    key_id, private_key = vault.certificate_signer(session, service.keys)
    yield CONTENTS, json.dumps(sign_contents(contents, private_key=private_key, key_id=key_id)).encode()


def _members(session: Session, service: Service, tenant: Tenant) -> Iterator[tuple[str, bytes]]:
    yield "tenant.json", _json({"id": tenant.id, "name": tenant.name, "created": tenant.created})
    yield "tables/apps.jsonl", _lines(_apps(session, tenant))
    for table in _TABLES:
        yield f"tables/{table.__tablename__}.jsonl", _lines(_rows(session, table, tenant))

    def opened(object_id: str) -> bytes:
        return vault.open_object(session, service.blobs, tenant_id=tenant.id, object_id=object_id)

    for version in session.scalars(_of(ModelVersion, tenant)):
        name = f"models/{version.model_id}/{version.version}"
        yield f"{name}.certificate.dsse.json", _json(version.certificate)
        yield f"{name}.safetensors", opened(version.weights_id)
    for weights in session.scalars(_of(Weights, tenant)):
        yield f"weights/{weights.id}.safetensors", opened(weights.object_id)
    for job in session.scalars(_of(Job, tenant)):
        yield f"jobs/{job.id}/spec.json", opened(job.spec_id)
        if job.result_id is not None:
            yield f"jobs/{job.id}/answer.json", opened(job.result_id).rstrip()
    for dataset in session.scalars(_of(Dataset, tenant).where(Dataset.status == "ready")):
        columns = datasets.schema_of(dataset)
        for number, part in enumerate(datasets.part_objects(session, service, dataset)):
            rows = open_form(columns, opened(part))
            if len(next(iter(rows.values()))):  # parts that only fill up the capacity hold none
                yield f"datasets/{dataset.id}/{number:05}.safetensors", encode_rows(columns, rows)


def _of(table: Any, tenant: Tenant) -> Any:
    keys = list(table.__table__.primary_key.columns)
    return select(table).where(table.tenant_id == tenant.id).order_by(*keys).execution_options(yield_per=_AT_ONCE)


def _rows(session: Session, table: type[Table], tenant: Tenant) -> Iterator[dict[str, Any]]:
    for row in session.scalars(_of(table, tenant)):
        yield {column.key: getattr(row, column.key) for column in row.__table__.columns}


def _apps(session: Session, tenant: Tenant) -> Iterator[dict[str, Any]]:
    """Who they are; the MACs of their secrets stay here."""
    for app in session.scalars(_of(App, tenant)):
        yield {"id": app.id, "name": app.name, "created": app.created}


def _lines(rows: Iterator[dict[str, Any]]) -> bytes:
    return b"".join(_json(row) + b"\n" for row in rows)


def _json(value: Any) -> bytes:
    """A digest as hexadecimal, a time as ISO 8601."""
    return json.dumps(value, default=lambda it: it.hex() if isinstance(it, bytes) else it.isoformat()).encode()
