"""The chain: each ledger and audit row of a tenant, linked by a digest to the one before. Knows SQL and anchors; no feature.

`extend` links what a transaction added, as the last thing that it does: the chain's lock is the last one that it takes, so that
no two transactions wait for each other. `verify` finds the first row that was altered, removed, reordered or put in beside it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    String,
    bindparam,
    cast,
    exists,
    func,
    inspect,
    select,
    tuple_,
)
from sqlalchemy.orm import Session

from cloister_server.errors import LedgerRolledBack, ServerError, StartRefused
from cloister_server.store.anchors import Anchor, Anchors, Draft
from cloister_server.store.bulk import insert_rows
from cloister_server.store.digests import GENESIS, Row, canonical, canonical_of, digest, row_id, uncanonical
from cloister_server.store.isolation import past_the_orm
from cloister_server.store.tables import Attempt, AuditRow, LedgerEntry, Link, Tenant

__all__ = [
    "GENESIS",
    "ChainBroken",
    "Head",
    "Linked",
    "add",
    "begin_new_chain",
    "canonical",
    "collect",
    "digest",
    "extend",
    "head",
    "link_rows_from_before",
    "linked",
    "lock",
    "pages",
    "require_anchored",
    "require_current",
    "require_link",
    "require_linked",
    "rolled_back",
    "row_id",
    "tells",
    "uncanonical",
    "verify",
]

log = logging.getLogger(__name__)

_KINDS: dict[str, type[Row]] = {"ledger": LedgerEntry, "audit": AuditRow}
_LEDGER_ID = re.compile(r"(.+)/([0-9]{1,9})")
_PAGE = 500

_ADDED, _VALUES, _BEGINS_ANEW = "cloister_chain_added", "cloister_chain_values", "cloister_chain_begins_anew"


class ChainBroken(ServerError):
    """A tenant's chain does not hold: the first place where it does not, and what is wrong there."""

    default_code = "chain_broken"

    def __init__(self, problem: str, *, number: int | None = None, row: str | None = None) -> None:
        place = "" if number is None else f"link {number}"
        named = ", ".join(part for part in (place, row) if part)
        super().__init__(f"{named}: {problem}" if named else problem)
        self.problem, self.number, self.row = problem, number, row


@dataclass(frozen=True, slots=True)
class Head:
    """The newest link of a chain: how many there are, and the digest that they all lead to."""

    count: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Linked:
    """A link and the row that it names, as the digest has it; None where the row is gone or cannot be read."""

    number: int
    kind: str
    row_id: str
    digest: bytes
    row: dict[str, Any] | None
    problem: str = ""
    """What is wrong with a row that is None."""


def collect(session: Session, row: object) -> None:
    """Keep in mind what a session is given, in that order: `extend` links it. For SQLAlchemy's `transient_to_pending`."""
    if isinstance(row, (LedgerEntry, AuditRow, Attempt)):
        session.info.setdefault(_ADDED, []).append(row)


def add(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Insert many audit rows at once, of values by column; `extend` links them after all others."""
    insert_rows(session, AuditRow, rows)
    session.info.setdefault(_VALUES, []).extend(rows)


def tells(session: Session) -> bool:
    """Whether this transaction, as far as it has come, tells the audit log of something."""
    return any(isinstance(row, AuditRow) for row in session.info.get(_ADDED, ()))


def extend(session: Session, anchors: Anchors | None, drafts: list[Draft]) -> None:
    """Link the rows that this transaction added; the anchors to publish once it is committed are added to `drafts`.

    The transaction has done all else, and is flushed. Raises LedgerRolledBack where a chain does not go on from its anchor: so it
    does, too, where an attempt begins that would charge.
    """
    added = [row for row in session.info.pop(_ADDED, ()) if inspect(row).persistent]
    values: dict[str, list[dict[str, Any]]] = {}
    for each in session.info.pop(_VALUES, ()):
        values.setdefault(each["tenant_id"], []).append(each)
    anew: set[str] = session.info.get(_BEGINS_ANEW, set())
    for tenant_id in sorted({row.tenant_id for row in added} | values.keys() | anew):
        rows = [row for row in added if row.tenant_id == tenant_id and not isinstance(row, Attempt)]
        more = [canonical_of(AuditRow, each) for each in values.get(tenant_id, ())]
        if not rows and not more and tenant_id not in anew:
            if anchors is not None:
                require_anchored(session, anchors, tenant_id)
            continue
        _lock(session, tenant_id)
        before = head(session, tenant_id) if tenant_id in anew else require_anchored(session, anchors, tenant_id)
        after = _link(session, tenant_id, (*map(canonical, rows), *more), before)
        if anchors is None:
            continue
        if before.count == 0:
            anchors.begin(tenant_id, genesis=GENESIS)
        if tenant_id in anew or any(isinstance(row, LedgerEntry) for row in rows):
            anchor = Anchor(tenant_id, after.count, after.digest)
            drafts.append(anchors.draft(anchor, is_new_chain=tenant_id in anew))


def begin_new_chain(session: Session, tenant_id: str) -> None:
    """Let this one transaction go on from whatever the tenant's chain is now, and anchor it there: its budgets are written off."""
    session.info.setdefault(_BEGINS_ANEW, set()).add(tenant_id)


def require_linked(session: Session) -> None:
    """Raise StartRefused where a tenant has rows and no link at all: rows from before the chain, which `init` links once."""
    for table in (LedgerEntry, AuditRow):
        is_linked = exists().where(Link.tenant_id == table.tenant_id)
        if session.scalar(select(table.tenant_id).where(~is_linked).limit(1)) is not None:
            raise StartRefused(
                "the ledger has rows from before it was hash-chained, which are not linked yet: the upgrade was cut short; run "
                "`cloister-admin init` again"
            )


def require_current(session: Session, anchors: Anchors | None, tenant_id: str) -> None:
    """Raise LedgerRolledBack unless the chain goes on from the tenant's anchor, or this transaction anchors it anew."""
    if anchors is not None and tenant_id not in session.info.get(_BEGINS_ANEW, set()):
        require_anchored(session, anchors, tenant_id)


def lock(session: Session, tenant_id: str) -> Head:
    """The chain's newest link, under the chain's lock: every transaction that links a row stands in line here, as its last act."""
    _lock(session, tenant_id)
    return head(session, tenant_id)


def head(session: Session, tenant_id: str) -> Head:
    """The chain's newest link, whatever is anchored."""
    return _ends(session, tenant_id, 0)[0]


def require_anchored(session: Session, anchors: Anchors | None, tenant_id: str) -> Head:
    """The chain's newest link. Raises LedgerRolledBack unless the chain goes on from the tenant's anchor.

    For a transaction that sees what was committed before this call; an anchor is always younger than its link.
    """
    anchor = None if anchors is None else anchors.of(tenant_id)
    newest, anchored = _ends(session, tenant_id, 0 if anchor is None else anchor.count)
    if anchors is not None:
        _require(anchors, tenant_id, anchor, newest, anchored)
    return newest


def rolled_back(session: Session, anchors: Anchors) -> list[LedgerRolledBack]:
    """The tenants whose chain does not go on from its anchor, those included that the database does not know any more.

    Of the others an anchor that a crash left behind is moved to the newest ledger row. The session has read nothing before, so
    that what it sees is no older than the anchors. Raises Unavailable where one cannot be read or moved.
    """
    found: list[LedgerRolledBack] = []
    held: dict[str, Anchor] = {}
    for tenant_id in anchors.tenants():
        try:
            anchor = anchors.of(tenant_id)
        except LedgerRolledBack as damaged:
            found.append(damaged)
        else:
            held |= {} if anchor is None else {tenant_id: anchor}
    damaged_ones = {each.tenant_id for each in found}
    for tenant_id in sorted({*held, *session.scalars(select(Tenant.id))} - damaged_ones):
        anchor = held.get(tenant_id)
        if anchor is None and anchors.path(tenant_id).exists():
            continue  # it came while we looked
        newest, anchored = _ends(session, tenant_id, 0 if anchor is None else anchor.count)
        try:
            _require(anchors, tenant_id, anchor, newest, anchored)
        except LedgerRolledBack as refusal:
            found.append(refusal)
        else:
            if anchor is not None:
                _catch_up(session, anchors, anchor)
    return found


def link_rows_from_before(session: Session, anchors: Anchors) -> list[Draft]:
    """Link the rows of tenants that have no link yet: the ledger by source and revision, then the audit log by time.

    Gives the anchors to publish once that is committed. An anchor that is there already stays: it knows better.
    """
    drafts = []
    unlinked = [
        select(each.tenant_id).where(~exists().where(Link.tenant_id == each.tenant_id)) for each in _KINDS.values()
    ]
    for tenant_id in sorted(
        {tenant_id for statement in unlinked for tenant_id in session.scalars(statement.distinct())}
    ):
        newest = lock(session, tenant_id)
        for table, order in (
            (LedgerEntry, (LedgerEntry.source_id, LedgerEntry.revision)),
            (AuditRow, (AuditRow.time, AuditRow.id)),
        ):
            for rows in _in_order(session, select(table).where(table.tenant_id == tenant_id), order):
                newest = _link(session, tenant_id, map(canonical, rows), newest)
        if anchors.of(tenant_id) is None:
            anchors.begin(tenant_id, genesis=GENESIS)
            drafts.append(anchors.draft(Anchor(tenant_id, newest.count, newest.digest)))
    return drafts


def linked(session: Session, tenant_id: str, *, after: int = 0) -> Iterator[Linked]:
    """Every link after that number, in order, with its row."""
    for page in pages(session, tenant_id, after=after):
        yield from page


def pages(session: Session, tenant_id: str, *, after: int = 0) -> Iterator[list[Linked]]:
    """Every link after that number, in order, with its row; some at a time, so that memory is bounded."""
    of_tenant = select(Link.number, Link.kind, Link.row_id, Link.digest).where(Link.tenant_id == tenant_id)
    while found := session.execute(of_tenant.where(Link.number > after).order_by(Link.number).limit(_PAGE)).all():
        rows: dict[tuple[str, str], dict[str, Any] | str] = {}
        for kind in _KINDS:
            rows |= _rows(session, tenant_id, kind, [link.row_id for link in found if link.kind == kind])
        page = []
        for link in found:
            row = rows.get((link.kind, link.row_id), "its row is missing")
            problem = row if isinstance(row, str) else ""
            page.append(
                Linked(link.number, link.kind, link.row_id, link.digest, None if isinstance(row, str) else row, problem)
            )
        yield page
        after = found[-1].number


def verify(session: Session, tenant_id: str) -> Head:
    """Walk the whole chain. Raises ChainBroken at the first row that was altered, removed, reordered, or put in beside it."""
    newest = Head(0, GENESIS)
    for link in linked(session, tenant_id):
        newest = require_link(link, newest, following=lambda after: linked(session, tenant_id, after=after))
    for kind, table in _KINDS.items():
        named = _id_in_sql(table)
        link_of_row = exists().where(Link.tenant_id == table.tenant_id, Link.kind == kind, Link.row_id == named)
        beside = select(named).where(table.tenant_id == tenant_id, ~link_of_row).order_by(named).limit(1)
        found = session.scalar(beside)
        if found is not None:
            raise ChainBroken("this row is in no link: it was put in beside the chain", row=f"{kind} {found}")
    return newest


def require_link(
    link: Linked, before: Head, *, following: Callable[[int], Iterable[Linked]] = lambda after: ()
) -> Head:
    """The chain's head at this link. Raises ChainBroken unless it follows `before` and its row is what was linked.

    `following(after)` gives the links after a number, among which a row that was moved is looked for.
    """
    number, row = link.number, f"{link.kind} {link.row_id}"
    if link.number != before.count + 1:
        raise ChainBroken("this link is missing", number=before.count + 1)
    if link.row is None:
        raise ChainBroken(link.problem, number=number, row=row)
    if (link.kind, link.row_id) != _named(link.row):
        raise ChainBroken("its row is not the one that it names", number=number, row=row)
    if digest(before.digest, link.row) == link.digest:
        return Head(link.number, link.digest)
    for later in following(link.number):
        if later.row is not None and digest(before.digest, later.row) in (link.digest, later.digest):
            raise ChainBroken(
                f"the rows are reordered: {later.kind} {later.row_id} belongs here", number=number, row=row
            )
    raise ChainBroken(
        "it does not follow the one before: its row was altered, or another stood here", number=number, row=row
    )


def _in_order(session: Session, rows: Select[Any], order: tuple[Any, Any]) -> Iterator[Sequence[Row]]:
    """Rows by two of their columns, some at a time."""
    page = rows.order_by(*order).limit(_PAGE)
    while found := session.scalars(page).all():
        yield found
        page = rows.where(tuple_(*order) > tuple(getattr(found[-1], column.key) for column in order))
        page = page.order_by(*order).limit(_PAGE)


def _link(session: Session, tenant_id: str, rows: Iterable[dict[str, Any]], before: Head) -> Head:
    links = []
    for row in rows:
        before = Head(before.count + 1, digest(before.digest, row))
        kind, named = _named(row)
        links.append(
            {
                "tenant_id": tenant_id,
                "number": before.count,
                "kind": kind,
                "row_id": named,
                "digest": before.digest,
            }
        )
    if links:
        insert_rows(session, Link, links)
    return before


def _require(anchors: Anchors, tenant_id: str, anchor: Anchor | None, newest: Head, anchored: bytes | None) -> None:
    if anchor is None and newest.count == 0:
        return
    if anchor is None:
        why = f"its chain has {newest.count} links, and its anchor {anchors.path(tenant_id)} is gone"
    elif newest.count < anchor.count:
        why = f"its chain ends at link {newest.count}, and its anchor says that there were {anchor.count}"
    elif anchored != anchor.head:
        why = f"link {anchor.count} of its chain is not the anchored one: this is a database of another past"
    else:
        return
    log.error("ledger.rolled_back", extra={"tenant_id": tenant_id, "why": why})
    raise LedgerRolledBack(tenant_id, why)


def _catch_up(session: Session, anchors: Anchors, anchor: Anchor) -> None:
    later = (Link.tenant_id == anchor.tenant_id, Link.number > anchor.count, Link.kind == "ledger")
    newest = session.execute(
        select(Link.number, Link.digest).where(*later).order_by(Link.number.desc()).limit(1)
    ).one_or_none()
    if newest is not None:
        anchors.draft(Anchor(anchor.tenant_id, newest.number, bytes(newest.digest))).publish()


def _lock(session: Session, tenant_id: str) -> None:
    past_the_orm(session, tenant_id).execute(_LOCKED, {"tenant_id": tenant_id})


def _ends(session: Session, tenant_id: str, number: int) -> tuple[Head, bytes | None]:
    """The newest link, and the digest of the link of that number, if there is one."""
    found = past_the_orm(session, tenant_id).execute(_ENDS, {"tenant_id": tenant_id, "number": number})
    digests = {0: GENESIS, **{link.number: bytes(link.digest) for link in found}}
    count = max(digests)
    return Head(count, digests[count]), digests.get(number)


def _statements() -> tuple[Select[Any], Select[Any]]:
    tenant, link, tenant_id = Tenant.__table__.c, Link.__table__.c, bindparam("tenant_id", type_=String)
    locked = select(tenant.id).where(tenant.id == tenant_id).with_for_update()
    of_tenant = select(link.number, link.digest).where(link.tenant_id == tenant_id)
    newest = select(func.max(link.number)).where(link.tenant_id == tenant_id).scalar_subquery()
    return locked, of_tenant.where(link.number.in_([newest, bindparam("number", type_=link.number.type)]))


_LOCKED, _ENDS = _statements()


def _rows(session: Session, tenant_id: str, kind: str, ids: list[str]) -> dict[tuple[str, str], dict[str, Any] | str]:
    """The rows of these ids as their digests have them, or what is wrong with one that cannot be read."""
    table = _KINDS[kind]
    statement = select(table.__table__).where(table.tenant_id == tenant_id, _named_by(kind, ids))
    try:
        found = [canonical_of(table, row._asdict()) for row in session.execute(statement)] if ids else []
        return {_named(row): row for row in found}
    except (ValueError, TypeError, AttributeError):  # one of them holds what no row of ours does
        if len(ids) == 1:
            return {(kind, ids[0]): "its row was altered: it cannot even be read"}
        return {place: row for each in ids for place, row in _rows(session, tenant_id, kind, [each]).items()}


def _named_by(kind: str, ids: list[str]) -> ColumnElement[bool]:
    if kind == "audit":
        return AuditRow.id.in_(ids)
    places = [(match[1], int(match[2])) for match in map(_LEDGER_ID.fullmatch, ids) if match]
    return tuple_(LedgerEntry.source_id, LedgerEntry.revision).in_(places)


def _id_in_sql(table: type[Row]) -> Any:
    if table is AuditRow:
        return AuditRow.id
    return LedgerEntry.source_id + "/" + cast(LedgerEntry.revision, String)


def _named(row: dict[str, Any]) -> tuple[str, str]:
    """Kind and id of a row as its digest has it: of the ledger's alone there are revisions."""
    if "revision" in row:
        return "ledger", f"{row.get('source_id')}/{row['revision']}"
    return "audit", str(row.get("id"))
