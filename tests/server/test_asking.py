"""Key providers are asked in no transaction, and keep no more threads than they may: whoever is slow holds up nobody else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from cloister_privacy.sealing import Context, LocalKeyProvider, new_key
from cloister_server import asking, deployment, keyring, tenants, vault
from cloister_server.keyring import AskedInTransaction, KeyProviderBusy, KeyRing
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import in_transaction, reading, snapshot, writing
from cloister_server.store.tables import TenantKey

SLOW = "slow"
OF_NOBODY = Context(tenant="tn_1", kind="weights", object="obj_1")


@pytest.fixture
def slow(service: Service, tmp_path: Path) -> Service:
    """The deployment with the provider `slow` besides, a keystore elsewhere, in which a tenant of its name has its key."""
    LocalKeyProvider.create(tmp_path / "elsewhere", key_file=tmp_path / "slow.key")
    given = {"kind": "local", "directory": str(tmp_path / "elsewhere"), "key_file": str(tmp_path / "slow.key")}
    file = tmp_path / "providers.json"
    file.touch(mode=0o600)
    file.write_text(json.dumps({"format": "cloister.key-providers/1", "default": "local", "providers": {SLOW: given}}))
    opened = deployment.open_service(service.settings.model_copy(update={"key_providers": file}))
    opened.write(
        ALL_TENANTS,
        lambda session: tenants.create_tenant(session, opened.keys, name=SLOW, request_id="r", provider=SLOW).id,
    )
    return opened


@dataclass
class Line:
    """What leads to the slow provider: whoever asks waits here until it answers."""

    waiting: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    answers: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def line(slow: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    made, wrap = Line(), LocalKeyProvider.wrap

    def waited(self: LocalKeyProvider, *given: Any, **more: Any) -> bytes:
        if self._directory == tmp_path / "elsewhere":
            made.waiting.release()
            assert made.answers.wait(60)
        return wrap(self, *given, **more)

    monkeypatch.setattr(LocalKeyProvider, "wrap", waited)
    return made


def tenant_of(service: Service) -> str:
    with reading(service.engine) as session:
        return tenants.find_tenant(session, SLOW).id


@pytest.mark.parametrize("begun", [reading, writing, snapshot])
def test_no_provider_is_asked_or_opened_while_a_transaction_is_open(
    service: Service, begun: Callable[..., Any]
) -> None:
    keys, again = service.keys, KeyRing.from_message(service.keys.to_message())
    local = keys.of("local")
    acts: list[Callable[[], object]] = [
        lambda: local.create_key("tn_1.first"),
        lambda: local.has_key("tn_1.first"),
        lambda: local.wrap("tn_1.first", new_key(), context=OF_NOBODY),
        lambda: local.unwrap("tn_1.first", b"", context=OF_NOBODY),
        lambda: local.destroy_key("tn_1.first"),
        lambda: again.of("local"),
    ]
    for act in acts:
        with pytest.raises(AskedInTransaction), begun(service.engine) as session:
            session.execute(text("SELECT 1"))
            act()
    assert not in_transaction() and not local.has_key("tn_1.first")


def test_a_transaction_that_cannot_run_again_asks_nobody(service: Service, make_client: Callable[..., Any]) -> None:
    tenant_id = make_client().tenant_id
    with pytest.raises(AskedInTransaction), writing(service.engine) as session:
        vault.new_data_key(session, tenant_id=tenant_id, kind="part")


def test_whoever_seals_with_a_slow_provider_holds_up_no_writer(slow: Service, line: Line) -> None:
    tenant_id = tenant_of(slow)
    with ThreadPoolExecutor(1) as pool:
        sealing = pool.submit(
            slow.write,
            ALL_TENANTS,
            lambda session: vault.seal_object(session, slow.blobs, b"x", tenant_id=tenant_id, kind="initial"),
        )
        assert line.waiting.acquire(timeout=60)
        other = slow.write(
            ALL_TENANTS, lambda session: tenants.create_tenant(session, slow.keys, name="other", request_id="r").id
        )
        assert not sealing.done() and other
        line.answers.set()
        object_id = sealing.result(60)
    opened = slow.read(
        ALL_TENANTS, lambda session: vault.open_object(session, slow.blobs, tenant_id=tenant_id, object_id=object_id)
    )
    assert opened == b"x"


def test_a_slow_provider_keeps_so_many_threads_and_no_more(
    slow: Service, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "_MOST_WAITING", 2)
    ring = KeyRing.from_message(slow.keys.to_message())
    with reading(slow.engine) as session:
        key_id = session.get_one(TenantKey, (tenant_of(slow), 1)).key_id

    def wrap() -> bytes:
        return ring.of(SLOW).wrap(key_id, new_key(), context=OF_NOBODY)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(wrap) for _ in range(2)]
        assert all(line.waiting.acquire(timeout=60) for _ in waiting)
        with pytest.raises(KeyProviderBusy) as refusal:
            wrap()
        assert (refusal.value.status, refusal.value.code) == (503, "key_provider_busy")
        assert not ring.of("local").has_key("tn_1.first"), "whoever asks another provider is answered"
        line.answers.set()
        assert all(each.result(60) for each in waiting)
    assert wrap()


def test_what_is_used_once_is_new_in_every_run_and_all_else_is_asked_once(service: Service) -> None:
    asked: list[str] = []

    @dataclass(frozen=True)
    class Number:
        name: str

        def ask(self, keys: KeyRing) -> int:
            assert not in_transaction()
            asked.append(self.name)
            return len(asked)

    taken: list[int] = []

    def work(session: Any) -> list[int]:
        session.execute(text("SELECT 1"))
        taken.append(asking.taken(session, Number("fresh")))
        (one,) = asking.answered(session, Number("one"))
        taken.append(asking.taken(session, Number("fresh")))
        return [one, taken[-2], taken[-1]]

    given = service.write(ALL_TENANTS, work)
    assert len(set(taken)) == len(taken) and len(set(given)) == 3
    assert asked.count("one") == 1 and asked.count("fresh") == len(taken)


def test_what_opens_several_keys_of_the_service_asks_for_them_together(service: Service) -> None:
    ring, runs = deployment.open_keys(service.settings), list[None]()  # one that remembers nothing yet

    def opened(session: Session) -> list[vault.SigningSecret]:
        runs.append(None)
        return vault.signing_keys(session, ring, "token", "certificate", "pepper")

    secrets = asking.run(lambda: reading(service.engine), ring, opened)
    assert len({each.id for each in secrets}) == 3
    assert len(runs) == 2, "a run that asks, and one that knows"
