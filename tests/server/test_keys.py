"""The life of a key: whatever happens to a rotation, everything opens before, during and after it, and once more finishes it."""

from __future__ import annotations

import io
import json
import secrets
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, func, select
from starlette.testclient import TestClient
from typer.testing import CliRunner

from asked import asked_reading, asked_writing
from cloister_privacy.sealing import KeyMissing, KeyProviderError, LocalKeyProvider, ProviderUnavailable
from cloister_server import deployment, keys, keystore_backups, rewrapping, tenants, vault
from cloister_server.cli.keys import key_cli
from cloister_server.errors import Conflict, Invalid, StartRefused, TenantKeyRefused
from cloister_server.keyring import KeyRing
from cloister_server.keys import Outcome, Rotation
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store import chain
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.anchors import Anchors
from cloister_server.store.blobs import Blobs
from cloister_server.store.key_record import KeyRecord
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, KeystoreBackup, SealedObject, Tenant, TenantKey
from cloister_server.vault import SYSTEM
from key_providers import ACCOUNT, PIN, TOKEN_LABEL

pytest_plugins = ("key_providers",)
pytestmark = pytest.mark.xdist_group("key-providers")

ON_SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
"""For what is the same on every database."""

PURPOSES: tuple[vault.Purpose, ...] = ("token", "certificate", "pepper")
OBJECTS, AT_ONCE = 25, 10
"""Objects of a tenant here, and how many of them one transaction rewraps: three transactions."""


@pytest.fixture(autouse=True)
def _small_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrapping, "_AT_ONCE", AT_ONCE)


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> Service:
    """A deployment on either database, with a second keystore, `second`, in its provider file."""
    LocalKeyProvider.create(tmp_path / "keystore", key_file=tmp_path / "root.key")
    LocalKeyProvider.create(tmp_path / "other", key_file=tmp_path / "other.key")
    name(
        tmp_path,
        second={"kind": "local", "directory": str(tmp_path / "other"), "key_file": str(tmp_path / "other.key")},
    )
    settings = Settings(
        data_dir=tmp_path / "data",
        key_dir=tmp_path / "keystore",
        key_file=tmp_path / "root.key",
        key_providers=tmp_path / "providers.json",
        database_url=SecretStr(engine.url.render_as_string(hide_password=False)),
    )
    made = Service(settings, engine, deployment.open_keys(settings), Blobs.open_at(settings))
    with asked_writing(made) as session:
        vault.new_tenant_key(session, provider="local", tenant_id=SYSTEM)
        session.flush()
        for purpose in PURPOSES:
            vault.new_signing_key(session, purpose)
    return made


def name(root: Path, **providers: dict[str, Any]) -> None:
    """Put providers into the provider file, beside those that are there."""
    path = root / "providers.json"
    before = json.loads(path.read_text())["providers"] if path.exists() else {}
    path.touch(0o600)
    path.write_text(
        json.dumps({"format": "cloister.key-providers/1", "default": "local", "providers": {**before, **providers}})
    )


class Sealed:
    """A tenant with objects, and what each holds."""

    def __init__(self, service: Service, tenant: str = "acme", *, count: int = OBJECTS, provider: str | None = None):
        self.service, self.name, self.contents = service, tenant, dict[str, bytes]()
        with asked_writing(service) as session:
            made = tenants.create_tenant(
                session, service.keys, name=tenant, request_id="request-of-a-test", provider=provider
            )
            self.id = made.id
        for _ in range(count):
            self.seal()

    def seal(self) -> None:
        content, service = secrets.token_bytes(40), self.service
        with asked_writing(service) as session:
            made = vault.seal_object(session, service.blobs, content, tenant_id=self.id, kind="part")
        self.contents[made] = content

    def require_all_open(self, keys: KeyRing | None = None) -> None:
        for object_id, content in list(self.contents.items()):
            with asked_reading(self.service, keys) as session:
                opened = vault.open_object(
                    session,
                    self.service.blobs,
                    tenant_id=self.id,
                    object_id=object_id,
                )
            assert opened == content

    def rotate(self, *, to: str | None = None, **more: Any) -> Rotation:
        """Where its key is, or into another provider."""
        if to is None:
            return keys.rotate(self.service, self.id, request_id="request-of-a-test", **more)
        done = self.migrate(to, **more)
        assert not done.refused, done.refused
        return done.rotated[0]

    def migrate(self, to: str = "second", **more: Any) -> Outcome:
        return keys.migrate(self.service, to=to, tenant_id=self.id, request_id="request-of-a-test", **more)

    def destroy(self, version: int) -> keys.Destroyed:
        return keys.destroy(self.service, self.id, version=version, request_id="request-of-a-test")


@pytest.fixture
def acme(service: Service) -> Sealed:
    return Sealed(service)


def states(service: Service, tenant_id: str) -> list[tuple[int, str, str, int]]:
    """Version, provider, state and how many data keys it wraps."""
    with reading(service.engine) as session:
        return [
            (each.version, each.provider, each.state, each.wraps)
            for each in keys.listed(session)
            if each.tenant == tenant_id
        ]


def files(service: Service) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (service.settings.data_dir / "objects").rglob("*") if path.is_file()}


def secrets_of(service: Service, ring: KeyRing | None = None) -> list[vault.SigningSecret]:
    return service.read(
        ALL_TENANTS, lambda session: [vault.signing_key(session, ring or service.keys, purpose) for purpose in PURPOSES]
    )


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


class Killed(Exception):
    """Stands for a death: whatever it goes through has committed what it has committed."""


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


@ON_SQLITE
def test_a_begun_rotation_into_another_provider_is_finished_or_discarded_by_name(
    acme: Sealed, service: Service
) -> None:
    def die(*_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        acme.migrate(on_progress=die)
    with pytest.raises(Conflict, match=r"into 'second' was begun.*migrate --to second.*--tenant acme --version 2"):
        acme.rotate()
    acme.destroy(2)
    assert acme.rotate().version == 3
    assert states(service, acme.id) == [
        (1, "local", "decrypt-only", 0),
        (2, "second", "destroyed", 0),
        (3, "local", "active", OBJECTS),
    ]
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


@pytest.fixture(params=["local", "pkcs11", "aws_kms"])
def third(request: pytest.FixtureRequest, service: Service, tmp_path: Path) -> str:
    """The name of a provider that came into the provider file after `service` was opened."""
    if request.param == "local":
        LocalKeyProvider.create(tmp_path / "third", key_file=tmp_path / "third.key")
        given = {"directory": str(tmp_path / "third"), "key_file": str(tmp_path / "third.key")}
    elif request.param == "pkcs11":
        given = {"library": str(request.getfixturevalue("token")), "token_label": TOKEN_LABEL, "pin": PIN}
    else:
        given = {"endpoint_url": request.getfixturevalue("kms"), **ACCOUNT}
    name(tmp_path, third={"kind": request.param, **given})
    return "third"


@ON_SQLITE
def test_all_keys_move_to_another_provider_under_processes_that_were_started_before(
    acme: Sealed, service: Service, third: str
) -> None:
    running = KeyRing.from_message(service.keys.to_message())
    other, before = Sealed(service, "other", count=2), secrets_of(service)
    operator = Service(service.settings, service.engine, deployment.open_keys(service.settings), service.blobs)
    done = keys.migrate(operator, to=third, request_id="request-of-a-test")
    assert {each.tenant for each in done.rotated} == {SYSTEM, acme.id, other.id} and not done.left and not done.refused
    for each in (acme, other):
        each.seal()  # by the keys of a process that had never heard of the provider
        each.require_all_open(running)
        assert states(service, each.id)[1] == (2, third, "active", len(each.contents))
    assert secrets_of(service, running) == before
    assert keys.migrate(operator, to=third, request_id="request-of-a-test").rotated == [], "nothing is left to do"
    for tenant_id in (SYSTEM, acme.id, other.id):
        keys.destroy(operator, tenant_id, version=1, request_id="request-of-a-test")
    assert not list(service.settings.key_dir.glob("*.kek"))
    acme.require_all_open()
    back = keys.migrate(operator, to="local", request_id="request-of-a-test")
    assert [each.tenant for each in back.rotated] == [SYSTEM], (
        "while the default is another, theirs may be the tenants' own"
    )
    assert {each.tenant for each in back.left} == {acme.id, other.id}


@ON_SQLITE
def test_a_migration_that_died_among_tenants_goes_on_with_those_that_are_left(acme: Sealed, service: Service) -> None:
    others = [Sealed(service, f"t{number}", count=2) for number in range(3)]
    seen: list[str] = []

    def die(tenant_id: str, step: str, _: int) -> None:
        seen.append(tenant_id)
        if tenant_id == others[1].id and step == "active":
            raise Killed

    with pytest.raises(Killed):
        keys.migrate(service, to="second", request_id="request-of-a-test", on_progress=die)
    for each in (acme, *others):
        each.require_all_open()
    done = keys.migrate(service, to="second", request_id="request-of-a-test")
    assert [each.tenant for each in done.rotated] == [others[1].id, others[2].id]
    for each in (acme, *others):
        assert states(service, each.id) == [
            (1, "local", "decrypt-only", 0),
            (2, "second", "active", len(each.contents)),
        ]


@ON_SQLITE
def test_a_customers_own_key_moves_only_where_the_customer_is_named(acme: Sealed, service: Service, third: str) -> None:
    operator = Service(service.settings, service.engine, deployment.open_keys(service.settings), service.blobs)
    own = Sealed(operator, "own", count=2, provider=third)
    done = keys.migrate(operator, to="second", request_id="request-of-a-test")
    assert [each.tenant for each in done.left] == [own.id] and "of its own" in done.left[0].why
    assert states(service, own.id) == [(1, third, "active", 2)]
    assert own.migrate("second").rotated[0].rewrapped == 2
    own.require_all_open()


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

    monkeypatch.setattr("cloister_server.processes.time.monotonic", iter(range(0, 10_000, 10)).__next__)
    with pytest.raises(StartRefused, match="in use by another process"):
        acme.rotate(on_progress=another)


@ON_SQLITE
def test_a_keystore_is_copied_without_its_root_and_is_on_record(acme: Sealed, service: Service, tmp_path: Path) -> None:
    (service.settings.anchor_dir).mkdir(exist_ok=True)
    place = tmp_path / "copies" / "keystore.tar"
    place.parent.mkdir()
    made = keystore_backups.backup(service, place)
    assert made.keys == 2 and place.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in place.parent.iterdir()] == [place.name], "no draft is left"
    with reading(service.engine) as session:
        row = session.get_one(KeystoreBackup, made.id)
        assert row.place == made.place == str(place)
    with tarfile.open(fileobj=io.BytesIO(place.read_bytes())) as tar:
        assert sorted(tar.getnames()) == sorted(
            path.name for path in service.settings.key_dir.iterdir() if path.is_file()
        )
        (tmp_path / "restored").mkdir(mode=0o700)
        tar.extractall(tmp_path / "restored", filter="data")
    assert service.settings.key_file is not None
    assert service.settings.key_file.read_bytes() not in place.read_bytes()
    root = LocalKeyProvider.open(service.settings.key_dir, key_file=service.settings.key_file).root_key
    assert root not in place.read_bytes()
    restored = {"kind": "local", "directory": tmp_path / "restored", "key_file": service.settings.key_file}
    acme.require_all_open(KeyRing("local", {"local": restored}, record=KeyRecord(tmp_path / "record")))
    before = place.read_bytes()
    with pytest.raises(Invalid, match="nothing is overwritten"):
        keystore_backups.backup(service, place)
    assert place.read_bytes() == before


@ON_SQLITE
@pytest.mark.parametrize("place", ["data/copy.tar", "keystore/copy.tar", "nowhere/copy.tar"])
def test_a_copy_of_the_keystore_goes_to_no_place_where_it_must_not(
    place: str, service: Service, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    with pytest.raises(Invalid):
        keystore_backups.backup(service, tmp_path / place)
    with reading(service.engine) as session:
        assert session.scalar(select(func.count()).select_from(KeystoreBackup)) == 0


@ON_SQLITE
def test_a_copy_that_was_not_written_is_not_on_record(
    acme: Sealed, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise KeyProviderError("no space left")

    monkeypatch.setattr(keystore_backups, "write_new", full)
    with pytest.raises(Invalid, match="no space left"):
        keystore_backups.backup(service, tmp_path / "copy.tar")
    with reading(service.engine) as session:
        assert session.scalar(select(func.count()).select_from(KeystoreBackup)) == 0


@ON_SQLITE
def test_a_provider_with_a_wrong_setting_is_named_and_not_quoted(service: Service, tmp_path: Path) -> None:
    secret = secrets.token_hex(16)
    name(tmp_path, odd={"kind": "vault_transit", "pin": secret}, worse={"kind": "aws_kms", "timeout_s": secret})
    for provider in ("odd", "worse"):
        with pytest.raises(KeyProviderError, match=provider) as refusal:
            service.keys.of(provider).has_key("tn_1.first")
        assert secret not in str(refusal.value)


@ON_SQLITE
def test_a_provider_file_that_was_broken_since_refuses_the_new_name_alone(
    acme: Sealed, service: Service, tmp_path: Path
) -> None:
    with pytest.raises(KeyProviderError, match="no key provider 'third'"):
        service.keys.of("third")
    (tmp_path / "providers.json").write_text("{")
    with pytest.raises(KeyProviderError, match="cannot be read as JSON"):
        service.keys.of("third")
    acme.rotate(to="second")
    acme.require_all_open()


def test_requests_go_on_over_a_rotation_of_all_keys(http: TestClient, bearer: dict[str, str], service: Service) -> None:
    for _ in range(2):
        done = keys.rotate_all(service, request_id="request-of-a-test")
        assert len(done.rotated) == 2 and not done.refused
        assert http.get("/v1/models", headers=bearer).status_code == 200
    for tenant in (SYSTEM, done.rotated[1].tenant):
        for version in (1, 2):
            keys.destroy(service, tenant, version=version, request_id="request-of-a-test")
    deployment.check_ready(service)


class CLI:
    """`cloister-admin key`, in this process."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env

    def __call__(self, *arguments: str, exit_code: int = 0) -> Any:
        done = CliRunner().invoke(key_cli, [*arguments, "--json"], env=self.env)
        assert done.exit_code == exit_code, (done.output, done.exception)
        return json.loads(done.stdout or done.stderr)


@pytest.fixture
def cli(service: Service) -> CLI:
    given = service.settings
    return CLI(
        {
            "CLOISTER_DATA_DIR": str(given.data_dir),
            "CLOISTER_KEY_DIR": str(given.key_dir),
            "CLOISTER_KEY_FILE": str(given.key_file),
            "CLOISTER_KEY_PROVIDERS": str(given.key_providers),
            "CLOISTER_DATABASE_URL": given.database_url.get_secret_value(),
        }
    )


@pytest.fixture
def anchored(service: Service) -> Iterator[Service]:
    """The deployment as its commands open it, with what they look for besides."""
    Anchors(service.settings.anchor_dir).create()
    opened = deployment.open_service(service.settings)
    yield opened
    opened.engine.dispose()


@ON_SQLITE
def test_the_operators_commands_plan_do_and_tell(cli: CLI, anchored: Service, tmp_path: Path) -> None:
    service, acme = anchored, Sealed(anchored, count=AT_ONCE + 1)
    plan = cli("rotate", "--tenant", "acme", "--dry-run")
    assert [(each["tenant_name"], each["act"], each["rewraps"]) for each in plan["plan"]] == [("acme", "rotate", 11)]
    plan = cli("migrate", "--to", "second", "--dry-run")
    assert [each["to_provider"] for each in plan["plan"]] == ["second"] * 2 and plan["left"] == []
    assert states(service, acme.id) == [(1, "local", "active", 11)], "a dry run does nothing"
    assert cli("rotate", "--tenant", acme.id)["rotated"][0]["version"] == 2
    assert [each["tenant_name"] for each in cli("rotate", "--all")["rotated"]] == ["system", "acme"]
    assert cli("rotate", "--system")["rotated"][0]["version"] == 3
    assert [each["provider"] for each in cli("migrate", "--to", "second")["rotated"]] == ["second"] * 2
    assert cli("destroy", "--tenant", "acme", "--version", "1", "--dry-run")["state"] == "decrypt-only"
    refused = cli("destroy", "--tenant", "acme", "--version", "1", exit_code=1)
    assert "--confirm acme" in refused["error"] and "Backups of the database" in refused["error"]
    assert cli("destroy", "--tenant", "acme", "--version", "1", "--confirm", "other", exit_code=1)
    assert states(service, acme.id)[0] == (1, "local", "decrypt-only", 0)
    assert cli("destroy", "--tenant", "acme", "--version", "1", "--confirm", "acme")["waiting_days"] == 0
    assert cli("destroy", "--system", "--version", "1", "--confirm", "system")["tenant"] == "system"
    assert "key file" in cli("backup", "--to", str(tmp_path / "copy.tar"))["note"]
    acme.require_all_open()


@ON_SQLITE
@pytest.mark.usefixtures("anchored")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rotate"], "name one of"),
        (["rotate", "--all", "--system"], "name one of"),
        (["rotate", "--tenant", "nobody"], "nobody"),
        (["migrate", "--to", "nowhere"], "no key provider 'nowhere'"),
        (["destroy", "--version", "1"], "name one of"),
        (["destroy", "--system", "--version", "1", "--confirm", "system"], "is the active one"),
        (["destroy", "--system", "--version", "9", "--confirm", "system"], "no version 9"),
    ],
)
def test_the_operators_commands_refuse_by_name(cli: CLI, arguments: list[str], said: str) -> None:
    assert said in cli(*arguments, exit_code=1)["error"]


@ON_SQLITE
def test_a_data_key_that_does_not_open_is_exit_status_1(cli: CLI, anchored: Service) -> None:
    service, acme = anchored, Sealed(anchored, count=2)
    damaged = sorted(acme.contents)[0]
    with writing(service.engine) as session:
        session.get_one(SealedObject, (acme.id, damaged)).wrapped_key = b"cloister.wrapped/1\nnothing"
    assert cli("rotate", "--tenant", "acme", exit_code=1)["rotated"][0]["unopened"] == [damaged]


@ON_SQLITE
def test_the_operator_makes_lists_and_removes_recipients(cli: CLI, anchored: Service) -> None:
    acme = Sealed(anchored, count=0)
    lines = [cli("recipient", "create", "--tenant", "acme")["recipient"] for _ in range(2)]
    assert [each["recipient"] for each in cli("recipient", "list", "--tenant", "acme")] == lines
    assert cli("rotate", "--tenant", "acme")["rotated"][0]["rewrapped"] == 2
    assert [each["recipient"] for each in cli("recipient", "list", "--tenant", "acme")] == lines, "rotated, not changed"
    with reading(anchored.engine) as session:
        first, _ = session.scalars(select(SealedObject.id).order_by(SealedObject.created, SealedObject.id)).all()
    assert first in {each["id"] for each in cli("recipient", "list", "--tenant", "acme")}
    assert cli("recipient", "remove", lines[0], "--tenant", acme.id) == {"removed": first}
    assert [each["recipient"] for each in cli("recipient", "list", "--tenant", "acme")] == lines[1:]
    assert first in cli("recipient", "remove", first, "--tenant", "acme", exit_code=1)["error"]
