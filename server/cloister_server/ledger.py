"""A source's ledger: append-only rows, and the balances that follow from them. Knows SQL and whole numbers; admits nothing.

A job is charged, in every block that it reads, the larger of what it reserved and what its attempts opened until it is settled,
and what they opened afterwards. `Books` is that rule as a fold over the rows; the running balances are its steps written down,
so that admission reads one row a block however many there are. Sums are of whole numbers, rounded up once a row: exact, and the
same in whatever order jobs come and go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from cloister_privacy.accounting import Filter
from cloister_privacy.overflow import log_weight
from cloister_server.errors import Unavailable
from cloister_server.store import chain
from cloister_server.store.session import anchors_of
from cloister_server.store.tables import Balance, LedgerEntry, Source, now

__all__ = [
    "ALL",
    "Account",
    "Acts",
    "Allowance",
    "Books",
    "Used",
    "account",
    "acts",
    "append",
    "balances",
    "derived",
    "entries_of_job",
    "filter_of",
    "lock",
    "newest",
    "opened",
    "per_step",
    "rate",
    "terms_of",
    "used_by",
]

ALL = "*"
"""The holder of a block's whole balance."""

_RHO_BITS, _OVERFLOW_BITS = 64, 512
"""Balances count in 2^-64 of RDP and 2^-512 of delta."""

_NEVER = 2**64
"""What infinity counts as: more than any budget, and yet a number that settling can take away again."""

_CLOCKS_DIFFER = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Used:
    """What was used of a block, or is by one step: by order of its filter, and of delta by overflowing steps."""

    rho: tuple[int, ...]
    overflow: int = 0

    @classmethod
    def nothing(cls, orders: int) -> Used:
        return cls((0,) * orders)

    @classmethod
    def of(cls, rho: Sequence[float | None], overflow: float = 0.0) -> Used:
        """Rounded up, RDP to 1 at least: no step is free. What is no number from 0 on, or None, counts as more than any budget."""
        return cls(tuple(max(1, _scaled(each, _RHO_BITS)) for each in rho), _scaled(overflow, _OVERFLOW_BITS))

    def plus(self, other: Used, *, times: int = 1) -> Used:
        return Used(
            tuple(a + times * b for a, b in zip(self.rho, other.rho, strict=True)),
            max(0, self.overflow + times * other.overflow),
        )

    @property
    def rdp(self) -> tuple[float, ...]:
        """As numbers, each rounded to the nearest once."""
        return tuple(each / 2**_RHO_BITS for each in self.rho)

    @property
    def delta(self) -> float:
        """What overflowing steps may add to delta; infinite beyond what a float holds."""
        try:
            return float(self.overflow / 2**_OVERFLOW_BITS)
        except OverflowError:
            return math.inf

    def weighed(self, log_factor: float) -> Used:
        """With the overflow at another epsilon, whose weight is larger by this factor; rounded up."""
        if log_factor <= 0 or not self.overflow:
            return self
        doublings, rest = divmod(log_factor, math.log(2))
        factor = math.ceil(math.ldexp(math.exp(rest) * (1 + 1e-12), 60))
        return replace(self, overflow=-((-self.overflow * factor << int(doublings)) >> 60))

    def to_json(self) -> dict[str, Any]:
        return {"rho": list(self.rho), "overflow": self.overflow}

    @classmethod
    def of_json(cls, read: dict[str, Any]) -> Used:
        return cls(tuple(read["rho"]), read["overflow"])


@dataclass(frozen=True, slots=True)
class Account:
    """A block's filter, and what all holders together have used of it. `filter` is None before the block's first event."""

    block: int
    filter: Filter | None
    used: Used
    unwritten: Mapping[str, Used] | None = None
    """What each holder has used where no balance of the block was ever written down; None where they are."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """The most that a principal may use, in each block, and until when; None where that is not bounded."""

    epsilon: float | None = None
    expires: datetime | None = None

    @property
    def is_over(self) -> bool:
        return self.expires is not None and self.expires <= now()


_UNBOUNDED = Allowance()


@dataclass(frozen=True, slots=True)
class Acts:
    """What the owner did to the budget of all blocks: the largest epsilon ever in force, allowances, and whether it is written off."""

    peak: float
    allowances: Mapping[str, Allowance] = field(default_factory=dict)
    """The newest one of each principal."""
    is_written_off: bool = False

    def allowance_of(self, principal_id: str) -> Allowance:
        return self.allowances.get(principal_id, _UNBOUNDED)


def lock(session: Session, source: Source) -> Source:
    """The source as it is now, under its one row lock: every write to its ledger stands in line here.

    Raises LedgerRolledBack where the tenant's chain is behind its anchor: what is read of such a ledger is too little.
    """
    key = (source.tenant_id, source.id)
    locked = session.get_one(Source, key, populate_existing=True, with_for_update=True)
    chain.require_current(session, anchors_of(session.get_bind()), source.tenant_id)
    return locked


def newest(session: Session, source: Source) -> int:
    """The ledger's revision: how many rows it has."""
    newest_first = _of_source(source, LedgerEntry.revision).order_by(LedgerEntry.revision.desc())
    return int(session.scalar(newest_first.limit(1)) or 0)


def append(
    session: Session,
    source: Source,
    kind: str,
    principal_id: str,
    *,
    used: Iterable[tuple[int, str, Used]] = (),
    **values: Any,
) -> LedgerEntry:
    """Write the next row, and with it the balances (block, holder, used) that it changes. The caller holds the lock.

    Raises Unavailable where the clock stands before the newest row's: what expires would be in force again.
    """
    statement = (
        _of_source(source, LedgerEntry.revision, LedgerEntry.created).order_by(LedgerEntry.revision.desc()).limit(1)
    )
    last = session.execute(statement).one_or_none()
    if last is not None and now() < last.created - _CLOCKS_DIFFER:
        raise Unavailable(
            f"the server's clock stands before the newest entry of the ledger ({last.created:%Y-%m-%d %H:%M}), so nothing is "
            "charged or allowed; its operator must set the clock right",
            code="clock_went_back",
        )
    entry = LedgerEntry(
        tenant_id=source.tenant_id,
        source_id=source.id,
        revision=(last.revision if last is not None else 0) + 1,
        kind=kind,
        principal_id=principal_id,
        **values,
    )
    session.add(entry)
    session.flush()  # rows of one transaction stand in the order of their revisions, and balances refer to theirs
    for block, holder_id, each in used:
        session.add(
            Balance(
                tenant_id=source.tenant_id, source_id=source.id, block=block, holder_id=holder_id,
                revision=entry.revision, used=each.to_json(),
            )
        )  # fmt: skip
    session.flush()
    return entry


def account(session: Session, source: Source, block: int) -> Account:
    """What is used of a block, at the present revision."""
    frozen = session.scalars(_of_kind(source, "freeze").where(LedgerEntry.block == block)).one_or_none()
    if frozen is None:
        return Account(block, None, Used(()))
    filter_ = filter_of(source, frozen)
    balance = session.scalars(_balances(source, block, ALL).limit(1)).one_or_none()
    if balance is not None:
        return Account(block, filter_, Used.of_json(balance.used))
    unwritten = derived(session, source).of_block(block)  # rows from before balances were written down, if any
    return Account(block, filter_, unwritten.get(ALL, Used.nothing(len(filter_.orders))), unwritten)


def used_by(session: Session, source: Source, account: Account, holder_id: str) -> Used:
    """What one holder has used of a block that has a filter."""
    nothing = Used.nothing(len(account.used.rho))
    if account.unwritten is not None:
        return account.unwritten.get(holder_id, nothing)
    balance = session.scalars(_balances(source, account.block, holder_id).limit(1)).one_or_none()
    return nothing if balance is None else Used.of_json(balance.used)


def acts(session: Session, source: Source) -> Acts:
    """The owner's acts, folded: the newest holds."""
    kinds = LedgerEntry.kind.in_(("budget", "allowance", "write_off"))
    rows = session.scalars(_of_source(source, LedgerEntry).where(kinds)).all()
    folded = Acts(peak=source.epsilon)
    # Sorted here: asked for in that order, SQLite reads all rows of the source by their primary key.
    for row in sorted(rows, key=lambda each: each.revision):
        folded = _fold_act(folded, row)
    return folded


def entries_of_job(
    session: Session, tenant_id: str, job_id: str, *kinds: Literal["reserve", "chunk", "settle"]
) -> list[LedgerEntry]:
    """A job's rows of these kinds, in the order of their blocks."""
    of_job = (LedgerEntry.tenant_id == tenant_id, LedgerEntry.job_id == job_id, LedgerEntry.kind.in_(kinds))
    return list(session.scalars(select(LedgerEntry).where(*of_job).order_by(LedgerEntry.block, LedgerEntry.revision)))


def opened(session: Session, tenant_id: str, job_id: str) -> int:
    """The steps that all attempts of a job opened."""
    return sum(chunk.steps for chunk in entries_of_job(session, tenant_id, job_id, "chunk"))


def terms_of(source: Source) -> dict[str, Any]:
    """What was declared of a source, and may not change but for its epsilon: its first event writes it down with the filter."""
    names = ("unit", "adjacency", "epsilon", "delta", "public", "owner_id")
    return {name: getattr(source, name) for name in names}


def filter_of(source: Source, frozen: LedgerEntry) -> Filter:
    """The filter that a 'freeze' row froze, at the source's present epsilon."""
    return Filter(
        epsilon=source.epsilon,
        delta=source.delta,
        orders=tuple(frozen.event["orders"]),
        weights=tuple(frozen.event["weights"]),
    )


def per_step(reserved: LedgerEntry, *, peak: float | None) -> Used:
    """What one step of a reservation uses of its block."""
    event = reserved.event
    return rate(event["rdp_per_step"], reserved.overflow, reserved.steps, cap=event.get("cap"), peak=peak)


def rate(
    rdp_per_step: Sequence[float | None], overflow: float, steps: int, *, cap: float | None, peak: float | None
) -> Used:
    """What one step of an event uses. `overflow` is what all of its steps may add to delta at epsilon `cap`, and is told at `peak`,
    the largest epsilon ever in force: with probability p of overflowing, (epsilon, delta) is (epsilon, delta + p (1 + e^epsilon))."""
    each = Used.of(rdp_per_step, overflow / steps)
    return each if cap is None or peak is None else each.weighed(log_weight(peak) - log_weight(cap))


def derived(session: Session, source: Source) -> Books:
    """The balances as they follow from all rows, whatever was written down of them."""
    books = Books()
    for row in session.scalars(_of_source(source, LedgerEntry).order_by(LedgerEntry.revision)):
        books.enter(row)
    return books


class Books:
    """The rule of charging, as a fold over one source's rows in their order."""

    def __init__(self) -> None:
        self._peak: float | None = None
        self._jobs: dict[str, _Job] = {}
        self._used: dict[tuple[int, str], Used] = {}

    def of_block(self, block: int) -> dict[str, Used]:
        """Holder -> what it has used of the block."""
        return {holder_id: used for (of, holder_id), used in self._used.items() if of == block}

    def enter(self, row: LedgerEntry) -> dict[tuple[int, str], Used]:
        """Take the next row in; the balances that it changes, by block and holder."""
        match row.kind:
            case "reserve":
                job = self._jobs.setdefault(str(row.job_id), _Job(row.principal_id, row.steps))
                job.reserved.append(row)
                return self._change(job.principal_id, [row], row.steps)
            case "chunk" | "settle":
                job = self._jobs[str(row.job_id)]
                before, after = job.charged, job.after(row)
                return self._change(job.principal_id, job.reserved, after - before)
            case "budget":
                before_it = row.event["was"] if self._peak is None else self._peak
                self._peak = max(before_it, row.event["epsilon"])
                return self._reweigh(log_weight(self._peak) - log_weight(before_it))
            case _:
                return {}

    def _change(self, principal_id: str, rows: Sequence[LedgerEntry], steps: int) -> dict[tuple[int, str], Used]:
        changed = {}
        for row in rows if steps else ():
            each = per_step(row, peak=self._peak)
            for place in ((row.block, ALL), (row.block, principal_id)):
                before = self._used.get(place, Used.nothing(len(each.rho)))
                changed[place] = before.plus(each, times=steps)
        self._used |= changed
        return changed

    def _reweigh(self, log_factor: float) -> dict[tuple[int, str], Used]:
        if log_factor <= 0:
            return {}
        self._used = {place: used.weighed(log_factor) for place, used in self._used.items()}
        return dict(self._used)


@dataclass(slots=True)
class _Job:
    """A job's account while the books are read."""

    principal_id: str
    steps: int
    reserved: list[LedgerEntry] = field(default_factory=list)
    opened: int = 0
    settled: int | None = None

    @property
    def charged(self) -> int:
        return max(self.steps, self.opened) if self.settled is None else self.settled

    def after(self, row: LedgerEntry) -> int:
        """Take a chunk or the settlement in; what the job is charged from then on."""
        if row.kind == "settle":
            self.settled = row.steps
        else:
            self.opened += row.steps
        return self.charged


def balances(session: Session, source: Source) -> Iterator[Balance]:
    """Every balance that was written down, in the order of the rows that they follow from."""
    of_source = (Balance.tenant_id == source.tenant_id, Balance.source_id == source.id)
    yield from session.scalars(
        select(Balance).where(*of_source).order_by(Balance.revision, Balance.block, Balance.holder_id)
    )


def _scaled(value: float | None, bits: int) -> int:
    return math.ceil(math.ldexp(value, bits)) if value is not None and 0 <= value < _NEVER else _NEVER << bits


def _fold_act(acts_: Acts, row: LedgerEntry) -> Acts:
    match row.kind:
        case "budget":
            return replace(acts_, peak=max(acts_.peak, row.event["was"]))
        case "allowance":
            expires = row.event.get("expires")
            given = Allowance(row.event["epsilon"], None if expires is None else datetime.fromisoformat(expires))
            return replace(acts_, allowances={**acts_.allowances, row.event["principal"]: given})
        case _:
            return replace(acts_, is_written_off=True)


def _of_source(source: Source, *what: Any) -> Select[Any]:
    return select(*what).where(LedgerEntry.tenant_id == source.tenant_id, LedgerEntry.source_id == source.id)


def _of_kind(source: Source, kind: str) -> Select[Any]:
    return _of_source(source, LedgerEntry).where(LedgerEntry.kind == kind)


def _balances(source: Source, block: int, holder_id: str) -> Select[Any]:
    return (
        select(Balance)
        .where(
            Balance.tenant_id == source.tenant_id,
            Balance.source_id == source.id,
            Balance.block == block,
            Balance.holder_id == holder_id,
        )
        .order_by(Balance.revision.desc())
    )
