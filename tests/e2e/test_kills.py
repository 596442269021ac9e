"""SIGKILL at random instants: nothing runs uncharged, nothing trains twice at once, nothing is published twice.

What the children executed is written down by a tracer planted from outside (tracing/sitecustomize.py); what was charged
is read from the ledger itself.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text

import cloister
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import new_engine, reading
from cloister_server.work.template import CHILD
from databases import new_postgres_database
from harness import App, Deployment
from journeys import upload

MODULES = {
    "supervisor": "cloister-server",
    "api": "cloister_server.cli.api_process",
    "worker": "cloister_server.work.worker",
    "template": "cloister_server.work.template",
    "child": CHILD,
}
STEPS = 120
LIFE_S = 5.0
"""About how long a job takes here, its child's start included: instants are drawn from it."""


def test_kills_and_a_clean_stop_neither_undercount_nor_double(tmp_path: Path, digits: dict[str, np.ndarray]) -> None:
    _kill_at_random_instants([["supervisor", "child"]], Deployment(tmp_path / "d"), digits)


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "http_server"),
    [*((target, "granian") for target in MODULES), ("supervisor", "uvicorn"), ("api", "uvicorn")],
)
def test_twenty_kills_neither_undercount_nor_double(
    target: str, http_server: str, tmp_path: Path, digits: dict[str, np.ndarray]
) -> None:
    instants = 2 if os.environ.get("SHORT") else 20
    _kill_at_random_instants([[target]] * instants, Deployment(tmp_path / "d", http_server=http_server), digits)


@pytest.mark.long
def test_kills_on_postgresql(tmp_path: Path, digits: dict[str, np.ndarray], postgres: str) -> None:
    urls = new_postgres_database(postgres)
    deployment = Deployment(tmp_path / "d", database_url=urls.runtime, owner_database_url=urls.owner)
    instants = 1 if os.environ.get("SHORT") else 20
    _kill_at_random_instants([[target] for target in MODULES] * instants, deployment, digits)


def _kill_at_random_instants(jobs: list[list[str]], deployment: Deployment, digits: dict[str, np.ndarray]) -> None:
    """For each job its targets, each killed at a random instant of the job's life, one after the other."""
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 2**32)
    print(f"KILL_SEED={seed}")  # noqa: T201 (shown when the test fails: it replays the instants)
    rng = random.Random(seed)
    _traced(deployment)
    watch = _Watch(deployment)
    try:
        app = _begin(deployment)
        watch.start()
        before = 0
        for targets in jobs:
            job = _start_job(deployment, app, digits)
            for target in rng.sample(targets, len(targets)):
                if target == "child" and len(targets) == 1:
                    _until(lambda: bool(deployment.pids(MODULES["child"])), "no child was started")
                time.sleep(rng.uniform(0, LIFE_S))
                _kill(deployment, target)
            _finish(deployment, app, job)
            executed = len(_trace(deployment))
            _check(deployment, job, executed=executed - before)
            before = executed
        _stop_in_time(deployment, app, digits, before)
        assert watch.most_children <= 1, "two children lived at once"
        assert watch.most_listeners <= 1, "two processes served the port at once"
    finally:
        watch.stop()
        deployment.kill()


def _stop_in_time(deployment: Deployment, app: App, digits: dict[str, np.ndarray], before: int) -> None:
    """SIGTERM amid a job: everything ends, what was opened stays charged, and the job goes on afterwards."""
    job = _start_job(deployment, app, digits)
    _until(lambda: len(_trace(deployment)) > before + 30, "the job never got going")
    deployment.stop()
    assert not [pid for module in MODULES.values() for pid in deployment.pids(module)]
    assert len(_trace(deployment)) - before <= _charged(deployment, job)
    deployment.start()
    _finish(deployment, app, job)
    assert len(_trace(deployment)) - before == _charged(deployment, job) == STEPS, "a clean stop wastes no step"


def _kill(deployment: Deployment, target: str) -> None:
    if target == "supervisor":
        assert deployment.process is not None
        deployment.process.kill()
        deployment.process.wait()
        deployment.start()
        return
    for pid in deployment.pids(MODULES[target]):
        os.kill(pid, signal.SIGKILL)
    deployment.wait_ready()


def _check(deployment: Deployment, job: str, *, executed: int) -> None:
    """The claims about one finished job."""
    charged = _charged(deployment, job)
    assert STEPS <= executed <= charged, f"{executed} steps ran, {charged} are charged"
    pids = [pid for pid, _ in itertools.groupby(pid for pid, _ in _trace(deployment))]
    assert len(pids) == len(set(pids)), "steps of two children are interleaved"
    versions = _query(deployment, "SELECT count(*) FROM model_versions WHERE job_id = :job", job=job)
    assert versions == 1, f"{versions} versions were published"


def _traced(deployment: Deployment) -> Deployment:
    deployment.extra_env = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "tracing"), *sys.path]),
        "STEP_TRACE": str(deployment.root / "steps"),
        "STEP_SLEEP_S": "0.01",
    }
    return deployment


def _begin(deployment: Deployment) -> App:
    deployment.init()
    app = deployment.app(deployment.tenant("acme"), "steward")
    deployment.start()
    return app


def _start_job(deployment: Deployment, app: App, digits: dict[str, np.ndarray]) -> str:
    with deployment.client(app, max_retries=8) as client:
        try:
            data = client.datasets.get("digits")
        except cloister.NotFound:
            data = upload(client, digits, epsilon=900.0)
        privacy = cloister.DP(noise_multiplier=2.0)
        plan = client.plan(data, target="digit", privacy=privacy, batch_size=100, epochs=STEPS / 10)
        assert plan.training.steps == STEPS
        return client.train(plan, model="m").id


def _finish(deployment: Deployment, app: App, job: str) -> None:
    with deployment.client(app, max_retries=8) as client:
        client.jobs.get(job).wait(timeout_s=300)


def _charged(deployment: Deployment, job: str) -> int:
    settled = _query(deployment, "SELECT steps FROM ledger WHERE kind = 'settle' AND job_id = :job", job=job)
    if settled is not None:
        return int(settled)
    return int(_query(deployment, "SELECT sum(steps) FROM ledger WHERE kind = 'chunk' AND job_id = :job", job=job) or 0)


def _query(deployment: Deployment, statement: str, **values: object) -> object:
    url = deployment.database_url or f"sqlite:///{deployment.data_dir}/cloister.db"
    engine = new_engine(url)
    try:
        with reading(engine, ALL_TENANTS) as session:
            return session.scalar(text(statement), values)
    finally:
        engine.dispose()


def _trace(deployment: Deployment) -> list[tuple[int, float]]:
    path = deployment.root / "steps"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(pid), float(at)) for pid, at in (line.split() for line in lines)]


def _until(claim: Callable[[], bool], complaint: str, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


class _Watch(threading.Thread):
    """Looks all the time: how many children live at once, how many processes listen on the port."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(daemon=True)
        self._deployment, self._over = deployment, threading.Event()
        self.most_children = self.most_listeners = 0

    def run(self) -> None:
        while not self._over.wait(0.05):
            self.most_children = max(self.most_children, len(self._deployment.pids(MODULES["child"])))
            self.most_listeners = max(self.most_listeners, self._listeners())

    def stop(self) -> None:
        self._over.set()
        if self.is_alive():
            self.join()

    def _listeners(self) -> int:
        """Listening sockets on the port, by the kernel's own table (proc(5), /proc/net/tcp: state 0A is LISTEN)."""
        port = f":{self._deployment.port:04X}"
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return len({row[9] for row in rows if row[1].endswith(port) and row[3] == "0A"})
