"""SIGKILL at random instants of real jobs, and the ledger is looked at after every one: nothing runs, and nothing is released,
that is not charged; and what is charged is charged once.

`test_kills.py` counts what one job at a time cost in the end; here every row is recomputed by `ledgers.py` while the service heals.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine, select, text

import ledgers
from cloister.wire.jobs import FINAL
from cloister_server.store.session import new_engine, reading
from cloister_server.store.tables import Source
from databases import new_postgres_database
from e2e import test_kills as kills
from harness import Deployment

TARGETS = [*kills.MODULES, "child", "child", "worker"]
"""A child dies more often than the rest: it is the one that opens chunks."""


@pytest.mark.long
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_at_every_instant_of_fifty_kills_what_ran_and_what_was_released_is_charged_once(
    database: str, tmp_path: Path, digits: dict[str, np.ndarray], request: pytest.FixtureRequest
) -> None:
    deployment = Deployment(tmp_path / "d", chunk_steps=10)
    if database == "postgres":
        urls = new_postgres_database(request.getfixturevalue("postgres"))
        deployment.database_url, deployment.owner_database_url = urls.runtime, urls.owner
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 2**32)
    print(f"KILL_SEED={seed}")  # noqa: T201 (shown when the test fails: it replays the instants)
    rng = random.Random(seed)
    try:
        app = kills._begin(kills._traced(deployment))
        with looking_at(deployment) as engine:
            jobs = [kills._start_job(deployment, app, digits)]
            for _ in range(5 if os.environ.get("SHORT") else 50):
                time.sleep(rng.uniform(0, kills.LIFE_S))
                kills._kill(deployment, rng.choice(TARGETS))
                _look(deployment, engine)
                if _status(deployment, jobs[-1]) in FINAL:
                    jobs.append(kills._start_job(deployment, app, digits))
            kills._until(lambda: _status(deployment, jobs[-1]) in FINAL, "the last job never ended")
            found = _look(deployment, engine)
            assert all(found.jobs[job].settled is not None for job in jobs)
            done = [job for job in jobs if _status(deployment, job) == "done"]  # some may have died too often to go on
            assert _released(engine) == dict.fromkeys(done, kills.STEPS) != {}
            with reading(engine) as session:
                source = session.scalars(select(Source)).one()
            ledgers.check_every_revision(engine, source)
    finally:
        deployment.kill()


def _look(deployment: Deployment, engine: Engine) -> ledgers.Recomputed:
    """What holds at every instant. What ran is read before what is charged, and what was released before it is asked whether."""
    executed = len(kills._trace(deployment))
    released = _released(engine)
    with reading(engine) as session:
        source = session.scalars(select(Source)).one()
    found = ledgers.check(engine, source)  # no attempt's chunk twice, no chunk of a stale attempt or a settled job
    opened = sum(job.opened for job in found.jobs.values())
    assert executed <= opened, f"{executed} steps ran, {opened} were opened"
    assert all(job.charged >= job.opened for job in found.jobs.values())
    for job, steps in released.items():
        settled = found.jobs[job].settled
        assert settled is not None and settled >= steps, f"a model of {steps} steps is out, and {settled} are charged"
    return found


def _status(deployment: Deployment, job: str) -> object:
    return kills._query(deployment, "SELECT status FROM jobs WHERE id = :job", job=job)


def _released(engine: Engine) -> dict[str, int]:
    """Job -> its steps, for every version of a model that there is; none is of a job that another one is of."""
    statement = "SELECT v.job_id, j.steps FROM model_versions v JOIN jobs j ON j.id = v.job_id"
    with reading(engine) as session:
        rows = session.execute(text(statement)).all()
    assert len({job for job, _ in rows}) == len(rows)
    return dict(map(tuple, rows))


@contextmanager
def looking_at(deployment: Deployment) -> Iterator[Engine]:
    """An engine whose every transaction sees one instant."""
    engine = new_engine(deployment.database_url or f"sqlite:///{deployment.data_dir}/cloister.db")
    is_sqlite = engine.dialect.name == "sqlite"  # whose every transaction does so anyway
    try:
        yield engine if is_sqlite else engine.execution_options(isolation_level="REPEATABLE READ")
    finally:
        engine.dispose()
