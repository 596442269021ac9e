"""Two gates behind `visible_to`: every statement of a session keeps to the tenants that it acts for, in the ORM and in the database.

The ORM adds the tenants to each statement about an `Owned` table, and refuses to flush a row of another. On PostgreSQL the database
itself is told them for the length of the transaction, and its row security shows and takes no others (migration 0008). Each gate
holds without the other. What a session acts for is looked up anew as each of its transactions begins; unless it is told, nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from sqlalchemy import BigInteger, Connection, String, bindparam, cast, event, inspect, null, or_, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction, with_loader_criteria
from sqlalchemy.sql.base import ExecutableOption

from cloister_server.errors import ServerError, Unavailable
from cloister_server.store.acting import Acting
from cloister_server.store.tables import SYSTEM, Grant, Member, Owned, PolicyRevision, Tenant, now

__all__ = [
    "GATES",
    "OtherTenant",
    "Transaction",
    "acting_for",
    "acts_for",
    "gated",
    "lifted",
    "past_the_orm",
    "transaction_of",
]

_ACTING, _TRANSACTION, _ASK, _SEEN = "acting", "transaction", "ask", "seen"
_TELL = text(
    "SELECT set_config('cloister.tenants', :tenants, true), set_config('cloister.principal', :principal, true)"
)


@dataclass(slots=True)
class Seen:
    """Of a connection to SQLite: a state of the database, and the policies' revisions that were read of it."""

    state: Any = None
    revisions: dict[str, int | None] = field(default_factory=dict)


@dataclass(slots=True)
class Transaction:
    """A session's transaction: which tenants it sees, and the driver's own connection, with what may be asked of it."""

    tenant_ids: tuple[str, ...] | None
    """None where it sees all."""
    connection: Any
    ask: Callable[..., Any]
    """Runs a statement, whose rows are fetched at once."""
    error: type[Exception]
    revision: str
    """Asks for a tenant's policy revision."""
    revisions: dict[str, int | None] | None
    """Those that were read of the state that it sees; None until it was looked whether that is still the one of `seen`."""
    seen: Seen


class OtherTenant(ServerError):
    """A row of a tenant that the transaction does not act for was about to be written: a mistake of ours, and nothing is kept."""


def acting_for(acting: Acting) -> dict[str, Any]:
    """A session's `info`, which tells the gates for whom it acts."""
    return {_ACTING: acting}


@contextmanager
def lifted(session: Session) -> Iterator[None]:
    """Look across tenants for a moment. For the store's own lookups of who somebody is, and never of what somebody has."""
    before = transaction_of(session)
    if before.tenant_ids is None:
        yield
        return
    session.flush()  # what waits to be written is none of the moment's
    session.info[_TRANSACTION] = replace(before, tenant_ids=None)
    _tell(session.connection(), None, _acting(session))
    try:
        yield
    finally:
        session.info[_TRANSACTION] = before
        _tell(session.connection(), before.tenant_ids, _acting(session))


def transaction_of(session: Session) -> Transaction:
    """The session's, which begins here at the latest."""
    found: Transaction | None = session.info.get(_TRANSACTION)
    if found is None:
        session.connection()
        found = session.info.get(_TRANSACTION)
        if found is None:  # it was refused as it began
            raise Unavailable("nobody could decide what you may see, so it is nothing; retry in a moment")
    return found


def acts_for(session: Session, *tenant_ids: str) -> bool:
    """Whether the session's transaction sees all of these tenants."""
    seen = transaction_of(session).tenant_ids
    return seen is None or all(each in seen for each in tenant_ids)


def past_the_orm(session: Session, *tenant_ids: str) -> Connection:
    """The session's connection, for statements about these tenants that the ORM takes longer with than the database.

    Raises OtherTenant where the transaction does not act for all of them. What waits in the session is not flushed.
    """
    if not acts_for(session, *tenant_ids):
        raise OtherTenant("rows of a tenant that this transaction does not act for")
    return session.connection()


def _acting(session: Session) -> Acting:
    """Unless it was told, a session acts for nobody."""
    acting: Acting = session.info.get(_ACTING, Acting(()))
    return acting


def begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Look up whom the transaction acts for, and tell the database. Raises Unavailable where it cannot be asked."""
    if transaction.nested:
        return
    acting, is_embedded = _acting(session), connection.dialect.name == "sqlite"
    try:
        _tell(connection, acting.tenant_ids, acting)
        tenant_ids, revisions = acting.tenant_ids, None if is_embedded else dict[str, int | None]()
        if tenant_ids is not None and acting.principal_id is not None:
            own = tenant_ids[0]
            asked = {"tenant_id": own, "principal_id": acting.principal_id, "at": now()}
            found = connection.execute(_SHARING if is_embedded else _SHARING_AND_REVISION, asked).all()
            if (
                revisions is not None
            ):  # on SQLite it is looked up where it is wanted; elsewhere a question more would be a round trip more
                revisions[own] = next((row.revision for row in found if row.revision is not None), None)
            tenant_ids = tuple(dict.fromkeys((*tenant_ids, *(row.tenant_id for row in found))))
            if tenant_ids != acting.tenant_ids:
                _tell(connection, tenant_ids, acting)
    except SQLAlchemyError:
        raise Unavailable("nobody could decide what you may see, so it is nothing; retry in a moment") from None
    mark = "?" if is_embedded else "%s"
    driver: Any = connection.connection.driver_connection
    session.info[_TRANSACTION] = Transaction(
        tenant_ids,
        driver,
        _asking(connection.info, driver) if is_embedded else driver.execute,
        connection.dialect.loaded_dbapi.Error,
        f"SELECT revision FROM policy_revisions WHERE tenant_id = {mark}",  # noqa: S608 (the driver's own mark)
        revisions,
        connection.info.setdefault(_SEEN, Seen()),
    )


def _asking(of_connection: dict[Any, Any], driver: Any) -> Callable[..., Any]:
    """By a cursor that lasts as long as the connection: to make one takes as long as to ask."""
    ask: Callable[..., Any] | None = of_connection.get(_ASK)
    if ask is None:
        ask = of_connection[_ASK] = driver.cursor().execute
    return ask


def end(session: Session, transaction: SessionTransaction) -> None:
    """The connection goes back to the pool: nothing is known of its next transaction."""
    if transaction.parent is None:
        session.info.pop(_TRANSACTION, None)


def keep_to_tenants(state: ORMExecuteState) -> None:
    """Add the session's tenants to every `Owned` table that a statement names, however deep; refuse bulk inserts of others."""
    tenant_ids = transaction_of(state.session).tenant_ids
    if tenant_ids is None:
        return
    if state.is_insert:
        _refuse_inserted(state, tenant_ids)
        return
    state.statement = state.statement.options(*_of(tenant_ids))


@lru_cache(maxsize=1024)
def _of(tenant_ids: tuple[str, ...]) -> tuple[ExecutableOption, ...]:
    """What keeps a statement to these tenants. Kept, since it takes longer to make than many a statement to run."""
    # The service's own key is told apart by no tenant: it opens the keys that sign tokens, for whoever comes.
    own = (*tenant_ids, SYSTEM)
    return (
        with_loader_criteria(Owned, lambda cls: cls.tenant_id.in_(own), include_aliases=True),
        with_loader_criteria(Tenant, lambda cls: cls.id.in_(own), include_aliases=True),
    )


def refuse_others(session: Session, *_: object) -> None:
    """Refuse to flush a row that is, was or becomes another tenant's."""
    touched = [*session.new, *session.dirty, *session.deleted]
    owned = [row for row in touched if isinstance(row, (Owned, Tenant))]
    if not owned:
        return
    tenant_ids = transaction_of(session).tenant_ids
    if tenant_ids is None:
        return
    for row in owned:
        history = inspect(row).attrs["id" if isinstance(row, Tenant) else "tenant_id"].history
        for tenant_id in (*history.added, *history.unchanged, *history.deleted):
            if tenant_id not in tenant_ids:
                raise OtherTenant(f"a {type(row).__name__} of a tenant that this transaction does not act for")


GATES = (
    ("after_begin", begin),
    ("after_transaction_end", end),
    ("do_orm_execute", keep_to_tenants),
    ("before_flush", refuse_others),
)
"""Session events and what is done at each."""


def gated(kind: type[Session]) -> type[Session]:
    """Sessions of this class go through every gate."""
    for name, gate in GATES:
        event.listen(kind, name, gate)
    return kind


def _refuse_inserted(state: ORMExecuteState, tenant_ids: tuple[str, ...]) -> None:
    mapper = state.bind_mapper
    if mapper is None or not issubclass(mapper.class_, Owned):
        return
    given: Any = state.parameters
    rows = given if isinstance(given, (list, tuple)) else [given or {}]
    if any(row.get("tenant_id") not in tenant_ids for row in rows):
        raise OtherTenant(f"a {mapper.class_.__name__} of a tenant that this transaction does not act for")


def _tell(connection: Connection, tenant_ids: tuple[str, ...] | None, acting: Acting) -> None:
    if connection.dialect.name == "sqlite":
        return
    tenants = "*" if tenant_ids is None else ",".join(tenant_ids)
    connection.execute(_TELL, {"tenants": tenants, "principal": acting.principal_id or ""})


def _sharing() -> Any:
    """The tenants that granted the principal something. On the tables themselves, past the ORM's gate."""
    grant, member = Grant.__table__.c, Member.__table__.c
    tenant_id, principal_id = bindparam("tenant_id", type_=String), bindparam("principal_id", type_=String)
    groups = select(member.group_id).where(member.tenant_id == tenant_id, member.principal_id == principal_id)
    return (
        select(grant.tenant_id, cast(null(), BigInteger).label("revision"))
        .distinct()
        .where(
            or_(grant.principal_id == principal_id, grant.principal_id.in_(groups)),
            grant.tenant_id != tenant_id,
            grant.effect == "allow",
            or_(grant.expires.is_(None), grant.expires > bindparam("at", type_=grant.expires.type)),
        )
    )


def _sharing_and_revision() -> Any:
    """The same, and its own with its policy's revision."""
    counted = PolicyRevision.__table__.c
    own = select(counted.tenant_id, counted.revision).where(counted.tenant_id == bindparam("tenant_id", type_=String))
    return own.union_all(_sharing())


_SHARING, _SHARING_AND_REVISION = _sharing(), _sharing_and_revision()
"""Made once: each transaction of a principal asks one of them."""
