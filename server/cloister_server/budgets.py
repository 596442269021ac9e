"""What a source's budget admits: reserve, open chunks, settle; budgets, allowances. Knows the filter; nothing of HTTP or torch.

Four conditions admit an event, in every block that it reads: the filter's; that overflowing steps of all jobs together add at
most a thousandth to delta, which the filter's weights leave free; the same filter at the principal's own allowance, where the
owner gave it one; and that the budget is not written off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from importlib.metadata import version
from typing import Literal

from sqlalchemy.orm import Session

from cloister.wire.plans import Event, Quote
from cloister.wire.queries import QueryEvent
from cloister.wire.sources import BlockBudget, Budget
from cloister_privacy.accounting import Filter, Fit, epsilon_by_rdp, least_noise_multiplier, rdp_per_step
from cloister_privacy.overflow import log_weight
from cloister_privacy.queries import rdp_of_pure
from cloister_server import ledger
from cloister_server.errors import BudgetExceeded, Conflict, Invalid, ServerError
from cloister_server.ledger import ALL, Account, Acts, Allowance, Used
from cloister_server.store.queries import blocks_of, is_suspended
from cloister_server.store.tables import Job, LedgerEntry, Source

__all__ = [
    "Budget",
    "Cancelled",
    "ChunkRefused",
    "LedgerEvent",
    "StaleAttempt",
    "TenantSuspended",
    "allow",
    "balance",
    "least_noise",
    "lock",
    "open_chunk",
    "quote",
    "reserve",
    "set_epsilon",
    "settle",
    "write_off",
]

_OVERFLOW_SHARE = 1e-3
"""Of a source's delta: what overflowing steps may add to it. The filter's weights sum to 0.999."""

LedgerEvent = Event | QueryEvent

_Obstacle = Literal["written_off", "budget", "overflow", "allowance_over", "allowance"]

lock = ledger.lock


class StaleAttempt(ServerError):
    """A newer attempt has taken the job over, or the job is over: this one must stop and may write nothing."""


class ChunkRefused(ServerError):
    """Steps that an earlier attempt already ran do not fit the budget a second time."""


class Cancelled(ServerError):
    """The job was asked to stop; it stops at this chunk boundary."""


class TenantSuspended(ServerError):
    """The job's tenant is suspended: an attempt stops at this chunk boundary, and none begins before the tenant is resumed."""


def balance(session: Session, source: Source, *, viewer_id: str | None = None) -> Budget:
    """The cap, what is used and what is left, at the ledger's present revision: of all, or as one principal may see it.

    Told of the block with the least left, and of each block beside it. A viewer sees its own use, and nobody else's.
    """
    acts = ledger.acts(session, source)
    told = [_told(session, source, acts, number, name, viewer_id) for number, name in blocks_of(session, source)]
    least = min(told, key=lambda each: each.left)
    allowance = acts.allowance_of(viewer_id or "")
    return Budget(
        epsilon=source.epsilon,
        delta=source.delta,
        spent=max(each.spent for each in told),
        left=least.left,
        revision=ledger.newest(session, source),
        blocks=tuple(told),
        allowance=allowance.epsilon,
        allowance_expires=allowance.expires,
    )


def quote(
    session: Session,
    source: Source,
    event: LedgerEvent,
    *,
    principal_id: str,
    blocks: Sequence[int],
    is_of_all: bool,
) -> Quote:
    """What the budget would be after this event, in the block that it leaves least of: used by all, or by the principal alone.

    Nothing is written.
    """
    acts = ledger.acts(session, source)
    places = [_place(session, source, acts, block, principal_id, event) for block in sorted(set(blocks))]
    fits = all(_obstacle(place) is None for place in places)
    place = min(places, key=lambda each: each.filter.left(each.after.rdp))
    used, own = (place.after, place.own_after) if fits else (place.before, place.own)
    before, after = (place.before, place.after) if is_of_all else (place.own, place.own_after)
    return Quote(
        revision=ledger.newest(session, source),
        cap=source.epsilon,
        delta=source.delta,
        before=place.filter.spent(before.rdp),
        after=place.filter.spent(after.rdp),
        left=_left(acts, place.filter, used, own, acts.allowance_of(principal_id)),
        fits=fits,
        block=place.block,
    )


def least_noise(
    session: Session,
    source: Source,
    *,
    principal_id: str,
    blocks: Sequence[int],
    sampling_rate: float,
    steps: int,
) -> float:
    """The least noise multiplier with which so many steps fit what is left, in each of these blocks. Raises BudgetExceeded."""
    acts = ledger.acts(session, source)
    fits: list[Fit | None] = []
    for block in sorted(set(blocks)):
        account = ledger.account(session, source, block)
        own = ledger.used_by(session, source, account, principal_id) if account.filter is not None else account.used
        allowed = acts.allowance_of(principal_id).epsilon
        fits.append(_largest(source, account, own, allowed, sampling_rate=sampling_rate, steps=steps))
    if acts.is_written_off or acts.allowance_of(principal_id).is_over or any(fit is None for fit in fits):
        raise BudgetExceeded(
            f"nothing is left of what source {source.name!r} allows for a run of this shape; plan fewer steps or a smaller batch, "
            "or ask the source's owner to raise the budget",
            details={"left": 0.0, "largest_epsilon": None, "owners": [source.owner_id]},
        )
    return max(fit.noise_multiplier for fit in fits if fit is not None)


def reserve(
    session: Session,
    source: Source,
    *,
    job_id: str,
    principal_id: str,
    event: LedgerEvent,
    blocks: Sequence[int],
) -> list[LedgerEntry]:
    """Charge a whole run to every block that it reads, before it touches data, so that a crash never under-counts.

    Gives the reservations. Raises BudgetExceeded, with what is left, and writes nothing then. The caller holds
    `lock(session, source)`.
    """
    acts = ledger.acts(session, source)
    places = [_place(session, source, acts, block, principal_id, event) for block in sorted(set(blocks))]
    for place in places:
        obstacle = _obstacle(place)
        if obstacle is not None:
            raise _refusal(place, event, obstacle)
    return [_reserve(session, place, job_id=job_id, principal_id=principal_id, event=event) for place in places]


def open_chunk(session: Session, *, tenant_id: str, job_id: str, attempt: int, first_step: int, steps: int) -> None:
    """Write steps [first_step, first_step + steps) of an attempt ahead of their first read of data.

    Raises StaleAttempt where the attempt is not the job's newest, ChunkRefused where steps that an earlier attempt
    already ran do not fit the budget again or it was written off, Cancelled where the job was asked to stop, TenantSuspended
    where its tenant was. Nothing is written then.
    """
    if first_step < 0 or steps < 1:
        raise ValueError("a chunk begins at step 0 or later and has a step at least")
    job = session.get_one(Job, (tenant_id, job_id), populate_existing=True, with_for_update=True)
    if job.attempt != attempt or ledger.entries_of_job(session, tenant_id, job_id, "settle"):
        raise StaleAttempt("a newer attempt has taken this job over, or it is over; this attempt must stop")
    if job.cancel_requested:
        raise Cancelled("the job was cancelled")
    if is_suspended(session, tenant_id):
        raise TenantSuspended("the tenant is suspended; the job goes on from its last checkpoint once it is resumed")
    source = lock(session, session.get_one(Source, (tenant_id, job.source_id)))
    if ledger.acts(session, source).is_written_off:
        raise ChunkRefused(
            "the source's budget was written off, so nothing more is read of its data; nothing was published"
        )
    reserved = ledger.entries_of_job(session, tenant_id, job_id, "reserve")
    opened = ledger.opened(session, tenant_id, job_id)
    extra = opened + steps - max(reserved[0].steps, opened)
    changes = _changes(session, source, reserved, extra) if extra > 0 else []
    ledger.append(
        session, source, "chunk", job.principal_id, used=changes,
        job_id=job_id, attempt=attempt, first_step=first_step, steps=steps,
    )  # fmt: skip


def settle(session: Session, job: Job) -> int:
    """Close a job's account at the steps that its attempts opened; the rest of its reservation is free again.

    Only for a caller that has seen the job's process group dead and holds its lease. Settling twice changes nothing.
    Returns the steps charged.
    """
    source = lock(session, session.get_one(Source, (job.tenant_id, job.source_id)))
    for settled in ledger.entries_of_job(session, job.tenant_id, job.id, "settle"):
        return settled.steps
    reserved = ledger.entries_of_job(session, job.tenant_id, job.id, "reserve")
    opened = ledger.opened(session, job.tenant_id, job.id)
    freed = opened - max(reserved[0].steps, opened)
    changes = _changes(session, source, reserved, freed)
    ledger.append(session, source, "settle", job.principal_id, used=changes, job_id=job.id, steps=opened)
    return opened


def set_epsilon(session: Session, source: Source, *, principal_id: str, epsilon: float, reason: str) -> None:
    """Change what the source allows, as its owner. Raises Invalid where that is below what is used of some block, Conflict where it
    was written off.

    Orders, weights and delta stay as they were frozen. The guarantee is the largest epsilon that was ever in force.
    """
    source = lock(session, source)
    books, acts = ledger.derived(session, source), ledger.acts(session, source)
    _require_in_use(source, acts)
    event = {"was": source.epsilon, "epsilon": epsilon, "reason": reason}
    changed = books.enter(LedgerEntry(kind="budget", event=event))
    for number, _ in blocks_of(session, source):
        account = ledger.account(session, source, number)
        if account.filter is not None:
            _require_room(_at(account.filter, epsilon), account.used, changed.get((number, ALL), account.used), acts)
    source.epsilon = epsilon
    used_by = [(block, holder_id, used) for (block, holder_id), used in sorted(changed.items())]
    ledger.append(session, source, "budget", principal_id, used=used_by, event=event)


def _require_in_use(source: Source, acts: Acts) -> None:
    if acts.is_written_off:
        raise Conflict(
            f"the budget of source {source.name!r} was written off, for good; there is nothing left to allow"
        )


def _require_room(filter_: Filter, before: Used, after: Used, acts: Acts) -> None:
    """Raise Invalid where a block has used more than another epsilon allows, or its overflows would weigh too much there."""
    if any(after.rho) and not filter_.admits(after.rdp, (0.0,) * len(after.rho)):
        least = math.ceil(filter_.spent(after.rdp) * 1000) / 1000
        raise Invalid(
            f"{filter_.epsilon:g} is below what is used already, and what was spent cannot be taken back; give {least:.3f} at least"
        )
    if not after.delta <= _OVERFLOW_SHARE * filter_.delta:
        weight = log_weight(acts.peak) + math.log(_OVERFLOW_SHARE * filter_.delta) - math.log(before.delta)
        most = _down(weight + math.log1p(-math.exp(-weight))) if weight > 0 else 0.0
        raise Invalid(
            f"at epsilon {filter_.epsilon:g} overflowing steps of the runs so far could add over a thousandth to delta, since what "
            f"they add grows as e^epsilon; raise the budget to {most:g} at most"
        )


def allow(
    session: Session,
    source: Source,
    *,
    principal_id: str,
    to: str,
    epsilon: float | None,
    expires: datetime | None,
    reason: str,
) -> None:
    """Bound what one principal may use of the source, in each block and until when; None and None lift the bound."""
    source = lock(session, source)
    _require_in_use(source, ledger.acts(session, source))
    if epsilon is not None and not 0 < epsilon <= source.epsilon:
        raise Invalid(f"an allowance lies above 0 and within the source's {source.epsilon:g}; give one that does")
    event = {
        "principal": to,
        "epsilon": epsilon,
        "expires": None if expires is None else expires.isoformat(),
        "reason": reason,
    }
    ledger.append(session, source, "allowance", principal_id, event=event)


def write_off(session: Session, source: Source, *, principal_id: str, reason: str) -> None:
    """Admit nothing more, ever: it is not known any more what was spent. Jobs that are running stop at their next chunk."""
    ledger.append(session, lock(session, source), "write_off", principal_id, event={"reason": reason})


@dataclass(frozen=True, slots=True)
class _Place:
    """A block as an event of one principal would find it and leave it."""

    source: Source
    acts: Acts
    account: Account
    filter: Filter
    """The block's, or the one that the event would freeze."""
    rdp_per_step: tuple[float, ...]
    cost: Used
    principal_id: str
    before: Used
    own: Used
    """What the principal itself has used."""

    @property
    def block(self) -> int:
        return self.account.block

    @property
    def after(self) -> Used:
        return self.before.plus(self.cost)

    @property
    def own_after(self) -> Used:
        return self.own.plus(self.cost)


def _left(acts: Acts, filter_: Filter, used: Used, own: Used, allowance: Allowance) -> float:
    """What is left of a block for a principal: the least of what the filter, its allowance and the owner's acts leave."""
    if acts.is_written_off or allowance.is_over:
        return 0.0
    left = filter_.left(used.rdp)
    return left if allowance.epsilon is None else min(left, _at(filter_, allowance.epsilon).left(own.rdp))


def _at(filter_: Filter, epsilon: float) -> Filter:
    """The same orders and weights at another epsilon."""
    return replace(filter_, epsilon=epsilon)


def _place(session: Session, source: Source, acts: Acts, block: int, principal_id: str, event: LedgerEvent) -> _Place:
    account = ledger.account(session, source, block)
    filter_ = account.filter or Filter.frozen_by(
        lambda orders: _rdp_per_step(event, orders), steps=event.steps, epsilon=source.epsilon, delta=source.delta
    )
    rdp = _rdp_per_step(event, filter_.orders)
    before = own = nothing = Used.nothing(len(filter_.orders))
    if account.filter is not None:
        before, own = account.used, ledger.used_by(session, source, account, principal_id)
    each = ledger.rate(rdp, event.overflow, event.steps, cap=source.epsilon, peak=acts.peak)
    return _Place(source, acts, account, filter_, rdp, nothing.plus(each, times=event.steps), principal_id, before, own)


def _rdp_per_step(event: LedgerEvent, orders: tuple[float, ...]) -> tuple[float, ...]:
    if isinstance(event, QueryEvent):
        return tuple(rdp_of_pure(event.epsilon, orders=orders))
    return rdp_per_step(event.sampling_rate, event.noise_multiplier, orders=orders)


@cache
def _versions(library: str) -> dict[str, str]:
    """Of the code that charges, and of the library that accounts or releases."""
    return {name: version(name) for name in ("cloister", library)}


def _finite(rdp: tuple[float, ...]) -> list[float | None]:
    """As JSON has it, which knows no infinity."""
    return [each if each < math.inf else None for each in rdp]


def _reserve(session: Session, place: _Place, *, job_id: str, principal_id: str, event: LedgerEvent) -> LedgerEntry:
    source, block, filter_ = place.source, place.block, place.filter
    if place.account.filter is None:
        frozen = {**ledger.terms_of(source), "orders": filter_.orders, "weights": filter_.weights}
        ledger.append(session, source, "freeze", principal_id, block=block, event=frozen)
    holders = {**(place.account.unwritten or {}), ALL: place.after, principal_id: place.own_after}
    return ledger.append(
        session, source, "reserve", principal_id,
        used=[(block, holder_id, used) for holder_id, used in holders.items()],
        block=block, job_id=job_id, steps=event.steps, overflow=event.overflow,
        event={
            **event.model_dump(),
            "sampler": "none" if isinstance(event, QueryEvent) else "poisson",
            "versions": _versions("opendp" if isinstance(event, QueryEvent) else "opacus"),
            "rdp_per_step": _finite(place.rdp_per_step),
            "cap": source.epsilon,
        },
    )  # fmt: skip


def _changes(
    session: Session, source: Source, reserved: Sequence[LedgerEntry], steps: int
) -> list[tuple[int, str, Used]]:
    """The balances after so many steps more, or less, than a job is charged now. Raises ChunkRefused where more do not fit."""
    acts, changes = ledger.acts(session, source), []
    for row in reserved if steps else ():
        account = ledger.account(session, source, row.block)
        assert account.filter is not None  # noqa: S101 (a reserved job's block is frozen)
        each = ledger.per_step(row, peak=acts.peak)
        after = account.used.plus(each, times=steps)
        used_so_far = ledger.used_by(session, source, account, row.principal_id)
        own = used_so_far.plus(each, times=steps)
        extra = tuple(steps * rho for rho in each.rdp)
        allowance = acts.allowance_of(row.principal_id)
        bound = account.filter if allowance.epsilon is None else _at(account.filter, allowance.epsilon)
        if steps > 0 and not (
            account.filter.admits(account.used.rdp, extra)
            and after.delta <= _OVERFLOW_SHARE * source.delta
            and not allowance.is_over
            and bound.admits(used_so_far.rdp, extra)
        ):
            raise ChunkRefused(
                "steps lost in a crash must be paid for again and do not fit what is left of the budget; ask an owner "
                "to raise it, then start a new job"
            )
        holders = {**(account.unwritten or {}), ALL: after, row.principal_id: own}
        changes += [(row.block, holder_id, used) for holder_id, used in holders.items()]
    return changes


def _told(session: Session, source: Source, acts: Acts, number: int, name: str, viewer_id: str | None) -> BlockBudget:
    account, allowance = ledger.account(session, source, number), acts.allowance_of(viewer_id or "")
    if account.filter is None:
        left = min(source.epsilon, allowance.epsilon or source.epsilon)
        is_closed = acts.is_written_off or allowance.is_over
        return BlockBudget(number=number, name=name, spent=0.0, left=0.0 if is_closed else left)
    own = account.used if viewer_id is None else ledger.used_by(session, source, account, viewer_id)
    left = _left(acts, account.filter, account.used, own, allowance)
    return BlockBudget(number=number, name=name, spent=account.filter.spent(own.rdp), left=left)


def _obstacle(place: _Place) -> _Obstacle | None:
    """What keeps an event from being admitted, or None."""
    allowance = place.acts.allowance_of(place.principal_id)
    if place.acts.is_written_off:
        return "written_off"
    if not place.filter.admits(place.before.rdp, place.cost.rdp):
        return "budget"
    if not place.after.delta <= _OVERFLOW_SHARE * place.source.delta:
        return "overflow"
    if allowance.is_over:
        return "allowance_over"
    if allowance.epsilon is not None and not _at(place.filter, allowance.epsilon).admits(place.own.rdp, place.cost.rdp):
        return "allowance"
    return None


def _largest(
    source: Source, account: Account, own: Used, allowed: float | None, *, sampling_rate: float, steps: int
) -> Fit | None:
    """The costliest run of these steps that a block, and a principal's allowance, still admit; None where they admit none."""

    def per_step(noise_multiplier: float, orders: tuple[float, ...]) -> tuple[float, ...]:
        return rdp_per_step(sampling_rate, noise_multiplier, orders=orders)

    def suffices(noise_multiplier: float) -> bool:
        filter_ = account.filter or Filter.frozen_by(
            partial(per_step, noise_multiplier), steps=steps, epsilon=source.epsilon, delta=source.delta
        )
        nothing = Used.nothing(len(filter_.orders))
        cost = nothing.plus(Used.of(per_step(noise_multiplier, filter_.orders)), times=steps).rdp
        used, own_used = (account.used, own) if account.filter is not None else (nothing, nothing)
        return filter_.admits(used.rdp, cost) and (allowed is None or _at(filter_, allowed).admits(own_used.rdp, cost))

    noise_multiplier = least_noise_multiplier(suffices)
    if noise_multiplier is None:
        return None
    epsilon = epsilon_by_rdp(sampling_rate, noise_multiplier, steps=steps, delta=source.delta)
    return Fit(noise_multiplier, epsilon)


def _refusal(place: _Place, event: LedgerEvent, obstacle: _Obstacle) -> BudgetExceeded:
    """Why an event is not admitted to a block: what was asked, what is left, and what to do."""
    source, allowance = place.source, place.acts.allowance_of(place.principal_id)
    match obstacle:
        case "written_off":
            return BudgetExceeded(
                f"the budget of source {source.name!r} was written off, since it is not known any more what was spent; nothing is "
                "ever trained on its data again",
                details={"owners": [source.owner_id]},
            )
        case "allowance_over":
            return BudgetExceeded(
                f"your allowance of source {source.name!r} ended on {allowance.expires:%Y-%m-%d}; ask the source's owner for a "
                "new one",
                code="allowance_expired",
                details={"owners": [source.owner_id]},
            )
        case "overflow":
            room = max(0.0, _OVERFLOW_SHARE * source.delta - place.before.delta)
            return BudgetExceeded(
                f"steps of this run that draw more units than there are slots may add {event.overflow:.3g} to delta, and source "
                f"{source.name!r} has {room:.3g} left for that; plan with a smaller delta, which gives every step more slots",
                details={"overflow": event.overflow, "overflow_left": room, "owners": [source.owner_id]},
            )
        case "budget":
            return _over(place, event, place.filter, place.before, "")
        case "allowance":
            assert allowance.epsilon is not None  # noqa: S101 (it is what was exceeded)
            return _over(place, event, _at(place.filter, allowance.epsilon), place.own, "your allowance of ")


def _over(place: _Place, event: LedgerEvent, filter_: Filter, used: Used, whose: str) -> BudgetExceeded:
    """What was asked, what is left, and the largest run of this shape that fits; epsilons told at the source's delta."""
    source, left, fit = place.source, filter_.left(used.rdp), None
    if isinstance(event, QueryEvent):
        asked, kind, advice = event.epsilon, "query", "ask with a smaller epsilon"
    else:
        kind, q = "run", event.sampling_rate
        asked = epsilon_by_rdp(q, event.noise_multiplier, steps=event.steps, delta=source.delta)
        allowed = place.acts.allowance_of(place.principal_id).epsilon
        fit = _largest(source, place.account, place.own, allowed, sampling_rate=q, steps=event.steps)
        advice = (
            f"the largest run of this shape that fits has epsilon {_down(fit.epsilon):.3f} on its own; plan a smaller one"
            if fit
            else "no run of this shape fits; plan fewer steps or a smaller batch"
        )
    where = f" in block {place.block}" if place.block else ""
    return BudgetExceeded(
        f"this {kind} of epsilon {asked:.3f} does not fit the {left:.3f} left of the {filter_.epsilon:g} that {whose}source "
        f"{source.name!r} allows{where}; {advice}, or ask the source's owner to raise the budget",
        details={
            "asked": asked,
            "left": left,
            "largest_epsilon": fit.epsilon if fit else None,
            "owners": [source.owner_id],
            "block": place.block,
        },
    )


def _down(epsilon: float) -> float:
    """To three digits, and never up: what a message names must be admitted."""
    return math.floor(epsilon * 1000) / 1000
