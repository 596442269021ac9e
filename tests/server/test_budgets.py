"""The ledger's arithmetic on real databases: nothing overdraws it, nothing is charged twice, nothing is rewritten."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from cloister.wire.plans import Event
from cloister_privacy.accounting import rdp_per_step
from cloister_server import budgets, ledger
from cloister_server.errors import BudgetExceeded
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import Dataset, Job, Model, Source, Tenant, new_id

EVENT = Event(
    mechanism="poisson_subsampled_gaussian",
    noise_multiplier=1.1425,
    sampling_rate=256 / 60_000,
    steps=2344,
    unit="row",
    adjacency="add_remove",
)


@pytest.fixture
def source(engine: Engine) -> Source:
    """A source of its own tenant, with the cap of PRIVACY's test vector."""
    tenant, row = new_id("tn"), new_id("src")
    with writing(engine) as session:
        session.add(Tenant(id=tenant, name=tenant))
        session.add(
            Source(
                tenant_id=tenant, id=row, name="people", unit="row", adjacency="add_remove",
                epsilon=3.0, delta=1e-6, public=False, owner_id="ap_owner",
            )
        )  # fmt: skip
    with writing(engine) as session:
        session.add(Model(tenant_id=tenant, id="mdl_x", name="m", champion=0))
        session.add(
            Dataset(
                tenant_id=tenant, id="ds_x", source_id=row, name="d", columns={}, nominal_size=60_000, capacity=60_000,
                capacity_rows=60_000, part_rows=1000, parts=60, status="ready",
            )
        )  # fmt: skip
    with reading(engine) as session:
        return session.get_one(Source, (tenant, row))


def reserve(engine: Engine, source: Source, event: Event = EVENT) -> str:
    """A running job with its reservation, as jobs.start makes it."""
    job_id = new_id("job")
    with writing(engine) as session:
        budgets.lock(session, source)
        budgets.reserve(session, source, job_id=job_id, principal_id="ap_x", event=event, blocks=(0,))
        session.add(
            Job(
                tenant_id=source.tenant_id, id=job_id, source_id=source.id, dataset_id="ds_x", model_id="mdl_x",
                principal_id="ap_x", request_id="r", spec_id="obj", status="running", steps=event.steps,
                epsilon=1.0, delta=1e-6, attempt=1,
            )
        )  # fmt: skip
    return job_id


def open_chunk(engine: Engine, source: Source, job_id: str, first: int, steps: int, *, attempt: int = 1) -> None:
    with writing(engine) as session:
        budgets.open_chunk(
            session, tenant_id=source.tenant_id, job_id=job_id, attempt=attempt, first_step=first, steps=steps
        )


def settle(engine: Engine, source: Source, job_id: str) -> int:
    with writing(engine) as session:
        return budgets.settle(session, session.get_one(Job, (source.tenant_id, job_id)))


def set_epsilon(engine: Engine, source: Source, epsilon: float) -> None:
    with writing(engine) as session:
        budgets.set_epsilon(session, source, principal_id="ap_owner", epsilon=epsilon, reason="because")


def balance(engine: Engine, source: Source) -> budgets.Budget:
    with reading(engine) as session:
        return budgets.balance(session, source)


def test_the_test_vector_admits_seven_jobs_and_refuses_the_eighth_unchanged(engine: Engine, source: Source) -> None:
    for _ in range(7):
        reserve(engine, source)
    before = balance(engine, source)
    with pytest.raises(BudgetExceeded, match=r"epsilon 1\.2\d+ does not fit") as refusal:
        reserve(engine, source)
    assert balance(engine, source) == before
    assert before.spent <= 3.0
    assert refusal.value.details["owners"] == ["ap_owner"]


def test_a_quote_is_what_the_balance_becomes(engine: Engine, source: Source) -> None:
    with reading(engine) as session:
        quoted = budgets.quote(session, source, EVENT, principal_id="ap_x", blocks=(0,), is_of_all=True)
    assert quoted.fits and quoted.before == 0.0 and quoted.revision == 0
    reserve(engine, source)
    assert balance(engine, source).spent == quoted.after
    assert balance(engine, source).left == quoted.left


def test_a_quote_for_a_partner_tells_its_own_use_alone(engine: Engine, source: Source) -> None:
    with reading(engine) as session:
        alone = budgets.quote(session, source, EVENT, principal_id="ap_z", blocks=(0,), is_of_all=False)
    reserve(engine, source)
    with reading(engine) as session:
        quoted = budgets.quote(session, source, EVENT, principal_id="ap_z", blocks=(0,), is_of_all=False)
    assert (quoted.before, quoted.after) == (0.0, alone.after)
    assert quoted.left < alone.left, "what is left is told to everyone"


def test_the_largest_run_that_a_refusal_names_is_admitted(engine: Engine, source: Source) -> None:
    for _ in range(7):
        reserve(engine, source)
    with pytest.raises(BudgetExceeded) as refusal:
        reserve(engine, source)
    largest = refusal.value.details["largest_epsilon"]
    assert 0 < largest < 1.21
    from cloister_privacy.plan import DPPlan

    plan = DPPlan.calibrated(
        epsilon=largest,
        nominal_size=60_000,
        capacity=60_000,
        batch_size=256,
        steps=2344,
        delta=1e-6,
        guarantee=(3, 1e-6),
    )
    reserve(engine, source, plan.event())


def test_a_settled_job_is_charged_what_it_opened(engine: Engine, source: Source) -> None:
    job = reserve(engine, source)
    open_chunk(engine, source, job, 0, 100)
    assert settle(engine, source, job) == 100
    assert settle(engine, source, job) == 100, "settling twice changes nothing"
    with reading(engine) as session:
        account = ledger.account(session, source, 0)
    assert account.filter is not None
    per_step = rdp_per_step(EVENT.sampling_rate, EVENT.noise_multiplier, orders=account.filter.orders)
    assert account.used.rdp == pytest.approx([100 * rho for rho in per_step])


def test_an_unsettled_job_holds_its_whole_reservation_even_when_all_its_attempts_died(
    engine: Engine, source: Source
) -> None:
    job = reserve(engine, source)
    whole = balance(engine, source).spent
    open_chunk(engine, source, job, 0, 100)
    assert balance(engine, source).spent == whole


def test_recomputed_steps_are_charged_on_top_of_the_reservation(engine: Engine, source: Source) -> None:
    job = reserve(engine, source)
    for first in range(0, 2344, 586):
        open_chunk(engine, source, job, first, 586)
    whole = balance(engine, source).spent
    with writing(engine) as session:
        session.get_one(Job, (source.tenant_id, job)).attempt = 2
    open_chunk(engine, source, job, 1758, 586, attempt=2)
    assert balance(engine, source).spent > whole
    assert settle(engine, source, job) == 2344 + 586


def test_recomputed_steps_that_do_not_fit_are_refused(engine: Engine, source: Source) -> None:
    jobs = [reserve(engine, source) for _ in range(7)]
    open_chunk(engine, source, jobs[0], 0, 2344)
    with writing(engine) as session:
        session.get_one(Job, (source.tenant_id, jobs[0])).attempt = 2
    with pytest.raises(budgets.ChunkRefused):
        open_chunk(engine, source, jobs[0], 0, 2344, attempt=2)


def test_a_stale_attempt_cannot_open_a_chunk(engine: Engine, source: Source) -> None:
    job = reserve(engine, source)
    with pytest.raises(budgets.StaleAttempt):
        open_chunk(engine, source, job, 0, 100, attempt=0)


def test_a_settled_job_opens_no_more_chunks(engine: Engine, source: Source) -> None:
    job = reserve(engine, source)
    settle(engine, source, job)
    with pytest.raises(budgets.StaleAttempt):
        open_chunk(engine, source, job, 0, 100)


def test_a_cancelled_job_stops_at_its_chunk_boundary(engine: Engine, source: Source) -> None:
    job = reserve(engine, source)
    with writing(engine) as session:
        session.get_one(Job, (source.tenant_id, job)).cancel_requested = True
    with pytest.raises(budgets.Cancelled):
        open_chunk(engine, source, job, 0, 100)


def test_racing_reservations_never_overdraw(engine: Engine, source: Source) -> None:
    def attempt(_: int) -> bool:
        try:
            reserve(engine, source)
        except BudgetExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        admitted = sum(pool.map(attempt, range(16)))
    assert admitted == 7
    assert balance(engine, source).spent <= 3.0


def overflowing(overflow: float, *, steps: int = 10) -> Event:
    """An event that costs next to nothing but what its overflowing steps may add to delta."""
    return EVENT.model_copy(update={"noise_multiplier": 100.0, "steps": steps, "overflow": overflow})


def test_overflowing_steps_add_at_most_a_thousandth_to_delta(engine: Engine, source: Source) -> None:
    for _ in range(3):
        reserve(engine, source, overflowing(3e-10))
    before = balance(engine, source)
    with pytest.raises(BudgetExceeded, match="plan with a smaller delta") as refusal:
        reserve(engine, source, overflowing(1.01e-10))
    assert refusal.value.details["overflow_left"] == pytest.approx(1e-10)
    assert balance(engine, source) == before, "a refusal writes nothing"
    with reading(engine) as session:
        assert not budgets.quote(
            session, source, overflowing(1.01e-10), principal_id="ap_x", blocks=(0,), is_of_all=True
        ).fits
        assert budgets.quote(
            session, source, overflowing(0.99e-10), principal_id="ap_x", blocks=(0,), is_of_all=True
        ).fits
    reserve(engine, source, overflowing(0.99e-10))


@pytest.mark.parametrize("overflow", [float("nan"), float("inf"), -1e-12, 1.01e-9])
def test_an_overflow_that_is_none_or_too_large_is_refused_from_the_first_event_on(
    engine: Engine, source: Source, overflow: float
) -> None:
    with pytest.raises(BudgetExceeded):
        reserve(engine, source, overflowing(overflow))
    assert balance(engine, source).revision == 0


def test_overflow_is_charged_by_the_step_like_everything_else(engine: Engine, source: Source) -> None:
    job = reserve(engine, source, overflowing(8e-10, steps=100))
    open_chunk(engine, source, job, 0, 25)
    assert _overflow(engine, source) == pytest.approx(8e-10), "an open reservation holds all of it"
    settle(engine, source, job)
    assert _overflow(engine, source) == pytest.approx(2e-10)
    reserve(engine, source, overflowing(8e-10))


def test_recomputed_steps_whose_overflow_does_not_fit_are_refused(engine: Engine, source: Source) -> None:
    job = reserve(engine, source, overflowing(9e-10, steps=90))
    open_chunk(engine, source, job, 0, 90)
    with writing(engine) as session:
        session.get_one(Job, (source.tenant_id, job)).attempt = 2
    open_chunk(engine, source, job, 80, 9, attempt=2)
    with pytest.raises(budgets.ChunkRefused):
        open_chunk(engine, source, job, 70, 2, attempt=2)


def test_a_raised_cap_weighs_past_overflows_by_its_own_epsilon(engine: Engine, source: Source) -> None:
    """What overflows add to delta grows with the epsilon of the guarantee: (1 + e^6) / (1 + e^3) times, here."""
    reserve(engine, source, overflowing(1e-11))
    set_epsilon(engine, source, 6.0)
    with reading(engine) as session:
        raised = session.get_one(Source, (source.tenant_id, source.id))
    assert _overflow(engine, raised) == pytest.approx(1e-11 * (1 + math.exp(6)) / (1 + math.exp(3)))


def test_the_filter_and_the_overflow_of_the_test_vector_fit_together(engine: Engine, source: Source) -> None:
    from cloister_privacy.plan import DPPlan

    plan = DPPlan(
        nominal_size=60_000, capacity=60_000, batch_size=256, steps=2344, noise_multiplier=1.1425, clip=1.0, delta=1e-6,
        guarantee=(3.0, 1e-6),
    )  # fmt: skip
    for _ in range(7):
        reserve(engine, source, plan.event())
    assert 0 < _overflow(engine, source) <= 7e-12


def _overflow(engine: Engine, source: Source) -> float:
    with reading(engine) as session:
        return ledger.account(session, source, 0).used.delta


@pytest.mark.parametrize("statement", ["UPDATE ledger SET steps = 0", "DELETE FROM ledger"])
def test_the_database_refuses_to_rewrite_the_ledger(engine: Engine, source: Source, statement: str) -> None:
    reserve(engine, source)
    with pytest.raises(DBAPIError, match=r"append-only|permission denied"), Session(engine) as session:
        session.execute(text(statement))
        session.commit()
