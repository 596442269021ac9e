"""SIGKILL at random instants of a rotation and a migration, under a server that goes on: nothing is lost, and once more finishes.

The operator's command is a real process; the server that predicts and takes uploads meanwhile was started before the provider
that the keys move to was in its provider file.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import insert, select

import cloister
from asked import asked_reading
from cloister_privacy.sealing import Context, LocalKeyProvider, new_key
from cloister_server import deployment as deployments
from cloister_server import keys, tenants, vault
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import SealedObject, new_id
from databases import new_postgres_database
from harness import BIN, App, Deployment
from journeys import COLUMNS, upload

ROWS = 1500
"""Data keys besides the tenant's real ones: a rotation says about ten times how far it has come."""

LINES = 12
"""What a command says at least while it works, about."""

PURPOSES: tuple[vault.Purpose, ...] = ("token", "certificate", "pepper")
COMMANDS = (
    ("local", "rotate", "--tenant", "acme"),
    ("local", "migrate", "--to", "other"),
    ("other", "rotate", "--all"),
    ("other", "migrate", "--to", "local"),
)
"""The default of the provider file as it is then, and the operator's command."""


@pytest.mark.long
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_many_kills_lose_nothing(
    database: str, request: pytest.FixtureRequest, tmp_path: Path, digits: dict[str, np.ndarray]
) -> None:
    made = Deployment(tmp_path / "d")
    if database == "postgres":
        urls = new_postgres_database(request.getfixturevalue("postgres"))
        made.database_url, made.owner_database_url = urls.runtime, urls.owner
    _kill_at_random_instants(made, digits, commands=COMMANDS * (1 if os.environ.get("SHORT") else 20))


def _kill_at_random_instants(
    deployment: Deployment, digits: dict[str, np.ndarray], *, commands: Sequence[tuple[str, ...]]
) -> None:
    """Each command in turn, killed at an instant of its life and run once more."""
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 2**32)
    print(f"KILL_SEED={seed}")  # noqa: T201 (shown when the test fails: it replays the instants)
    rng = random.Random(seed)
    _write_providers(deployment, default="local")
    deployment.extra_env = {"CLOISTER_KEY_PROVIDERS": str(deployment.root / "providers.json")}
    deployment.init()
    app = deployment.app(deployment.tenant("acme"), "steward")
    deployment.start()
    try:
        with deployment.client(app, max_retries=8) as client:
            data = upload(client, digits, epsilon=900.0)
            privacy = cloister.DP(noise_multiplier=2.0)
            plan = client.plan(data, target="digit", privacy=privacy, batch_size=100, epochs=1)
            client.train(plan, model="m").wait(timeout_s=120)
        LocalKeyProvider.create(deployment.root / "other", key_file=deployment.root / "other.key")
        _write_providers(deployment, default="local", other=deployment.root / "other")
        service = _opened(deployment)
        cheap = _add_rows(service, app.tenant_id)
        traffic = _Traffic(deployment, app, digits)
        traffic.start()
        interrupted = 0
        for default, *command in commands:
            _write_providers(deployment, default=default, other=deployment.root / "other")
            interrupted += _kill(deployment, command, rng)
            _require_all_open(service, app.tenant_id, cheap)
            deployment.admin("key", *command)
            to = command[-1] if command[0] == "migrate" else None
            _require_finished(service, to=to)
            _require_all_open(service, app.tenant_id, cheap)
        assert interrupted, "no kill came in time"
        traffic.end()
        _destroy_old(service, left=to)
        _require_all_open(service, app.tenant_id, cheap)
        with deployment.client(app, max_retries=8) as client:
            assert len(client.models.get("m").predict(digits["scan"][:2])) == 2
        service.engine.dispose()
    finally:
        deployment.kill()


def _write_providers(deployment: Deployment, *, default: str, other: Path | None = None) -> None:
    """Whole or not at all: a running server reads it when it meets a provider that it does not know."""
    given = {} if other is None else {"other": {"kind": "local", "directory": str(other), "key_file": f"{other}.key"}}
    draft = deployment.root / "providers.new"
    draft.touch(0o600)
    draft.write_text(json.dumps({"format": "cloister.key-providers/1", "default": default, "providers": given}))
    draft.replace(deployment.root / "providers.json")


def _opened(deployment: Deployment) -> Service:
    given = {
        name.removeprefix("CLOISTER_").lower(): value
        for name, value in deployment.env.items()
        if name.startswith("CLOISTER_")
    }
    return deployments.open_service(Settings.model_validate(given))


def _add_rows(service: Service, tenant_id: str) -> dict[str, bytes]:
    """Data keys that seal nothing, and what each is."""
    made = {new_id("obj"): new_key() for _ in range(ROWS)}
    with reading(service.engine) as session:
        kek = vault.active_key(session, tenant_id)
    assert kek is not None
    rows = [
        {
            "tenant_id": tenant_id,
            "id": object_id,
            "kind": "part",
            "key_version": kek.version,
            "wrapped_key": service.keys.of(kek.provider).wrap(
                kek.key_id, secret, context=Context(tenant=tenant_id, kind="part", object=object_id)
            ),
        }
        for object_id, secret in made.items()
    ]
    with writing(service.engine) as session:
        session.execute(insert(SealedObject), rows)
    return made


def _kill(deployment: Deployment, command: list[str], rng: random.Random) -> bool:
    """Kill the command a moment after it has said some lines; whether it was still at work."""
    process = subprocess.Popen(
        [BIN / "cloister-admin", "key", *command],
        env=deployment.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    for _ in range(rng.randrange(LINES)):
        process.stderr.readline()
    time.sleep(rng.uniform(0, 0.03))
    process.kill()
    process.stderr.close()
    return process.wait() < 0


def _require_all_open(service: Service, tenant_id: str, cheap: dict[str, bytes]) -> None:
    with asked_reading(service) as session:
        rows = session.scalars(select(SealedObject).where(SealedObject.tenant_id == tenant_id)).all()
        opened = {row.id: vault.data_key(session, tenant_id=tenant_id, object_id=row.id).secret for row in rows}
        for purpose in PURPOSES:
            vault.signing_key(session, service.keys, purpose)
    assert {object_id: opened[object_id] for object_id in cheap} == cheap
    assert len(opened) > len(cheap)
    assert len(set(opened.values())) == len(opened), "one key for two streams"


def _require_finished(service: Service, *, to: str | None) -> None:
    """One version of each wraps everything, and nothing is left on its way."""
    with reading(service.engine) as session:
        listed = keys.listed(session)
    assert {each.state for each in listed} <= {"active", "decrypt-only"}, listed
    assert all(each.wraps == 0 for each in listed if each.state != "active"), listed
    active = [each for each in listed if each.state == "active"]
    assert len(active) == len({each.tenant for each in listed}) == 2
    assert to is None or {each.provider for each in active} == {to}


def _destroy_old(service: Service, *, left: str | None) -> None:
    """What is left in the keystores afterwards is what the database names, and no more."""
    with reading(service.engine) as session:
        old = [each for each in keys.listed(session) if each.state == "decrypt-only"]
        assert [each.name for each in tenants.tenants(session)] == ["acme"]
    for each in old:
        keys.destroy(service, each.tenant, version=each.version, request_id="kills")
    with reading(service.engine) as session:
        assert [each.provider for each in keys.listed(session) if each.state != "destroyed"] == [left, left]
    root = service.settings.key_dir.parent
    assert {name: len(list((root / name).glob("*.kek"))) for name in ("keystore", "other")} == {
        "keystore": 2 * (left == "local"),
        "other": 2 * (left == "other"),
    }


class _Traffic(threading.Thread):
    """A client that predicts and uploads all the time, and is never refused."""

    def __init__(self, deployment: Deployment, app: App, digits: dict[str, np.ndarray]) -> None:
        super().__init__(daemon=True)
        self._deployment, self._app, self._over = deployment, app, threading.Event()
        self._rows = {name: column[:20] for name, column in digits.items()}
        self._done, self._problem = 0, ""

    def run(self) -> None:
        try:
            with self._deployment.client(self._app, max_retries=8) as client:
                source, model = client.sources.get("digits-people"), client.models.get("m")
                while not self._over.is_set():
                    assert len(model.predict(self._rows["scan"])) == 20
                    name = f"d{self._done}"
                    client.datasets.upload(
                        name, self._rows, source=source, columns=COLUMNS, nominal_size=20, capacity=40
                    )
                    self._done += 1
        except Exception as problem:
            self._problem = repr(problem)

    def end(self) -> None:
        self._over.set()
        self.join()
        assert not self._problem, f"{self._problem}: {self._deployment.tail()}"
        assert self._done > 1, "hardly anything was served"
