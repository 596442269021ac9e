"""The end of a tenant: nothing of it opens any more, here or from a backup, and every other tenant is as before."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import create_engine, make_url, select, text
from starlette.testclient import TestClient

from asked import asked_reading, asked_writing
from cloister_privacy.sealing import InvalidSeal, LocalKeyProvider
from cloister_server import deployment, grants, keys, processes, shredding, sources, tenants, vault
from cloister_server.app import create_app
from cloister_server.errors import Conflict, ServerError, TenantKeyRefused, Unavailable
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.key_record import KeyRecord
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import (
    AuditRow,
    Grant,
    Job,
    LedgerEntry,
    Part,
    SealedObject,
    Tenant,
    TenantKey,
    Unit,
    new_id,
)
from houses import House, assert_nothing_is_left, blobs_of, count, counted, second_keystore, shred, verified
from issuers import soon
from key_providers import PIN, TOKEN_LABEL

pytest_plugins = ("key_providers", "houses")
pytestmark = pytest.mark.xdist_group("key-providers")


def opened(service: Service, house: House) -> dict[str, bytes | str]:
    """What each of a tenant's sealed objects opens to, or the code of the refusal."""
    found: dict[str, bytes | str] = {}
    with asked_reading(service) as session:
        for row in session.scalars(select(SealedObject).where(SealedObject.tenant_id == house.id)):
            of: dict[str, Any] = {"tenant_id": house.id, "object_id": row.id}
            try:
                found[row.id] = (
                    vault.data_key(session, **of).secret
                    if row.kind == "units"
                    else vault.open_object(session, service.blobs, **of)
                )
            except (ServerError, InvalidSeal) as error:
                found[row.id] = str(getattr(error, "code", type(error).__name__))
    return found


@pytest.fixture
def backed_up(service: Service, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Callable[..., Any]]:
    """Copies the data directory and the database; what it gives opens the copy, on the live keystore and providers."""

    def back_up(*also_open: Service) -> Callable[..., Any]:
        for each in (service, *also_open):
            each.engine.dispose()
        copy, url = tmp_path / "restored", service.settings.database_url
        shutil.copytree(service.settings.data_dir, copy)
        if service.settings.is_sqlite:
            url = SecretStr(f"sqlite:///{copy}/cloister.db")
        else:
            url = SecretStr(_copied(url.get_secret_value(), request.getfixturevalue("postgres")))

        @contextmanager
        def restore(live: Service = service) -> Iterator[Service]:
            settings = live.settings.model_copy(update={"data_dir": copy, "database_url": url})
            restored = deployment.open_service(settings)
            yield restored
            restored.engine.dispose()

        return restore

    return back_up


def _copied(url: str, superuser_url: str) -> str:
    """The URL of a copy of a PostgreSQL database that nobody is connected to."""
    name, copy = str(make_url(url).database), f"copy{new_id('db')[3:15]}"
    admin = create_engine(
        superuser_url.replace("postgresql://", "postgresql+psycopg://", 1), isolation_level="AUTOCOMMIT"
    )
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {copy} TEMPLATE {name}"))
    admin.dispose()
    return url.replace(f"/{name}?", f"/{copy}?", 1)


@pytest.mark.parametrize("kept_by", ["local", "softhsm"])
def test_nothing_of_a_shredded_tenant_opens_from_a_backup_and_every_other_tenant_does(
    kept_by: str,
    service: Service,
    furnish: Callable[[str], House],
    backed_up: Callable[..., Callable[..., Any]],
    with_providers: Callable[..., Service],
    request: pytest.FixtureRequest,
    http: TestClient,
) -> None:
    victim, other = furnish("acme"), furnish("other")
    if kept_by == "softhsm":
        library = str(request.getfixturevalue("token"))
        service = with_providers(hsm={"kind": "pkcs11", "library": library, "token_label": TOKEN_LABEL, "pin": PIN})
        keys.migrate(service, to="hsm", tenant_id=victim.id, request_id="request-of-a-test")
        keys.destroy(service, victim.id, version=1, request_id="request-of-a-test")
    before, others = opened(service, victim), opened(service, other)
    assert len(before) >= 5 and all(isinstance(each, bytes) for each in [*before.values(), *others.values()])
    predicted = other.predict().json()["outputs"]
    blobs = {path: path.read_bytes() for path in blobs_of(service, other.id)}
    restore = backed_up(service)

    receipt = shred(service, victim)

    assert_nothing_is_left(service, victim)
    assert opened(service, other) == others and other.predict().json()["outputs"] == predicted
    assert {path: path.read_bytes() for path in blobs_of(service, other.id)} == blobs
    with restore(service) as restored, TestClient(create_app(restored), raise_server_exceptions=False) as again:
        assert opened(restored, victim) == dict.fromkeys(before, "tenant_key_refused")
        assert blobs_of(restored, victim.id), "the backup has the bytes, and no key to them"
        assert opened(restored, other) == others
        assert other.predict(http=again).json()["outputs"] == predicted
        refused = victim.predict(http=again)
        assert (refused.status_code, refused.json()["code"]) == (403, "tenant_key_refused")
    newest = receipt.keys[-1]
    assert (newest.outcome, newest.waiting_days, newest.gone) == ("destroyed", 0, newest.destroyed)
    assert (newest.kind, newest.provider) == (("local", "local") if kept_by == "local" else ("pkcs11", "hsm"))
    assert newest.claim == service.keys.of(newest.provider).destruction.claim
    if kept_by == "softhsm":
        assert [key.outcome for key in receipt.keys] == ["earlier", "destroyed"]


def test_a_client_is_refused_at_once_and_others_lose_what_they_had_been_granted(
    service: Service, furnish: Callable[[str], House]
) -> None:
    victim, other = furnish("acme"), furnish("other")
    with writing(service.engine) as session:
        grants.add(session, victim.operator, to=other.client.id, verb="dataset.read", resource_id="*")
        grants.add(session, other.operator, to=victim.client.id, verb="dataset.read", resource_id="*")
    assert other.ask("GET", f"/v1/datasets/{victim.dataset}").status_code == 200
    shred(service, victim)
    assert victim.predict().status_code == victim.ask("GET", "/v1/datasets").status_code == 401
    asked = victim.http.post(
        "/oauth/token", data={"grant_type": "client_credentials"}, auth=(victim.client.id, victim.client.secret)
    )
    assert asked.status_code == 401
    assert other.ask("GET", f"/v1/datasets/{victim.dataset}").status_code == 404
    assert count(service, Grant, Grant.principal_id == victim.client.id) == 0
    assert other.predict().status_code == 200


def test_a_shredded_tenant_takes_nothing_new_from_the_operator_either(
    service: Service, furnish: Callable[[str], House]
) -> None:
    house, other = furnish("acme"), furnish("other")
    shred(service, house)
    acts: list[Callable[[Any], object]] = [
        lambda session: tenants.create_client(session, service.keys, house.operator, name="new", role="steward"),
        lambda session: tenants.rotate_client(session, service.keys, house.operator, house.client.id),
        lambda session: grants.add(session, house.operator, to=other.client.id, verb="model.predict", resource_id="*"),
        lambda session: sources.create(
            session, house.operator, sources.wire.CreateSource(name="s", epsilon=1, delta=1e-5), owner_id="ap_x"
        ),
    ]
    for act in acts:
        with pytest.raises(Conflict) as refused:
            service.write(ALL_TENANTS, act)
        assert refused.value.code == "tenant_shredded"
    with pytest.raises(Conflict):
        keys.rotate(service, house.id, request_id="request-of-a-test")
    with pytest.raises(TenantKeyRefused), asked_writing(service) as session:
        vault.seal_object(session, service.blobs, b"x", tenant_id=house.id, kind="part")
    assert_nothing_is_left(service, house)


class Died(BaseException):
    """The process is gone at this instant."""


def test_a_shredding_that_dies_at_any_step_is_finished_by_the_next_with_one_receipt(
    service: Service, furnish: Callable[[str], House], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not service.settings.is_sqlite:
        pytest.skip("a transaction that is committed is committed on every database")
    left = 0

    def deed(act: Callable[..., Any]) -> Callable[..., Any]:
        """Dies behind the deed that the countdown ends at."""

        def dying(*given: Any, **more: Any) -> Any:
            nonlocal left
            done = act(*given, **more)
            left -= 1
            if left == 0:
                raise Died
            return done

        return dying

    @contextmanager
    def dying_writing(engine: Any, acting: Any) -> Iterator[Any]:
        with writing(engine, acting) as session:
            yield session
        deed(lambda: None)()

    monkeypatch.setattr(shredding, "writing", dying_writing)
    monkeypatch.setattr(LocalKeyProvider, "destroy_key", deed(LocalKeyProvider.destroy_key))
    monkeypatch.setattr(type(service.blobs), "delete", deed(type(service.blobs).delete))
    for instant in range(1, 100):
        house = furnish(f"t{instant}")
        service.blobs.put(house.id, new_id("obj"), b"stored by a process that died before it could name it")
        objects = counted(service, house)
        deaths = 0
        for left in (instant, instant // 2 + 1, 0):  # noqa: B007 (the countdown reads it)
            try:
                envelope = shredding.shred(service, house.operator)
                break
            except Died:
                deaths += 1
                with reading(service.engine) as session:
                    assert session.get_one(Tenant, house.id).status != "active"
        receipt = verified(service, envelope)
        assert receipt.keys[0].outcome == "destroyed"
        assert receipt.deleted["wrapped_keys"] == objects and receipt.deleted["clients"] == 1
        assert_nothing_is_left(service, house)
        for verb in ("tenant.shred", "tenant.shredded"):
            assert count(service, AuditRow, AuditRow.tenant_id == house.id, AuditRow.verb == verb) == 1
        if not deaths:
            break
    assert 5 < instant < 40, "it died at every instant there is"


def test_a_provider_that_is_away_leaves_the_tenant_closed_and_the_next_run_goes_on(
    service: Service, furnish: Callable[[str], House], with_providers: Callable[..., Service], tmp_path: Path
) -> None:
    house = furnish("acme")
    both = with_providers(second=second_keystore(tmp_path))
    keys.migrate(both, to="second", tenant_id=house.id, request_id="request-of-a-test")
    with pytest.raises(Conflict, match="no key provider 'second'") as refused:
        shredding.shred(service, house.operator)
    assert refused.value.code == "shredding_unfinished" and "run the command again" in refused.value.message
    with pytest.raises(TenantKeyRefused), asked_writing(both) as session:
        vault.seal_object(session, both.blobs, b"x", tenant_id=house.id, kind="part")
    with reading(service.engine) as session:
        assert session.get_one(Tenant, house.id).status == "shredding"
        with pytest.raises(Conflict, match="not shredded yet"):
            shredding.receipt(session, house.operator)
    receipt = shred(both, house)
    assert [(key.provider, key.outcome) for key in receipt.keys] == [("local", "destroyed"), ("second", "destroyed")]
    assert list((tmp_path / "second").glob("*.kek")) == []
    assert_nothing_is_left(service, house)


def test_keys_that_a_restored_database_does_not_know_are_destroyed_with_the_others(
    service: Service, furnish: Callable[[str], House], backed_up: Callable[..., Any]
) -> None:
    house = furnish("acme")
    restore = backed_up(service)
    keys.rotate(service, house.id, request_id="request-of-a-test")
    with reading(service.engine) as session:
        older, newer = session.scalars(
            select(TenantKey.key_id).where(TenantKey.tenant_id == house.id).order_by(TenantKey.version)
        )
    with restore() as restored:
        receipt = shred(restored, house)
        assert_nothing_is_left(restored, house)
    assert [(key.key_id, key.outcome) for key in receipt.keys] == [(older, "destroyed"), (newer, "destroyed")]
    assert not any(service.keys.of("local").has_key(each) for each in (older, newer))


def test_no_key_is_made_that_cannot_be_put_on_record(service: Service) -> None:
    directory = service.settings.key_record_dir
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    shutil.rmtree(directory)
    directory.write_text("in the way")
    with pytest.raises(Unavailable, match="on no record is not made"):
        service.keys.of("local").create_key("tn_1.first")
    directory.unlink()
    assert not service.keys.of("local").has_key("tn_1.first")
    deployment.initialise(service.settings).engine.dispose()
    again = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert again.keys() == before.keys() and before, "an upgrade puts the keys on record that there are"
    (directory / next(iter(before))).write_text("{")
    with pytest.raises(Unavailable, match="damaged"):
        KeyRecord(directory).of("system")


def test_work_that_does_not_end_holds_the_shredding_up_and_is_cancelled_once_it_does(
    service: Service, furnish: Callable[[str], House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = furnish("acme")
    asked = {"dataset": house.dataset, "queries": [{"type": "count"}], "epsilon": 0.5}
    started = house.ask("POST", "/v1/queries", json={"query": asked})
    assert started.status_code == 201, started.text
    job_id = started.json()["id"]
    monkeypatch.setattr(shredding, "_CHILD_S", 0.2)
    lock = service.settings.data_dir / "locks" / f"{job_id}.lock"
    with processes.locked(lock, wait_s=1, what="a child"), pytest.raises(Conflict, match=job_id) as refused:
        shredding.shred(service, house.operator)
    assert refused.value.code == "shredding_unfinished"
    with reading(service.engine) as session:
        job = session.get_one(Job, (house.id, job_id))
        assert job.cancel_requested and job.status == "queued"
        assert session.get_one(TenantKey, (house.id, 1)).state == "decrypt-only", "what runs can still end in order"
    shred(service, house)
    with reading(service.engine) as session:
        assert session.get_one(Job, (house.id, job_id)).status == "cancelled"
    settled = (LedgerEntry.job_id == job_id, LedgerEntry.kind == "settle", LedgerEntry.steps == 0)
    assert count(service, LedgerEntry, *settled) == 1
    assert not lock.exists()
    assert_nothing_is_left(service, house)


def test_requests_that_race_the_shredding_leave_nothing(
    service: Service, furnish: Callable[[str], House], weights: bytes
) -> None:
    house = furnish("acme")
    source = house.ask("POST", "/v1/sources", json={"name": "more", "unit": "user", "epsilon": 9, "delta": 1e-5})
    datasets = [house.declare(f"d{each}", source.json()["id"]) for each in range(3)]
    answers: list[tuple[int, str]] = []
    stop, under_way = threading.Event(), threading.Event()

    def upload(dataset: str, at: int) -> None:
        for turn in range(1000):
            if stop.is_set():
                return
            for answer in (
                house.put(dataset, f"user-{at}-{turn}", key=f"k{at}-{turn}"),
                house.ask("POST", "/v1/weights", content=weights),
                house.ask(
                    "POST",
                    "/v1/queries",
                    json={"query": {"dataset": house.dataset, "queries": [{"type": "count"}], "epsilon": 1e-3}},
                ),
            ):
                answers.append((answer.status_code, str(answer.json().get("code"))))
            if turn:
                under_way.set()

    threads = [threading.Thread(target=upload, args=(each, at)) for at, each in enumerate(datasets)]
    for thread in threads:
        thread.start()
    try:
        assert under_way.wait(120)
        shredding.shred(service, house.operator)
        soon(lambda: sum(status == 401 for status, _ in answers) >= 9)
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    assert {status for status, _ in answers} >= {201, 401}
    assert {status for status, _ in answers} <= {201, 401, 403, 404, 409}, set(answers)
    assert_nothing_is_left(service, house)


def test_on_sqlite_no_wrapped_key_and_no_mac_lingers_in_the_files_of_the_database(
    service: Service, furnish: Callable[[str], House]
) -> None:
    if not service.settings.is_sqlite:
        pytest.skip("PostgreSQL keeps deleted rows until they are vacuumed, and the receipt says so")
    house = furnish("acme")
    with reading(service.engine) as session:
        secrets = [*session.scalars(select(SealedObject.wrapped_key).where(SealedObject.tenant_id == house.id))]
        secrets += [mac for mac in session.scalars(select(Unit.mac)) if mac]
        secrets += [mac for mac in session.scalars(select(Part.content_mac)) if mac]
    assert len(secrets) > 5

    def on_disk() -> bytes:
        return b"".join(path.read_bytes() for path in service.settings.data_dir.glob("cloister.db*"))

    assert all(secret[:64] in on_disk() for secret in secrets)
    shred(service, house)
    assert not [secret for secret in secrets if secret[-32:] in on_disk()]
