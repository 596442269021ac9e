"""The privacy ledger: reserve, open chunks, settle. Knows SQL and the filter's arithmetic; nothing of HTTP or torch.

Every balance is derived from append-only rows. A job is charged the larger of what it reserved and what its attempts
opened until it is settled, and what they opened afterwards. Two conditions admit: the filter's, and that overflowing
steps of all jobs together add at most a thousandth to delta, which the filter's weights leave free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cloister.wire.plans import Event, Quote
from cloister.wire.sources import Budget
from cloister_privacy.accounting import Filter, epsilon_by_rdp, largest, rdp_per_step
from cloister_privacy.overflow import log_weight
from cloister_server.errors import BudgetExceeded, ServerError
from cloister_server.store.tables import Job, LedgerEntry, Source

__all__ = [
    "Budget",
    "Cancelled",
    "ChunkRefused",
    "StaleAttempt",
    "balance",
    "lock",
    "open_chunk",
    "quote",
    "reserve",
    "settle",
]

_OVERFLOW_SHARE = 1e-3
"""Of a source's delta: what overflowing steps may add to it. The filter's weights sum to 0.999."""


class StaleAttempt(ServerError):
    """A newer attempt has taken the job over, or the job is over: this one must stop and may write nothing."""


class ChunkRefused(ServerError):
    """Steps that an earlier attempt already ran do not fit the budget a second time."""


class Cancelled(ServerError):
    """The job was asked to stop; it stops at this chunk boundary."""


@dataclass(frozen=True, slots=True)
class _Account:
    """A source's filter and what it has used, at one revision. `filter` is None before the first event.

    `overflow` is what overflowing steps may add to delta, at the source's present epsilon.
    """

    revision: int
    filter: Filter | None
    used: tuple[float, ...]
    overflow: float


def balance(session: Session, source: Source) -> Budget:
    """The cap, what the filter has used and what is left, at the ledger's present revision."""
    account = _account(session, source)
    spent, left = _spent_and_left(source, account.filter, account.used)
    return Budget(epsilon=source.epsilon, delta=source.delta, spent=spent, left=left, revision=account.revision)


def quote(session: Session, source: Source, event: Event) -> Quote:
    """What the budget would be after this event. Nothing is written."""
    account = _account(session, source)
    filter_ = account.filter or _first_filter(source, event)
    used = account.used or (0.0,) * len(filter_.orders)
    cost = _cost(_rdp_per_step(filter_, event), event.steps)
    fits = filter_.admits(used, cost) and _holds_overflow(source, account.overflow, event.overflow)
    before, left_now = _spent_and_left(source, account.filter, account.used)
    after, left_after = _spent_and_left(source, filter_, _add(used, cost))
    return Quote(
        revision=account.revision,
        cap=source.epsilon,
        delta=source.delta,
        before=before,
        after=after,
        left=left_after if fits else left_now,
        fits=fits,
    )


def lock(session: Session, source: Source) -> None:
    """Take the source's one row lock: every write to its ledger stands in line here."""
    session.execute(
        select(Source.id).where(Source.tenant_id == source.tenant_id, Source.id == source.id).with_for_update()
    )


def reserve(session: Session, source: Source, *, job_id: str, principal_id: str, event: Event) -> None:
    """Charge a whole run before it touches data, so that a crash never under-counts.

    Raises BudgetExceeded, with what is left, and writes nothing then. The caller holds `lock(session, source)`.
    """
    account = _account(session, source)
    filter_ = account.filter or _first_filter(source, event)
    used = account.used or (0.0,) * len(filter_.orders)
    per_step = _rdp_per_step(filter_, event)
    if not filter_.admits(used, _cost(per_step, event.steps)):
        raise _refusal(source, account, event)
    if not _holds_overflow(source, account.overflow, event.overflow):
        raise _overflow_refusal(source, account, event)
    revision = account.revision
    if account.filter is None:
        revision += 1
        frozen = {
            "epsilon": filter_.epsilon,
            "delta": filter_.delta,
            "orders": filter_.orders,
            "weights": filter_.weights,
        }
        session.add(_entry(source, revision, "freeze", principal_id, event=frozen))
        session.flush()  # rows of one transaction stand in the order of their revisions
    session.add(
        _entry(
            source, revision + 1, "reserve", principal_id,
            job_id=job_id, steps=event.steps, overflow=event.overflow,
            event={**event.model_dump(), "rdp_per_step": per_step, "cap": source.epsilon},
        )
    )  # fmt: skip


def open_chunk(session: Session, *, tenant_id: str, job_id: str, attempt: int, first_step: int, steps: int) -> None:
    """Write steps [first_step, first_step + steps) of an attempt ahead of their first read of data.

    Raises StaleAttempt where the attempt is not the job's newest, ChunkRefused where steps that an earlier attempt
    already ran do not fit the budget again, Cancelled where the job was asked to stop. Nothing is written then.
    """
    job = session.get_one(Job, (tenant_id, job_id), populate_existing=True, with_for_update=True)
    is_over = session.scalars(_of_job(tenant_id, job_id, "settle")).one_or_none() is not None
    if job.attempt != attempt or is_over:
        raise StaleAttempt("a newer attempt has taken this job over, or it is over; this attempt must stop")
    if job.cancel_requested:
        raise Cancelled("the job was cancelled")
    source = session.get_one(Source, (tenant_id, job.source_id))
    lock(session, source)
    reserved = session.scalars(_of_job(tenant_id, job_id, "reserve")).one()
    opened = _opened(session, tenant_id, job_id)
    extra = opened + steps - max(reserved.steps, opened)
    account = _account(session, source)
    if extra > 0:
        assert account.filter is not None  # noqa: S101 (a reserved job's source is frozen)
        if not (
            account.filter.admits(account.used, _cost(tuple(reserved.event["rdp_per_step"]), extra))
            and _holds_overflow(source, account.overflow, _overflow(source, reserved, extra))
        ):
            raise ChunkRefused(
                "steps lost in a crash must be paid for again and do not fit what is left of the budget; ask an owner "
                "to raise it, then start a new job"
            )
    session.add(
        _entry(
            source, account.revision + 1, "chunk", job.principal_id,
            job_id=job_id, attempt=attempt, first_step=first_step, steps=steps,
        )
    )  # fmt: skip


def settle(session: Session, job: Job) -> int:
    """Close a job's account at the steps that its attempts opened; the rest of its reservation is free again.

    Only for a caller that has seen the job's process group dead and holds its lease. Settling twice changes nothing.
    Returns the steps charged.
    """
    source = session.get_one(Source, (job.tenant_id, job.source_id))
    lock(session, source)
    settled = session.scalars(_of_job(job.tenant_id, job.id, "settle")).one_or_none()
    if settled is not None:
        return int(settled.steps)
    opened = _opened(session, job.tenant_id, job.id)
    session.add(_entry(source, _revision(session, source) + 1, "settle", job.principal_id, job_id=job.id, steps=opened))
    return opened


def _entry(source: Source, revision: int, kind: str, principal_id: str, **values: Any) -> LedgerEntry:
    return LedgerEntry(
        tenant_id=source.tenant_id,
        source_id=source.id,
        revision=revision,
        kind=kind,
        principal_id=principal_id,
        **values,
    )


def _of_source(source: Source, kind: str) -> Any:
    return select(LedgerEntry).where(
        LedgerEntry.tenant_id == source.tenant_id, LedgerEntry.source_id == source.id, LedgerEntry.kind == kind
    )


def _of_job(tenant_id: str, job_id: str, kind: str) -> Any:
    return select(LedgerEntry).where(
        LedgerEntry.tenant_id == tenant_id, LedgerEntry.job_id == job_id, LedgerEntry.kind == kind
    )


def _opened(session: Session, tenant_id: str, job_id: str) -> int:
    opened = select(func.coalesce(func.sum(LedgerEntry.steps), 0)).where(
        LedgerEntry.tenant_id == tenant_id, LedgerEntry.job_id == job_id, LedgerEntry.kind == "chunk"
    )
    return int(session.scalar(opened) or 0)


def _revision(session: Session, source: Source) -> int:
    newest = select(func.coalesce(func.max(LedgerEntry.revision), 0)).where(
        LedgerEntry.tenant_id == source.tenant_id, LedgerEntry.source_id == source.id
    )
    return int(session.scalar(newest) or 0)


def _account(session: Session, source: Source) -> _Account:
    frozen = session.scalars(_of_source(source, "freeze")).one_or_none()
    if frozen is None:
        return _Account(_revision(session, source), None, (), 0.0)
    filter_ = Filter(
        epsilon=source.epsilon,
        delta=source.delta,
        orders=tuple(frozen.event["orders"]),
        weights=tuple(frozen.event["weights"]),
    )
    in_source = (LedgerEntry.tenant_id == source.tenant_id, LedgerEntry.source_id == source.id)
    by_job = select(LedgerEntry.job_id, func.sum(LedgerEntry.steps)).group_by(LedgerEntry.job_id)
    opened = {job: int(n) for job, n in session.execute(by_job.where(*in_source, LedgerEntry.kind == "chunk"))}
    settled = {job: int(n) for job, n in session.execute(by_job.where(*in_source, LedgerEntry.kind == "settle"))}
    used, overflow = (0.0,) * len(filter_.orders), 0.0
    for reserved in session.scalars(_of_source(source, "reserve")):
        charged = settled.get(reserved.job_id, max(reserved.steps, opened.get(reserved.job_id, 0)))
        used = _add(used, _cost(tuple(reserved.event["rdp_per_step"]), charged))
        overflow += _overflow(source, reserved, charged)
    return _Account(_revision(session, source), filter_, used, overflow)


def _first_filter(source: Source, event: Event) -> Filter:
    return Filter.frozen_by(
        lambda orders: rdp_per_step(event.sampling_rate, event.noise_multiplier, orders=orders),
        steps=event.steps,
        epsilon=source.epsilon,
        delta=source.delta,
    )


def _rdp_per_step(filter_: Filter, event: Event) -> tuple[float, ...]:
    return rdp_per_step(event.sampling_rate, event.noise_multiplier, orders=filter_.orders)


def _cost(per_step: tuple[float, ...], steps: int) -> tuple[float, ...]:
    return tuple(rho * steps for rho in per_step)


def _overflow(source: Source, reserved: LedgerEntry, steps: int) -> float:
    """What `steps` steps of a job may add to delta by overflowing, at the source's present epsilon; never less than when reserved."""
    if reserved.overflow == 0:
        return 0.0
    raised = log_weight(source.epsilon) - log_weight(reserved.event["cap"])
    return reserved.overflow * steps / reserved.steps * math.exp(min(max(0.0, raised), 700.0))


def _holds_overflow(source: Source, used: float, more: float) -> bool:
    return more >= 0 and used + more <= _OVERFLOW_SHARE * source.delta  # False for what is not a number, too


def _add(used: tuple[float, ...], more: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(used, more, strict=True))


def _spent_and_left(source: Source, filter_: Filter | None, used: tuple[float, ...]) -> tuple[float, float]:
    if filter_ is None:
        return 0.0, source.epsilon
    return filter_.spent(used), filter_.left(used)


def _refusal(source: Source, account: _Account, event: Event) -> BudgetExceeded:
    """What was asked, what is left, and the largest run of this shape that fits; epsilons told at the source's delta."""
    asked = epsilon_by_rdp(event.sampling_rate, event.noise_multiplier, steps=event.steps, delta=source.delta)
    _, left = _spent_and_left(source, account.filter, account.used)
    fit = largest(
        event.sampling_rate,
        event.steps,
        delta=source.delta,
        filter=account.filter or (source.epsilon, source.delta),
        used=account.used,
    )
    advice = (
        f"the largest run of this shape that fits has epsilon {fit.epsilon:.3f} on its own"
        if fit
        else "no run of this shape fits"
    )
    return BudgetExceeded(
        f"this run of epsilon {asked:.3f} does not fit the {left:.3f} left of the {source.epsilon:g} that source "
        f"{source.name!r} allows; "
        f"{advice}; plan a smaller one, or ask the source's owner to raise the budget",
        details={
            "asked": asked,
            "left": left,
            "largest_epsilon": fit.epsilon if fit else None,
            "owners": [source.owner_id],
        },
    )


def _overflow_refusal(source: Source, account: _Account, event: Event) -> BudgetExceeded:
    """The filter would admit the run, but overflowing steps might add too much to delta."""
    room = max(0.0, _OVERFLOW_SHARE * source.delta - account.overflow)
    return BudgetExceeded(
        f"steps of this run that draw more units than there are slots may add {event.overflow:.3g} to delta, and source "
        f"{source.name!r} has {room:.3g} left for that; plan with a smaller delta, which gives every step more slots",
        details={"overflow": event.overflow, "overflow_left": room, "owners": [source.owner_id]},
    )
