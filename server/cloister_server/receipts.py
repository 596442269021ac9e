"""What the receipt of a shredding says: of each key, of what was deleted, and what that reaches and what it does not.

Knows SQL, and what key providers claim; destroys and signs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from importlib.metadata import version as installed
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister.wire.receipts import DestroyedKey, KeystoreCopy, Receipt
from cloister_server.keyring import LOCAL
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store.tables import KeystoreBackup, Tenant, TenantKey, now

__all__ = ["may_hold", "stated"]

_BACKUP_TAKES = timedelta(minutes=10)
"""A backup that is written down so much before or after may hold a key: files are copied first, and rows commit late."""


def stated(
    session: Session, service: Service, tenant: Tenant, *, notes: Mapping[str, Any], deleted: dict[str, int]
) -> Receipt:
    """The receipt of a tenant all of whose keys are destroyed. `notes`: `begun`, and by version what was noted of each key."""
    rows = session.scalars(select(TenantKey).where(TenantKey.tenant_id == tenant.id).order_by(TenantKey.version)).all()
    keys = tuple(_destroyed_key(service, row, notes["keys"].get(str(row.version))) for row in rows)
    copies = session.scalars(select(KeystoreBackup).order_by(KeystoreBackup.created, KeystoreBackup.id))
    held = [
        (copy, tuple(k.version for k in keys if may_hold(copy, k.provider, k.created, k.destroyed))) for copy in copies
    ]
    return Receipt(
        tenant=tenant.id,
        name=tenant.name,
        begun=datetime.fromisoformat(notes["begun"]),
        issued=now(),
        keys=keys,
        deleted=deleted,
        kept=_KEPT,
        covers=_COVERS,
        not_covered=_not_covered(service.settings, keys),
        keystore_copies=tuple(
            KeystoreCopy(id=copy.id, place=copy.place, created=copy.created, keys=versions)
            for copy, versions in held
            if versions
        ),
        server=installed("cloister"),
    )


def may_hold(copy: KeystoreBackup, provider: str, created: datetime, destroyed: datetime | None) -> bool:
    """Whether a backup of the service's own keystore may hold a key that was there from when to when."""
    is_before_its_end = destroyed is None or copy.created <= destroyed + _BACKUP_TAKES
    return provider == LOCAL and created - _BACKUP_TAKES <= copy.created and is_before_its_end


def _destroyed_key(service: Service, row: TenantKey, told: Mapping[str, Any] | None) -> DestroyedKey:
    """What the receipt says of a key: what was written down when it was destroyed, or what can be said of one that went before."""
    destroyed = row.destroyed or row.created
    told = _EARLIER if told is None else told
    days = told["waiting_days"]
    return DestroyedKey(
        version=row.version,
        key_id=row.key_id,
        provider=row.provider,
        kind=service.keys.kind_of(row.provider),
        created=row.created,
        outcome=told["outcome"],
        destroyed=destroyed,
        claim=told["claim"],
        waiting_days=days,
        gone=None if days is None else destroyed + timedelta(days=days),
    )


_EARLIER: Mapping[str, Any] = {
    "outcome": "earlier",
    "claim": "The service was told to end this version before the shredding. Whether its provider had it then, and what that "
    "promised, was not written down, and nothing is claimed of it here.",
    "waiting_days": None,
}


_KEPT = {
    "ledger": "Sources and blocks, the ledger of their privacy budgets, balances and allowances: what was spent of people's "
    "privacy stays spent.",
    "audit": "The audit log, and the chain that links it and the ledger.",
    "catalogue": "Names, declared columns and sizes of datasets; names of models; jobs with their figures, ids and digests.",
    "certificates": "The certificates of published versions, which are public statements and hold no weights.",
    "keys": "The names of the keys, and when they were made and destroyed.",
    "others": "What clients of other tenants got as answers to their own requests, where those are kept for retries.",
}

_COVERS = {
    "data": "Rows, manifests, specifications, checkpoints, weights and sealed answers in the service's store, and in every copy of "
    "that store and of its database that was made before: what would open them was wrapped by the destroyed keys.",
    "derived": "The keys by which users of the tenant's datasets were told apart, and those to which clients sealed their uploads: "
    "they were wrapped by the destroyed keys as well.",
}


def _not_covered(settings: Settings, keys: Iterable[DestroyedKey]) -> dict[str, str]:
    local = {
        "keystore_copies": "Copies of the service's keystore from before, those listed here and any others: together with "
        "the keystore's root key they open copies of the store.",
        "flash": "What flash, snapshots and copying file systems keep of the keystore's files.",
    }
    database = (
        "Deleted rows are overwritten with zeros in the database's file, and its write-ahead log is emptied where no reader was in "
        "the way; the file system may keep older blocks of both"
        if settings.is_sqlite
        else "Deleted rows stay in the database's pages until they are vacuumed, and in its write-ahead log, archives and replicas"
    )
    return {
        "rows": "How many parts, users and kept answers were deleted with the rest is not told: it would tell how many rows there "
        "were.",
        "restores": "Keys that neither a row nor the record beside the ledgers' anchors names, because an older database was "
        "restored and the record was lost as well, or the key is from before there was one: they are still with their provider.",
        "providers": "What the claim of a key leaves open, and all of it before the day from which the key is gone.",
        **(local if any(key.kind == "local" for key in keys) else {}),
        "database": f"{database}. They are wrapped keys and MACs, which nothing opens without the destroyed keys.",
        "objects": "Blocks of disks, and versions and replicas of an object store, that still hold deleted objects: what they "
        "hold is sealed.",
        "memory": "What processes of the service still had opened, for at most 3600 s (their CLOISTER_KEY_CACHE_S) after the keys "
        "were destroyed, memory that they gave back without overwriting it, and swap.",
        "parties": "Shares of weights, and architectures, that were handed to the parties and dealers of private deployments: they "
        "are with those, who get no requests any more within a minute.",
        "clients": "What clients were given: predictions, answers, certificates, rows that they uploaded and still have.",
        "exports": "Bundles and exports that were given out.",
        "recordings": "Recordings of requests, on the way or by a proxy, of what clients had not sealed themselves.",
    }
