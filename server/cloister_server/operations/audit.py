"""Operations on the audit log: its newest rows, all of it a page at a time, and whether anything in it was tampered with."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field
from sqlalchemy.orm import Session

from cloister.wire._model import Body
from cloister_server import deployment, evidence, operators, tenants
from cloister_server.audit_lines import FORMATS, Format, told
from cloister_server.errors import Invalid, LedgerRolledBack
from cloister_server.operations.definition import Acting, Given, Moment, in_utc, operation
from cloister_server.service import Service
from cloister_server.store import audit_log
from cloister_server.store.audit_log import Entry
from cloister_server.store.chain import ChainBroken
from cloister_server.store.tables import Tenant, now

__all__ = ["HOW_TO_MEND", "Export", "MaybeTenant", "Tail", "export", "named", "tail", "verify"]

HOW_TO_MEND = (
    "restore the newest database, or run `cloister-admin ledger replay` with an export of its ledger; where what was charged is "
    "lost, `cloister-admin ledger write-off`"
)
"""What there is to do about a ledger that is older than its anchor."""

_AT_ONCE = 1000


class MaybeTenant(Body):
    """About one tenant, or about all."""

    tenant: Given | None = None


class Tail(MaybeTenant):
    lines: Annotated[int, Field(ge=0, le=10_000)] = 20


class Export(MaybeTenant):
    since: Moment | None = None
    """From when on, UTC unless it says otherwise; from the beginning where it is left out."""
    until: Moment | None = None
    """As the page before said it: what is exported does not grow while it is."""
    format: Format = "jsonl"
    after: Given | None = None
    """`next` of the page before."""


@operation("audit.tail", Tail)
def tail(session: Session, _: Service, __: Acting, request: Tail) -> list[dict[str, Any]]:
    return named(session, audit_log.newest(session, _id(session, request.tenant), count=request.lines))


def named(session: Session, entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """What is said of rows, with the accounts of the operators among their principals."""
    accounts = operators.accounts(session)
    return [{**told(each), "principal_name": accounts.get(each.principal)} for each in entries]


@operation("audit.export", Export)
def export(session: Session, _: Service, __: Acting, request: Export) -> dict[str, Any]:
    until = request.until or now()
    found = audit_log.page(
        session,
        _id(session, request.tenant),
        since=request.since,
        until=until,
        after=None if request.after is None else _place(request.after),
        count=_AT_ONCE,
    )
    line = FORMATS[request.format]
    last = f"{found[-1].time.isoformat()} {found[-1].id}" if len(found) == _AT_ONCE else None
    return {"lines": [line(each) for each in found], "until": until, "next": last}


@operation("audit.verify", MaybeTenant)
def verify(session: Session, service: Service, by: Acting, request: MaybeTenant) -> list[dict[str, Any]]:
    # Looked at first: a chain that grows meanwhile must not look shorter than its anchor.
    behind = {each.tenant_id: each for each in deployment.rolled_back(service)}
    named = request.tenant
    chosen = tenants.tenants(session) if named is None else [tenants.find_tenant(session, named)]
    rows = [_verified(session, by, each, behind.pop(each.id, None)) for each in chosen]
    return rows + [_row(each.tenant_id, problem=_why(each)) for each in behind.values() if named is None]


def _verified(session: Session, by: Acting, tenant: Tenant, behind: LedgerRolledBack | None) -> dict[str, Any]:
    named = {"tenant": tenant.id, "tenant_name": tenant.name}
    try:
        head = evidence.verify(session, by.within(session, tenant.id))
    except ChainBroken as fault:
        return {**_row(tenant.id, problem=fault.message, link=fault.number, row=fault.row), **named}
    found = {} if behind is None else {"problem": _why(behind)}
    return {**_row(tenant.id), "links": head.count, "head": head.digest.hex(), **named, **found}


def _row(
    tenant_id: str, *, problem: str | None = None, link: int | None = None, row: str | None = None
) -> dict[str, Any]:
    return {"tenant": tenant_id, "links": None, "head": None, "link": link, "row": row, "problem": problem}


def _why(behind: LedgerRolledBack) -> str:
    return f"{behind.why}; {HOW_TO_MEND}"


def _id(session: Session, tenant: str | None) -> str | None:
    return None if tenant is None else tenants.find_tenant(session, tenant).id


def _place(after: str) -> tuple[datetime, str]:
    moment, _, row = after.partition(" ")
    try:
        return in_utc(datetime.fromisoformat(moment)), row
    except ValueError:
        raise Invalid("`after` is no place in the log; give `next` of the page before") from None
