"""SIGKILL while rows are uploaded and models published: what was promised opens, nothing is left over, no key sealed twice."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select

import cloister
from asked import asked_reading
from cloister.wire.rows import open_form
from cloister_server import datasets, vault
from cloister_server import deployment as deployments
from cloister_server.settings import Settings
from cloister_server.store.tables import Dataset, Job, ModelVersion, SealedObject
from cloister_server.work.template import CHILD
from databases import new_postgres_database
from harness import App, Deployment

COLUMNS = {
    "x": cloister.Tensor(shape=(4096,), low=0, high=1),
    "y": cloister.Category(values=("no", "yes")),
}
"""16 KiB a row: 255 rows a part."""
ROWS = 1500
API, WORKER = "cloister_server.cli.api_process", "cloister_server.work.worker"


@pytest.mark.long
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_killed_uploads_and_publications_leave_nothing_behind(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    deployment = Deployment(tmp_path / "d")
    if database == "postgres":
        urls = new_postgres_database(request.getfixturevalue("postgres"))
        deployment = Deployment(tmp_path / "d", database_url=urls.runtime, owner_database_url=urls.owner)
    _kill_and_look(deployment, rounds=2 if os.environ.get("SHORT") else 20)


def _kill_and_look(deployment: Deployment, *, rounds: int) -> None:
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 2**32)
    print(f"KILL_SEED={seed}")  # noqa: T201 (shown when the test fails: it replays the instants)
    chance = random.Random(seed)
    deployment.init()
    app = deployment.app(deployment.tenant("acme"), "steward")
    watch = _Watch(deployment.data_dir / "objects" / app.tenant_id)
    try:
        deployment.start()
        watch.start()
        rows = {
            "x": np.random.default_rng(seed).random((ROWS, 4096), dtype=np.float32),
            "y": (np.arange(ROWS) % 2).astype(np.int32),
        }
        with deployment.client(app, timeout_s=20.0) as client:
            source = client.sources.create("people", epsilon=500, delta=1e-6)
            for number in range(rounds):
                _upload_with_a_kill(deployment, client, f"d{number}", rows, source=source, chance=chance)
            for number in range(rounds):
                _train_with_a_kill(deployment, client, f"m{number}", chance=chance)
        deployment.admin("storage", "collect")
        watch.stop()
        _look(deployment, app, rows, rounds=rounds, seen=watch.seen)
        assert not watch.changed, "a sealed object was written twice"
    finally:
        watch.stop()
        deployment.kill()


def _upload_with_a_kill(
    deployment: Deployment,
    client: cloister.Cloister,
    name: str,
    rows: dict[str, np.ndarray],
    *,
    source: cloister.Source,
    chance: random.Random,
) -> None:
    """Upload; one process dies somewhere in between; the upload is taken up again until it is done."""
    done = threading.Event()

    def upload() -> None:
        for _ in range(20):
            try:
                client.datasets.upload(name, rows, source=source, columns=COLUMNS, nominal_size=1000, capacity=2000)
            except cloister.CloisterError:
                if any(each.name == name and each.status == "ready" for each in _listed(client)):
                    break  # it was completed, and the answer died with the server
                time.sleep(0.2)
            else:
                break
        done.set()

    uploading = threading.Thread(target=upload)
    uploading.start()
    time.sleep(chance.uniform(0, 1.5))
    _kill(deployment, chance.choice(["supervisor", API]))
    uploading.join(120)
    assert done.is_set()
    assert any(each.name == name and each.status == "ready" for each in _listed(client))


def _listed(client: cloister.Cloister) -> list[cloister.Dataset]:
    try:
        return list(client.datasets.list())
    except cloister.CloisterError:
        return []


def _train_with_a_kill(deployment: Deployment, client: cloister.Cloister, name: str, *, chance: random.Random) -> None:
    """Train a little; the worker or its child dies about when weights are written and the version is published."""
    plan = client.plan(client.datasets.get("d0"), target="y", privacy=cloister.DP(epsilon=12), epochs=1, batch_size=250)
    job = client.train(plan, model=name)
    deadline = time.monotonic() + 60
    while job.refresh().status == "queued" and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(chance.uniform(0, 4))
    _kill(deployment, chance.choice(["supervisor", WORKER, CHILD]))
    model = job.wait(timeout_s=120)
    assert model.version == 1


def _kill(deployment: Deployment, target: str) -> None:
    if target == "supervisor":
        assert deployment.process is not None
        deployment.process.kill()
        deployment.process.wait()
        deployment.start()
        return
    for pid in deployment.pids(target):
        os.kill(pid, signal.SIGKILL)
    deployment.wait_ready()


def _look(deployment: Deployment, app: App, rows: dict[str, np.ndarray], *, rounds: int, seen: dict[str, str]) -> None:
    """Everything that a row names opens to what was given; nothing else is stored; every data key is another."""
    given = {
        name.removeprefix("CLOISTER_").lower(): value for name, value in deployment.env.items() if "CLOISTER_" in name
    }
    service = deployments.open_service(Settings.model_validate(given))
    tenant_id = app.tenant_id
    with asked_reading(service) as session:

        def opened(object_id: str) -> bytes:
            return vault.open_object(session, service.blobs, tenant_id=tenant_id, object_id=object_id)

        named: set[str] = set()
        complete = session.scalars(select(Dataset).where(Dataset.tenant_id == tenant_id)).all()
        assert len(complete) == rounds
        for dataset in complete:
            parts = datasets.part_objects(session, service, dataset)
            found = [open_form(datasets.schema_of(dataset), opened(part)) for part in parts]
            for column, array in rows.items():
                assert np.array_equal(np.concatenate([part[column] for part in found]), array)
            named |= {*parts, str(dataset.manifest_id)}
        for job in session.scalars(select(Job).where(Job.tenant_id == tenant_id)):
            opened(job.spec_id)
            named.add(job.spec_id)
        versions = session.scalars(select(ModelVersion).where(ModelVersion.tenant_id == tenant_id)).all()
        assert len(versions) == rounds
        for version in versions:
            opened(version.weights_id)
            named.add(version.weights_id)
        keys = session.scalars(select(SealedObject.id).where(SealedObject.tenant_id == tenant_id)).all()
        secrets = {vault.data_key(session, tenant_id=tenant_id, object_id=each).secret for each in keys}
    stored = {path.name for path in (deployment.data_dir / "objects" / tenant_id).iterdir()}
    assert stored == named == set(keys)
    assert len(secrets) == len(keys), "two objects have one data key"
    assert named <= seen.keys()
    service.engine.dispose()


class _Watch(threading.Thread):
    """Every sealed object that ever lay in the store, by its digest: one that changes was sealed twice under its key."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, str] = {}
        self.changed: list[str] = []
        self._directory, self._stopping = directory, threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(0.05):
            for path in list(self._directory.iterdir()) if self._directory.is_dir() else []:
                if path.name.partition("#")[1] or path.name in self.seen:
                    continue  # on its way into the store; or seen, and looked at again in the end
                self._digest(path)

    def stop(self) -> None:
        self._stopping.set()
        self.join(10)
        for path in list(self._directory.iterdir()) if self._directory.is_dir() else []:
            self._digest(path)

    def _digest(self, path: Path) -> None:
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            return
        if self.seen.setdefault(path.name, digest) != digest:
            self.changed.append(path.name)
