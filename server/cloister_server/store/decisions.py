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
    """The grants of a holder on a resource, where it depends on when and from where it is asked which of them count."""

    __slots__ = ("entries",)

    def __init__(self, entries: list[_Entry]) -> None:
        self.entries = tuple(entries)


_Held = Mapping[str, Mapping[str, "_Entry | _Open"]]
"""By holder, then by resource: the grant that decides among the holder's on it."""


class _Snapshot:
    """A tenant's grants, none while it is suspended, and members at one revision."""

    __slots__ = ("_holders", "_verbs", "revision")

    def __init__(
        self, revision: int | None, verbs: Mapping[str, _Held], holders: Mapping[str, tuple[str, ...]]
    ) -> None:
        self.revision, self._verbs, self._holders = revision, verbs, holders

    def holders(self, principal_id: str) -> tuple[str, ...]:
        """Of a principal of the tenant: itself, and the groups that it is in."""
        return self._holders.get(principal_id) or (principal_id,)

    def decided(self, holders: tuple[str, ...], verb: str, resource_id: str, address: str | None) -> Decisive | None:
        """What decides, of all that these hold."""
        held = self._verbs.get(verb, _NOTHING)
        best: _Entry | None = None
        for holder in holders:
            on = held.get(holder)
            if on is None:
                continue
            for found in (on.get(resource_id), on.get(ANY)):
                if found is None:
                    continue
                if type(found) is _Open:
                    return self._decided_now(holders, verb, resource_id, address)
                if best is None or found < best:
                    best = found
        return None if best is None else best.decisive

    def _decided_now(
        self, holders: tuple[str, ...], verb: str, resource_id: str, address: str | None
    ) -> Decisive | None:
        at, key, counting = now(), address_key(address), []
        for holder in holders:
            on = self._verbs[verb].get(holder, {})
            for found in (on.get(resource_id), on.get(ANY)):
                entries = found.entries if isinstance(found, _Open) else () if found is None else (found,)
                counting += [each for each in entries if each.counts(at, key)]
        return min(counting).decisive if counting else None


_NOTHING: _Held = {}


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
        known = transaction.revisions
        revision = known[tenant_id] if tenant_id in known else _revision(transaction, tenant_id)
        kept = self._kept.get(tenant_id)
        if kept is not None and kept.revision == revision:
            return kept
        verbs = {} if is_suspended(session, tenant_id) else _verbs(session, tenant_id)
        fresh = _Snapshot(revision, verbs, _holders(session, tenant_id))
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
    seen = transaction.tenant_ids  # as `acts_for` asks it, written out: the transaction is wanted besides
    if seen is not None and (tenant_id not in seen or own_id not in seen):
        return decisive_by_query(session, principal, verb, tenant_id=tenant_id, resource_id=resource_id)
    snapshot = snapshots.of(session, transaction, tenant_id)
    own = snapshot if own_id == tenant_id else snapshots.of(session, transaction, own_id)
    return snapshot.decided(own.holders(principal.id), verb, resource_id, principal.address)


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


def _revision(transaction: Transaction, tenant_id: str) -> int | None:
    """As the transaction sees it, asked of the driver itself.

    SQLite says in one word whether anybody has committed anything since this connection last asked (`data_version`: others;
    `total_changes`: it itself); while nobody has, what it knew then is what it would read.
    """
    seen = transaction.seen
    try:
        if seen is None:
            revision = _asked(transaction, tenant_id)
        else:
            state = transaction.ask("PRAGMA data_version").fetchone(), transaction.connection.total_changes
            if seen.get("") != state or len(seen) > _MOST_TENANTS:
                seen.clear()
                seen[""] = state
            revision = (
                seen[tenant_id] if tenant_id in seen else seen.setdefault(tenant_id, _asked(transaction, tenant_id))
            )
    except transaction.error:
        raise Unavailable("nobody could decide whether you may do this, so you may not; retry in a moment") from None
    transaction.revisions[tenant_id] = revision
    return revision


def _asked(transaction: Transaction, tenant_id: str) -> int | None:
    row = transaction.ask(transaction.revision, (tenant_id,)).fetchone()
    return None if row is None else int(row[0])


def _verbs(session: Session, tenant_id: str) -> dict[str, _Held]:
    held: dict[str, dict[str, dict[str, list[_Entry]]]] = {}
    for row in session.scalars(select(Grant).where(Grant.tenant_id == tenant_id)):
        by_holder = held.setdefault(row.verb, {}).setdefault(row.principal_id, {})
        by_holder.setdefault(row.resource_id, []).append(_entry(row))
    return {
        verb: {holder: {on: _settled(each) for on, each in found.items()} for holder, found in holders.items()}
        for verb, holders in held.items()
    }


def _settled(entries: list[_Entry]) -> _Entry | _Open:
    is_open = any(each.expires is not None or each.network is not None for each in entries)
    return _Open(entries) if is_open else min(entries)


def _holders(session: Session, tenant_id: str) -> dict[str, tuple[str, ...]]:
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
