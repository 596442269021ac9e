"""No tenant sees another: each of the gates holds for every table without the others, and no line of the product goes round them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, LargeBinary, MetaData, create_engine, delete, event, exists, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, aliased

from cloister_server import policy
from cloister_server.errors import NotFound
from cloister_server.policy import Allow
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import chain, isolation, paging, tables
from cloister_server.store import session as transactions
from cloister_server.store.acting import ALL_TENANTS, Acting, for_principal, for_tenants
from cloister_server.store.identities import Login
from cloister_server.store.session import new_engine, reading, writing
from cloister_server.store.tables import Grant, Model, Owned, Source, Table, Tenant, now
from server.test_policy import put

HERE, THERE = "tn_" + "1" * 32, "tn_" + "2" * 32
WHO = Principal(HERE, "ap_" + "1" * 32, "app", "request-of-a-test")
OWNED = sorted(
    (m.class_ for m in Table.registry.mappers if issubclass(m.class_, Owned)), key=lambda table: table.__name__
)
PRODUCT = Path(isolation.__file__).resolve().parents[1]


@contextmanager
def no_gate_in_the_orm() -> Iterator[None]:
    gates = [each for each in isolation.GATES if each[1] not in (isolation.begin, isolation.end)]
    for name, gate in gates:
        event.remove(transactions._Reading, name, gate)
    try:
        yield
    finally:
        for name, gate in gates:
            event.listen(transactions._Reading, name, gate)


@contextmanager
def no_row_security(service: Service) -> Iterator[None]:
    if service.settings.owner_database_url is None:
        yield  # SQLite has none
        return
    owner = new_engine(service.settings.owner_database_url.get_secret_value())

    def alter(how: str) -> None:
        with owner.begin() as connection:
            for table in (*OWNED, Tenant):
                connection.execute(text(f"ALTER TABLE {table.__tablename__} {how} ROW LEVEL SECURITY"))

    alter("DISABLE")
    try:
        yield
    finally:
        alter("ENABLE")
        owner.dispose()


def no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is visible, and whoever asks may do everything to it."""
    for module in (policy, paging):
        monkeypatch.setattr(module, "visible_to", lambda principal, table: select(table))
    monkeypatch.setattr(policy, "decide", lambda *_, **__: Allow(by="mutant"))


@contextmanager
def left_alone(gate: str, service: Service) -> Iterator[None]:
    """All gates but this one are taken away; every gate, where it is none of them."""
    if gate == "row security" and service.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no row security")
    with ExitStack() as taken:
        if gate != "policy":
            no_policy(taken.enter_context(pytest.MonkeyPatch.context()))
        if gate != "orm":
            taken.enter_context(no_gate_in_the_orm())
        if gate != "row security":
            taken.enter_context(no_row_security(service))
        yield


def some_row(table: type[Any], tenant_id: str, **changed: Any) -> dict[str, Any]:
    """Values of a row that refers to the rows that the same makes of the other tables."""
    plain = {str: "x", int: 1, float: 1.0, bool: False}
    values = {}
    for column in table.__table__.columns:
        if isinstance(column.type, LargeBinary):
            values[column.name] = b"x"
        elif isinstance(column.type, tables._UTC):
            values[column.name] = None if column.nullable else now()
        else:
            values[column.name] = plain.get(column.type.python_type, {})
    return {**values, ("id" if table is Tenant else "tenant_id"): tenant_id, **changed}


def fill(engine: Engine, *tenant_ids: str) -> None:
    """One row of each tenant in every table that is tenants', written past every gate."""
    order = {table.name: number for number, table in enumerate(Table.metadata.sorted_tables)}
    with engine.begin() as connection:
        for tenant_id in tenant_ids:
            for table in sorted(
                (*OWNED, Tenant), key=lambda each: (each is not tables.PolicyRevision, order[each.__tablename__])
            ):
                connection.execute(insert(table.__table__), some_row(table, tenant_id, **_named(table, tenant_id)))


def _named(table: type[Any], tenant_id: str) -> dict[str, Any]:
    """What no two tenants may have alike."""
    if table is Tenant:
        return {"name": tenant_id}
    return {"handle": tenant_id} if table is Login else {}


def of_tenant(table: type[Any]) -> Any:
    return table.tenant_id if hasattr(table, "tenant_id") else table.id


@pytest.mark.parametrize("gate", ["orm", "row security"])
def test_a_gate_alone_shows_and_takes_no_row_of_another_tenant(service: Service, gate: str) -> None:
    fill(service.engine, HERE, THERE)
    with writing(service.engine) as session:  # the one row that is no tenant's and everybody's to read
        session.execute(delete(tables.TenantKey).where(tables.TenantKey.tenant_id == tables.SYSTEM))
    with left_alone(gate, service):
        for acting in (for_principal(WHO), for_tenants(HERE)):
            with reading(service.engine, acting) as session:
                for table in (*OWNED, Tenant):
                    _is_not_shown(session, table)
        for table in (*OWNED, Tenant):
            _is_not_changed(service.engine, table)


def _is_not_shown(session: Session, table: type[Any]) -> None:
    tenant, other = of_tenant(table), aliased(table)
    assert set(session.scalars(select(tenant))) == {HERE}, table
    assert {getattr(row, "tenant_id", HERE) for row in session.scalars(select(table))} == {HERE}
    assert session.scalar(select(func.count()).select_from(table)) == 1
    assert session.scalars(select(table).where(tenant == THERE)).all() == []
    key = some_row(table, THERE)
    assert session.get(table, tuple(key[column.name] for column in table.__table__.primary_key)) is None
    assert not session.scalar(select(exists().where(of_tenant(other) == THERE)))
    assert session.scalars(select(of_tenant(other)).where(of_tenant(other).in_(select(tenant)))).all() == [HERE]


def _is_not_changed(engine: Engine, table: type[Any]) -> None:
    tenant = of_tenant(table)
    changed = {c.name: "y" for c in table.__table__.primary_key if c.type.python_type is str}
    fresh = some_row(table, THERE) | changed | {tenant.key: THERE} | ({"handle": "y"} if table is Login else {})
    refusals = (isolation.OtherTenant, DBAPIError)
    with pytest.raises(refusals), writing(engine, for_principal(WHO)) as session:
        session.add(table(**fresh))
    if table is not Tenant:
        with pytest.raises(refusals), writing(engine, for_tenants(HERE)) as session:
            session.execute(insert(table), [fresh])
    try:
        with writing(engine, for_tenants(HERE)) as session:
            assert session.execute(delete(table).where(tenant == THERE)).rowcount == 0
    except DBAPIError as refusal:  # of an append-only table nobody may delete
        assert "denied" in str(refusal) or "append-only" in str(refusal)
    with reading(engine, ALL_TENANTS) as session:
        assert session.scalar(select(func.count()).where(tenant == THERE)) == 1, table


@pytest.mark.parametrize("gate", ["orm", "row security"])
def test_a_row_is_not_moved_to_another_tenant(service: Service, gate: str) -> None:
    fill(service.engine, HERE, THERE)
    with left_alone(gate, service):
        with pytest.raises((isolation.OtherTenant, DBAPIError)), writing(service.engine, for_tenants(HERE)) as session:
            session.get_one(tables.IdempotencyKey, (HERE, "x", "x", "x")).tenant_id = "tn_" + "3" * 32
        with pytest.raises((isolation.OtherTenant, DBAPIError)), writing(service.engine, for_tenants(HERE)) as session:
            theirs = tables.IdempotencyKey(**some_row(tables.IdempotencyKey, THERE))
            session.merge(theirs)


@pytest.mark.parametrize("gate", ["orm", "row security"])
def test_a_look_across_tenants_writes_nothing_of_theirs_that_waits(service: Service, gate: str) -> None:
    fill(service.engine, HERE, THERE)
    with (
        left_alone(gate, service),
        pytest.raises((isolation.OtherTenant, DBAPIError)),
        writing(service.engine, for_tenants(HERE)) as session,
    ):
        session.add(tables.Group(id="grp_" + "9" * 32, tenant_id=THERE, name="theirs"))
        with isolation.lifted(session):
            session.scalars(select(tables.Group)).all()
    with reading(service.engine, ALL_TENANTS) as session:
        assert "theirs" not in session.scalars(select(tables.Group.name)).all()


@pytest.mark.parametrize("ask", [chain.head, chain.lock, chain.require_anchored])
def test_another_tenants_chain_is_not_looked_at(service: Service, ask: Any) -> None:
    fill(service.engine, HERE, THERE)
    given = (None, THERE) if ask is chain.require_anchored else (THERE,)
    for acting in (for_tenants(HERE), for_tenants()):
        with reading(service.engine, acting) as session, pytest.raises(isolation.OtherTenant):
            ask(session, *given)


def test_what_a_grant_shares_passes_every_gate_and_ends_with_the_grant(service: Service) -> None:
    fill(service.engine, HERE)
    theirs = put(service, Model, THERE, "shared")
    shared = {"tenant_id": THERE, "principal_id": WHO.id, "verb": "model.read", "resource_id": theirs.id}
    with writing(service.engine) as session:
        session.add(Grant(id="gr_" + "1" * 32, effect="allow", expires=now() + timedelta(hours=1), **shared))
    with reading(service.engine, for_principal(WHO)) as session:
        assert policy.find(session, WHO, "model.read", Model, theirs.id).resource.name == "shared"
        assert set(session.scalars(select(Model.tenant_id))) == {HERE, THERE}
    with reading(service.engine, for_tenants(HERE)) as session:
        assert set(session.scalars(select(Model.tenant_id))) == {HERE}
    with writing(service.engine) as session:
        session.execute(delete(Grant).where(Grant.id == "gr_" + "1" * 32))
    with reading(service.engine, for_principal(WHO)) as session:
        assert set(session.scalars(select(Model.tenant_id))) == {HERE}
        with pytest.raises(NotFound):
            policy.find(session, WHO, "model.read", Model, theirs.id)


def test_who_is_not_said_for_sees_nothing(service: Service) -> None:
    fill(service.engine, HERE)
    with transactions._Reading(service.engine) as session:
        assert session.scalars(select(Source)).all() == []
    with reading(service.engine, for_tenants()) as session:
        assert session.scalars(select(Source)).all() == []
    if service.engine.dialect.name == "sqlite":
        return
    bare = create_engine(service.engine.url)
    with bare.connect() as connection:
        connection.execute(text("SELECT set_config('cloister.tenants', '', false)"))
        assert connection.scalar(text("SELECT count(*) FROM sources")) == 0
        connection.rollback()
    bare.dispose()


def test_what_a_transaction_acted_for_ends_with_it(service: Service) -> None:
    """The pool gives the connection on; what the last one acted for must not go with it."""
    fill(service.engine, HERE, THERE)
    seen = []
    for acting in (ALL_TENANTS, for_tenants(HERE), for_tenants(THERE), Acting(())):
        with reading(service.engine, acting) as session:
            seen.append(set(session.scalars(select(Source.tenant_id))))
            session.rollback()
            assert set(session.scalars(select(Source.tenant_id))) == seen[-1]  # a second transaction of the session
    assert seen == [{HERE, THERE}, {HERE}, {THERE}, set()]


def test_every_table_of_tenants_is_owned_and_forces_row_security(engine: Engine) -> None:
    of_tenants = {name for name, table in Table.metadata.tables.items() if "tenant_id" in table.c}
    assert {table.__tablename__ for table in OWNED} == of_tenants
    if engine.dialect.name == "sqlite":
        return
    secured = text("SELECT relname FROM pg_class WHERE relrowsecurity AND relforcerowsecurity AND relkind = 'r'")
    with engine.connect() as connection:
        assert set(connection.scalars(secured)) == of_tenants | {"tenants"}
        there = MetaData()
        there.reflect(connection)
    assert of_tenants <= set(there.tables)


_DOORS = {
    "Session",
    "create_engine",
    "connect",
    "raw_connection",
    "connection",
    "exec_driver_sql",
    "text",
    "lifted",
    "past_the_orm",
}
_ALLOWED = {
    ("backups.py", "connect"): "SQLite's own copy of the whole file, by whoever holds the deployment",
}
_STATEMENTS = {"select", "update", "delete", "insert", "exists"}


def bypasses(name: str, source: str) -> list[str]:
    """What goes round the gates in a module outside of the store: a door of its own to the database, or a statement about tenants'
    rows in a function that compares no tenant."""
    tree, found = ast.parse(source), []
    owned = {table.__name__ for table in OWNED}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            is_statement = called != "text" or node.args or node.keywords  # without SQL it is somebody else's `text`
            if called in _DOORS and is_statement and (name, called) not in _ALLOWED:
                found.append(f"{name}:{node.lineno}: {called}")
    for function in (each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)):
        for node in ast.walk(function):
            is_statement = (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _STATEMENTS
            )
            if is_statement and owned & _names_in(node) and not any(map(_compares_tenant, ast.walk(function))):
                found.append(f"{name}:{node.lineno}: a statement of no tenant")
    return found


def _names_in(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _compares_tenant(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "tenant_id"


def test_no_module_outside_of_the_store_goes_round_the_gates() -> None:
    modules = [path for path in sorted(PRODUCT.rglob("*.py")) if "store" not in path.relative_to(PRODUCT).parts]
    assert len(modules) > 60
    assert [each for path in modules for each in bypasses(path.name, path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "def f(session):\n    return session.scalars(select(Model).where(Model.id == given))",
        "def f(session):\n    session.execute(delete(Grant).where(Grant.principal_id == given))",
        "def f(session):\n    return session.scalar(select(func.count()).select_from(select(Job.id).subquery()))",
        "def f(engine):\n    with Session(engine) as session:\n        pass",
        "def f(engine):\n    with engine.connect() as connection:\n        pass",
        "def f(session):\n    session.execute(text('SELECT * FROM models'))",
        "def f(session):\n    with lifted(session):\n        pass",
        "def f(session):\n    past_the_orm(session, given).execute(statement)",
    ],
)
def test_a_bypass_is_seen(source: str) -> None:
    assert bypasses("feature.py", source)
