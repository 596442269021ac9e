"""How operations are run: by whom they may be, what of them is audited, planned, confirmed. Knows no operation.

Who comes by the API is asked for anew in each transaction: whoever is no operator any more is refused on the next request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from cloister.wire._model import Body
from cloister_server import asking, audit, operators
from cloister_server.audit import denials_kept
from cloister_server.errors import Forbidden, Invalid, ServerError, Unavailable
from cloister_server.operations.definition import Acting, Asked, Operation
from cloister_server.policy import Denial, Denied
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import snapshot

__all__ = ["accounted", "done", "planned", "prepared", "read", "repeated", "require_operator", "require_scope", "run"]

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Body)


class _NoScope(Denied, Forbidden):
    """The token has not the scope of the operator's operations."""

    default_code = "admin_scope_needed"

    def __init__(self, denial: Denial) -> None:
        Forbidden.__init__(
            self,
            "this is for operators, whose tokens have the scope `admin`: log in with `cloister-admin login`, or ask an operator",
        )
        self.denial = denial


class _NoOperator(Forbidden):
    default_code = "no_operator"

    def __init__(self) -> None:
        super().__init__("you are no operator of this deployment any more; ask another one, or whoever holds its keys")


class _Planned(Exception):
    """Ends the transaction of a dry run, and says what it would have answered."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer


def require_scope(principal: Principal, name: str) -> None:
    """Raise Denied unless whoever comes by the API has an operator's token."""
    if not principal.may_administer:
        raise _NoScope(Denial(principal, f"admin.{name}", "deployment", "the token has not the scope `admin`"))


def run(service: Service, operation: Operation[R], by: Acting, asked: Asked[R]) -> Any:
    """All of it: what the operation answers, or what it would do where that is asked. Raises ServerError."""
    with accounted(service, operation, by, asked):
        if not operation.changes:
            return read(service, operation, by, asked)
        ready = prepared(service, operation, by, asked)
        if asked.dry_run:
            return planned(service, operation, by, ready)
        return service.write(ALL_TENANTS, lambda session: done(session, service, operation, by, ready))


@contextmanager
def accounted(service: Service, operation: Operation[R], by: Acting, asked: Asked[R]) -> Iterator[None]:
    """Around an operation: a refusal that ends it is told in the audit log, and raised again."""
    try:
        with denials_kept(service.engine):
            yield
    except ServerError as refusal:
        try:
            _tell(service, operation, by, asked, f"denied: {refusal.code}")
        except (SQLAlchemyError, Unavailable) as error:
            log.error("audit.denial_not_written", extra={"error": type(error).__name__, "request_id": by.request_id})
        raise


def prepared(service: Service, operation: Operation[R], by: Acting, asked: Asked[R]) -> Asked[R]:
    """What takes long is done, in no transaction, for nobody but an operator."""
    prepare = operation.prepare
    if prepare is None:
        return asked
    service.read(ALL_TENANTS, lambda session: require_operator(session, by))
    return asked.model_copy(update={"request": prepare(asked.request)})


def read(service: Service, operation: Operation[R], by: Acting, asked: Asked[R]) -> Any:
    """The answer of an operation that writes nothing, of one moment; told in the audit log before it is given."""

    def work(session: Session) -> Any:
        require_operator(session, by)
        return operation.work(session, service, by, asked.request)

    answer = asking.run(lambda: snapshot(service.engine, ALL_TENANTS), service.keys, work)
    try:
        _tell(service, operation, by, asked, "allowed")
    except Unavailable as error:
        if not by.is_local:
            raise
        # Whoever holds the keys must see what is wrong with a ledger before they mend it.
        log.error("audit.read_not_written", extra={"error": type(error).__name__, "request_id": by.request_id})
    return answer


def planned(service: Service, operation: Operation[R], by: Acting, asked: Asked[R]) -> dict[str, Any]:
    """What the operation would answer, but for what is fresh in it; it is refused what the operation would be. Nothing is changed."""

    def work(session: Session) -> Any:
        require_operator(session, by)
        answer = (operation.plan or operation.work)(session, service, by, asked.request)
        session.flush()  # the database's own checks, too
        raise _Planned({name: value for name, value in answer.items() if name not in operation.fresh})

    try:
        service.write(ALL_TENANTS, work)
    except _Planned as plan:
        _tell(service, operation, by, asked, "allowed")
        return {"dry_run": True, **plan.answer}
    raise AssertionError("unreachable")


def done(session: Session, service: Service, operation: Operation[R], by: Acting, asked: Asked[R]) -> Any:
    """Do it, in this transaction, and tell so in the audit log. Raises Invalid where it is to be confirmed first."""
    require_operator(session, by)
    _require_confirmed(session, operation, asked)
    answer = operation.work(session, service, by, asked.request)
    _told(session, operation, by, asked, "allowed")
    return answer


def repeated(session: Session, operation: Operation[R], by: Acting, asked: Asked[R]) -> None:
    """Before an answer is given again: tell of that in the audit log. Raises Forbidden as `require_operator` does."""
    require_operator(session, by)
    _told(session, operation, by, asked, "allowed: answered again")


def require_operator(session: Session, by: Acting) -> None:
    """Raise Forbidden unless whoever has come by the API is an operator now."""
    if not (by.is_local or operators.is_operator(session, by.id)):
        raise _NoOperator


def _require_confirmed(session: Session, operation: Operation[R], asked: Asked[R]) -> None:
    if operation.destroys is None:
        return
    name, warning = operation.destroys.name(session, asked.request), operation.destroys.warning
    if asked.confirm != name:
        raise Invalid(
            f"nothing was changed: confirm it with --confirm {name}. {warning}",
            code="not_confirmed",
            details={"name": name, "warning": warning},
        )


def _tell(service: Service, operation: Operation[R], by: Acting, asked: Asked[R], outcome: str) -> None:
    work: Callable[[Session], None] = lambda session: _told(session, operation, by, asked, outcome)  # noqa: E731 (its type)
    service.write(ALL_TENANTS, work)


def _told(session: Session, operation: Operation[R], by: Acting, asked: Asked[R], outcome: str) -> None:
    """In the chain of the operators' own tenant, once there is one; what was done to another tenant is told in that one's, too."""
    tenant = operators.tenant(session)
    if tenant is None:
        return
    principal = Principal.operator(tenant.id, request_id=by.request_id, by=by.id)
    about = str(getattr(asked.request, "tenant", None) or getattr(asked.request, "name", None) or "deployment")
    verb = f"admin.{operation.name}{'.dry-run' if asked.dry_run else ''}"
    audit.operated(session, principal, verb, about if audit.NAMING.fullmatch(about) else "deployment", outcome)
