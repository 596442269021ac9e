"""Who may do what: one query over grants, a deny before every allow, and no as the last word. Knows nothing of HTTP.

A feature asks for `Authorized[Model]` and not for an id: only this module can make one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from cloister_server import grant_rate
from cloister_server.errors import Conflict, Forbidden, NotFound, RateLimited, ServerError, Unavailable
from cloister_server.principal import Principal
from cloister_server.store.conditions import UNBOUND, Conditions
from cloister_server.store.decisions import decisive
from cloister_server.store.queries import OPERATOR_VERBS, VERBS, visible_to
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
    "authorize_again",
    "authorize_change",
    "decide",
    "find",
    "find_served",
    "proofs",
    "require_epsilon",
]

DECIDED = "decided"
"""Under this name a session's `info` has the list, if anybody keeps one, to which is added what is allowed in it."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_ID = re.compile(r"[a-z]{2,4}_[0-9a-f]{32}")
_PROOF = object()

R = TypeVar("R", bound=Table)


class Allow(NamedTuple):
    """Yes, by this grant, and as it is bound."""

    by: str
    conditions: Conditions = UNBOUND


class Deny(NamedTuple):
    """No; the reason is for the audit log. `by` is the grant that denies, where one does."""

    reason: str
    by: str | None = None


class Decided(NamedTuple):
    """What was allowed, by which grant, and for a job of which epsilon, where that was asked."""

    verb: str
    tenant_id: str
    resource_id: str
    grant_id: str
    epsilon: float | None = None


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
    allow = _allow(session, principal, verb, tenant_id, resource_id)
    _note(session, Decided(verb, tenant_id, resource_id, allow.by))
    return Authorized(principal, row, allow.by, _PROOF, allow.conditions)


def require_epsilon(session: Session, authorized: Authorized[Any], verb: str, epsilon: float) -> None:
    """Raise Forbidden where the grant does not allow a job of this epsilon."""
    tenant_id, resource_id = _place(authorized.resource)
    _require_epsilon(
        Allow(authorized.grant_id, authorized.conditions), authorized.principal, verb, resource_id, epsilon
    )
    _note(session, Decided(verb, tenant_id, resource_id, authorized.grant_id, epsilon))


def proofs(session: Session, principal: Principal) -> list[list[Any]]:
    """What was allowed so far for this request, as JSON for `authorize_again`: [verb, tenant, resource, epsilon] each.

    Of what the work itself took the grant away, as whoever deletes a resource does, the verb is null: that cannot be asked again.
    """
    noted: dict[tuple[str, str, str], float | None] = {}
    for each in session.info[DECIDED]:
        asked = (each.verb, each.tenant_id, each.resource_id)
        noted[asked] = max(
            (epsilon for epsilon in (noted.get(asked), each.epsilon) if epsilon is not None), default=None
        )
    kept: list[list[Any]] = []
    for (verb, tenant_id, resource_id), epsilon in noted.items():
        decision = decide(session, principal, verb, tenant_id=tenant_id, resource_id=resource_id)
        kept.append([verb if isinstance(decision, Allow) else None, tenant_id, resource_id, epsilon])
    return kept


def authorize_again(session: Session, principal: Principal, proofs: Iterable[Iterable[Any]]) -> None:
    """Ask for all of this as the work that was allowed it would be asked now; refuses as `find` and `require_epsilon` do.

    What cannot be asked again is refused where its tenant is suspended, or no more.
    """
    for verb, tenant_id, resource_id, epsilon in proofs:
        if verb is None:
            _require_standing(session, principal, tenant_id, resource_id)
            continue
        try:
            allow = _allow(session, principal, verb, tenant_id, resource_id)
        except _NotThis as refusal:
            if _may_know(session, principal, verb, resource_id):
                raise
            raise _NotVisible(VERBS[verb].__name__.lower(), refusal.denial) from None
        if epsilon is not None:
            _require_epsilon(allow, principal, verb, resource_id, epsilon)


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
    model = _model(principal.tenant_id, served.model_id, served.model)
    return Authorized(principal, model, served.by.grant_id, _PROOF, served.by.conditions), served


@lru_cache(maxsize=1024)
def _model(tenant_id: str, model_id: str, name: str) -> Model:
    """A row of no session, which whoever is given it only reads."""
    return Model(tenant_id=tenant_id, id=model_id, name=name)


def _allow(session: Session, principal: Principal, verb: str, tenant_id: str, resource_id: str) -> Allow:
    """Raises _NotThis, RateLimited or Unavailable."""
    decision = decide(session, principal, verb, tenant_id=tenant_id, resource_id=resource_id)
    if isinstance(decision, Allow):
        _count(session, decision, tenant_id)
        return decision
    if decision is _UNREACHABLE:
        raise Unavailable("nobody could decide whether you may do this, so you may not; retry in a moment")
    raise _NotThis(Denial(principal, verb, resource_id, decision.reason))


def _require_epsilon(allow: Allow, principal: Principal, verb: str, resource_id: str, epsilon: float) -> None:
    most = allow.conditions.max_epsilon
    if most is not None and not epsilon <= most:
        reason = f"grant {allow.by} allows epsilon {most:g} at most, and {epsilon:g} was asked"
        raise _NotSoMuch(Denial(principal, verb, resource_id, reason), most)


def _require_standing(session: Session, principal: Principal, tenant_id: str, resource_id: str) -> None:
    tenant = session.get(Tenant, tenant_id)
    if tenant is None or tenant.status != "active" or tenant.suspended is not None:
        raise _NotVisible(
            "resource", Denial(principal, "(a replay)", resource_id, "its tenant is suspended or shredded")
        )


def _may_know(session: Session, principal: Principal, verb: str, resource_id: str) -> bool:
    """Whether the principal may know that there is such a resource: of a tenant, which is its own, it does."""
    table = VERBS.get(verb, Tenant)
    if table is Tenant:
        return True
    visible = visible_to(principal, table).where(table.__table__.c.id == resource_id)
    return session.scalars(visible).one_or_none() is not None


def _note(session: Session, decided: Decided) -> None:
    noted: list[Decided] | None = session.info.get(DECIDED)
    if noted is not None:
        noted.append(decided)


def _count(session: Session, allow: Allow, tenant_id: str) -> None:
    most = allow.conditions.requests_per_minute
    if most is None:
        return
    wait_s = grant_rate.use(session, tenant_id=tenant_id, grant_id=allow.by)
    if wait_s:
        raise RateLimited(
            f"your grant allows this {most} times a minute; go on in {wait_s} s, or ask the owner for another grant",
            details={"requests_per_minute": most, "retry_after_s": wait_s},
        )


def _decide_for_operator(principal: Principal, verb: str, tenant_id: str) -> Allow | Deny:
    if verb in OPERATOR_VERBS and tenant_id == principal.tenant_id:
        return Allow(by="operator")
    return Deny("not an operator's to do")


def _place(row: Any) -> tuple[str, str]:
    """A resource's tenant and id; a tenant is a resource of its own. Every resource has an id, though `Table` has none."""
    return str(row.id if isinstance(row, Tenant) else row.tenant_id), str(row.id)
