"""What is left over: sealed bytes whose key was never kept, and keys of work that is over. Knows SQL and blobs; opens nothing.

It never races a publication. A key's row is written before its blob is stored, and an id is used once: so where a row of that
id can be inserted, no transaction that would name the blob is under way, and none will ever be.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sqlalchemy import Select, and_, delete, exists, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from cloister.wire.jobs import FINAL
from cloister_server import deployment, marking, processes
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS, for_tenants
from cloister_server.store.blobs import Stored
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import Attempt, Job, ModelVersion, SealedObject, Tenant

__all__ = ["Collected", "collect", "is_due"]

_EVERY_S = 3600.0

_AT_ONCE = 500
"""Rows of one transaction, so that SQLite's other writers wait for moments alone."""

_MOST_TOLD = 100

_OF_ATTEMPTS = ("checkpoint", "weights", "answer")
"""The kinds whose keys are made before what they seal; of every other kind row and name are one transaction's."""

_INSERT: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


@dataclass(frozen=True, slots=True)
class Collected:
    """How many blobs, and keys of objects that nothing names, and how many bytes the blobs took.

    `odd`: names in the store that are not of our making, 100 at most; they are left alone, and stop nothing.
    """

    blobs: int
    keys: int
    bytes: int
    odd: tuple[str, ...] = ()


def collect(service: Service, *, dry_run: bool = False) -> Collected:
    """Delete what is left over, or only count it. Killed at any instant it is done again by the next one.

    Left alone are tenants whose ledger is behind its anchor, since a newer database may be about to be restored, and whatever
    lies in the store and is no tenant's of this deployment. Raises StartRefused where another process is at it,
    and Unavailable where the store is not this deployment's.
    """
    marking.require_ours(service)
    stamp = _stamp(service)
    with processes.locked(stamp, wait_s=0, what="the collection of what is left over"):
        behind = {each.tenant_id for each in deployment.rolled_back(service)}
        with reading(service.engine, ALL_TENANTS) as session:
            rows = session.execute(select(Tenant.id, Tenant.status)).all()
        tenants = {each.id: each.status for each in rows if each.id not in behind}
        keys, blobs, size = 0, 0, 0
        doomed: set[str] = set()
        for tenant_id, status in tenants.items():
            if status == "active":  # where one is being shredded, its receipt counts them
                gone = _forget_keys(service, tenant_id, dry_run=dry_run)
                keys += len(gone)
                doomed.update(gone)
        odd: dict[str, None] = {}
        service.blobs.tenants(on_odd=odd.setdefault)  # those that are this deployment's are known
        for page in chain.from_iterable(service.blobs.pages(each, on_odd=odd.setdefault) for each in tenants):
            unclaimed = _unclaimed(service, page) | (doomed if dry_run else set())
            found = [each for each in page if each.object_id in unclaimed]
            if found and not dry_run:
                service.blobs.delete(page[0].tenant_id, *(each.name for each in found))
            blobs += len(found)
            size += sum(each.size for each in found)
        if not dry_run:
            os.utime(stamp)
    return Collected(blobs, keys, size, tuple(islice(odd, _MOST_TOLD)))


def is_due(service: Service) -> bool:
    """Whether the last collection is an hour ago. The first is, an hour after the first time that this is asked."""
    stamp = _stamp(service)
    try:
        return time.time() - stamp.stat().st_mtime >= _EVERY_S
    except FileNotFoundError:
        stamp.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        stamp.touch(mode=0o600)
        return False


def _stamp(service: Service) -> Path:
    return service.settings.data_dir / "locks" / "collection.lock"


def _forget_keys(service: Service, tenant_id: str, *, dry_run: bool) -> list[str]:
    """Delete the tenant's keys that nothing names, some at a time; their ids."""
    nameless = _nameless(tenant_id)
    with reading(service.engine, for_tenants(tenant_id)) as session:
        found = session.scalars(nameless).all()
    if dry_run:
        return list(found)
    gone: list[str] = []
    for first in range(0, len(found), _AT_ONCE):
        with writing(service.engine, for_tenants(tenant_id)) as session:
            # A row that somebody holds, who rewraps it, is left for the next collection, so that none waits for another.
            some = nameless.where(SealedObject.id.in_(found[first : first + _AT_ONCE])).with_for_update(
                skip_locked=True
            )
            ids = session.scalars(some).all()
            session.execute(delete(SealedObject).where(SealedObject.tenant_id == tenant_id, SealedObject.id.in_(ids)))
        gone += ids
    return gone


def _nameless(tenant_id: str) -> Select[str]:
    """The keys that were made for an attempt, that nothing names, and nothing can any more: the job is over, or has a newer
    attempt. Whoever names one for an attempt holds the job's row, and has looked whether it is the newest."""
    of_tenant = Job.tenant_id == tenant_id
    over = exists().where(
        of_tenant, Job.id == SealedObject.job_id, or_(Job.status.in_(FINAL), Job.attempt > SealedObject.attempt)
    )
    nothing_runs = ~exists().where(of_tenant, Job.status.not_in(FINAL))
    named = [
        select(Job.checkpoint_id).where(of_tenant, Job.checkpoint_id.is_not(None), Job.status.not_in(FINAL)),
        select(Job.result_id).where(of_tenant, Job.result_id.is_not(None)),
        select(ModelVersion.weights_id).where(ModelVersion.tenant_id == tenant_id),
    ]
    for name in (Attempt.result["weights_id"].as_string(), Attempt.result["answer_id"].as_string()):
        named.append(select(name).where(Attempt.tenant_id == tenant_id, name.is_not(None)))
    return select(SealedObject.id).where(
        SealedObject.tenant_id == tenant_id,
        SealedObject.kind.in_(_OF_ATTEMPTS),
        or_(over, and_(SealedObject.job_id.is_(None), nothing_runs)),  # older than the column: made for some job
        *(SealedObject.id.not_in(each) for each in named),
    )


def _unclaimed(service: Service, page: Sequence[Stored]) -> set[str]:
    """Of the objects stored, those that no row names nor ever will."""
    tenant_id = page[0].tenant_id
    with reading(service.engine, for_tenants(tenant_id)) as session:
        unnamed = {each.object_id for each in page} - _named(session, tenant_id, page)
    if not unnamed:
        return set()
    with writing(service.engine, for_tenants(tenant_id)) as session, session.begin_nested() as trial:
        # Where a row of this id is being inserted or deleted, this waits for how that ends; where there is one, it is skipped.
        values = [
            {"tenant_id": tenant_id, "id": each, "kind": "collected", "key_version": 0, "wrapped_key": b""}
            for each in sorted(unnamed)
        ]
        insert = _INSERT[session.get_bind().dialect.name](SealedObject).on_conflict_do_nothing()
        free = set(session.scalars(insert.returning(SealedObject.id), values))
        trial.rollback()
    return free


def _named(session: Session, tenant_id: str, page: Sequence[Stored]) -> set[str]:
    ids = [each.object_id for each in page]
    rows = select(SealedObject.id).where(SealedObject.tenant_id == tenant_id, SealedObject.id.in_(ids))
    return set(session.scalars(rows))
