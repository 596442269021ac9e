"""What is left over is deleted by one collection, and nothing that is published, or may still be, ever is."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from asked import asked_reading, asked_writing
from cloister_server import collection, vault
from cloister_server.collection import Collected, collect
from cloister_server.errors import StartRefused
from cloister_server.processes import locked
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import (
    Attempt,
    Dataset,
    Job,
    Model,
    ModelVersion,
    SealedObject,
    Source,
    Tenant,
    new_id,
)
from cloister_server.vault import DataKey
from cloister_server.work import worker

NOTHING = Collected(0, 0, 0)


@pytest.fixture
def tenant_id(make_client: Callable[..., Any]) -> str:
    return str(make_client().tenant_id)


def stored(service: Service) -> set[str]:
    return {each.name for page in service.blobs.pages() for each in page}


def kept(service: Service, tenant_id: str) -> set[str]:
    with reading(service.engine) as session:
        return set(session.scalars(select(SealedObject.id).where(SealedObject.tenant_id == tenant_id)))


def seal(service: Service, tenant_id: str, content: bytes = b"content") -> str:
    return service.write(
        ALL_TENANTS,
        lambda session: vault.seal_object(session, service.blobs, content, tenant_id=tenant_id, kind="initial"),
    )


class _Undone(Exception):
    pass


def seal_in_vain(service: Service, tenant_id: str, before: Callable[[], None] = lambda: None) -> str:
    """The blob is stored, and the transaction that would have kept its key is rolled back, as of a process that died."""
    object_id = ""
    with suppress(_Undone), asked_writing(service) as session:
        object_id = vault.seal_object(session, service.blobs, b"x" * 50, tenant_id=tenant_id, kind="spec")
        before()
        raise _Undone
    return object_id


def test_a_blob_whose_key_was_never_kept_goes_and_all_others_stay(service: Service, tenant_id: str) -> None:
    named = seal(service, tenant_id)
    lost = seal_in_vain(service, tenant_id)
    directory = service.settings.data_dir / "objects" / tenant_id
    for name in (f"{new_id('obj')}#1", f"{lost}#2"):
        (directory / name).write_bytes(b"half")  # what a killed write leaves
    (directory / "notes.txt").write_text("the operator's own")
    before = stored(service)
    size = sum(each.size for page in service.blobs.pages() for each in page if each.object_id != named)
    odd = (f"{tenant_id}/notes.txt",)
    assert collect(service, dry_run=True) == Collected(3, 0, size, odd)
    assert stored(service) == before
    assert collect(service) == Collected(3, 0, size, odd)
    assert stored(service) == {named} and (directory / "notes.txt").exists()
    assert collect(service) == Collected(0, 0, 0, odd)
    with asked_reading(service) as session:
        assert vault.open_object(session, service.blobs, tenant_id=tenant_id, object_id=named) == b"content"
        assert session.scalars(select(SealedObject).where(SealedObject.kind == "collected")).all() == []


def test_an_object_that_was_forgotten_by_a_process_that_died_goes(service: Service, tenant_id: str) -> None:
    forgotten = seal(service, tenant_id)
    with writing(service.engine) as session:
        session.execute(delete(SealedObject).where(SealedObject.id == forgotten))
    assert collect(service).blobs == 1
    assert stored(service) == set()


def test_many_left_over_blobs_go_in_pages(service: Service, tenant_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister_server.store.blobs._AT_ONCE", 3)
    named = {seal(service, tenant_id) for _ in range(4)}
    for _ in range(9):
        seal_in_vain(service, tenant_id)
    assert collect(service).blobs == 9
    assert stored(service) == named


def test_a_shredded_tenants_blobs_go_and_a_strangers_stay(service: Service, tenant_id: str) -> None:
    mine = seal(service, tenant_id)
    objects = service.settings.data_dir / "objects"
    stranger = f"tn_{secrets.token_hex(16)}"
    shutil.copytree(objects / tenant_id, objects / stranger)  # another deployment's, on the same store
    with writing(service.engine) as session:
        session.execute(delete(SealedObject).where(SealedObject.tenant_id == tenant_id))
        session.execute(update(Tenant).where(Tenant.id == tenant_id).values(status="shredded"))
    assert collect(service).blobs == 1
    assert [path.name for path in objects.rglob("obj_*")] == [mine]
    assert (objects / stranger / mine).exists()


def test_of_a_tenant_behind_its_anchor_nothing_goes(
    service: Service, tenant_id: str, make_client: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old database was restored: of what it does not know a newer one may."""
    other = make_client("other").tenant_id
    lost, lost_of_other = seal_in_vain(service, tenant_id), seal_in_vain(service, other)
    anchor = service.settings.anchor_dir / next(
        path.name for path in service.settings.anchor_dir.iterdir() if tenant_id in path.name
    )
    whole = anchor.read_bytes()
    anchor.unlink()
    assert collect(service).blobs == 1
    assert stored(service) == {lost} and lost != lost_of_other
    anchor.write_bytes(whole)
    assert collect(service).blobs == 1


class Work:
    """Jobs and attempts as the worker and its child write them, without the training."""

    def __init__(self, service: Service, tenant_id: str) -> None:
        self.service, self.tenant_id = service, tenant_id
        with writing(service.engine) as session:
            session.add(
                Source(
                    tenant_id=tenant_id, id="src_x", name="people", unit="row", adjacency="add_remove", epsilon=3.0,
                    delta=1e-6, public=False, owner_id="ap_x",
                )
            )  # fmt: skip
            session.flush()
            session.add(Model(tenant_id=tenant_id, id="mdl_x", name="m", champion=0))
            session.add(
                Dataset(
                    tenant_id=tenant_id, id="ds_x", source_id="src_x", name="d", columns={}, nominal_size=10, capacity=10,
                    capacity_rows=10, part_rows=10, parts=1, status="ready",
                )
            )  # fmt: skip

    def job(self, kind: str = "train") -> str:
        job_id = new_id("job")
        with asked_writing(self.service) as session:
            spec_id = vault.seal_object(session, self.service.blobs, b"{}", tenant_id=self.tenant_id, kind="spec")
            session.add(
                Job(
                    tenant_id=self.tenant_id, id=job_id, kind=kind, source_id="src_x", dataset_id="ds_x", model_id="mdl_x",
                    principal_id="ap_x", request_id="r", spec_id=spec_id, status="queued", steps=10, epsilon=1.0, delta=1e-6,
                )
            )  # fmt: skip
        return job_id

    def begin(self, job_id: str, *kinds: vault.Kind) -> list[DataKey]:
        """An attempt, and its keys."""
        with asked_writing(self.service) as session:
            job = session.get_one(Job, (self.tenant_id, job_id), with_for_update=True)
            job.attempt, job.status = job.attempt + 1, "running"
            session.add(Attempt(tenant_id=self.tenant_id, job_id=job_id, number=job.attempt, from_step=0))
            return [vault.new_data_key(session, tenant_id=self.tenant_id, kind=kind, job=job) for kind in kinds]

    def put(self, key: DataKey) -> None:
        self.service.blobs.put(self.tenant_id, key.object_id, b"sealed")

    def change(self, job_id: str, **values: Any) -> None:
        with writing(self.service.engine) as session:
            job = session.get_one(Job, (self.tenant_id, job_id), with_for_update=True)
            for name, value in values.items():
                setattr(job, name, value)

    def left(self, job_id: str, outcome: str, result: dict[str, Any]) -> None:
        with writing(self.service.engine) as session:
            number = session.get_one(Job, (self.tenant_id, job_id)).attempt
            row = session.get_one(Attempt, (self.tenant_id, job_id, number))
            row.outcome, row.result = outcome, result

    def publish(self, job_id: str, key: DataKey, *, version: int = 1) -> None:
        with writing(self.service.engine) as session:
            session.get_one(Job, (self.tenant_id, job_id), with_for_update=True).status = "done"
            session.add(
                ModelVersion(
                    tenant_id=self.tenant_id, model_id="mdl_x", version=version, job_id=job_id, weights_id=key.object_id,
                    certificate={},
                )
            )  # fmt: skip


@pytest.fixture
def work(service: Service, tenant_id: str) -> Work:
    return Work(service, tenant_id)


def test_the_keys_of_a_live_attempt_stay_and_those_of_dead_ones_go(
    service: Service, tenant_id: str, work: Work
) -> None:
    job = work.job()
    first = work.begin(job, "checkpoint", "checkpoint", "checkpoint", "weights")
    for key in first[:2]:
        work.put(key)
    work.change(job, checkpoint_id=first[1].object_id)
    before = kept(service, tenant_id)
    assert collect(service) == NOTHING, "its attempt is the newest: the child may be about to use any of them"
    assert kept(service, tenant_id) == before
    second = work.begin(job, "checkpoint", "weights")
    assert collect(service) == Collected(blobs=1, keys=3, bytes=6)
    named = {first[1].object_id, second[0].object_id, second[1].object_id}
    assert named <= kept(service, tenant_id) and first[0].object_id not in stored(service)
    work.put(second[1])
    work.left(job, "trained", {"weights_id": second[1].object_id})
    assert collect(service) == NOTHING, "they are about to be published"
    work.publish(job, second[1])
    assert collect(service) == Collected(blobs=1, keys=2, bytes=6), "nobody resumes a job that is over"
    assert second[1].object_id in kept(service, tenant_id) & stored(service)
    assert collect(service) == NOTHING


def test_a_querys_answer_stays_and_the_keys_of_a_failed_one_go(service: Service, tenant_id: str, work: Work) -> None:
    job, failed = work.job("query"), work.job("query")
    (answer,), (unused,) = work.begin(job, "answer"), work.begin(failed, "answer")
    work.put(answer)
    work.put(unused)
    work.left(job, "answered", {"answer_id": answer.object_id})
    work.change(job, status="done", result_id=answer.object_id)
    work.change(failed, status="failed")
    assert collect(service) == Collected(blobs=1, keys=1, bytes=6)
    assert answer.object_id in kept(service, tenant_id) & stored(service)


def test_keys_from_before_they_named_their_job_stay_while_the_tenant_has_one_under_way(
    service: Service, tenant_id: str, work: Work
) -> None:
    job, old = work.job(), work.job()
    fresh, used, lost = work.begin(job, "weights")[0], *work.begin(old, "weights", "weights")
    for key in (used, lost):
        work.put(key)
    work.publish(old, used)
    with writing(service.engine) as session:
        ids = [used.object_id, lost.object_id]
        session.execute(update(SealedObject).where(SealedObject.id.in_(ids)).values(job_id=None, attempt=None))
    assert collect(service) == NOTHING
    work.change(job, status="cancelled")
    assert collect(service) == Collected(blobs=1, keys=2, bytes=6)
    assert used.object_id in stored(service) and fresh.object_id not in kept(service, tenant_id)


def test_where_a_tenant_is_being_shredded_its_keys_are_left_to_that(
    service: Service, tenant_id: str, work: Work
) -> None:
    job = work.job()
    work.begin(job, "weights")
    work.change(job, status="cancelled")
    with writing(service.engine) as session:
        session.execute(update(Tenant).where(Tenant.id == tenant_id).values(status="shredding"))
    assert collect(service) == NOTHING


@contextmanager
def collecting(service: Service, elsewhere: Path) -> Iterator[list[BaseException]]:
    """Two collect all the time meanwhile, as workers of two machines on one database and one store would."""
    stopping, failures = threading.Event(), []
    other = replace(service, settings=service.settings.model_copy(update={"data_dir": elsewhere}))

    def loop(each: Service) -> None:
        while not stopping.is_set():
            try:
                collect(each)
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=loop, args=(each,)) for each in (service, other)]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        stopping.set()
        for thread in threads:
            thread.join(60)


def test_collecting_all_the_time_takes_nothing_that_is_published(
    service: Service, tenant_id: str, work: Work, tmp_path: Path
) -> None:
    """Uploads that are kept or not, attempts that end or die; the moment between blob and name is stretched."""
    chance = random.Random(7)
    delays = [chance.uniform(0, 0.02) for _ in range(200)]
    pause = threading.Event().wait

    def upload(number: int) -> str | None:
        if number % 3 == 0:
            seal_in_vain(service, tenant_id, lambda: pause(delays[number]) and None)
            return None
        with asked_writing(service) as session:
            made = vault.seal_object(session, service.blobs, b"x", tenant_id=tenant_id, kind="initial")
            pause(delays[number])
        return made

    def train(number: int) -> str | None:
        job = work.job()
        keys: list[DataKey] = []
        for _ in range(2):  # the first attempt dies
            keys = work.begin(job, "checkpoint", "weights")
            work.put(keys[0])
            pause(delays[number])
            work.change(job, checkpoint_id=keys[0].object_id)
            work.put(keys[1])
        work.left(job, "trained", {"weights_id": keys[1].object_id})
        pause(delays[number])
        if number % 2:
            work.change(job, status="failed", checkpoint_id=None)
            return None
        work.publish(job, keys[1], version=number + 1)
        return keys[1].object_id

    with collecting(service, tmp_path / "another") as failures, ThreadPoolExecutor(4) as pool:
        made = [pool.submit(upload, number) for number in range(60)] + [pool.submit(train, n) for n in range(10)]
        published = {each.result() for each in made} - {None}
    assert len(published) == 45
    assert not failures, failures
    collect(service)
    with reading(service.engine) as session:
        specs = set(session.scalars(select(Job.spec_id)))
        left = {each["weights_id"] for each in session.scalars(select(Attempt.result)) if each}
    assert stored(service) == published | specs | left
    assert stored(service) == kept(service, tenant_id)


def test_two_collections_are_never_at_it_at_once(service: Service) -> None:
    with locked(collection._stamp(service), wait_s=1, what="a test"), pytest.raises(StartRefused, match="collection"):
        collect(service)


def test_one_is_due_an_hour_after_the_last(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    now = collection.time.time()
    assert not collection.is_due(service)
    monkeypatch.setattr(collection.time, "time", lambda: now + 3_700)
    assert collection.is_due(service)
    collect(service)
    monkeypatch.setattr(collection.time, "time", lambda: now + 60)
    assert not collection.is_due(service)


def test_a_store_that_fails_is_told_and_the_next_collection_goes_on(
    service: Service, tenant_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal_in_vain(service, tenant_id)
    place = service.settings.data_dir / "objects"
    place.rename(place.with_name("away"))
    with pytest.raises(Exception, match="store of sealed objects") as refusal:
        collect(service)
    assert refusal.value.code == "storage_unavailable"  # type: ignore[attr-defined]  # so it is an Unavailable
    place.with_name("away").rename(place)
    assert collect(service).blobs == 1


def test_the_worker_collects_when_it_is_due_and_outlives_what_keeps_it_from_that(
    service: Service, tenant_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_LOOK_S", 0.02)
    assert not collection.is_due(service)
    seal_in_vain(service, tenant_id)
    place, stopping = service.settings.data_dir / "objects", threading.Event()
    place.rename(place.with_name("away"))
    collecting = threading.Thread(target=worker._collect, args=(service, stopping))
    collecting.start()
    try:
        os.utime(collection._stamp(service), (0, 0))
        assert not stopping.wait(0.3) and collecting.is_alive() and collection.is_due(service)
        place.with_name("away").rename(place)
        deadline = time.monotonic() + 120
        while collection.is_due(service) and time.monotonic() < deadline:
            stopping.wait(0.02)
        assert stored(service) == set()
    finally:
        stopping.set()
        collecting.join(120)
