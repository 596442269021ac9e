"""Tamper evidence on real databases: what was altered is named, and a database from an older backup spends nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection, create_engine, event, func, make_url, select, text
from starlette.testclient import TestClient

from cloister.wire.plans import Event
from cloister.wire.sources import CreateSource
from cloister_server import budgets, deployment, evidence, ledger, restores, sources
from cloister_server.app import create_app
from cloister_server.errors import (
    BudgetExceeded,
    Conflict,
    Invalid,
    LedgerRolledBack,
    StartRefused,
    Unavailable,
)
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import chain
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.anchors import Anchor, Anchors
from cloister_server.store.chain import ChainBroken, Head
from cloister_server.store.queries import blocks_of
from cloister_server.store.session import new_engine, reading, snapshot, writing
from cloister_server.store.tables import (
    Attempt,
    AuditRow,
    Dataset,
    Job,
    LedgerEntry,
    Link,
    Model,
    Source,
    Tenant,
    new_id,
)

EVENT = Event(
    mechanism="poisson_subsampled_gaussian",
    noise_multiplier=1.1425,
    sampling_rate=256 / 60_000,
    steps=100,
    unit="row",
    adjacency="add_remove",
)


class World:
    """A deployment with one tenant, its operator and a source of it."""

    def __init__(self, service: Service, principal: Principal, name: str = "people") -> None:
        self.service, self.principal = service, principal
        self.tenant_id = principal.tenant_id
        self.operator = Principal.operator(self.tenant_id, request_id="request-of-a-test")
        self.source_id = declare(service, principal, name)

    def charge(self) -> str:
        """Reserve a run; the job's id."""
        job_id = new_id("job")
        with writing(self.service.engine) as session:
            source = budgets.lock(session, self.source(session))
            budgets.reserve(session, source, job_id=job_id, principal_id="ap_x", event=EVENT, blocks=(0,))
        return job_id

    def source(self, session: Any) -> Source:
        return session.get_one(Source, (self.tenant_id, self.source_id))

    def verify(self) -> Head:
        with snapshot(self.service.engine) as session:
            return evidence.verify(session, self.operator)

    def fault(self) -> str:
        with pytest.raises(ChainBroken) as fault:
            self.verify()
        return fault.value.message

    def anchor(self) -> Anchor | None:
        return Anchors(self.service.settings.anchor_dir).of(self.tenant_id)

    def exported(self) -> list[str]:
        with snapshot(self.service.engine) as session:
            return [json.dumps(line) for line in restores.export(session, self.operator)]

    def replay(self, lines: list[str]) -> restores.Replayed:
        with writing(self.service.engine) as session:
            return restores.replay(session, self.operator, lines, Anchors(self.service.settings.anchor_dir))

    def write_off(self) -> None:
        with writing(self.service.engine) as session:
            anchors = Anchors(self.service.settings.anchor_dir)
            restores.write_off(session, self.operator, reason="the events are lost", anchors=anchors)

    def in_service(self, service: Service) -> World:
        """The same tenant and source, in another database."""
        other = object.__new__(World)
        vars(other).update(vars(self), service=service)
        return other


def put_a_job(world: World) -> None:
    """A job that waits to be begun, as little of it as the database takes."""
    with writing(world.service.engine) as session:
        session.add(Model(tenant_id=world.tenant_id, id="mdl_x", name="m", champion=0))
        session.add(
            Dataset(
                tenant_id=world.tenant_id, id="ds_x", source_id=world.source_id, name="d", columns={}, nominal_size=1,
                capacity=1, capacity_rows=1, part_rows=1, parts=1, status="ready",
            )
        )  # fmt: skip
        session.flush()
        session.add(
            Job(
                tenant_id=world.tenant_id, id="job_x", source_id=world.source_id, dataset_id="ds_x", model_id="mdl_x",
                principal_id="ap_x", request_id="r", spec_id="o", status="queued", steps=1, epsilon=1.0, delta=1e-6,
            )
        )  # fmt: skip


def declare(service: Service, principal: Principal, name: str) -> str:
    with writing(service.engine) as session:
        return sources.create(session, principal, CreateSource(name=name, epsilon=3.0, delta=1e-6)).id


@pytest.fixture
def world(service: Service, make_client: Callable[..., Any]) -> World:
    """Charged twice, so that its chain has rows of both kinds."""
    made = World(service, make_client().principal)
    for _ in range(2):
        made.charge()
    return made


@pytest.fixture
def backup(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Service], Callable[[], Service]]]:
    """Takes a backup of a service's database; what it gives opens the deployment on that backup, in the database's place."""
    opened: list[Service] = []

    def take(service: Service) -> Callable[[], Service]:
        copy = _copy_file(service, tmp_path) if service.settings.is_sqlite else _copy_database(service, request)

        def restore() -> Service:
            service.engine.dispose()
            for each in opened:
                each.engine.dispose()
            opened.append(deployment.open_service(service.settings.model_copy(update={"database_url": copy()})))
            return opened[-1]

        return restore

    yield take
    for each in opened:
        each.engine.dispose()


def _copy_file(service: Service, tmp_path: Path) -> Callable[[], SecretStr]:
    url = service.settings.database_url
    path = Path(str(make_url(url.get_secret_value()).database))
    kept = tmp_path / f"{os.urandom(4).hex()}.backup"
    with service.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(path, kept)

    def put_in_place() -> SecretStr:
        for beside in ("-wal", "-shm"):
            path.with_name(path.name + beside).unlink(missing_ok=True)
        shutil.copy(kept, path)
        return url

    return put_in_place


def _copy_database(service: Service, request: pytest.FixtureRequest) -> Callable[[], SecretStr]:
    admin = create_engine(
        request.getfixturevalue("postgres").replace("postgresql://", "postgresql+psycopg://", 1),
        isolation_level="AUTOCOMMIT",
    )

    def copy_of(name: str) -> str:
        made = f"t{os.urandom(6).hex()}"
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {made} TEMPLATE {name} OWNER {owner}")
        admin.dispose()
        return made

    url = make_url(service.settings.database_url.get_secret_value())
    owner = str(make_url(service.settings.owner_database_url.get_secret_value()).username)  # type: ignore[union-attr]  # it has one
    service.engine.dispose()  # a database that somebody is connected to is no template
    kept = copy_of(str(url.database))
    return lambda: SecretStr(url.set(database=copy_of(kept)).render_as_string(hide_password=False))


@contextmanager
def tampering(service: Service) -> Iterator[Connection]:
    """The database as its owner holds it, who can drop the triggers that refuse changes."""
    owner = service.settings.owner_database_url
    engine = new_engine((owner or service.settings.database_url).get_secret_value())
    with engine.connect() as connection, connection.begin():
        for table in ("ledger", "audit", "balances", "links"):
            if engine.dialect.name == "sqlite":
                for verb in ("update", "delete"):
                    connection.execute(text(f"DROP TRIGGER {table}_no_{verb}"))
            else:
                connection.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER USER"))
        yield connection
    engine.dispose()


def links_of(world: World) -> list[Any]:
    with reading(world.service.engine) as session:
        return list(session.execute(select(Link.number, Link.kind, Link.row_id, Link.digest).order_by(Link.number)))


def last(world: World, kind: str) -> Any:
    return [link for link in links_of(world) if link.kind == kind][-1]


def test_every_ledger_and_audit_row_is_linked_without_a_gap(world: World) -> None:
    links = links_of(world)
    assert [link.number for link in links] == list(range(1, len(links) + 1))
    with reading(world.service.engine) as session:
        rows = {f"{row.source_id}/{row.revision}" for row in session.scalars(select(LedgerEntry))}
        rows |= set(session.scalars(select(AuditRow.id)))
    assert {link.row_id for link in links} == rows
    head = world.verify()
    assert (head.count, head.digest) == (len(links), links[-1].digest)
    assert world.anchor() == Anchor(world.tenant_id, head.count, head.digest), "the last row was the ledger's"


def test_what_was_linked_is_what_is_read_back(world: World) -> None:
    """Floats by all their bits, whole numbers beyond a float's, keys that are no text, tuples, times by the microsecond."""
    odd: dict[Any, Any] = {
        "third": 1 / 3, "tiny": 5e-324, "negative zero": -0.0, "whole": 1.0, "many": 2**70, 2: "a key", 10: "another",
        "nested": {"b": (1, 2.5), "a": None}, "text": "ü \u2028 \U0001f600",
    }  # fmt: skip
    with writing(world.service.engine) as session:
        session.add(
            LedgerEntry(
                tenant_id=world.tenant_id, source_id=world.source_id, revision=99, kind="odd", principal_id="ap_x",
                steps=7, overflow=0, event=odd, created=datetime(2024, 2, 29, 23, 59, 59, 7, UTC),
            )
        )  # fmt: skip
        session.add(
            LedgerEntry(
                tenant_id=world.tenant_id, source_id=world.source_id, revision=100, kind="odd", principal_id="ap_x",
                overflow=-0.0,
            )
        )  # fmt: skip
    with reading(world.service.engine) as session:
        chain.verify(session, world.tenant_id)


def test_the_digest_of_a_row_never_changes() -> None:
    """A vector: whoever alters how rows are digested, or a column of theirs, breaks every chain there is."""
    row = LedgerEntry(
        tenant_id="tn_1", source_id="src_1", revision=3, kind="reserve", block=0, job_id="job_1", steps=10, overflow=1e-12,
        principal_id="ap_1", event={"b": 0.1, "a": [1, 2.0]}, created=datetime(2026, 1, 2, 3, 4, 5, 6, UTC),
    )  # fmt: skip
    told = AuditRow(
        tenant_id="tn_1", id="aud_1", time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), principal_id="ap_1", verb="x",
        resource_id="src_1", outcome="allowed", grant_id=None, request_id="r",
    )  # fmt: skip
    content = (
        b'{"block":0,"created":"2026-01-02T03:04:05.000006+00:00","event":{"a":[1,2.0],"b":0.1},"job_id":"job_1",'
        b'"kind":"reserve","overflow":1e-12,"principal_id":"ap_1","revision":3,"source_id":"src_1","steps":10,'
        b'"tenant_id":"tn_1"}'
    )
    first = chain.digest(chain.GENESIS, chain.canonical(row))
    begin = hashlib.sha256(b"cloister.chain/1\n").digest()
    assert first == hashlib.sha256(begin + len(content).to_bytes(8, "big") + content).digest()
    second = chain.digest(first, chain.canonical(told)).hex()
    assert second == "7ea204664e01017cb1972365eabcebe0be6f2e7b96622f3b255b04136dddd8d5"


def _alter_ledger(connection: Connection, world: World) -> None:
    connection.execute(text("UPDATE ledger SET steps = 1 WHERE kind = 'reserve' AND revision = 3"))


def _alter_audit(connection: Connection, world: World) -> None:
    connection.execute(text("UPDATE audit SET outcome = 'denied: no' WHERE verb = 'source.create'"))


def _delete_row(connection: Connection, world: World) -> None:
    connection.execute(text("DELETE FROM balances WHERE revision = 3"))
    connection.execute(text("DELETE FROM ledger WHERE revision = 3"))


def _delete_row_and_link(connection: Connection, world: World) -> None:
    row_id = connection.scalar(text("SELECT id FROM audit WHERE verb = 'source.create'"))
    connection.execute(text("DELETE FROM audit WHERE id = :id"), {"id": row_id})
    connection.execute(text("DELETE FROM links WHERE row_id = :id"), {"id": row_id})


def _swap_rows(connection: Connection, world: World) -> None:
    first, (one, other) = _swapped(world)
    for number, row_id in ((first, "between"), (first + 1, one), (first, other)):
        connection.execute(
            text("UPDATE links SET row_id = :id WHERE number = :number"), {"id": row_id, "number": number}
        )


def _swap_links(connection: Connection, world: World) -> None:
    first, _ = _swapped(world)
    for before, after in ((first, -1), (first + 1, first), (-1, first + 1)):
        connection.execute(
            text("UPDATE links SET number = :after WHERE number = :before"), {"after": after, "before": before}
        )


def _swapped(world: World) -> tuple[int, list[str]]:
    """The number of the first of the ledger's links, and what it and the next one name."""
    one, other = [link for link in links_of(world) if link.kind == "ledger"][:2]
    assert other.number == one.number + 1
    return one.number, [one.row_id, other.row_id]


def _put_in(connection: Connection, world: World) -> None:
    connection.execute(
        text(
            "INSERT INTO ledger (tenant_id, source_id, revision, kind, block, steps, overflow, principal_id, event, created) "
            "SELECT tenant_id, source_id, 77, 'settle', 0, 0, 0, principal_id, '{}', created FROM ledger WHERE revision = 1"
        )
    )


def _put_in_with_a_link(connection: Connection, world: World) -> None:
    _put_in(connection, world)
    connection.execute(
        text(
            "INSERT INTO links (tenant_id, number, kind, row_id, digest) "
            "SELECT tenant_id, number + 1, 'ledger', :id, digest FROM links ORDER BY number DESC LIMIT 1"
        ),
        {"id": f"{world.source_id}/77"},
    )


def _change_a_balance(connection: Connection, world: World) -> None:
    used = json.loads(
        str(connection.scalar(text("SELECT CAST(used AS TEXT) FROM balances WHERE revision = 3 LIMIT 1")))
    )
    less = json.dumps({**used, "rho": [0] * len(used["rho"])})
    connection.execute(text("UPDATE balances SET used = :used WHERE revision = 3 AND holder_id = '*'"), {"used": less})


def _forget_a_balance(connection: Connection, world: World) -> None:
    connection.execute(text("DELETE FROM balances WHERE revision = 3 AND holder_id = '*'"))


def _raise_the_budget(connection: Connection, world: World) -> None:
    connection.execute(text("UPDATE sources SET epsilon = 300"))


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (_alter_ledger, r"^link \d+, ledger src_\w+/3: .*its row was altered"),
        (_alter_audit, r"^link 3, audit aud_\w+: .*its row was altered"),
        (_delete_row, r"^link \d+, ledger src_\w+/3: its row is missing"),
        (_delete_row_and_link, r"^link 3: this link is missing"),
        (_swap_rows, r"^link 4, ledger src_\w+/2: the rows are reordered: ledger src_\w+/1 belongs here"),
        (_swap_links, r"^link 4, ledger src_\w+/2: the rows are reordered: ledger src_\w+/1 belongs here"),
        (_put_in, r"^ledger src_\w+/77: this row is in no link"),
        (_put_in_with_a_link, r"^link 7, ledger src_\w+/77: it does not follow"),
        (_change_a_balance, r"^ledger src_\w+/3: the balance of \* in block 0 does not follow"),
        (_forget_a_balance, r"^ledger src_\w+/3: the balance of \* in block 0 is missing"),
        (_raise_the_budget, r"^source src_\w+: epsilon is 300, and the ledger says 3"),
    ],
)
def test_what_was_tampered_with_is_named(world: World, tamper: Callable[[Connection, World], None], told: str) -> None:
    world.verify()
    with tampering(world.service) as connection:
        tamper(connection, world)
    with pytest.raises(ChainBroken, match=told):
        world.verify()


@pytest.mark.parametrize(
    ("column", "value"),
    [("steps", "no number"), ("steps", b"x"), ("steps", 1.5), ("created", "no time"), ("event", "{")],
)
def test_a_value_that_no_row_of_ours_holds_is_an_alteration(world: World, column: str, value: Any) -> None:
    if not world.service.settings.is_sqlite:
        column, value = "steps", -1  # PostgreSQL's columns hold nothing else
    with tampering(world.service) as connection:
        changed = {
            "steps": "UPDATE ledger SET steps",
            "created": "UPDATE ledger SET created",
            "event": "UPDATE ledger SET event",
        }
        connection.execute(text(f"{changed[column]} = :value WHERE revision = 2"), {"value": value})
    assert "/2: " in world.fault() and "was altered" in world.fault()


def test_a_tail_that_was_cut_off_is_behind_its_anchor(world: World) -> None:
    newest = last(world, "ledger")
    with tampering(world.service) as connection:
        _delete_row(connection, world)
        connection.execute(text("DELETE FROM links WHERE number = :number"), {"number": newest.number})
    assert world.verify().count == newest.number - 1, "what is left of it holds"
    (found,) = deployment.rolled_back(world.service)
    assert found.tenant_id == world.tenant_id
    assert (
        found.why == f"its chain ends at link {newest.number - 1}, and its anchor says that there were {newest.number}"
    )


def test_a_chain_that_was_rewritten_is_not_the_anchored_one(world: World) -> None:
    """Whoever can write the database can link a forged history; the anchor and a signed head still tell."""
    head = world.service.read(
        ALL_TENANTS, lambda session: evidence.signed_head(session, world.operator, world.service.keys)
    )
    with tampering(world.service) as connection:
        _alter_audit(connection, world)
        connection.execute(text("DELETE FROM links"))
    engine = new_engine(world.service.settings.database_url.get_secret_value())
    with writing(engine) as session:
        chain.link_rows_from_before(session, Anchors(world.service.settings.anchor_dir))
    engine.dispose()
    world.verify()
    (found,) = deployment.rolled_back(world.service)
    assert "not the anchored one" in found.why
    with snapshot(world.service.engine) as session:
        told = evidence.compare(session, world.operator, evidence.opened_head(session, head)).problem
    assert told is not None and "is another now" in told


def test_racing_writes_make_one_chain(world: World) -> None:
    def write(number: int) -> None:
        if number % 2:
            world.charge()
        else:
            declare(world.service, world.principal, f"source{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(32)))
    assert world.verify().count == 6 + 16 + 16
    newest, anchor = last(world, "ledger"), world.anchor()
    assert anchor is not None and anchor.count == newest.number and anchor.head == newest.digest


def test_a_transaction_that_is_rolled_back_links_nothing(world: World) -> None:
    before, anchor = links_of(world), world.anchor()
    with pytest.raises(RuntimeError), writing(world.service.engine) as session:
        budgets.write_off(session, world.source(session), principal_id="ap_x", reason="not meant")
        raise RuntimeError
    assert links_of(world) == before and world.anchor() == anchor
    assert not list(world.service.settings.anchor_dir.glob(".*"))


def test_linking_takes_three_statements(world: World) -> None:
    statements: list[str] = []
    event.listen(world.service.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    source = Source(tenant_id=world.tenant_id, id=world.source_id)
    with writing(world.service.engine) as session:
        ledger.append(session, source, "allowance", "ap_x", event={"principal": "ap_y", "epsilon": 1.0})
        written = len(statements)
    assert len(statements) - written == 3


def test_a_restored_database_is_read_only_for_its_tenant(
    world: World,
    backup: Callable[[Service], Callable[[], Service]],
    make_client: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = World(world.service, make_client("other").principal)
    other.charge()
    put_a_job(world)
    restore = backup(world.service)
    world.charge()
    restored = world.in_service(restore())
    (logged,) = [record for record in caplog.records if record.getMessage() == "ledger.rolled_back"]
    assert (logged.levelname, logged.__dict__["tenant_id"]) == ("ERROR", world.tenant_id)
    before = links_of(restored)
    for write in (restored.charge, lambda: declare(restored.service, restored.principal, "more")):
        with pytest.raises(LedgerRolledBack) as refusal:
            write()
        assert (refusal.value.status, refusal.value.code) == (503, "ledger_rolled_back")
    with pytest.raises(LedgerRolledBack), writing(restored.service.engine) as session:
        session.add(Attempt(tenant_id=world.tenant_id, job_id="job_x", number=1, from_step=0))
    assert links_of(restored) == before, "a refusal writes nothing"
    with reading(restored.service.engine) as session:
        assert sources.get(session, restored.principal, restored.source_id).name == "people"
    restored.verify()
    other.in_service(restored.service).charge()


def test_a_restored_database_is_told_of_over_http(
    world: World,
    backup: Callable[[Service], Callable[[], Service]],
    steward: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    restore = backup(world.service)
    world.charge()
    restored = restore()
    with TestClient(create_app(restored)) as http:
        form = {"grant_type": "client_credentials"}
        token = http.post("/oauth/token", data=form, auth=(steward.id, steward.secret)).json()["access_token"]
        bearer = {"Authorization": f"Bearer {token}"}
        body = {"name": "more", "epsilon": 1, "delta": 1e-6}
        refused = http.post("/v1/sources", json=body, headers=bearer)
        assert (refused.status_code, refused.json()["code"]) == (503, "ledger_rolled_back")
        assert world.tenant_id not in refused.text
        assert len(http.get("/v1/sources", headers=bearer).json()["items"]) == 1
        absent = http.get(f"/v1/sources/src_{'0' * 32}", headers=bearer)
        assert absent.status_code == 404, "a denial stands though the log of it cannot be written"
        told = [each for each in caplog.records if each.msg == "audit.beside_the_chain"]
        assert [(each.principal_id, each.verb, each.resource_id, each.outcome) for each in told] == [
            (steward.id, "source.create", world.tenant_id, "allowed: not done"),
            (steward.id, "GET", "/v1/sources", "allowed"),
        ]


def test_a_replayed_ledger_spends_again_from_where_it_was(
    world: World, backup: Callable[[Service], Callable[[], Service]]
) -> None:
    restore = backup(world.service)
    world.charge()
    late = declare(world.service, world.principal, "late")
    with writing(world.service.engine) as session:
        source = world.source(session)
        budgets.set_epsilon(session, source, principal_id="ap_x", epsilon=4.0, reason="more of it")
        budgets.allow(
            session, session.get_one(Source, (world.tenant_id, late)), principal_id="ap_x", to="ap_y", epsilon=1.0,
            expires=None, reason="of the late one",
        )  # fmt: skip
    before, lines = links_of(world), world.exported()
    with reading(world.service.engine) as session:
        balance = budgets.balance(session, world.source(session))
    restored = world.in_service(restore())
    missing = len(before) - len(links_of(restored))
    assert restored.replay(lines) == restores.Replayed(missing, 0)
    assert links_of(restored)[: len(before)] == before
    assert deployment.rolled_back(restored.service) == []
    with reading(restored.service.engine) as session:
        assert budgets.balance(session, restored.source(session)) == balance
        assert session.scalars(select(AuditRow.verb).order_by(AuditRow.time.desc())).first() == "ledger.replay"
    restored.charge()
    declare(restored.service, restored.principal, "more")
    restored.verify()
    with pytest.raises(Conflict, match="no row is missing"):
        restored.replay(lines)


def test_an_export_from_before_the_last_charge_replays_nothing(
    world: World, backup: Callable[[Service], Callable[[], Service]]
) -> None:
    restore = backup(world.service)
    world.charge()
    early = world.exported()
    world.charge()
    whole = world.exported()
    restored = world.in_service(restore())
    before = links_of(restored)
    forged = [line.replace('"steps": 100', '"steps": 1') for line in whole]
    for lines, refusal, told in (
        (early, Conflict, "this export ends at link 7, and the chain had 8"),
        (whole[:-1], Invalid, "cut short"),
        (whole[1:], Invalid, "line 1 is not of an export"),
        (forged, ChainBroken, "its row was altered"),
        ([line.replace(world.tenant_id, "tn_" + "0" * 32) for line in whole], Conflict, "is of tenant"),
        ([whole[0], "[]", *whole[1:]], Invalid, "line 2"),
        ([line for line in whole if '"number": 5' not in line], ChainBroken, "link 5: this link is missing"),
        ([_without_balances(line) for line in whole], ChainBroken, "the balance of"),
    ):
        with pytest.raises(refusal, match=told):
            restored.replay(lines)
        assert links_of(restored) == before, "nothing was put back"
    restored.replay(whole)


def _without_balances(line: str) -> str:
    read = json.loads(line)
    return json.dumps({**read, "balances": []} if read.get("number") == 8 else read)


def test_a_budget_that_is_written_off_admits_nothing_ever(
    world: World, backup: Callable[[Service], Callable[[], Service]]
) -> None:
    restore = backup(world.service)
    world.charge()
    lost = world.exported()
    restored = world.in_service(restore())
    restored.write_off()
    assert deployment.rolled_back(restored.service) == []
    kept = restored.service.settings.anchor_dir / f"{world.tenant_id}.json.written-off-1"
    assert json.loads(kept.read_text())["count"] == 7
    for _ in range(2):
        with pytest.raises(BudgetExceeded, match="written off"):
            restored.charge()
    declare(restored.service, restored.principal, "other-people")
    restored.verify()
    with pytest.raises(Conflict):
        restored.replay(lost)
    again = world.in_service(restore())
    with pytest.raises(LedgerRolledBack):
        again.charge()


def test_databases_of_different_pasts_are_told_apart(
    world: World, backup: Callable[[Service], Callable[[], Service]]
) -> None:
    """Two deployments went on from one backup; each database is refused where the other one was charged."""
    restore = backup(world.service)
    anchor = Anchors(world.service.settings.anchor_dir).path(world.tenant_id)
    then = anchor.read_bytes()
    world.charge()
    ours = anchor.read_bytes()
    anchor.write_bytes(then)
    fork = world.in_service(restore())
    fork.charge()
    fork.charge()
    theirs = fork.exported()
    anchor.write_bytes(ours)
    with pytest.raises(LedgerRolledBack) as refusal:
        fork.charge()
    assert "link 7 of its chain is not the anchored one: this is a database of another past" in refusal.value.why
    restored = world.in_service(restore())
    with pytest.raises(Conflict, match="of another past: its link 7 is not the one that was anchored"):
        restored.replay(theirs)


def test_a_sound_ledger_is_written_off_only_where_that_is_insisted_on(world: World) -> None:
    with pytest.raises(Conflict, match="nothing is missing"):
        world.write_off()
    world.charge()
    anchors = Anchors(world.service.settings.anchor_dir)
    with writing(world.service.engine) as session:
        restores.write_off(session, world.operator, reason="the study ends", anchors=anchors, is_forced=True)
    with pytest.raises(BudgetExceeded, match="written off"):
        world.charge()


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("{}"), lambda path: path.write_text("no")])
def test_a_lost_anchor_is_missed(world: World, harm: Callable[[Path], Any]) -> None:
    harm(Anchors(world.service.settings.anchor_dir).path(world.tenant_id))
    with pytest.raises(LedgerRolledBack, match="older database"):
        world.charge()
    (found,) = deployment.rolled_back(world.service)
    assert "is gone" in found.why or "is damaged" in found.why
    deployment.initialise(world.service.settings).engine.dispose()
    assert len(deployment.rolled_back(world.service)) == 1, "init knows no better"
    world.write_off()
    assert deployment.rolled_back(world.service) == []


def test_a_tenant_that_is_not_there_any_more_is_told_of(
    service: Service, make_client: Callable[..., Any], backup: Callable[[Service], Callable[[], Service]]
) -> None:
    restore = backup(service)
    World(service, make_client().principal).charge()
    (found,) = deployment.rolled_back(restore())
    assert found.why == "its chain ends at link 0, and its anchor says that there were 5"


_CHARGE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from cloister_server import ledger
from cloister_server.store.acting import for_tenants
from cloister_server.store.anchors import Anchors, Draft
from cloister_server.store.session import new_engine, writing
from cloister_server.store.tables import Source
url, anchors, tenant, source = sys.argv[1:]
Draft.publish = lambda draft: os.kill(os.getpid(), signal.SIGKILL)
with writing(new_engine(url, anchors=Anchors(Path(anchors))), for_tenants(tenant)) as session:
    row = session.get_one(Source, (tenant, source))
    ledger.append(session, row, "allowance", "ap_x", event={"principal": "ap_y", "epsilon": 1.0})
"""


def test_a_crash_between_commit_and_anchor_leaves_a_database_that_goes_on(world: World) -> None:
    settings, before = world.service.settings, world.anchor()
    assert before is not None
    ended = subprocess.run(
        [
            sys.executable, "-c", _CHARGE_AND_DIE, settings.database_url.get_secret_value(), str(settings.anchor_dir),
            world.tenant_id, world.source_id,
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert last(world, "ledger").number == before.count + 1, "it was committed"
    assert world.anchor() == before
    assert deployment.rolled_back(world.service) == []
    after = world.anchor()
    assert after is not None and after.count == before.count + 1, "the next start moves the anchor"
    world.charge()
    world.verify()


def test_an_anchor_that_cannot_be_written_lets_nothing_be_charged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = links_of(world)

    def fail(path: Path, mode: str = "r", *_: Any, **__: Any) -> Any:
        if path.suffix == ".draft":
            raise OSError(28, "No space left on device")
        return path_open(path, mode)

    path_open = Path.open
    with monkeypatch.context() as full:
        full.setattr(Path, "open", fail)
        with pytest.raises(Unavailable, match="anchor cannot be written"):
            world.charge()
    assert links_of(world) == before
    world.charge()


def test_an_anchor_that_cannot_be_moved_is_told_of_and_caught_up(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = world.anchor()
    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        world.charge()
    assert "anchor.not_moved" in caplog.text and world.anchor() == before
    world.charge()
    assert world.anchor() != before and not list(world.service.settings.anchor_dir.glob(".*"))


def test_an_anchor_only_moves_forward(tmp_path: Path) -> None:
    anchors = Anchors(tmp_path)
    drafts = [anchors.draft(Anchor("tn_1", count, bytes([count]) * 32)) for count in (3, 1, 2)]
    for draft in drafts:
        draft.publish()
    assert anchors.of("tn_1") == Anchor("tn_1", 3, bytes([3]) * 32)
    assert [path.name for path in tmp_path.iterdir()] == ["tn_1.json"]


def _lose(directory: Path) -> None:
    shutil.rmtree(directory)


def _put_a_file_there(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("")


@pytest.mark.parametrize("harm", [_lose, _put_a_file_there])
def test_without_a_place_for_anchors_nothing_starts(world: World, harm: Callable[[Path], None]) -> None:
    harm(world.service.settings.anchor_dir)
    with pytest.raises(StartRefused, match="restore the keystore whole"):
        deployment.open_service(world.service.settings)


def test_init_links_the_rows_from_before_there_were_chains(world: World) -> None:
    with reading(world.service.engine) as session:
        rows = (
            session.scalar(select(func.count()).select_from(LedgerEntry)),
            session.scalar(select(func.count()).select_from(AuditRow)),
        )
    with tampering(world.service) as connection:
        connection.execute(text("DELETE FROM links"))
    shutil.rmtree(world.service.settings.anchor_dir)
    for _ in range(2):
        deployment.initialise(world.service.settings).engine.dispose()
        assert [link.kind for link in links_of(world)] == ["ledger"] * rows[0] + ["audit"] * rows[1]
        world.verify()
        anchor = world.anchor()
        assert anchor is not None and anchor.count == sum(rows)
    world.charge()


def test_a_signed_head_tells_whether_a_chain_goes_on_from_it(
    world: World, backup: Callable[[Service], Callable[[], Service]]
) -> None:
    def compared(of: World, envelope: Any) -> evidence.Comparison:
        with snapshot(of.service.engine) as session:
            return evidence.compare(session, of.operator, evidence.opened_head(session, envelope))

    restore = backup(world.service)
    declare(world.service, world.principal, "audited-only")
    head = world.service.read(
        ALL_TENANTS, lambda session: evidence.signed_head(session, world.operator, world.service.keys)
    )
    world.charge()
    assert compared(world, json.dumps(head)) == evidence.Comparison(world.tenant_id, 7, 8, None)
    later = world.service.read(
        ALL_TENANTS, lambda session: evidence.signed_head(session, world.operator, world.service.keys)
    )
    with snapshot(world.service.engine) as session:
        forged = {**head, "payload": later["payload"]}
        for nothing in (forged, {}, {**head, "signatures": []}):
            with pytest.raises(Invalid, match="no chain head of this service"):
                evidence.opened_head(session, nothing)
    problem = compared(world.in_service(restore()), head).problem
    assert problem is not None and problem.startswith("links 7 to 7 are missing")


def test_a_row_of_a_tenant_that_is_not_there_is_linked_all_the_same(service: Service) -> None:
    with writing(service.engine) as session:
        session.add(
            AuditRow(
                tenant_id="tn_nobody", id="aud_1", principal_id="p", verb="v", resource_id="r", outcome="allowed",
                request_id="r",
            )
        )  # fmt: skip
    with reading(service.engine) as session:
        assert session.get(Tenant, "tn_nobody") is None
        assert chain.verify(session, "tn_nobody").count == 1


def test_a_crafted_export_mints_no_budget(world: World, backup: Callable[[Service], Callable[[], Service]]) -> None:
    unspent = declare(world.service, world.principal, "unspent")
    restore = backup(world.service)
    world.charge()
    lines = [json.loads(line) for line in world.exported()]
    for line in lines:
        if line.get("source", {}).get("id") == unspent:
            line["source"] |= {"epsilon": 900.0, "public": True}
    block = {"tenant_id": world.tenant_id, "source_id": world.source_id, "number": 1, "name": "fresh"}
    lines.insert(2, {"block": {**block, "created": lines[1]["source"]["created"]}})
    restored = world.in_service(restore())
    restored.replay([json.dumps(line) for line in lines])
    with writing(restored.service.engine) as session:
        assert session.get_one(Source, (world.tenant_id, unspent)).epsilon == 3.0
        assert blocks_of(session, restored.source(session)) == [(0, "first")]
    restored.verify()


def test_charges_beyond_the_anchor_are_not_replayed(
    world: World, backup: Callable[[Service], Callable[[], Service]]
) -> None:
    restore = backup(world.service)
    world.charge()
    path = Anchors(world.service.settings.anchor_dir).path(world.tenant_id)
    anchored = path.read_bytes()
    world.charge()
    lines = world.exported()
    path.write_bytes(anchored)
    with pytest.raises(Conflict, match="beyond the anchor"):
        world.in_service(restore()).replay(lines)


def test_no_service_opens_on_rows_that_an_upgrade_has_not_linked_yet(world: World) -> None:
    with world.service.engine.begin() as connection:  # past `writing`, which would link it
        row = {column.key: "x" for column in AuditRow.__table__.columns if not column.nullable}
        connection.execute(
            AuditRow.__table__.insert().values({**row, "tenant_id": "tn_before", "time": datetime.now(UTC)})
        )
    with pytest.raises(StartRefused, match="not linked yet"):
        deployment.open_service(world.service.settings)
    deployment.initialise(world.service.settings).engine.dispose()
