"""Whatever is done to a source in whatever order, its ledger says what ran, admits what rule 1 admits, and refuses without a trace.

Every example is a source of its own; what its raw rows mean is recomputed by `ledgers.py`, which shares no arithmetic with the server.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

import ledgers
from cloister.wire.plans import Event
from cloister.wire.queries import QueryEvent
from cloister_privacy.accounting import Filter
from cloister_privacy.accounting import rdp_per_step as product_rdp_per_step
from cloister_privacy.queries import rdp_of_pure
from cloister_server import budgets
from cloister_server.errors import BudgetExceeded, Conflict, Invalid
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import Block, Job, Source, now
from ledgers import DELTA, OWNER, Account, Recomputed

NOISES = (0.6, 1.1425, 2.0, 8.0)
RATES = (256 / 60_000, 0.05, 1.0)
OVERFLOWS = (0.0, 1e-13, 5e-11, 4e-10)
EPSILONS = st.one_of(st.sampled_from([0.5, 3.0, 8.0]), st.floats(0.3, 12))
PRINCIPALS = st.sampled_from(["ap_a", "ap_b"])
MOST_BLOCKS = 3

TRAININGS = st.builds(
    Event,
    mechanism=st.just("poisson_subsampled_gaussian"),
    noise_multiplier=st.sampled_from(NOISES),
    sampling_rate=st.sampled_from(RATES),
    steps=st.integers(1, 30) | st.integers(30, 3000),
    unit=st.just("row"),
    adjacency=st.just("add_remove"),
    overflow=st.sampled_from(OVERFLOWS),
)
QUERIES = st.builds(
    QueryEvent,
    mechanism=st.just("discrete_laplace"),
    epsilon=st.floats(0.001, 2),
    unit=st.just("row"),
    adjacency=st.just("add_remove"),
)
EVENTS = st.one_of(TRAININGS, TRAININGS, QUERIES)

LIFE = (
    *["chunk"] * 4, *["rest"] * 3, "the same chunk again", "a stale attempt's chunk", *["crash"] * 3, "retry", "cancel",
    *["settle"] * 2,
)  # fmt: skip

_EVERYTHING = """
    SELECT 'source', id, epsilon, 0 FROM sources WHERE tenant_id = :tenant
    UNION ALL SELECT 'job', id, attempt, CASE WHEN cancel_requested THEN 1 ELSE 0 END FROM jobs WHERE tenant_id = :tenant
    UNION ALL SELECT 'ledger', '', max(revision), count(*) FROM ledger WHERE tenant_id = :tenant
    UNION ALL SELECT 'balances', '', max(revision), count(*) FROM balances WHERE tenant_id = :tenant
    UNION ALL SELECT 'links', '', max(number), count(*) FROM links WHERE tenant_id = :tenant
    ORDER BY 1, 2
"""

_TIE = 1e-5
"""Nearer to a budget than this, two ways of rounding may decide differently."""


@dataclass
class Run:
    """A job as this test has driven it."""

    id: str
    event: Event | QueryEvent
    principal_id: str
    blocks: tuple[int, ...]
    opened: int = 0
    settled: int | None = None
    attempt: int = 1
    at: int = 0
    last: tuple[int, int] | None = None
    """First step and steps of this attempt's last chunk."""
    is_cancelled: bool = False

    @property
    def charged(self) -> int:
        return max(self.event.steps, self.opened) if self.settled is None else self.settled


class LedgerMachine(RuleBasedStateMachine):
    """A source under everything that can happen to it, one after the other."""

    runs = Bundle("runs")

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.blocks = 1
        self.driven: dict[str, Run] = {}
        self.allowances: dict[str, tuple[float | None, datetime | None]] = {}
        self.is_written_off = False
        self.frozen: dict[int, Any] = {}
        self.found: Recomputed

    @initialize(target=runs, epsilon=EPSILONS, event=EVENTS, blocks=st.integers(1, MOST_BLOCKS))
    def declare(self, epsilon: float, event: Event | QueryEvent, blocks: int) -> Any:
        self.source = ledgers.new_source(self.engine, epsilon=epsilon)
        self.found = ledgers.check(self.engine, self.source)
        while self.blocks < blocks:
            self._open_block()
        return self._reserve(event, "ap_a", set())

    @rule(target=runs, event=EVENTS, who=PRINCIPALS, chosen=st.sets(st.integers(0, 2)))
    def reserve(self, event: Event | QueryEvent, who: str, chosen: set[int]) -> Any:
        return self._reserve(event, who, chosen)

    @rule(target=runs, job=runs, who=PRINCIPALS, chosen=st.sets(st.integers(0, 2)))
    def reserve_the_like(self, job: str, who: str, chosen: set[int]) -> Any:
        """Another run of a shape that was admitted already, as most are."""
        return self._reserve(self.driven[job].event, who, chosen)

    def _reserve(self, event: Event | QueryEvent, who: str, chosen: set[int]) -> Any:
        blocks = tuple(sorted(chosen & set(range(self.blocks)))) or (0,)
        expected = self._admits(event, who, blocks)
        with reading(self.engine) as session:
            quoted = budgets.quote(
                session, self._source(session), event, principal_id=who, blocks=blocks, is_of_all=True
            )
        if self._is_refused(
            lambda session: ledgers.reserve(session, self.source, event, principal_id=who, blocks=blocks),
            BudgetExceeded,
            expected=None if expected is None else not expected,
        ):
            assert not quoted.fits
            return multiple()
        assert quoted.fits
        job_id = self.done
        self.driven[job_id] = Run(job_id, event, who, blocks)
        with reading(self.engine) as session:
            told = budgets.balance(session, self._source(session)).blocks[quoted.block]
            to_whom = budgets.balance(session, self._source(session), viewer_id=who).blocks[quoted.block]
        assert (told.spent, to_whom.left) == (quoted.after, quoted.left), "a quote is what the balance becomes"
        return job_id

    @rule(job=runs, act=st.sampled_from(LIFE), steps=st.integers(1, 1500), share=st.floats(0, 1))
    def job_lives(self, job: str, act: str, steps: int, share: float) -> None:
        run = self.driven[job]
        match act:
            case "rest" if run.at < run.event.steps:
                self._open_next(run, run.event.steps - run.at)
            case "rest" | "chunk":
                self._open_next(run, max(1, int(share * run.event.steps)) if run.opened == 0 else steps)
            case "the same chunk again" if run.last is not None:
                assert self._open(run, *run.last, attempt=run.attempt, is_repeated=True)
            case "a stale attempt's chunk":
                assert self._open(run, run.at, steps, attempt=run.attempt - 1)
            case "crash":
                self._crash(run, back_to=int(share * run.at))
            case "retry":
                self._retry(run)
            case "cancel":
                self._cancel(run)
            case "settle":
                self._settle(run)

    @rule(
        act=st.sampled_from(["set_epsilon", "set_epsilon", "allow", "allow", "open_block", "write_off"]),
        who=PRINCIPALS,
        epsilon=EPSILONS,
        share=st.floats(0.05, 1.2),
        hours=st.sampled_from([None, None, None, -1, 1]),
    )
    def owner_acts(self, act: str, who: str, epsilon: float, share: float, hours: int | None) -> None:
        if act == "set_epsilon":
            self._set_epsilon(epsilon)
        elif act == "allow":
            allowance = None if 0.9 < share < 1 else share * self.found.epsilon
            self._allow(who, allowance, None if hours is None else now() + timedelta(hours=hours))
        elif act == "open_block" and self.blocks < MOST_BLOCKS:
            self._open_block()
        elif act == "write_off" and share > 1 and len(self.driven) > 4:
            with writing(self.engine) as session:
                budgets.write_off(session, self._source(session), principal_id=OWNER, reason="lost")
            self.is_written_off = True

    @invariant()
    def the_ledger_says_what_was_done(self) -> None:
        self.found = ledgers.check(self.engine, self.source)
        assert self.found.jobs.keys() == self.driven.keys()
        for run in self.driven.values():
            job = self.found.jobs[run.id]
            assert (job.principal_id, job.reserved, tuple(sorted(job.events))) == (
                run.principal_id,
                run.event.steps,
                run.blocks,
            )
            assert (job.opened, job.settled, job.charged) == (run.opened, run.settled, run.charged)
            assert all(run.event.model_dump().items() <= event.items() for event in job.events.values())
        assert self.found.is_written_off == self.is_written_off
        self.frozen = {**self.found.filters, **self.frozen}
        assert self.found.filters == self.frozen, "orders and weights never change"
        assert self.found.delta == DELTA

    def teardown(self) -> None:
        if hasattr(self, "source"):
            ledgers.check_every_revision(self.engine, self.source)

    def _open_next(self, run: Run, steps: int) -> None:
        first = run.at
        if not self._open(run, first, steps, attempt=run.attempt):
            run.opened += steps
            run.at, run.last = first + steps, (first, steps)

    def _crash(self, run: Run, *, back_to: int) -> None:
        """The attempt dies; the next goes on from an earlier step, and recomputes what came after it."""
        run.attempt, run.at, run.last = run.attempt + 1, back_to, None
        with writing(self.engine) as session:
            session.get_one(Job, (self.source.tenant_id, run.id)).attempt = run.attempt

    def _retry(self, run: Run) -> None:
        """The same job once more, as a client that heard no answer might ask for it."""
        self._is_refused(
            lambda session: ledgers.reserve(
                session, self.source, run.event, principal_id=run.principal_id, blocks=run.blocks, job_id=run.id
            ),
            (BudgetExceeded, IntegrityError),
            expected=True,
        )

    def _cancel(self, run: Run) -> None:
        run.is_cancelled = True
        with writing(self.engine) as session:
            session.get_one(Job, (self.source.tenant_id, run.id)).cancel_requested = True

    def _settle(self, run: Run) -> None:
        before = self._everything()
        with writing(self.engine) as session:
            charged = ledgers.settle(session, self.source, run.id)
        assert charged == run.opened, "a job is charged what it opened, and no more however often it is settled"
        if run.settled is not None:
            assert self._everything() == before, "settling twice changes nothing"
        run.settled = charged

    def _set_epsilon(self, epsilon: float) -> None:
        self._is_refused(
            lambda session: budgets.set_epsilon(
                session, self._source(session), principal_id=OWNER, epsilon=epsilon, reason="because"
            ),
            (Invalid, Conflict),
            expected=self.is_written_off or self._refuses_epsilon(epsilon),
        )

    def _allow(self, who: str, epsilon: float | None, expires: datetime | None) -> None:
        def act(session: Session) -> None:
            source = self._source(session)
            budgets.allow(session, source, principal_id=OWNER, to=who, epsilon=epsilon, expires=expires, reason="so")

        is_too_much = epsilon is not None and epsilon > self.found.epsilon
        if not self._is_refused(act, (Invalid, Conflict), expected=self.is_written_off or is_too_much):
            self.allowances[who] = (epsilon, expires)

    def _open_block(self) -> None:
        with writing(self.engine) as session:
            source = budgets.lock(session, self.source)
            session.add(
                Block(tenant_id=source.tenant_id, source_id=source.id, number=self.blocks, name=f"b{self.blocks}")
            )
        self.blocks += 1

    def _open(self, run: Run, first: int, steps: int, *, attempt: int, is_repeated: bool = False) -> bool:
        """Try to open a chunk; whether it was refused, which it was if, and only if, it had to be."""
        more = max(run.event.steps, run.opened + steps) - max(run.event.steps, run.opened)
        expected: bool | None
        why: type[Exception] | tuple[type[Exception], ...]
        if attempt != run.attempt or run.settled is not None:
            expected, why = True, budgets.StaleAttempt
        elif run.is_cancelled:
            expected, why = True, budgets.Cancelled
        else:
            admitted = self._admits_steps(run, more)
            why = (budgets.ChunkRefused, IntegrityError) if is_repeated else budgets.ChunkRefused
            expected = True if is_repeated else None if admitted is None else not admitted
        return self._is_refused(
            lambda session: ledgers.open_chunk(session, self.source, run.id, first, steps, attempt=attempt),
            why,
            expected=expected,
        )

    def _is_refused(
        self,
        act: Callable[[Session], Any],
        why: type[Exception] | tuple[type[Exception], ...],
        *,
        expected: bool | None,
    ) -> bool:
        """Do it in a transaction of its own. A refusal is one of these errors, was expected (None: either is right), and leaves
        no trace; `self.done` is what the act gave otherwise."""
        before = self._everything()
        try:
            with writing(self.engine) as session:
                self.done = act(session)
        except why:
            assert expected is not False
            assert self._everything() == before, "a refusal changes nothing"
            return True
        assert expected is not True
        return False

    def _admits(self, event: Event | QueryEvent, who: str, blocks: tuple[int, ...]) -> bool | None:
        """What rule 1, the thousandth for overflows and the allowance say of an event; None where it is too near to call."""
        epsilon, expires = self.allowances.get(who, (None, None))
        if self.is_written_off or (expires is not None and expires <= now()):
            return False
        values: dict[str, Any] = event.model_dump()
        margins = []
        for block in blocks:
            is_new = block not in self.found.filters
            orders, weights = self._would_freeze(event) if is_new else self.found.filters[block]
            cost = event.steps * ledgers.rdp_per_step(values, orders)
            for cap, holder in ((self.found.epsilon, "*"), (epsilon, who)):
                if cap is not None:
                    used = cost + (0 if is_new else self.found.used(block, holder))
                    margins.append(ledgers.best_room(orders, weights, used, epsilon=cap, delta=DELTA) / cap)
            added = event.overflow * ledgers.heavier(self.found.peak, self.found.epsilon)
            added += 0 if is_new else self.found.overflow(block)
            margins.append(1 - added / (1e-3 * DELTA))
        return _sign(min(margins))

    def _would_freeze(self, event: Event | QueryEvent) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Which orders are frozen is no matter of soundness: the product is asked."""

        def per_step(orders: tuple[float, ...]) -> tuple[float, ...]:
            if isinstance(event, QueryEvent):
                return rdp_of_pure(event.epsilon, orders=orders)
            return product_rdp_per_step(event.sampling_rate, event.noise_multiplier, orders=orders)

        frozen = Filter.frozen_by(per_step, steps=event.steps, epsilon=self.found.epsilon, delta=DELTA)
        return frozen.orders, frozen.weights

    def _admits_steps(self, run: Run, more: int) -> bool | None:
        """The same of steps on top of what a job is charged. Nothing is read where the budget is written off."""
        if more == 0 or self.is_written_off:
            return not self.is_written_off
        epsilon, expires = self.allowances.get(run.principal_id, (None, None))
        if expires is not None and expires <= now():
            return False
        margins = []
        for block in run.blocks:
            values = self.found.jobs[run.id].events[block]
            cost = more * ledgers.rdp_per_step(values, self.found.filters[block][0])
            for cap, holder in ((self.found.epsilon, "*"), (epsilon, run.principal_id)):
                if cap is not None:
                    margins.append(self.found.room(block, cost + self.found.used(block, holder), epsilon=cap) / cap)
            longer = Account(run.principal_id, {block: values}, reserved=run.event.steps, settled=more)
            alone = Recomputed(0, 0, peak=self.found.peak, jobs={"": longer})
            margins.append(1 - (self.found.overflow(block) + alone.overflow(block)) / (1e-3 * DELTA))
        return _sign(min(margins))

    def _refuses_epsilon(self, epsilon: float) -> bool | None:
        """Whether a budget would be below what is used of some block, or let overflows weigh too much."""
        margins = [1.0]
        peak = max(self.found.peak, epsilon)
        for block in self.found.filters:
            used = self.found.used(block)
            if used.any():
                margins.append(self.found.room(block, used, epsilon=epsilon) / epsilon)
            overflow = self.found.overflow(block) * ledgers.heavier(peak, self.found.peak)
            margins.append(1 - overflow / (1e-3 * DELTA))
        admitted = _sign(min(margins))
        return None if admitted is None else not admitted

    def _source(self, session: Session) -> Source:
        return session.get_one(Source, (self.source.tenant_id, self.source.id))

    def _everything(self) -> list[Any]:
        """All that is written of the tenant, but for what no rule may change anyway."""
        with reading(self.engine) as session:
            return [tuple(row) for row in session.execute(text(_EVERYTHING), {"tenant": self.source.tenant_id})]


def _sign(margin: float) -> bool | None:
    return None if abs(margin) < _TIE else margin > 0


def _run(engine: Engine, *, examples: int, steps: int) -> None:
    run_machine(
        lambda: LedgerMachine(engine),
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_whatever_happens_the_ledger_says_what_ran_and_admits_no_more_than_the_filter(engine: Engine) -> None:
    _run(engine, examples=8, steps=20)


@pytest.mark.long
def test_whatever_happens_for_long_the_ledger_says_what_ran_and_admits_no_more_than_the_filter(engine: Engine) -> None:
    _run(engine, examples=15 if os.environ.get("SHORT") else 100, steps=50)


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_an_admission_looks_at_no_more_of_a_source_with_many_events_than_of_one_with_few(engine: Engine) -> None:
    few, many = _instructions(engine, events=5), _instructions(engine, events=150)
    assert many < 1.5 * few


def _instructions(engine: Engine, *, events: int) -> int:
    """What SQLite's virtual machine executes for one reservation on a source with so many settled events."""
    small = ledgers.EVENT.model_copy(update={"steps": 2})
    source = ledgers.new_source(engine)
    for begun in range(0, events, 50):
        with writing(engine) as session:
            for _ in range(min(50, events - begun)):
                job = ledgers.reserve(session, source, small)
                session.flush()
                ledgers.open_chunk(session, source, job, 0, small.steps)
                ledgers.settle(session, source, job)
    executed = 0

    def count() -> None:
        nonlocal executed
        executed += 1

    with writing(engine) as session:
        driver: Any = session.connection().connection.driver_connection
        driver.set_progress_handler(count, 1)
        ledgers.reserve(session, source, small)
        session.flush()
        driver.set_progress_handler(None, 1)
    return executed
