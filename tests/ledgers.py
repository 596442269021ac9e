"""A source's ledger, recomputed from its raw rows by other means than the server's, and what tests write into it.

RDP comes from dp-accounting (whole orders) and from the integral that defines it (the others, which dp-accounting rounds up by
up to some per cent); budgets and the cost of a query are written out from rules 1 and 6 of PRIVACY.md.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from cloister.wire.plans import Event
from cloister.wire.queries import QueryEvent
from cloister_server import budgets, ledger
from cloister_server.store import chain
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import Dataset, Job, LedgerEntry, Model, Source, Tenant, new_id

EVENT = Event(
    mechanism="poisson_subsampled_gaussian",
    noise_multiplier=1.1425,
    sampling_rate=256 / 60_000,
    steps=2344,
    unit="row",
    adjacency="add_remove",
)
"""The event of rule 1's test vector."""

EPSILON, DELTA = 3.0, 1e-6
OWNER, SOMEONE = "ap_owner", "ap_x"

_CLOSE = 1e-6
_DUST = 1e-12
"""To this, in RDP a step, the product's series for orders that are not whole is exact."""


def new_source(engine: Engine, *, epsilon: float = EPSILON, delta: float = DELTA) -> Source:
    """A source of its own tenant, with a dataset and a model for jobs to name."""
    tenant, row = new_id("tn"), new_id("src")
    with writing(engine, ALL_TENANTS) as session:
        session.add(Tenant(id=tenant, name=tenant))
        source = Source(
            tenant_id=tenant, id=row, name="people", unit="row", adjacency="add_remove", epsilon=epsilon, delta=delta,
            public=False, owner_id=OWNER,
        )  # fmt: skip
        session.add(source)
        session.flush()
        session.add(Model(tenant_id=tenant, id="mdl_x", name="m", champion=0))
        session.add(
            Dataset(
                tenant_id=tenant, id="ds_x", source_id=row, name="d", columns={}, nominal_size=60_000, capacity=60_000,
                capacity_rows=60_000, part_rows=1000, parts=60, status="ready",
            )
        )  # fmt: skip
    return source


def reserve(
    session: Session,
    source: Source,
    event: Event | QueryEvent = EVENT,
    *,
    principal_id: str = SOMEONE,
    blocks: Sequence[int] = (0,),
    job_id: str | None = None,
) -> str:
    """A running job with its reservation, as starting one makes it."""
    job_id = job_id or new_id("job")
    source = budgets.lock(session, source)
    budgets.reserve(session, source, job_id=job_id, principal_id=principal_id, event=event, blocks=blocks)
    session.add(
        Job(
            tenant_id=source.tenant_id, id=job_id, source_id=source.id, dataset_id="ds_x", model_id="mdl_x",
            principal_id=principal_id, request_id="r", spec_id="obj", status="running", steps=event.steps, epsilon=1.0,
            delta=source.delta, attempt=1,
        )
    )  # fmt: skip
    return job_id


def open_chunk(session: Session, source: Source, job_id: str, first: int, steps: int, *, attempt: int = 1) -> None:
    budgets.open_chunk(
        session, tenant_id=source.tenant_id, job_id=job_id, attempt=attempt, first_step=first, steps=steps
    )


def settle(session: Session, source: Source, job_id: str) -> int:
    """As the end of an attempt does it: the job's row is locked first."""
    return budgets.settle(session, session.get_one(Job, (source.tenant_id, job_id), with_for_update=True))


@dataclass
class Account:
    """What a job is charged, by its raw rows."""

    principal_id: str
    events: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By block, as its 'reserve' row has it, and with `overflow`."""
    reserved: int = 0
    opened: int = 0
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    """Attempt, first step and steps of each."""
    settled: int | None = None

    @property
    def charged(self) -> int:
        return max(self.reserved, self.opened) if self.settled is None else self.settled


@dataclass
class Recomputed:
    """A source's ledger as its raw rows have it."""

    epsilon: float
    delta: float
    revision: int = 0
    peak: float = 0.0
    """The largest epsilon ever in force."""
    filters: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    """Orders and weights by block."""
    jobs: dict[str, Account] = field(default_factory=dict)
    is_written_off: bool = False

    def used(self, block: int, holder: str = "*") -> np.ndarray:
        """The RDP that a block's events sum to, of all holders or of one, at the orders of its filter."""
        orders, _ = self.filters[block]
        total = np.zeros(len(orders))
        for job in self.jobs.values():
            if block in job.events and holder in ("*", job.principal_id):
                total += job.charged * rdp_per_step(job.events[block], orders)
        return total

    def overflow(self, block: int, holder: str = "*") -> float:
        """What overflowing steps may add to delta, at the largest epsilon ever in force."""
        total = 0.0
        for job in self.jobs.values():
            if block in job.events and holder in ("*", job.principal_id):
                event = job.events[block]
                total += job.charged * event["overflow"] / job.reserved * heavier(self.peak, event["cap"])
        return total

    def steps(self, block: int, holder: str = "*") -> int:
        return sum(
            job.charged for job in self.jobs.values() if block in job.events and holder in ("*", job.principal_id)
        )

    def holders(self, block: int) -> set[str]:
        return {"*"} | {job.principal_id for job in self.jobs.values() if block in job.events}

    def room(self, block: int, used: np.ndarray, *, epsilon: float | None = None) -> float:
        """By how much the budget of the order with the most room exceeds what is used of it; below 0 nothing is admitted."""
        orders, weights = self.filters[block]
        return best_room(orders, weights, used, epsilon=self.epsilon if epsilon is None else epsilon, delta=self.delta)

    def spent(self, block: int, holder: str = "*") -> float:
        """Rule 2: 0 without events, else the least over the orders of what is used, plus epsilon, minus the budget."""
        used = self.used(block, holder)
        return max(0.0, self.epsilon - self.room(block, used)) if used.any() else 0.0


def recompute(session: Session, source: Source) -> Recomputed:
    """Read the raw rows of a source's ledger. Asserts that they are in order and that each says what it may say where it stands."""
    key = {"tenant": source.tenant_id, "source": source.id}
    epsilon, delta = session.execute(
        text("SELECT epsilon, delta FROM sources WHERE tenant_id = :tenant AND id = :source"), key
    ).one()
    rows = session.execute(
        text("SELECT * FROM ledger WHERE tenant_id = :tenant AND source_id = :source ORDER BY revision"), key
    ).all()
    found = Recomputed(epsilon, delta, revision=len(rows), peak=epsilon)
    assert [row.revision for row in rows] == list(range(1, len(rows) + 1)), "revisions are counted without a gap"
    for row in rows:
        _enter(found, row, json.loads(row.event) if isinstance(row.event, str) else row.event)
    return found


def _enter(found: Recomputed, row: Any, event: dict[str, Any]) -> None:
    match row.kind:
        case "freeze":
            assert row.block not in found.filters, "a filter is frozen once"
            found.filters[row.block] = (tuple(event["orders"]), tuple(event["weights"]))
            assert math.fsum(event["weights"]) <= 0.999 + 1e-12
        case "reserve":
            assert row.block in found.filters and not found.is_written_off
            job = found.jobs.setdefault(row.job_id, Account(row.principal_id, reserved=row.steps))
            assert row.block not in job.events and not job.chunks, "a job is reserved once, and before it reads"
            assert (job.principal_id, job.reserved) == (row.principal_id, row.steps)
            job.events[row.block] = {**event, "overflow": row.overflow}
        case "chunk":
            job = found.jobs[row.job_id]
            assert job.settled is None, "a settled job reads nothing"
            assert row.attempt >= max((attempt for attempt, _, _ in job.chunks), default=1), (
                "a stale attempt writes nothing"
            )
            job.chunks.append((row.attempt, row.first_step, row.steps))
            assert len({chunk[:2] for chunk in job.chunks}) == len(job.chunks), "no attempt runs a chunk twice"
            job.opened += row.steps
        case "settle":
            job = found.jobs[row.job_id]
            assert job.settled is None, "a job is settled once"
            assert row.steps == job.opened, "a job is charged what it opened"
            job.settled = row.steps
        case "budget":
            found.peak = max(found.peak, event["was"], event["epsilon"])
        case "write_off":
            found.is_written_off = True
        case kind:
            assert kind == "allowance"


def check(engine: Engine, source: Source) -> Recomputed:
    """Assert what must hold of a source's ledger at any instant: its balances are what its rows say, in every way of reading
    them, and no block is overdrawn."""
    with reading(engine, ALL_TENANTS) as session:
        row = session.get_one(Source, (source.tenant_id, source.id))
        found = recompute(session, row)
        written = {
            (each.block, each.holder_id): ledger.Used.of_json(each.used) for each in ledger.balances(session, row)
        }
        derived = ledger.derived(session, row)
        told = budgets.balance(session, row)
    folded = {(block, holder): used for block in found.filters for holder, used in derived.of_block(block).items()}
    assert written == folded, "what is written down is what follows from the rows"
    assert set(written) == {(block, holder) for block in found.filters for holder in found.holders(block)}
    assert told.revision == found.revision and (told.epsilon, told.delta) == (found.epsilon, found.delta)
    for (block, holder), used in written.items():
        steps = found.steps(block, holder)
        assert np.allclose(used.rdp, found.used(block, holder), rtol=_CLOSE, atol=_DUST * steps), (block, holder)
        assert used.delta == pytest.approx(found.overflow(block, holder), rel=_CLOSE, abs=1e-30)
    for block in found.filters:
        used = found.used(block)
        assert found.room(block, used) >= -_CLOSE * found.epsilon or not used.any(), f"block {block} is overdrawn"
        assert found.overflow(block) <= 1e-3 * found.delta * (1 + _CLOSE)
        (of_block,) = (each for each in told.blocks if each.number == block)
        assert of_block.spent == pytest.approx(found.spent(block), rel=1e-5, abs=1e-8)
    assert told.spent <= told.epsilon * (1 + _CLOSE)
    return found


def check_every_revision(engine: Engine, source: Source) -> None:
    """Assert that the balances which every single row left behind are those that follow from the rows up to it, and that
    the tenant's chain holds from its first link on."""
    with reading(engine, ALL_TENANTS) as session:
        row = session.get_one(Source, (source.tenant_id, source.id))
        at: Mapping[int, dict[tuple[int, str], ledger.Used]] = defaultdict(dict)
        for each in ledger.balances(session, row):
            at[each.revision][each.block, each.holder_id] = ledger.Used.of_json(each.used)
        of_source = (LedgerEntry.tenant_id == row.tenant_id, LedgerEntry.source_id == row.id)
        books = ledger.Books()
        for entry in session.scalars(select(LedgerEntry).where(*of_source).order_by(LedgerEntry.revision)):
            assert books.enter(entry) == at.get(entry.revision, {}), f"at revision {entry.revision}"
        chain.verify(session, row.tenant_id)


def rdp_per_step(event: Mapping[str, Any], orders: tuple[float, ...]) -> np.ndarray:
    """What one step of an event costs, from the public numbers that its row keeps."""
    if "epsilon" in event:
        return np.array([_pure(event["epsilon"], order) for order in orders])
    return _gaussian(event["sampling_rate"], event["noise_multiplier"], orders)


def heavier(epsilon: float, before: float) -> float:
    """(1 + e^epsilon) / (1 + e^before): what an overflow adds to delta at one epsilon, by what it does at another."""
    return math.exp(float(np.logaddexp(0, epsilon) - np.logaddexp(0, before)))


def best_room(
    orders: Sequence[float], weights: Sequence[float], used: np.ndarray, *, epsilon: float, delta: float
) -> float:
    """Rule 1: the most by which B(a) exceeds what is used at a, over the orders whose budget is above 0."""
    rooms = [-math.inf]
    for order, weight, rho in zip(orders, weights, used, strict=True):
        budget = epsilon - (
            math.log(1 / (weight * delta)) + (order - 1) * math.log(1 - 1 / order) - math.log(order)
        ) / (order - 1)  # fmt: skip
        if budget > 0:
            rooms.append(budget - rho)
    return max(rooms)


@lru_cache(maxsize=4096)
def _gaussian(rate: float, noise_multiplier: float, orders: tuple[float, ...]) -> np.ndarray:
    accountant = RdpAccountant([order for order in orders if order.is_integer()])
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier)))
    whole = dict(zip(accountant.orders, accountant.rdp, strict=True))
    return np.array([whole[order] if order in whole else _integral(rate, noise_multiplier, order) for order in orders])


def _integral(rate: float, noise_multiplier: float, order: float) -> float:
    """ln E[((1 - q) + q e^((2 x - 1) / (2 sigma^2)))^a] / (a - 1), over x ~ N(0, sigma^2) (arXiv 1908.10530)."""
    sigma = noise_multiplier
    at = np.linspace(-15 * sigma, order + 15 * sigma, 40_001)
    ratio = (2 * at - 1) / (2 * sigma**2)
    if rate < 1:
        ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + ratio)
    terms = order * ratio - at**2 / (2 * sigma**2)
    largest = terms.max()
    total = np.exp(terms - largest).sum() * (at[1] - at[0]) / (sigma * math.sqrt(2 * math.pi))
    return float((largest + math.log(total)) / (order - 1))


def _pure(epsilon: float, order: float) -> float:
    """Rule 6, word for word."""
    numerator = math.exp(order * epsilon) + math.exp((1 - order) * epsilon)
    return min(epsilon, math.log(numerator / (1 + math.exp(epsilon))) / (order - 1))
