"""Who may do what: one query over grants, a deny before every allow, and no as the last word. Knows nothing of HTTP.

A feature asks for `Authorized[Model]` and not for an id: only this module can make one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from cloister_server.errors import Conflict, Forbidden, NotFound, RateLimited, ServerError, Unavailable
from cloister_server.principal import Principal
from cloister_server.store.conditions import UNBOUND, Conditions
from cloister_server.store.decisions import decisive
from cloister_server.store.queries import OPERATOR_VERBS, VERBS, visible_to
from cloister_server.store.rates import take
from cloister_server.store.serving import Served, Serving
from cloister_server.store.tables import Model, Table, Tenant

__all__ = [
    "DECIDED",
    "Allow",
    "Authorized",
    "Decided",
    "Denial",
    "Denied",
    "Deny",
    "authorize",
    "authorize_change",
    "decide",
    "find",
    "find_served",
    "require_epsilon",
]

DECIDED = "decided"
"""Under this name a session's `info` has the list, if anybody keeps one, to which is added what is allowed in it."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_ID = re.compile(r"[a-z]{2,4}_[0-9a-f]{32}")
_PROOF = object()

R = TypeVar("R", bound=Table)


@dataclass(frozen=True, slots=True)
class Allow:
    """Yes, by this grant, and as it is bound."""

    by: str
    conditions: Conditions = UNBOUND


@dataclass(frozen=True, slots=True)
class Deny:
    """No; the reason is for the audit log. `by` is the grant that denies, where one does."""

    reason: str
    by: str | None = None


class Decided(NamedTuple):
    """What was allowed, and by which grant."""

    verb: str
    resource_id: str
    grant_id: str | None


@dataclass(frozen=True, slots=True)
class Authorized(Generic[R]):
    """The proof that a principal may do what it asked to this row; `grant_id` says why, `conditions` how."""

    principal: Principal
    resource: R
    grant_id: str
    proof: object = field(repr=False, compare=False)
    conditions: Conditions = UNBOUND

    def __post_init__(self) -> None:
        if self.proof is not _PROOF:
            raise TypeError("only policy.authorize and policy.find make an Authorized")


@dataclass(frozen=True, slots=True)
class Denial:
    """What the audit log is told of a refusal."""

    principal: Principal
    verb: str
    resource_id: str
    reason: str


class Denied(ServerError):
    """A refusal by policy, as 403 or 404; the denial that it carries is for the audit log and not for the caller."""

    denial: Denial
    is_kept: bool = False
    """Whether the audit log has it already."""


class _NotThis(Denied, Forbidden):
    def __init__(self, denial: Denial) -> None:
        super().__init__(
            f"you may see this, but {denial.verb!r} on it is not granted to you; ask its owner for a grant"
        )
        self.denial = denial


class _NotSoMuch(Denied, Forbidden):
    def __init__(self, denial: Denial, most: float) -> None:
        super().__init__(
            f"your grant allows jobs of epsilon {most:g} at most; ask for a smaller epsilon, or the owner for another grant",
            details={"max_epsilon": most},
        )
        self.denial = denial


class _NotVisible(Denied, NotFound):
    def __init__(self, kind: str, denial: Denial) -> None:
        super().__init__(kind)
        self.denial = denial


_UNREACHABLE = Deny("the policy store could not be asked")
_NO_SUCH_VERB = Deny("no such verb")
_NO_GRANT = Deny("no grant matched")


def decide(session: Session, principal: Principal, verb: str, *, tenant_id: str, resource_id: str) -> Allow | Deny:
    """May the principal do the verb to this resource of this tenant? Never raises for a store that cannot be asked."""
    if principal.kind == "operator":
        return _decide_for_operator(principal, verb, tenant_id)
    if verb not in VERBS:
        return _NO_SUCH_VERB
    try:
        grant = decisive(session, principal, verb, tenant_id=tenant_id, resource_id=resource_id)
    except (SQLAlchemyError, Unavailable):
        return _UNREACHABLE
    if grant is not None and grant.effect == "allow":
        return Allow(grant.grant_id, grant.conditions)
    if grant is not None:
        return Deny(f"grant {grant.grant_id} denies it", grant.grant_id)
    return _NO_GRANT


def authorize(session: Session, principal: Principal, verb: str, row: R) -> Authorized[R]:
    """The proof for a row that the principal may know of.

    Raises Forbidden, RateLimited where the grant was used too often, or Unavailable where nobody could decide.
    """
    tenant_id, resource_id = _place(row)
    decision = decide(session, principal, verb, tenant_id=tenant_id, resource_id=resource_id)
    if isinstance(decision, Allow):
        _count(session, decision)
        kept: list[Decided] | None = session.info.get(DECIDED)
        if kept is not None:
            kept.append(Decided(verb, resource_id, decision.by))
        return Authorized(principal, row, decision.by, _PROOF, decision.conditions)
    if decision is _UNREACHABLE:
        raise Unavailable("nobody could decide whether you may do this, so you may not; retry in a moment")
    raise _NotThis(Denial(principal, verb, resource_id, decision.reason))


def require_epsilon(authorized: Authorized[Any], verb: str, epsilon: float) -> None:
    """Raise Forbidden where the grant does not allow a job of this epsilon."""
    most = authorized.conditions.max_epsilon
    if most is not None and not epsilon <= most:
        reason = f"grant {authorized.grant_id} allows epsilon {most:g} at most, and {epsilon:g} was asked"
        raise _NotSoMuch(Denial(authorized.principal, verb, str(authorized.resource.id), reason), most)


def authorize_change(session: Session, principal: Principal, verb: str) -> Authorized[Tenant]:
    """The proof that the principal may give its own tenant something new, whose row is locked from here to the transaction's end.

    Raises Conflict where the tenant is shredded, or on its way to it; else as `authorize`.
    """
    tenant = session.get_one(Tenant, principal.tenant_id, populate_existing=True, with_for_update=True)
    authorized = authorize(session, principal, verb, tenant)
    if tenant.status != "active":
        raise Conflict(
            f"tenant {tenant.name!r} is shredded, or about to be: it takes no clients, grants or sources; make another tenant",
            code="tenant_shredded",
        )
    return authorized


def find(session: Session, principal: Principal, verb: str, table: type[R], id_or_name: str) -> Authorized[R]:
    """The row of this id in any tenant, or of this name in the principal's own, with the proof that it may be used so.

    Raises NotFound alike where there is none and where the principal may do nothing to it, after the same one statement;
    Forbidden where it may do other things to it. Raises Unavailable where the store cannot be asked.
    """
    if not (_ID.fullmatch(id_or_name) or _NAME.fullmatch(id_or_name)):
        raise _NotVisible(table.__name__.lower(), Denial(principal, verb, id_or_name, "neither an id nor a name"))
    row_of = table.__table__.c
    visible = visible_to(principal, table)
    if "name" in row_of and not _ID.fullmatch(id_or_name):
        visible = visible.where(row_of.name == id_or_name, row_of.tenant_id == principal.tenant_id)
    else:
        visible = visible.where(row_of.id == id_or_name)
    try:
        row = session.scalars(visible).one_or_none()
    except SQLAlchemyError:
        raise Unavailable("nobody could decide whether you may do this, so you may not; retry in a moment") from None
    if row is None:
        raise _NotVisible(table.__name__.lower(), Denial(principal, verb, id_or_name, "not visible"))
    return authorize(session, principal, verb, row)


def find_served(
    serving: Serving, principal: Principal, verb: str, id_or_name: str, number: int | None
) -> tuple[Authorized[Model], Served] | None:
    """What `find` would say of a model, with its version, sooner; None where it is for `find` to say, whatever that is."""
    is_id = _ID.fullmatch(id_or_name) is not None
    served = serving.find(principal, verb, id_or_name, number, is_id=is_id)
    if served is None:
        return None
    model = Model(tenant_id=principal.tenant_id, id=served.model_id, name=served.model)
    return Authorized(principal, model, served.by.grant_id, _PROOF, served.by.conditions), served


def _count(session: Session, allow: Allow) -> None:
    most = allow.conditions.requests_per_minute
    if most is None:
        return
    wait_s = take(session, allow.by, per_minute=most)
    if wait_s > 0:
        raise RateLimited(
            f"your grant allows this {most} times a minute; go on in {math.ceil(wait_s)} s, or ask the owner for another grant",
            details={"requests_per_minute": most, "retry_after_s": math.ceil(wait_s)},
        )


def _decide_for_operator(principal: Principal, verb: str, tenant_id: str) -> Allow | Deny:
    if verb in OPERATOR_VERBS and tenant_id == principal.tenant_id:
        return Allow(by="operator")
    return Deny("not an operator's to do")


def _place(row: Any) -> tuple[str, str]:
    """A resource's tenant and id; a tenant is a resource of its own. Every resource has an id, though `Table` has none."""
    return str(row.id if isinstance(row, Tenant) else row.tenant_id), str(row.id)
