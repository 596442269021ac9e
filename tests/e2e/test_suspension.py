"""A tenant is suspended while a real job of it runs: that stops at a chunk boundary, waits, and goes on from there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

import cloister
from cloister_server.store.session import new_engine, reading
from cloister_server.store.tables import Attempt, Job, LedgerEntry
from harness import Deployment
from journeys import upload


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (it := found()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
    return it


@pytest.mark.long
def test_a_running_job_stops_at_a_chunk_boundary_and_goes_on_from_there_without_a_step_twice(
    tmp_path: Path, digits: dict[str, np.ndarray]
) -> None:
    deployment = Deployment(tmp_path / "d")
    deployment.extra_env = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "tracing"), os.environ.get("PYTHONPATH", "")]),
        "STEP_TRACE": str(tmp_path / "steps"),
        "STEP_SLEEP_S": "0.3",  # the job outlives a command that is slow to start
    }
    deployment.init().start()
    engine = new_engine(f"sqlite:///{deployment.data_dir}/cloister.db")
    app, other = (deployment.app(deployment.tenant(name), "app") for name in ("acme", "other"))

    def asked(statement: Any) -> list[Any]:
        with reading(engine) as session:
            return list(session.scalars(statement))

    def train(client: cloister.Cloister) -> cloister.Job:
        privacy = cloister.DP(noise_multiplier=2.0)
        plan = client.plan(upload(client, digits), target="digit", privacy=privacy, batch_size=100, epochs=10)
        return client.train(plan, model="m")

    try:
        with deployment.client(app) as client, deployment.client(other) as neighbour:
            job = train(client)
            until(lambda: asked(select(Job.id).where(Job.id == job.id, Job.steps_done > 0)))
            assert deployment.admin("tenant", "suspend", "acme")["jobs_not_over"] == 1
            of_job = select(Attempt.outcome).where(Attempt.job_id == job.id)
            assert until(lambda: [each for each in asked(of_job) if each]) == ["paused"]
            (done,) = asked(select(Job.steps_done).where(Job.id == job.id))
            assert 0 < done < 100
            train(neighbour).wait(timeout_s=120)  # nobody else waits for it
            assert asked(of_job) == ["paused"], "no other attempt began"
            deployment.admin("tenant", "resume", "acme")
            until(lambda: asked(select(Job.id).where(Job.id == job.id, Job.status == "done")))
            chunks = select(LedgerEntry.steps).where(LedgerEntry.job_id == job.id, LedgerEntry.kind == "chunk")
            assert sum(asked(chunks)) == 100, "no step ran twice, so none is charged twice"
    finally:
        engine.dispose()
        deployment.kill()
