"""Clients with connections of their own, all at once at one source: what is admitted is what one after the other would be."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

import ledgers
from cloister_server import budgets
from cloister_server.errors import BudgetExceeded, Invalid
from cloister_server.store.session import new_engine, writing
from cloister_server.store.tables import Job, Source
from ledgers import EVENT, OWNER

REFUSALS = (BudgetExceeded, Invalid, budgets.ChunkRefused, budgets.StaleAttempt, IntegrityError)


@pytest.fixture
def source(engine: Engine) -> Source:
    return ledgers.new_source(engine)


def clients_of(engine: Engine) -> int:
    return 8 if engine.dialect.name == "sqlite" else 64


@contextmanager
def own_connection(engine: Engine) -> Iterator[Engine]:
    """Another client of the same database."""
    other = new_engine(engine.url.render_as_string(hide_password=False))
    try:
        yield other
    finally:
        other.dispose()


def all_at_once(engine: Engine, acts: Sequence[Callable[[Session], Any]]) -> list[Any]:
    """Each act in a transaction and on a connection of its own, begun together; what each gave, or the error that refused it."""
    ready = threading.Barrier(len(acts))

    def client(act: Callable[[Session], Any]) -> Any:
        with own_connection(engine) as own:
            own.connect().close()
            ready.wait(60)
            try:
                with writing(own) as session:
                    return act(session)
            except REFUSALS as refusal:
                return refusal

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(client, acts))


def test_of_all_who_race_for_the_last_slice_exactly_one_wins(engine: Engine, source: Source) -> None:
    for _ in range(6):
        with writing(engine) as session:
            ledgers.reserve(session, source)
    told = all_at_once(engine, [lambda session: ledgers.reserve(session, source)] * clients_of(engine))
    (winner,) = (each for each in told if isinstance(each, str))
    assert [type(each) for each in told if each is not winner] == [BudgetExceeded] * (len(told) - 1)
    found = ledgers.check(engine, source)
    assert len(found.jobs) == 7 and winner in found.jobs
    ledgers.check_every_revision(engine, source)


def test_runs_of_all_sizes_at_once_fill_a_new_source_and_whoever_is_refused_would_not_fit(
    engine: Engine, source: Source
) -> None:
    rng = random.Random(0)
    events = [EVENT.model_copy(update={"steps": rng.randrange(200, 5000)}) for _ in range(clients_of(engine))]
    told = all_at_once(
        engine, [lambda session, event=event: ledgers.reserve(session, source, event) for event in events]
    )
    found = ledgers.check(engine, source)
    admitted = {each for each in told if isinstance(each, str)}
    assert admitted == found.jobs.keys() and 3 <= len(admitted) < len(events)
    assert {type(each) for each in told} == {str, BudgetExceeded}
    for event, each in zip(events, told, strict=True):
        if not isinstance(each, str):
            with pytest.raises(BudgetExceeded), writing(engine) as session:
                ledgers.reserve(session, source, event)
    assert list(found.filters) == [0], "the filter was frozen once"


@contextmanager
def in_flight(engine: Engine, act: Callable[[Session], Any], then: Callable[[Session], Any]) -> Iterator[Future[Any]]:
    """`act` is done and not yet committed when another client begins `then`, whose future is given; on leaving, it commits."""
    begun = threading.Event()

    def client() -> Any:
        with own_connection(engine) as other:
            begun.set()
            with writing(other) as waiting:
                return then(waiting)

    with ThreadPoolExecutor(1) as pool, own_connection(engine) as own, writing(own) as session:
        act(session)
        future = pool.submit(client)
        begun.wait(60)
        yield future


def lower(source: Source, epsilon: float) -> Callable[[Session], None]:
    return lambda session: budgets.set_epsilon(
        session, session.get_one(Source, (source.tenant_id, source.id)), principal_id=OWNER, epsilon=epsilon, reason="less"
    )  # fmt: skip


def test_a_budget_is_not_lowered_below_a_reservation_that_is_about_to_commit(engine: Engine, source: Source) -> None:
    def reserve(session: Session) -> None:
        for _ in range(5):
            ledgers.reserve(session, source)

    with in_flight(engine, reserve, lower(source, 1.5)) as lowered, pytest.raises(TimeoutError):
        lowered.result(0.5)
    with pytest.raises(Invalid):
        lowered.result()
    assert ledgers.check(engine, source).epsilon == 3.0


def test_a_run_is_not_admitted_by_a_budget_that_is_about_to_be_lowered(engine: Engine, source: Source) -> None:
    with (
        in_flight(engine, lower(source, 0.5), lambda session: ledgers.reserve(session, source)) as reserved,
        pytest.raises(TimeoutError),
    ):
        reserved.result(0.5)
    with pytest.raises(BudgetExceeded):
        reserved.result()
    assert not ledgers.check(engine, source).jobs


def test_owners_who_lower_a_budget_while_others_spend_it_never_leave_it_overdrawn(
    engine: Engine, source: Source
) -> None:
    small = EVENT.model_copy(update={"steps": 600})
    half = clients_of(engine) // 2
    acts = [lower(source, 3.0 - index / half) for index in range(half)]
    acts += [lambda session: ledgers.reserve(session, source, small)] * half
    random.Random(1).shuffle(acts)
    told = all_at_once(engine, acts)
    assert {type(each) for each in told} <= {str, type(None), BudgetExceeded, Invalid}
    found = ledgers.check(engine, source)
    assert len(found.jobs) == sum(isinstance(each, str) for each in told) >= 1
    ledgers.check_every_revision(engine, source)


def test_of_two_who_open_the_same_chunk_one_runs_it_and_it_is_charged_once(engine: Engine, source: Source) -> None:
    with writing(engine) as session:
        job = ledgers.reserve(session, source)
    told = all_at_once(engine, [lambda session: ledgers.open_chunk(session, source, job, 0, 100)] * 4)
    assert sorted(type(each).__name__ for each in told) == ["IntegrityError"] * 3 + ["NoneType"]
    assert ledgers.check(engine, source).jobs[job].chunks == [(1, 0, 100)]


def test_an_attempt_that_is_taken_over_amid_its_chunks_opens_none_afterwards(engine: Engine, source: Source) -> None:
    """The old attempt opens one chunk after the other until it is told that it is stale; the new one begins amid them."""
    with writing(engine) as session:
        job = ledgers.reserve(session, source)
    is_going = threading.Event()

    def old() -> int:
        with own_connection(engine) as own:
            for opened in range(20_000):
                try:
                    with writing(own) as session:
                        ledgers.open_chunk(session, source, job, 10 * opened, 10)
                except budgets.StaleAttempt:
                    return opened
                if opened == 5:
                    is_going.set()
        raise AssertionError("nobody took it over")

    def new() -> None:
        is_going.wait(60)
        with own_connection(engine) as own:
            with writing(own) as session:
                session.get_one(Job, (source.tenant_id, job), with_for_update=True).attempt = 2
            for index in range(10):
                with writing(own) as session:
                    ledgers.open_chunk(session, source, job, 10 * index, 10, attempt=2)

    with ThreadPoolExecutor(2) as pool:
        opened, _ = pool.submit(old), pool.submit(new).result()
    found = ledgers.check(engine, source).jobs[job]  # its reading of the rows refuses a stale attempt's
    assert [attempt for attempt, _, _ in found.chunks] == [1] * opened.result() + [2] * 10
    with writing(engine) as session:
        assert ledgers.settle(session, source, job) == 10 * (opened.result() + 10)


def test_of_two_jobs_that_lost_steps_and_race_for_the_last_slice_one_may_run_them_again(
    engine: Engine, source: Source
) -> None:
    jobs = []
    for _ in range(6):
        with writing(engine) as session:
            jobs.append(ledgers.reserve(session, source))
    for job in jobs[:2]:
        with writing(engine) as session:
            ledgers.open_chunk(session, source, job, 0, EVENT.steps)
        with writing(engine) as session:
            session.get_one(Job, (source.tenant_id, job)).attempt = 2
    told = all_at_once(
        engine,
        [
            lambda session, job=job: ledgers.open_chunk(session, source, job, 0, EVENT.steps, attempt=2)
            for job in jobs[:2]
        ],
    )
    assert sorted(type(each).__name__ for each in told) == ["ChunkRefused", "NoneType"]
    ledgers.check(engine, source)


def test_a_job_that_is_settled_by_all_at_once_is_settled_once(engine: Engine, source: Source) -> None:
    with writing(engine) as session:
        job = ledgers.reserve(session, source)
    with writing(engine) as session:
        ledgers.open_chunk(session, source, job, 0, 100)
    assert all_at_once(engine, [lambda session: ledgers.settle(session, source, job)] * 8) == [100] * 8
    found = ledgers.check(engine, source)
    assert found.jobs[job].settled == 100 and found.revision == 4
