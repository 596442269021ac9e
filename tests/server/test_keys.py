"""The life of a key: whatever happens to a rotation, everything opens before, during and after it, and once more finishes it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from starlette.testclient import TestClient

from asked import asked_reading, asked_writing
from cloister_privacy.sealing import KeyMissing, KeyProviderError, LocalKeyProvider, ProviderUnavailable
from cloister_server import deployment, keys, rewrapping, vault
from cloister_server.errors import Conflict, Invalid, StartRefused, TenantKeyRefused
from cloister_server.keyring import KeyRing
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store import chain
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, SealedObject, Tenant, TenantKey
from cloister_server.vault import SYSTEM
from rotated import AT_ONCE, OBJECTS, ON_SQLITE, PURPOSES, Killed, Sealed, files, new_service, secrets_of, states


@pytest.fixture(autouse=True)
def _small_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrapping, "_AT_ONCE", AT_ONCE)


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> Service:
    return new_service(engine, tmp_path)


@pytest.fixture
def acme(service: Service) -> Sealed:
    return Sealed(service)


def test_a_rotation_rewraps_every_data_key_and_touches_no_object(acme: Sealed, service: Service) -> None:
    other, before = Sealed(service, "other", count=1), files(service)
    done = acme.rotate()
    assert (done.version, done.provider, done.is_new, done.rewrapped, done.unopened) == (2, "local", True, OBJECTS, [])
    assert states(service, acme.id) == [(1, "local", "decrypt-only", 0), (2, "local", "active", OBJECTS)]
    assert states(service, other.id) == [(1, "local", "active", 1)]
    assert files(service) == before
    acme.seal()
    acme.require_all_open()
    other.require_all_open()
    assert states(service, acme.id)[1] == (2, "local", "active", OBJECTS + 1)


def test_a_rotation_is_in_the_tenants_audit_log(acme: Sealed, service: Service) -> None:
    acme.rotate()
    acme.destroy(1)
    with reading(service.engine) as session:
        ids = session.scalars(
            select(TenantKey.key_id).order_by(TenantKey.version).where(TenantKey.tenant_id == acme.id)
        ).all()
        told = session.execute(
            select(AuditRow.verb, AuditRow.resource_id, AuditRow.outcome).order_by(AuditRow.time)
        ).all()
        chain.verify(session, acme.id)
    assert told[1:] == [("key.rotate", ids[1], "allowed"), ("key.destroy", ids[0], "allowed")]


def test_the_systems_key_moves_and_the_services_keys_stay_the_same(service: Service) -> None:
    before = secrets_of(service)
    done = keys.migrate(service, to="second", tenant_id=SYSTEM, request_id="request-of-a-test").rotated[0]
    assert done.rewrapped == len(PURPOSES)
    assert states(service, SYSTEM) == [(1, "local", "decrypt-only", 0), (2, "second", "active", len(PURPOSES))]
    keys.destroy(service, SYSTEM, version=1, request_id="request-of-a-test")
    assert secrets_of(service) == secrets_of(service, deployment.open_keys(service.settings)) == before
    with asked_writing(service) as session:
        made = vault.new_signing_key(session, "token")
    assert secrets_of(service)[0].id == made.id


@pytest.mark.parametrize("to", ["local", "second"])
def test_a_rotation_that_dies_after_any_step_leaves_all_open_and_the_next_finishes(service: Service, to: str) -> None:
    for instant in range(1, 8):  # begun, made, active, three times rewrapped; and once more than there are steps
        acme = Sealed(service, f"t{instant}")
        steps = iter(range(1, 100))

        def die(*_: Any, steps: Any = steps, instant: int = instant) -> None:
            if next(steps) == instant:
                raise Killed

        if instant == 7:
            acme.rotate(to=None if to == "local" else to, on_progress=die)
        else:
            with pytest.raises(Killed):
                acme.rotate(to=None if to == "local" else to, on_progress=die)
        acme.seal()
        acme.require_all_open()
        acme.require_all_open(KeyRing.from_message(service.keys.to_message()))
        assert len(states(service, acme.id)) == 2
        if to == "second":
            acme.migrate(to)
        else:
            acme.rotate(to=None if to == "local" else to)
        acme.seal()
        acme.require_all_open()
        left = states(service, acme.id)
        assert [state for _, _, state, _ in left] == ["decrypt-only"] * (len(left) - 1) + ["active"]
        assert left[-1][1] == to and [wraps for *_, wraps in left] == [0] * (len(left) - 1) + [len(acme.contents)]
        is_one_more = to == "local" and instant >= 6  # nothing was left to finish
        assert len(left) == 2 + is_one_more, instant


@pytest.mark.parametrize("is_done", [False, True])
def test_a_rotation_that_dies_in_the_provider_goes_on_with_the_key_that_it_began(
    acme: Sealed, service: Service, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = LocalKeyProvider.create_key

    def create_key(self: LocalKeyProvider, key_id: str) -> None:
        if is_done:
            really(self, key_id)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LocalKeyProvider, "create_key", create_key)
        acme.rotate()
    assert states(service, acme.id)[1] == (2, "local", "pre-active", 0)
    acme.require_all_open()
    assert acme.rotate().version == 2
    assert states(service, acme.id) == [(1, "local", "decrypt-only", 0), (2, "local", "active", OBJECTS)]
    assert len(list(service.settings.key_dir.glob("*.kek"))) == 3, (
        "one key more than the system's and the tenant's first"
    )


@ON_SQLITE
def test_a_key_that_does_not_unwrap_never_becomes_the_active_one(
    acme: Sealed, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyProviderError, match="does not unwrap what it wrapped"):
        patch.setattr(LocalKeyProvider, "unwrap", lambda *_, **__: b"another secret")
        acme.rotate()
    assert [state for _, _, state, _ in states(service, acme.id)] == ["active", "pre-active"]
    acme.seal()
    acme.require_all_open()


@ON_SQLITE
def test_a_provider_that_is_away_leaves_no_trace_of_a_rotation(
    acme: Sealed, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> bool:
        raise ProviderUnavailable("no answer")

    with monkeypatch.context() as patch, pytest.raises(ProviderUnavailable):
        patch.setattr(LocalKeyProvider, "has_key", away)
        acme.rotate()
    assert states(service, acme.id) == [(1, "local", "active", OBJECTS)]


def test_a_provider_that_goes_away_amid_the_rewrapping_stops_it_and_the_next_run_goes_on(
    acme: Sealed, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, asked = LocalKeyProvider.unwrap, 0

    def unwrap(self: LocalKeyProvider, *arguments: Any, **more: Any) -> bytes:
        nonlocal asked
        asked += 1
        if asked > 2 * AT_ONCE + 5:  # each is opened as it was, and as it is to be
            raise ProviderUnavailable("no answer")
        return really(self, *arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(ProviderUnavailable):
        patch.setattr(LocalKeyProvider, "unwrap", unwrap)
        acme.rotate()
    assert states(service, acme.id) == [(1, "local", "decrypt-only", 15), (2, "local", "active", 10)]
    acme.require_all_open()
    done = acme.rotate()
    assert (done.version, done.is_new, done.rewrapped) == (2, False, 15)


@ON_SQLITE
def test_a_tenant_whose_key_was_taken_away_gets_no_other_one(acme: Sealed, service: Service) -> None:
    with reading(service.engine) as session:
        key_id = session.get_one(TenantKey, (acme.id, 1)).key_id
    service.keys.of("local").destroy_key(key_id)
    with pytest.raises(KeyMissing, match="give it back first"):
        acme.rotate()
    assert states(service, acme.id) == [(1, "local", "active", OBJECTS)]


@ON_SQLITE
def test_a_provider_that_wraps_what_does_not_open_replaces_nothing(
    acme: Sealed, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, wrapped = LocalKeyProvider.wrap, 0

    def wrap(self: LocalKeyProvider, key_id: str, key: bytes, **more: Any) -> bytes:
        nonlocal wrapped
        wrapped += 1
        return really(self, key_id, key if wrapped < 5 else bytes(32), **more)

    with monkeypatch.context() as patch, pytest.raises(KeyProviderError, match="do not open"):
        patch.setattr(LocalKeyProvider, "wrap", wrap)
        acme.rotate()
    acme.require_all_open()
    acme.rotate()
    acme.require_all_open()


def test_a_wrapped_key_that_does_not_open_is_named_and_stops_no_other(acme: Sealed, service: Service) -> None:
    damaged = sorted(acme.contents)[3]
    with writing(service.engine) as session:
        row = session.get_one(SealedObject, (acme.id, damaged))
        row.wrapped_key = before = row.wrapped_key[:-1] + bytes([row.wrapped_key[-1] ^ 1])
    done = acme.rotate()
    assert (done.rewrapped, done.unopened) == (OBJECTS - 1, [damaged])
    with reading(service.engine) as session:
        row = session.get_one(SealedObject, (acme.id, damaged))
        assert (row.key_version, row.wrapped_key) == (1, before)
    with pytest.raises(Conflict, match="still wraps 1 data keys"):
        acme.destroy(1)
    again = acme.rotate()
    assert (again.version, again.is_new, again.unopened) == (3, True, [damaged])
    del acme.contents[damaged]
    acme.require_all_open()


def test_a_destroyed_version_opens_nothing_from_before_the_rotation(acme: Sealed, service: Service) -> None:
    with reading(service.engine) as session:
        backup = session.scalars(select(SealedObject).where(SealedObject.tenant_id == acme.id)).all()
    acme.rotate()
    gone = acme.destroy(1)
    assert gone.claim == service.keys.of("local").destruction.claim and gone.waiting_days == 0
    assert states(service, acme.id)[0] == (1, "local", "destroyed", 0)
    acme.require_all_open()
    with writing(service.engine) as session:
        row = session.get_one(SealedObject, (acme.id, backup[0].id))
        row.key_version, row.wrapped_key = backup[0].key_version, backup[0].wrapped_key
    with asked_reading(service) as session, pytest.raises(TenantKeyRefused):
        vault.data_key(session, tenant_id=acme.id, object_id=backup[0].id)
    assert acme.rotate().unopened == [backup[0].id]


def test_no_key_that_is_needed_is_destroyed(acme: Sealed, service: Service) -> None:
    with pytest.raises(Conflict, match="is the active one"):
        acme.destroy(1)
    with pytest.raises(Invalid, match="no version 2 to destroy"):
        acme.destroy(2)
    steps: list[str] = []

    def die(_: str, step: str, __: int) -> None:
        steps.append(step)
        if step == "rewrapped":
            raise Killed

    with pytest.raises(Killed):
        acme.rotate(on_progress=die)
    with pytest.raises(Conflict, match=f"still wraps {OBJECTS - AT_ONCE} data keys"):
        acme.destroy(1)
    acme.require_all_open()
    acme.rotate()
    acme.destroy(1)
    with pytest.raises(Invalid, match="or it is destroyed"):
        acme.destroy(1)


@pytest.mark.parametrize("is_done", [False, True])
def test_a_destruction_that_dies_is_finished_by_the_next(
    acme: Sealed, service: Service, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = LocalKeyProvider.destroy_key

    def destroy_key(self: LocalKeyProvider, key_id: str) -> None:
        if is_done:
            really(self, key_id)
        raise Killed

    acme.rotate()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LocalKeyProvider, "destroy_key", destroy_key)
        acme.destroy(1)
    assert states(service, acme.id)[0] == (1, "local", "decrypt-only", 0)
    acme.destroy(1)
    assert states(service, acme.id)[0] == (1, "local", "destroyed", 0)
    assert len(list(service.settings.key_dir.glob("*.kek"))) == 2
    acme.require_all_open()


def test_what_is_sealed_and_opened_amid_rotations_is_never_refused(acme: Sealed, service: Service) -> None:
    problems: list[BaseException] = []
    over = threading.Event()

    def work() -> None:
        mine = Sealed.__new__(Sealed)
        mine.service, mine.id, mine.contents = service, acme.id, {}
        while not over.is_set() and not problems:
            try:
                mine.seal()
                mine.require_all_open()
            except BaseException as problem:
                problems.append(problem)
        acme.contents |= mine.contents

    threads = [threading.Thread(target=work) for _ in range(3)]
    for each in threads:
        each.start()
    try:
        for turn in range(6):
            acme.rotate(to=("second", "local")[turn % 2])
    finally:
        over.set()
        for each in threads:
            each.join()
    assert not problems, problems
    assert len(acme.contents) > OBJECTS
    acme.require_all_open()
    assert [wraps for _, _, state, wraps in states(service, acme.id) if state != "active"] == [0] * 6


@ON_SQLITE
def test_one_tenant_that_cannot_be_rotated_stops_no_other(acme: Sealed, service: Service) -> None:
    other, third = Sealed(service, "other", count=1), Sealed(service, "third", count=1)
    with writing(service.engine) as session:
        session.get_one(TenantKey, (other.id, 1)).provider = "nowhere"
    done = keys.rotate_all(service, request_id="request-of-a-test")
    assert [each.tenant for each in done.rotated] == [SYSTEM, acme.id, third.id]
    assert [each.tenant for each in done.refused] == [other.id] and "'nowhere'" in done.refused[0].why


@ON_SQLITE
def test_a_tenant_that_ends_is_not_rotated(acme: Sealed, service: Service) -> None:
    with writing(service.engine) as session:
        session.get_one(Tenant, acme.id).status = "shredding"
    with pytest.raises(Conflict, match="has no active key"):
        acme.rotate()
    with reading(service.engine) as session:
        planned = keys.plan_rotation(session, service.keys, None)
    assert [each.tenant for each in planned] == [SYSTEM]


def test_a_rotation_gives_way_to_a_tenants_end(acme: Sealed, service: Service) -> None:
    def end(_: str, step: str, __: int) -> None:
        if step in ("made", "rewrapped"):
            with writing(service.engine) as session:
                session.get_one(Tenant, acme.id).status = "shredding"

    with pytest.raises(Conflict, match="destroyed while this one was made"):
        acme.rotate(on_progress=end)
    assert [state for _, _, state, _ in states(service, acme.id)] == ["active", "pre-active"]


@ON_SQLITE
def test_a_tenant_may_be_shredded_between_two_that_are_rotated(acme: Sealed, service: Service) -> None:
    other, ended = Sealed(service, "other", count=1), []

    def end_other(tenant_id: str, step: str, _: int) -> None:
        if tenant_id == acme.id and step == "begun":  # in a turn: nobody else has one
            with writing(service.engine) as session:
                session.get_one(Tenant, other.id).status = "shredding"
            ended.append(other.id)

    done = keys.rotate_all(service, request_id="request-of-a-test", on_progress=end_other)
    assert ended == [each.tenant for each in done.left] == [other.id] and done.refused == []
    assert [each.tenant for each in done.rotated] == [SYSTEM, acme.id]


@ON_SQLITE
def test_the_lock_is_free_between_two_tenants(acme: Sealed, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    Sealed(service, "other", count=1)
    turns, alone = [], keys.alone

    def counted(settings: Settings) -> Any:
        turns.append(settings)
        return alone(settings)

    monkeypatch.setattr(keys, "alone", counted)
    assert len(keys.rotate_all(service, request_id="request-of-a-test").rotated) == len(turns) == 3


@ON_SQLITE
def test_two_operators_do_not_rotate_at_once(acme: Sealed, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def another(*_: Any) -> None:
        with keys.alone(service.settings):
            pytest.fail("two at once")

    monkeypatch.setattr("cloister_server.processes.monotonic", iter(range(0, 10_000, 10)).__next__)
    with pytest.raises(StartRefused, match="in use by another process"):
        acme.rotate(on_progress=another)


def test_requests_go_on_over_a_rotation_of_all_keys(http: TestClient, bearer: dict[str, str], service: Service) -> None:
    for _ in range(2):
        done = keys.rotate_all(service, request_id="request-of-a-test")
        assert len(done.rotated) == 2 and not done.refused
        assert http.get("/v1/models", headers=bearer).status_code == 200
    for tenant in (SYSTEM, done.rotated[1].tenant):
        for version in (1, 2):
            keys.destroy(service, tenant, version=version, request_id="request-of-a-test")
    deployment.check_ready(service)
