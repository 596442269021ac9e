"""Which grant decides: by the one query that defines it, or by a snapshot of the tenant's grants that agrees with it.

A snapshot holds for one revision of the tenant's policy, which the database counts and which every transaction reads anew. Only
those that read use one: what another has changed and not committed is no revision yet, and so it asks the query.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple, final

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_server.errors import Unavailable
from cloister_server.principal import Principal
from cloister_server.store.conditions import Conditions, address_key
from cloister_server.store.isolation import Transaction, lifted, transaction_of
from cloister_server.store.queries import ANY, bearing, deciding, is_suspended
from cloister_server.store.tables import Grant, Member, now

__all__ = ["SNAPSHOTS", "Decisive", "Snapshots", "bearing_on", "decisive", "decisive_by_query", "decisive_of"]

SNAPSHOTS = "snapshots"
"""Under this name a session's `info` has the engine's snapshots, where it may use them."""

_MOST_TENANTS = 2000


class Decisive(NamedTuple):
    """The grant that decides."""

    grant_id: str
    effect: str
    conditions: Conditions
    holder_id: str
    resource_id: str


class _Entry(NamedTuple):
    """A grant, in the order in which grants decide."""

    is_allow: bool
    outputs: int
    epsilon: tuple[bool, float]
    rate: tuple[bool, int]
    grant_id: str
    expires: datetime | None
    network: tuple[str, str] | None
    decisive: Decisive

    def counts(self, at: datetime, address: str | None) -> bool:
        if self.expires is not None and self.expires <= at:
            return False
        if self.network is None:
            return True
        return not self.is_allow if address is None else self.network[0] <= address <= self.network[1]


@final
class _Open:
    """The grants of one place, where it depends on when and from where it is asked which of them count."""

    __slots__ = ("entries",)

    def __init__(self, entries: list[_Entry]) -> None:
        self.entries = tuple(entries)


_Place = tuple[str, str, str]
"""A holder, a verb and a resource, or ANY."""
_Grants = Mapping[_Place, _Entry | _Open]
"""The grant that decides among those of a place. Flat: a decision's time goes to places of memory that are in no cache."""


_Holders = Mapping[str, tuple[str, ...]]
"""Of a principal that is in a group: itself, and its groups."""


class _Snapshot:
    """A tenant's grants, none while it is suspended, and members at one revision."""

    __slots__ = ("_grants", "_holders", "revision")

    def __init__(self, revision: int | None, grants: _Grants, holders: _Holders) -> None:
        self.revision, self._grants, self._holders = revision, grants, holders

    def decided(self, own: _Snapshot, principal: Principal, verb: str, resource_id: str) -> Decisive | None:
        """What decides, of all that a principal holds, whose `own` tenant's snapshot says of which groups it is."""
        grants, principal_id = self._grants, principal.id
        bearing: list[_Entry | _Open] = []
        for holder in own._holders.get(principal_id) or (principal_id,):
            found = grants.get((holder, verb, resource_id))
            if found is not None:
                bearing.append(found)
            found = grants.get((holder, verb, ANY))
            if found is not None:
                bearing.append(found)
        if not bearing:
            return None
        counting = [each for each in bearing if isinstance(each, _Entry)]
        if len(counting) < len(bearing):
            at, key = now(), address_key(principal.address)
            for each in bearing:
                if isinstance(each, _Open):
                    counting += [one for one in each.entries if one.counts(at, key)]
        return min(counting).decisive if counting else None


class Snapshots:
    """One process' snapshots, by tenant."""

    def __init__(self) -> None:
        self._kept: dict[str, _Snapshot] = {}
        self._lock = threading.Lock()

    def kept(self, tenant_id: str, revision: int) -> _Snapshot | None:
        """The tenant's, if there is one of this revision."""
        kept = self._kept.get(tenant_id)
        return kept if kept is not None and kept.revision == revision else None

    def of(self, session: Session, transaction: Transaction, tenant_id: str) -> _Snapshot:
        """The one of the tenant's revision as this transaction sees it."""
        try:
            revisions = transaction.revisions
            if revisions is None:
                # SQLite says in one word whether anybody has committed anything since this connection last asked (`data_version`:
                # others; `total_changes`: it itself); while nobody has, what was read then is what would be read.
                state = transaction.ask("PRAGMA data_version").fetchone(), transaction.connection.total_changes
                seen = transaction.seen
                if seen.state != state:
                    seen.state, seen.revisions = state, {}
                revisions = transaction.revisions = seen.revisions
            revision = revisions[tenant_id] if tenant_id in revisions else _revision(transaction, revisions, tenant_id)
        except transaction.error:
            raise Unavailable(
                "nobody could decide whether you may do this, so you may not; retry in a moment"
            ) from None
        kept = self._kept.get(tenant_id)
        if kept is not None and kept.revision == revision:
            return kept
        grants = {} if is_suspended(session, tenant_id) else _grants(session, tenant_id)
        fresh = _Snapshot(revision, grants, _holders(session, tenant_id))
        with self._lock:
            while len(self._kept) >= _MOST_TENANTS:
                del self._kept[next(iter(self._kept))]
            self._kept[tenant_id] = fresh
        return fresh


def decisive(session: Session, principal: Principal, verb: str, *, tenant_id: str, resource_id: str) -> Decisive | None:
    """What `decisive_by_query` says, sooner. Raises SQLAlchemyError or Unavailable where the store cannot be asked."""
    snapshots: Snapshots | None = session.info.get(SNAPSHOTS)
    if snapshots is None:
        return decisive_by_query(session, principal, verb, tenant_id=tenant_id, resource_id=resource_id)
    transaction, own_id = transaction_of(session), principal.tenant_id
    seen_ids = transaction.tenant_ids  # as `acts_for` asks it, written out: the transaction is wanted besides
    if seen_ids is not None and (tenant_id not in seen_ids or own_id not in seen_ids):
        return decisive_by_query(session, principal, verb, tenant_id=tenant_id, resource_id=resource_id)
    snapshot = snapshots.of(session, transaction, tenant_id)
    own = snapshot if own_id == tenant_id else snapshots.of(session, transaction, own_id)
    return snapshot.decided(own, principal, verb, resource_id)


def decisive_by_query(
    session: Session, principal: Principal, verb: str, *, tenant_id: str, resource_id: str
) -> Decisive | None:
    """The grant that decides, as `queries.deciding` defines it; None where there is none."""
    asked = deciding(principal, verb, tenant_id=tenant_id, resource_id=resource_id)
    row = session.execute(asked).scalar_one_or_none()
    return None if row is None else _decisive(row)


def decisive_of(session: Session, who: Principal, verb: str, *, tenant_id: str, resource_id: str) -> Decisive | None:
    """What decides for somebody else than the session acts for, of whatever tenant: to be told, and never to be acted upon."""
    with lifted(session):
        return decisive_by_query(session, who, verb, tenant_id=tenant_id, resource_id=resource_id)


def bearing_on(session: Session, who: Principal, verb: str, *, tenant_id: str, resource_id: str) -> list[Grant]:
    """All grants of the tenant that somebody holds on this, itself or by a group, whether they count now or not."""
    with lifted(session):
        return list(session.scalars(bearing(who, verb, tenant_id=tenant_id, resource_id=resource_id)))


def _revision(transaction: Transaction, revisions: dict[str, int | None], tenant_id: str) -> int | None:
    row = transaction.ask(transaction.revision, (tenant_id,)).fetchone()
    if len(revisions) >= _MOST_TENANTS:
        revisions.clear()
    revisions[tenant_id] = None if row is None else int(row[0])
    return revisions[tenant_id]


def _grants(session: Session, tenant_id: str) -> _Grants:
    found: dict[_Place, list[_Entry]] = {}
    for row in session.scalars(select(Grant).where(Grant.tenant_id == tenant_id)):
        found.setdefault((row.principal_id, row.verb, row.resource_id), []).append(_entry(row))
    return {place: _settled(entries) for place, entries in found.items()}


def _settled(entries: list[_Entry]) -> _Entry | _Open:
    is_open = any(each.expires is not None or each.network is not None for each in entries)
    return _Open(entries) if is_open else min(entries)


def _holders(session: Session, tenant_id: str) -> _Holders:
    members = select(Member.principal_id, Member.group_id).where(Member.tenant_id == tenant_id)
    holders: dict[str, tuple[str, ...]] = {}
    for principal_id, group_id in session.execute(members):
        holders[principal_id] = (*holders.get(principal_id, (principal_id,)), group_id)
    return holders


def _entry(row: Grant) -> _Entry:
    outputs = {None: 0, "rounded": 1}.get(row.outputs, 2)
    network = None if row.address_first is None else (row.address_first, row.address_last or row.address_first)
    return _Entry(
        row.effect == "allow",
        outputs,
        (row.max_epsilon is not None, -(row.max_epsilon or 0.0)),
        (row.requests_per_minute is not None, -(row.requests_per_minute or 0)),
        row.id,
        row.expires,
        network,
        _decisive(row),
    )


def _decisive(row: Any) -> Decisive:
    conditions = Conditions(row.max_epsilon, row.requests_per_minute, row.outputs)
    return Decisive(row.id, row.effect, conditions, row.principal_id, row.resource_id)
