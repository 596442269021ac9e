"""Deeds that take two operators, of a tenant that asks for it: one asks, another does it within a day. Knows SQL; does no deed itself.

An operator is who a command acts as. What two names stand for, two people or one at the machine itself, is not known here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Literal, get_args

from sqlalchemy.orm import Session

from cloister_server import audit, policy
from cloister_server.errors import Conflict
from cloister_server.policy import Authorized
from cloister_server.principal import Principal
from cloister_server.store.tables import Tenant, now

__all__ = ["Approvals", "Deed", "Request", "ask", "ask_end", "require", "set_two_persons", "told", "withdraw"]

Deed = Literal["shred", "one_person"]
"""To end the tenant, and to ask for one operator from then on."""

_LASTS = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Request:
    """What an operator has asked for, and until when another may do it; times as ISO 8601."""

    deed: Deed
    by: str
    asked: str
    until: str


@dataclass(frozen=True, slots=True)
class Approvals:
    """Whether a tenant's end takes two operators, and what is asked for now."""

    tenant: str
    two_person: bool
    requests: list[Request]


def told(tenant: Tenant) -> Approvals:
    """As the row says. A request that is past its day is none."""
    standing = ((tenant.approvals or {}).get(deed) for deed in get_args(Deed))
    requests = [Request(**each) for each in standing if each is not None]
    return Approvals(
        tenant.name, tenant.two_person, [each for each in requests if datetime.fromisoformat(each.until) > now()]
    )


def set_two_persons(session: Session, operator: Principal, *, required: bool) -> Approvals:
    """Let the operator's tenant take two operators to be shredded, at once; or one, which is asked for here, and done where another
    operator asked for it. Raises Conflict where it is shredded."""
    authorized = policy.authorize_change(session, operator, "tenant.administer")
    tenant = authorized.resource
    if required and not tenant.two_person:
        tenant.two_person = True
        audit.allowed(session, authorized, "tenant.two_person", tenant.id)
    elif tenant.two_person and not required and ask(session, authorized, "one_person") is None:
        require(session, authorized, "one_person")
        tenant.two_person, tenant.approvals = False, None
        audit.allowed(session, authorized, "tenant.one_person", tenant.id)
    return told(tenant)


def ask(session: Session, authorized: Authorized[Tenant], deed: Deed) -> Request | None:
    """Ask for a deed, under the lock of the tenant's row: the request that stands now; None where the deed may be done, because the
    tenant takes one operator, or another one than this asked for it."""
    tenant = authorized.resource
    if not tenant.two_person:
        return None
    standing = _standing(tenant, deed)
    if standing is None:
        at = now()
        standing = Request(deed, authorized.principal.id, at.isoformat(), (at + _LASTS).isoformat())
        tenant.approvals = {**(tenant.approvals or {}), deed: asdict(standing)}
        audit.allowed(session, authorized, f"tenant.{deed}_ask", tenant.id)
    return standing if standing.by == authorized.principal.id else None


def ask_end(session: Session, operator: Principal) -> Approvals:
    """Ask for the end of the operator's tenant, which another operator brings about at the deployment itself, by `tenant shred`.

    Raises Conflict where it takes one operator, or is shredded.
    """
    authorized = policy.authorize_change(session, operator, "tenant.administer")
    if not authorized.resource.two_person:
        raise Conflict(
            f"the end of tenant {authorized.resource.name!r} takes one operator: run `cloister-admin tenant shred` at the deployment, "
            "or let it take two first, by `tenant approvals --two-person`",
            code="takes_one_operator",
        )
    ask(session, authorized, "shred")
    return told(authorized.resource)


def require(session: Session, authorized: Authorized[Tenant], deed: Deed) -> None:
    """Take the request of another operator for a deed that is done in this transaction, under the lock of the tenant's row.

    Raises Conflict where the tenant takes two operators, and no other than this has asked for it within a day.
    """
    tenant = authorized.resource
    if not tenant.two_person:
        return
    standing = _standing(tenant, deed)
    if standing is None or standing.by == authorized.principal.id:
        raise Conflict(
            f"tenant {tenant.name!r} takes two operators for this: one asks for it, and another does it within a day; "
            "`cloister-admin tenant approvals` shows what is asked",
            code="needs_another_operator",
        )
    tenant.approvals = {name: each for name, each in (tenant.approvals or {}).items() if name != deed}
    audit.allowed(session, authorized, f"tenant.{deed}_approve", tenant.id)


def withdraw(session: Session, operator: Principal) -> Approvals:
    """Take back all that is asked for the operator's tenant, whoever asked. Raises Conflict where it is shredded."""
    authorized = policy.authorize_change(session, operator, "tenant.administer")
    if authorized.resource.approvals:
        authorized.resource.approvals = None
        audit.allowed(session, authorized, "tenant.approvals_withdraw", authorized.resource.id)
    return told(authorized.resource)


def _standing(tenant: Tenant, deed: Deed) -> Request | None:
    return next((each for each in told(tenant).requests if each.deed == deed), None)
