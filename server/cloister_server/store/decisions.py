"""Which grant decides: by the one query that defines it, or by a snapshot of the tenant's grants that agrees with it.

A snapshot holds for one revision of the tenant's policy, which the database counts and which is read anew for every decision. Only
transactions that read use one: what another has changed and not committed is no revision yet, and so it asks the query.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_server.errors import Unavailable
from cloister_server.principal import Principal
from cloister_server.store.conditions import Conditions, address_key
from cloister_server.store.isolation import DRIVER, acts_for, lifted
from cloister_server.store.queries import ANY, bearing, deciding, is_suspended
from cloister_server.store.tables import Grant, Member, now

__all__ = ["SNAPSHOTS", "Decisive", "Snapshots", "bearing_on", "decisive", "decisive_by_query", "decisive_of"]

SNAPSHOTS = "snapshots"
"""Under this name a session's `info` has the engine's snapshots, where it may use them."""

_MOST_TENANTS, _MOST_TABLES = 2000, 2000


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


class _Open:
    """What depends on when and from where it is asked: the grants that may decide, in their order."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self._entries = tuple(sorted(entries))

    def decided(self, address: str | None) -> Decisive | None:
        at, key = now(), address_key(address)
        return next((each.decisive for each in self._entries if each.counts(at, key)), None)


_Table = Mapping[str, "Decisive | _Open | None"]
"""By resource, what decides; under '*' what does for each that is not named."""


class _Snapshot:
    """A tenant's grants, none while it is suspended, and members at one revision; and what follows for whom was asked about."""

    __slots__ = ("_entries", "_tables", "groups", "revision")

    def __init__(
        self,
        revision: int | None,
        entries: Mapping[tuple[str, str], Mapping[str, Sequence[_Entry]]],
        groups: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.revision, self.groups = revision, groups
        """By principal of the tenant."""
        self._entries = entries
        """By holder and verb, then by resource."""
        self._tables: dict[tuple[str, str, tuple[str, ...]], _Table] = {}

    def table(self, principal_id: str, verb: str, groups: tuple[str, ...]) -> _Table:
        """Of a principal and the groups that it is in, all that a verb may be done to."""
        place = (principal_id, verb, groups)
        table = self._tables.get(place)
        if table is None:
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            table = self._tables[place] = self._made(principal_id, verb, groups)
        return table

    def _made(self, principal_id: str, verb: str, groups: tuple[str, ...]) -> _Table:
        found: dict[str, list[_Entry]] = {ANY: []}
        for holder in (principal_id, *groups):
            for resource_id, entries in self._entries.get((holder, verb), {}).items():
                found.setdefault(resource_id, []).extend(entries)
        wide = found[ANY]
        return {each: _settled(entries if each == ANY else [*entries, *wide]) for each, entries in found.items()}


class Snapshots:
    """One process' snapshots, by tenant."""

    def __init__(self) -> None:
        self._kept: dict[str, _Snapshot] = {}
        self._lock = threading.Lock()

    def of(self, session: Session, tenant_id: str) -> _Snapshot:
        """The one of the tenant's revision as this transaction sees it."""
        revision = _revision(session, tenant_id)
        kept = self._kept.get(tenant_id)
        if kept is not None and kept.revision == revision:
            return kept
        entries = {} if is_suspended(session, tenant_id) else _entries(session, tenant_id)
        fresh = _Snapshot(revision, entries, _groups(session, tenant_id))
        with self._lock:
            while len(self._kept) >= _MOST_TENANTS:
                del self._kept[next(iter(self._kept))]
            self._kept[tenant_id] = fresh
        return fresh


def decisive(session: Session, principal: Principal, verb: str, *, tenant_id: str, resource_id: str) -> Decisive | None:
    """What `decisive_by_query` says, sooner. Raises SQLAlchemyError or Unavailable where the store cannot be asked."""
    snapshots: Snapshots | None = session.info.get(SNAPSHOTS)
    if snapshots is None or not acts_for(session, tenant_id, principal.tenant_id):
        return decisive_by_query(session, principal, verb, tenant_id=tenant_id, resource_id=resource_id)
    snapshot = snapshots.of(session, tenant_id)
    own = snapshot if principal.tenant_id == tenant_id else snapshots.of(session, principal.tenant_id)
    table = snapshot.table(principal.id, verb, own.groups.get(principal.id, ()))
    found = table[resource_id] if resource_id in table else table[ANY]
    return found.decided(principal.address) if type(found) is _Open else found  # type: ignore[return-value]  # else it is settled


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


def _settled(entries: Sequence[_Entry]) -> Decisive | _Open | None:
    if any(each.expires is not None or each.network is not None for each in entries):
        return _Open(entries)
    return min(entries).decisive if entries else None


def _revision(session: Session, tenant_id: str) -> int | None:
    """Asked of the driver itself: this is all that a warm decision costs."""
    if DRIVER not in session.info:
        session.connection()
    driver = session.info[DRIVER]
    try:
        row = driver.connection.execute(driver.revision, (tenant_id,)).fetchone()
    except driver.error:
        raise Unavailable("nobody could decide whether you may do this, so you may not; retry in a moment") from None
    return None if row is None else row[0]


def _entries(session: Session, tenant_id: str) -> dict[tuple[str, str], dict[str, list[_Entry]]]:
    entries: dict[tuple[str, str], dict[str, list[_Entry]]] = {}
    for row in session.scalars(select(Grant).where(Grant.tenant_id == tenant_id)):
        entries.setdefault((row.principal_id, row.verb), {}).setdefault(row.resource_id, []).append(_entry(row))
    return entries


def _groups(session: Session, tenant_id: str) -> dict[str, tuple[str, ...]]:
    members = select(Member.principal_id, Member.group_id).where(Member.tenant_id == tenant_id)
    groups: dict[str, list[str]] = {}
    for principal_id, group_id in session.execute(members):
        groups.setdefault(principal_id, []).append(group_id)
    return {principal_id: tuple(found) for principal_id, found in groups.items()}


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
