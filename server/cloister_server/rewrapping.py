"""Data keys from one key-encryption key to another: where they lie, and how each is wrapped anew. Knows SQL and providers; no plan.

What the data keys sealed is not touched, and all of it opens at every instant.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqlalchemy import ColumnElement, ScalarResult, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from cloister_privacy.sealing import Context, InvalidWrap, KeyMissing, KeyProviderError, KeystoreDamaged
from cloister_server import vault
from cloister_server.errors import Conflict
from cloister_server.keyring import KeyRing
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS, for_tenants
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import SealedObject, SigningKey, TenantKey

__all__ = ["Wraps", "rewrap"]

_AT_ONCE = 200
"""Data keys that one transaction rewraps: the most that a killed process has to do again."""

_PAUSE_S = 0.05
"""Before rows that another transaction held are looked at again."""


@dataclass(frozen=True, slots=True)
class Wraps:
    """Where the keys lie that a KEK wraps: a tenant's data keys, or the service's own."""

    table: type[SealedObject | SigningKey]
    id: InstrumentedAttribute[str]
    kind: InstrumentedAttribute[str]
    version: InstrumentedAttribute[int]
    wrapped: InstrumentedAttribute[bytes]
    tenant_id: str

    @classmethod
    def of(cls, tenant_id: str) -> Wraps:
        if tenant_id == vault.SYSTEM:
            own = SigningKey
            return cls(own, own.id, own.purpose, own.key_version, own.wrapped, tenant_id)
        each = SealedObject
        return cls(each, each.id, each.kind, each.key_version, each.wrapped_key, tenant_id)

    def are_before(self, version: int) -> ColumnElement[bool]:
        """Those that are wrapped by a version before this one."""
        older = self.version < version
        return older if self.table is SigningKey else older & (SealedObject.tenant_id == self.tenant_id)

    def count(self, session: Session, version: int) -> int:
        return session.scalar(select(func.count()).select_from(self.table).where(self.are_before(version))) or 0


def rewrap(service: Service, key: TenantKey, *, on_page: Callable[[int], None]) -> tuple[int, list[str]]:
    """Wrap every older data key under `key`, some in each transaction, until none is left but those that do not open.

    How many were rewrapped, and the ids of those; `on_page` is told how many are by now.

    Providers are asked outside of the transactions, which may be slow; a row is written only if it still is what was unwrapped.
    """
    wraps, rewrapped, unopened = Wraps.of(key.tenant_id), 0, set[str]()
    with reading(service.engine, for_tenants(key.tenant_id)) as session:
        keys = {
            each.version: each
            for each in session.scalars(select(TenantKey).where(TenantKey.tenant_id == key.tenant_id))
        }
    while True:
        missed = 0
        for page in _pages(service, wraps, key.version):
            fresh = {}
            for object_id, kind, version, wrapped in page:
                context = Context(tenant=key.tenant_id, kind=kind, object=object_id)
                secret = _opened(service.keys, keys.get(version), wrapped, context)
                if secret is None:
                    unopened.add(object_id)
                else:
                    provider = service.keys.of(key.provider)
                    rewrap = provider.wrap(key.key_id, secret, context=context)
                    # It takes the place of the only one that opens.
                    if not hmac.compare_digest(provider.unwrap(key.key_id, rewrap, context=context), secret):
                        raise KeyProviderError(
                            f"key provider {key.provider!r} wraps keys that do not open; see to it, then run this again"
                        )
                    fresh[object_id] = (wrapped, rewrap)
            written = _write(service, wraps, key, fresh)
            rewrapped, missed = rewrapped + written, missed + len(fresh) - written
            on_page(rewrapped)
        if not missed:
            return rewrapped, sorted(unopened)
        time.sleep(_PAUSE_S)


def _pages(service: Service, wraps: Wraps, version: int) -> Iterator[list[tuple[str, str, int, bytes]]]:
    """What is wrapped by versions before this one, some at a time: id, kind, version and wrapped form."""
    after, older = "", select(wraps.id, wraps.kind, wraps.version, wraps.wrapped).where(wraps.are_before(version))
    while True:
        with reading(service.engine, ALL_TENANTS) as session:
            page = session.execute(older.where(wraps.id > after).order_by(wraps.id).limit(_AT_ONCE)).all()
        if not page:
            return
        yield [(object_id, kind, by, wrapped) for object_id, kind, by, wrapped in page]
        after = page[-1][0]


def _opened(keys: KeyRing, key: TenantKey | None, wrapped: bytes, context: Context) -> bytes | None:
    """The data key; None where this row is beyond help. Raises KeyProviderError where it may open another time."""
    if key is None or key.state == "destroyed":
        return None
    try:
        return keys.of(key.provider).unwrap(key.key_id, wrapped, context=context)
    except (InvalidWrap, KeyMissing, KeystoreDamaged):
        return None


def _write(service: Service, wraps: Wraps, key: TenantKey, fresh: dict[str, tuple[bytes, bytes]]) -> int:
    """Put new wrapped forms, by the row's id, in place of the ones they were made from; how many there were to replace."""
    written = 0
    with writing(service.engine, for_tenants(key.tenant_id)) as session:
        active = vault.active_key(session, key.tenant_id)
        if active is None or active.version != key.version:
            raise Conflict("the tenant's key was changed or destroyed meanwhile; run the command again")
        # A row that another transaction holds is not waited for: two that wait for each other's would wait for ever.
        rows: ScalarResult[SealedObject | SigningKey] = session.scalars(
            select(wraps.table)
            .where(wraps.are_before(key.version), wraps.id.in_(fresh))
            .with_for_update(skip_locked=True)
        )
        for row in rows:
            before, after = fresh[row.id]
            if getattr(row, wraps.wrapped.key) == before:
                setattr(row, wraps.wrapped.key, after)
                row.key_version = key.version
                written += 1
    return written
