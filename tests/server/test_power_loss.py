"""The power goes at any instant: whatever was answered is on the disk, the ledger is whole, and no anchor is ahead of it.

A real process works on a real SQLite database, with `fsync_shim.c` loaded into it, and is killed. What then lies on the disk is
made from what was synced alone, or from that and any 512-byte sectors of what was not. Run as a script, this file is that process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, event, text

import ledgers
from cloister_privacy.accounting import Filter, rdp_per_step
from cloister_server import ledger
from cloister_server.settings import Settings
from cloister_server.store import chain, migrate
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.anchors import Anchors
from cloister_server.store.session import new_engine, reading, writing
from cloister_server.store.tables import Job, Link, Source

SECTOR = 512
EVENT = ledgers.EVENT.model_copy(update={"steps": 40})


def open_engine(root: Path, *, synchronous: str = "FULL") -> Engine:
    """The product's own engine, anchors and all, that checkpoints often: each checkpoint writes in the database itself."""
    engine = new_engine(f"sqlite:///{root}/cloister.db", anchors=Anchors(root / "anchors"))

    def set_pragmas(connection: Any, _: object) -> None:
        connection.execute("PRAGMA wal_autocheckpoint=60")
        connection.execute(f"PRAGMA synchronous={synchronous}")

    event.listen(engine, "connect", set_pragmas)
    return engine


@dataclass(frozen=True)
class Announced:
    """A commit that was answered: the ledger's revision, and the newest link of the chain."""

    revision: int
    count: int
    digest: str


class Worker:
    """The process with the shim in it, which forks one that works for each power cut."""

    def __init__(self, root: Path, shim: Path) -> None:
        self.root, self.mirror = root / "disk", root / "synced"
        self.root.mkdir()
        self.mirror.mkdir()
        more = {"LD_PRELOAD": str(shim), "SYNCED_ROOT": str(self.root), "SYNCED_MIRROR": str(self.mirror)}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **more,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
            },
        )

    def work_until_the_power_goes(
        self, place: Path, source: Source, rng: random.Random, *, synchronous: str = "FULL"
    ) -> list[Announced]:
        """Everything that was answered before the process was killed, which was amid something."""
        assert self.process.stdin is not None and self.process.stdout is not None
        asked = [str(place), source.tenant_id, source.id, synchronous, rng.randrange(2**32)]
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        pid, announced = int(self.process.stdout.readline()), []
        goes_after = rng.randrange(1, 40)
        for line in self.process.stdout:
            if line == "over\n":
                break
            announced.append(Announced(**json.loads(line)))
            if len(announced) == goes_after:
                time.sleep(rng.uniform(0, 0.03))  # about as long as two commits take
                os.kill(pid, signal.SIGKILL)
        return announced

    def restore(self, place: Path, to: Path, rng: random.Random | None = None) -> None:
        """What the power cut left of a directory and those in it; with `rng`, also any sectors that were never synced."""
        live = {each.stat().st_ino: each.read_bytes() for each in place.rglob("*") if each.is_file()}
        for listing in self.mirror.glob("dir-*"):
            directory = self.root / listing.name.removeprefix("dir-").replace("%", "/")
            if not directory.is_relative_to(place):
                continue
            restored = to / directory.relative_to(place)
            restored.mkdir(parents=True, exist_ok=True)
            for line in listing.read_text().splitlines():
                inode, _, name = line.partition(" ")
                kept = self.mirror / f"inode-{inode}"
                content = kept.read_bytes() if kept.exists() else b""
                if rng is not None:
                    content = torn(content, live.get(int(inode), content), rng)
                (restored / name).write_bytes(content)

    def close(self) -> None:
        self.process.communicate()


def torn(synced: bytes, written: bytes, rng: random.Random) -> bytes:
    """Of each sector what was synced or what was written since, in either length."""
    size = rng.choice([len(synced), len(written)])
    both = [each[:size].ljust(size, b"\0") for each in (synced, written)]
    return b"".join(rng.choice(both)[at : at + SECTOR] for at in range(0, size, SECTOR))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("calls of fsync are watched by a C library for Linux, and there is no compiler for it here")
    root = tmp_path_factory.mktemp("power").resolve()
    shim = root / "fsync_shim.so"
    source = Path(__file__).with_name("fsync_shim.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    worker = Worker(root, shim)
    yield worker
    worker.close()


def new_place(worker: Worker, name: str) -> tuple[Path, Source]:
    """A directory with a database, its anchors and a source."""
    place = worker.root / name
    (place / "anchors").mkdir(parents=True)
    migrate.upgrade(Settings(data_dir=place, database_url=SecretStr(f"sqlite:///{place}/cloister.db")))
    engine = open_engine(place)
    source = ledgers.new_source(engine, epsilon=60.0)
    engine.dispose()
    return place, source


def cut_the_power(worker: Worker, place: Path, tmp_path: Path, source: Source, *, cuts: int) -> None:
    """Again and again, each time going on from what the last cut left."""
    seed = int(os.environ.get("POWER_SEED") or random.SystemRandom().randrange(2**32))
    print(f"POWER_SEED={seed}")  # noqa: T201 (shown when the test fails: it replays what is torn)
    rng = random.Random(seed)
    for cut in range(cuts):
        announced = worker.work_until_the_power_goes(place, source, rng)
        left = {"synced": tmp_path / f"synced-{cut}", "torn": tmp_path / f"torn-{cut}"}
        worker.restore(place, left["synced"])
        worker.restore(place, left["torn"], rng)
        goes_on = tmp_path / f"goes-on-{cut}"
        shutil.copytree(left[rng.choice(["synced", "torn"])], goes_on)
        for each in left.values():
            _check(each, source, announced)
            shutil.rmtree(each)
        shutil.rmtree(place)
        shutil.move(goes_on, place)


def _check(place: Path, source: Source, announced: list[Announced]) -> None:
    engine, newest = open_engine(place), announced[-1]
    anchors = Anchors(place / "anchors")
    with reading(engine, ALL_TENANTS) as session:
        assert session.scalar(text("PRAGMA integrity_check")) == "ok"
        for each in announced:
            link = session.get(Link, (source.tenant_id, each.count))
            assert link is not None and link.digest.hex() == each.digest, (
                f"revision {each.revision} was answered, and is lost"
            )
        chain.require_anchored(session, anchors, source.tenant_id)
    found = ledgers.check(engine, source)
    ledgers.check_every_revision(engine, source)
    assert found.revision - newest.revision in (0, 1, 2), (
        "at most the one transaction that was not answered is there beside"
    )
    anchor = anchors.of(source.tenant_id)
    assert anchor is not None and anchor.count >= newest.count, "an answered commit is anchored"
    with writing(engine, ALL_TENANTS) as session:  # and it can go on
        ledgers.reserve(session, source, EVENT)
    engine.dispose()


def test_what_was_answered_before_the_power_went_is_on_the_disk(worker: Worker, tmp_path: Path) -> None:
    place, source = new_place(worker, "a")
    cut_the_power(worker, place, tmp_path, source, cuts=10)


@pytest.mark.long
def test_a_hundred_power_cuts_lose_nothing_that_was_answered(worker: Worker, tmp_path: Path) -> None:
    place, source = new_place(worker, "b")
    cut_the_power(worker, place, tmp_path, source, cuts=10 if os.environ.get("SHORT") else 100)


def test_without_synchronous_full_a_power_cut_loses_what_was_answered(worker: Worker, tmp_path: Path) -> None:
    """What the tests above would see, and why a start without it is refused."""
    place, source = new_place(worker, "c")
    announced = worker.work_until_the_power_goes(place, source, random.Random(0), synchronous="NORMAL")
    worker.restore(place, tmp_path / "left")
    with pytest.raises(AssertionError, match="was answered, and is lost"):
        _check(tmp_path / "left", source, announced)


def _serve() -> None:
    """Fork a worker for each line of stdin, and say when it is dead."""
    Filter.frozen_by(  # loads what is slow to load, once for all workers
        lambda orders: rdp_per_step(EVENT.sampling_rate, EVENT.noise_multiplier, orders=orders),
        steps=EVENT.steps,
        epsilon=60.0,
        delta=ledgers.DELTA,
    )
    for line in sys.stdin:
        place, tenant_id, source_id, synchronous, seed = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _work(Path(place), tenant_id, source_id, synchronous, random.Random(seed))
        print(pid, flush=True)  # noqa: T201 (a pipe)
        os.waitpid(pid, 0)
        print("over", flush=True)  # noqa: T201 (a pipe)


def _work(place: Path, tenant_id: str, source_id: str, synchronous: str, rng: random.Random) -> None:
    for directory in (place, place / "anchors"):  # what was there before the power went is on the disk
        for path in (*directory.iterdir(), directory):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    engine = open_engine(place, synchronous=synchronous)
    with reading(engine, ALL_TENANTS) as session:
        source = session.get_one(Source, (tenant_id, source_id))
    jobs: dict[str, int] = {}
    while True:
        job = rng.choice([*jobs, ""])
        with writing(engine, ALL_TENANTS) as session:
            if not job:
                jobs[ledgers.reserve(session, source, EVENT)] = 0
            elif jobs[job] < EVENT.steps:
                attempt = session.get_one(Job, (tenant_id, job)).attempt
                ledgers.open_chunk(session, source, job, jobs[job], 10, attempt=attempt)
                jobs[job] += 10
            else:
                ledgers.settle(session, source, job)
                del jobs[job]
        with reading(engine, ALL_TENANTS) as session:
            head = chain.head(session, tenant_id)
            revision = ledger.newest(session, source)
        told = {"revision": revision, "count": head.count, "digest": head.digest.hex()}
        os.write(1, (json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    _serve()
