"""After a database was restored from a backup: a ledger exported, replayed up to its anchor, or written off where it is lost.

Knows SQL and the chain; nothing of HTTP. The operator's alone: whoever holds the deployment runs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from sqlalchemy import insert, select, tuple_
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from cloister.wire.dsse import Digest
from cloister_server import audit, budgets, evidence, policy
from cloister_server.errors import Conflict, Invalid, LedgerRolledBack
from cloister_server.principal import Principal
from cloister_server.store import chain
from cloister_server.store.anchors import Anchors
from cloister_server.store.chain import GENESIS, Head, Linked
from cloister_server.store.tables import AuditRow, Balance, Block, LedgerEntry, Link, Source, Table, Tenant

__all__ = ["Replayed", "export", "replay", "write_off"]

_FORMAT = "cloister.ledger/1"
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Replayed:
    """How many links were put back, and how many of them lie beyond the anchor, where nothing vouches for them."""

    links: int
    beyond_anchor: int


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Header(_Line):
    format: Literal["cloister.ledger/1"]
    tenant: str


class _SourceLine(_Line):
    source: dict[str, Any]


class _BlockLine(_Line):
    block: dict[str, Any]


class _Balance(_Line):
    block: int
    holder_id: str
    used: dict[str, Any]


class _LinkLine(_Line):
    number: Annotated[int, Field(ge=1)]
    kind: Literal["ledger", "audit"]
    row_id: str
    digest: Digest
    row: dict[str, Any]
    balances: list[_Balance] = []

    @property
    def linked(self) -> Linked:
        return Linked(self.number, self.kind, self.row_id, bytes.fromhex(self.digest), self.row)


class _End(_Line):
    count: int
    head: Digest


_LINE: TypeAdapter[_Header | _SourceLine | _BlockLine | _LinkLine | _End] = TypeAdapter(
    _Header | _SourceLine | _BlockLine | _LinkLine | _End
)


def export(session: Session, principal: Principal) -> Iterator[dict[str, Any]]:
    """The tenant's chain as documents: whose it is, sources and blocks, each link with its row and balances, and where it ends.

    For a snapshot. Raises ChainBroken where the chain does not hold; what came before is no export without its last document.
    """
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    yield {"format": _FORMAT, "tenant": tenant.id}
    for source in evidence.sources_of(session, tenant.id):
        yield {"source": chain.canonical(source)}
        of_source = (Block.tenant_id == tenant.id, Block.source_id == source.id)
        for block in session.scalars(select(Block).where(*of_source).order_by(Block.number)):
            yield {"block": chain.canonical(block)}
    newest = Head(0, GENESIS)
    for page in chain.pages(session, tenant.id):
        balances = _balances(session, tenant.id, page)
        for link in page:
            newest = chain.require_link(link, newest)
            line = {"number": link.number, "kind": link.kind, "row_id": link.row_id, "digest": link.digest.hex()}
            of_row = {"balances": balances[link.row_id]} if link.row_id in balances else {}
            yield {**line, "row": link.row, **of_row}
    yield {"count": newest.count, "head": newest.digest.hex()}


def replay(session: Session, principal: Principal, lines: Iterable[str], anchors: Anchors) -> Replayed:
    """Put back what an export holds and a restored database lacks: the chain goes on from its own head, to its anchor and beyond.

    Puts nothing back, and raises Conflict, where nothing is missing or the export does not continue this chain up to the
    anchor; Invalid where it is no whole export; ChainBroken where a row is not what was linked, or a balance does not follow.
    """
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    # Whoever charges holds a source's lock and then takes the chain's: in this order nobody waits for us in a circle.
    session.execute(select(Source.id).where(Source.tenant_id == tenant.id).order_by(Source.id).with_for_update()).all()
    present, anchor = chain.lock(session, tenant.id), anchors.of(tenant.id)
    if anchor is None:
        raise Conflict(
            "the tenant's anchor is gone, so nothing tells what is missing; restore it from the keystore's backup"
        )
    if present.count >= anchor.count:
        raise Conflict(f"no row is missing: the chain has {present.count} links, and its anchor is at {anchor.count}")
    newest, batch, is_whole = Head(0, GENESIS), _Batch(session, tenant.id), False
    for line in _read(lines, tenant):
        match line:
            case _SourceLine():
                batch.declare(line.source)
            case _BlockLine():
                batch.open_block(line.block)
            case _LinkLine():
                newest, is_whole = chain.require_link(line.linked, newest), False
                for known, what in (
                    (present, "that this database has"),
                    (Head(anchor.count, anchor.head), "that was anchored"),
                ):
                    if newest.count == known.count and newest != known:
                        raise Conflict(f"this export is of another past: its link {known.count} is not the one {what}")
                if newest.count > anchor.count and line.kind == "ledger":
                    raise Conflict(
                        f"ledger row {line.row_id} of this export lies beyond the anchor, so nothing vouches for it; give one from "
                        "before it was written"
                    )
                if newest.count > present.count:
                    batch.add(line)
            case _End():
                is_whole = (line.count, line.head) == (newest.count, newest.digest.hex())
    batch.write()
    batch.set_epsilons()
    session.flush()  # it is verified below
    if not is_whole:
        raise Invalid("this export is cut short; give the whole of what `ledger export` printed")
    if newest.count < anchor.count:
        raise Conflict(
            f"this export ends at link {newest.count}, and the chain had {anchor.count}; find a later one, or else write the "
            "budgets off: `cloister-admin ledger write-off`"
        )
    evidence.verify(session, principal)
    audit.allowed(session, authorized, "ledger.replay", tenant.id)
    return Replayed(newest.count - present.count, newest.count - anchor.count)


def write_off(
    session: Session, principal: Principal, *, reason: str, anchors: Anchors, is_forced: bool = False
) -> list[Source]:
    """Admit nothing more to any of the tenant's budgets, ever: what was spent of them is lost. Its chain is anchored anew.

    Gives the sources. One that was declared since the backup is not among them, and must not be declared again. Raises Conflict
    where nothing is missing, unless it is forced.
    """
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    if not reason.strip():
        raise Invalid("a write-off needs a reason, which the ledger keeps; give one")
    if not is_forced:
        _require_behind(session, anchors, tenant.id)
    chain.begin_new_chain(session, tenant.id)
    sources = evidence.sources_of(session, tenant.id)
    for source in sources:
        budgets.write_off(session, source, principal_id=principal.id, reason=reason)
    audit.allowed(session, authorized, "ledger.write_off", tenant.id)
    return sources


def _require_behind(session: Session, anchors: Anchors, tenant_id: str) -> None:
    try:
        chain.require_anchored(session, anchors, tenant_id)
    except LedgerRolledBack:
        return
    raise Conflict(
        "the ledger goes on from its anchor, so nothing is missing, and a write-off would end every budget of the tenant for good; "
        "leave it, or say --even-if-nothing-is-missing"
    )


def _balances(session: Session, tenant_id: str, page: list[Linked]) -> dict[str, list[dict[str, Any]]]:
    """The balances that were written down with a page's rows, by row id."""
    places = [(link.row["source_id"], link.row["revision"]) for link in page if link.kind == "ledger" and link.row]
    of_rows = tuple_(Balance.source_id, Balance.revision).in_(places)
    statement = (
        select(Balance).where(Balance.tenant_id == tenant_id, of_rows).order_by(Balance.block, Balance.holder_id)
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for each in session.scalars(statement) if places else ():
        of_row = found.setdefault(f"{each.source_id}/{each.revision}", [])
        of_row.append({"block": each.block, "holder_id": each.holder_id, "used": each.used})
    return found


def _read(lines: Iterable[str], tenant: Tenant) -> Iterator[_SourceLine | _BlockLine | _LinkLine | _End]:
    """An export's lines after its first. Raises Invalid where one is none, and where it is of another tenant."""
    for number, text in enumerate(lines, 1):
        try:
            line = _LINE.validate_python(json.loads(text, parse_constant=_refuse))
        except (ValueError, RecursionError):
            raise Invalid(f"line {number} is not of an export; give what `ledger export` printed") from None
        if (number == 1) != isinstance(line, _Header):
            raise Invalid(f"line {number} is not of an export; give what `ledger export` printed")
        if not isinstance(line, _Header):
            yield line
        elif line.tenant != tenant.id:
            raise Conflict(f"this export is of tenant {line.tenant}, and not of {tenant.id}; give that one's")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _values(table: type[Table], line: dict[str, Any], tenant_id: str) -> dict[str, Any]:
    try:
        if line["tenant_id"] != tenant_id:
            raise Invalid("the export holds a row of another tenant; give what `ledger export` printed")
        return chain.uncanonical(table, line)
    except (KeyError, TypeError, ValueError):
        raise Invalid(
            "the export holds a row that this release does not know; replay it with the one that wrote it"
        ) from None


@dataclass(slots=True)
class _Batch:
    """Rows to be put back, some at a time."""

    session: Session
    tenant_id: str
    rows: dict[type[Table], list[dict[str, Any]]] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    epsilons: dict[str, float] = field(default_factory=dict)

    def add(self, line: _LinkLine) -> None:
        """A link whose row was seen to be the linked one."""
        table = LedgerEntry if line.kind == "ledger" else AuditRow
        row = _values(table, line.row, self.tenant_id)
        self.rows.setdefault(table, []).append(row)
        if table is LedgerEntry:
            self._put_back(row)
        for each in line.balances if table is LedgerEntry else ():
            place = {"tenant_id": self.tenant_id, "source_id": row["source_id"], "revision": row["revision"]}
            self.rows.setdefault(Balance, []).append({**place, **each.model_dump()})
        link = line.linked
        self.rows.setdefault(Link, []).append(
            {
                "tenant_id": self.tenant_id,
                "number": link.number,
                "kind": link.kind,
                "row_id": link.row_id,
                "digest": link.digest,
            }
        )
        if len(self.rows[Link]) >= _AT_ONCE:
            self.write()

    def declare(self, line: dict[str, Any]) -> None:
        """A source, as the export has it: put back with its first ledger row, which `evidence` compares it with. Without one nothing
        was charged to it, and its owner declares it again."""
        values = _values(Source, line, self.tenant_id)
        self.sources[values["id"]] = values

    def open_block(self, line: dict[str, Any]) -> None:
        """A block, put back with the ledger row that says that it was opened."""
        values = _values(Block, line, self.tenant_id)
        self.blocks[values["source_id"], values["number"]] = values

    def _put_back(self, row: dict[str, Any]) -> None:
        source_id = row["source_id"]
        if source_id in self.sources and self.session.get(Source, (self.tenant_id, source_id)) is None:
            self.session.add(Source(**self.sources[source_id]))
            self.session.flush()  # the ledger's rows refer to it
        block = self.blocks.get((source_id, row["block"])) if row["kind"] == "block" else None
        if block is not None and self.session.get(Block, (self.tenant_id, source_id, row["block"])) is None:
            self.session.add(Block(**block))
            self.session.flush()
        if row["kind"] == "budget":
            self.epsilons[source_id] = row["event"]["epsilon"]

    def set_epsilons(self) -> None:
        """Give every source the epsilon that its newest 'budget' row says."""
        for source_id, epsilon in self.epsilons.items():
            self.session.get_one(Source, (self.tenant_id, source_id)).epsilon = epsilon

    def write(self) -> None:
        """Insert them: rows before what refers to them. Raises Conflict where one is there already, in no link."""
        try:
            for table in (LedgerEntry, AuditRow, Balance, Link):
                if rows := self.rows.pop(table, []):
                    self.session.execute(insert(table), rows)
        except (IntegrityError, DataError):
            raise Conflict(
                "a row of the export is there already, or refers to one that is not; `cloister-admin audit verify` says which"
            ) from None
