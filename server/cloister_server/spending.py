"""What was spent of a source, as whoever asks may see it. Knows SQL and the ledger; admits and charges nothing.

A job is one line in each block that it reads, however many chunks and attempts it took: when those were opened is told to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, func, or_, select
from sqlalchemy.orm import Session

from cloister.wire.ledger import BudgetEntry, Charge, LedgerPage
from cloister_privacy.accounting import Filter
from cloister_server import ledger, policy, sources
from cloister_server.errors import Invalid
from cloister_server.ledger import ALL, Books, Used
from cloister_server.principal import Principal
from cloister_server.store.queries import blocks_of, names_of_principals
from cloister_server.store.tables import Balance, Dataset, Job, LedgerEntry, Model, Source

__all__ = ["of_source"]

_ACTS = ("block", "budget", "allowance", "write_off")


def of_source(session: Session, principal: Principal, id_or_name: str, *, cursor: str | None, limit: int) -> LedgerPage:
    """Up to `limit` lines after the cursor, oldest first: of all for an owner, of the principal alone for everyone else.

    Who is no owner sees its own jobs and what was done about its own allowance: no other principal, and no reason. Raises Invalid
    on a cursor of no page.
    """
    source = policy.find(session, principal, "source.read", Source, id_or_name).resource
    viewer_id = None if sources.is_owned(session, principal, source) else principal.id
    after = 0 if cursor is None else _revision(cursor)
    rows = list(session.scalars(_lines(source, viewer_id).where(LedgerEntry.revision > after).limit(limit + 1)))
    more, rows = len(rows) > limit, rows[:limit]
    view = _view(session, source, rows, viewer_id)
    return LedgerPage(
        is_of_all=viewer_id is None,
        items=tuple(view.entry(row) for row in rows),
        next=str(rows[-1].revision) if more else None,
    )


@dataclass(frozen=True, slots=True)
class _View:
    """What the lines of one page tell beside their rows."""

    viewer_id: str | None
    names: Mapping[str, str]
    blocks: Mapping[int, str]
    filters: Mapping[int, Filter]
    used: Mapping[int, Used]
    """By a reservation's revision: of its block, right afterwards."""
    jobs: Mapping[str, Any]
    steps: Mapping[tuple[str, str], int]
    """By job and kind of row, 'chunk' or 'settle'."""

    def entry(self, row: LedgerEntry) -> BudgetEntry:
        told: dict[str, Any] = {"revision": row.revision, "time": row.created, "kind": row.kind}
        if self.viewer_id is None:
            told |= {"principal": row.principal_id, "principal_name": self.names.get(row.principal_id)}
        return BudgetEntry(**told | (self._job(row) if row.kind == "reserve" else self._act(row)))

    def _job(self, row: LedgerEntry) -> dict[str, Any]:
        job, job_id = self.jobs.get(str(row.job_id)), str(row.job_id)
        settled = self.steps.get((job_id, "settle"))
        held = max(row.steps, self.steps.get((job_id, "chunk"), 0))
        told = {
            "kind": "job",
            "block": self.blocks[row.block],
            "job": job_id,
            "steps_reserved": row.steps,
            "steps_charged": held if settled is None else settled,
            "is_settled": settled is not None,
            "charge": Charge.model_validate(row.event),
            "spent": self.filters[row.block].spent(self.used[row.revision].rdp),
        }
        if job is None:
            return told
        dataset = job.dataset if job.block == row.block else None
        more = {"kind": job.kind, "model": job.model, "dataset": dataset, "epsilon": job.epsilon, "delta": job.delta}
        return told | more

    def _act(self, row: LedgerEntry) -> dict[str, Any]:
        event, client = row.event, row.event.get("principal")
        told = {"epsilon": event.get("epsilon"), "expires": event.get("expires"), "client": client}
        if self.viewer_id is None:
            name = None if client is None else self.names.get(client)
            if row.kind == "block":
                told["block"] = event["name"]
            told |= {"was": event.get("was"), "client_name": name, "reason": event.get("reason")}
        return told


def _view(session: Session, source: Source, rows: Sequence[LedgerEntry], viewer_id: str | None) -> _View:
    reserved = [row for row in rows if row.kind == "reserve"]
    job_ids = {str(row.job_id) for row in reserved}
    named = {row.principal_id for row in rows} | {str(row.event.get("principal")) for row in rows}
    filters = {}
    for block in sorted({row.block for row in reserved}):
        frozen = ledger.account(session, source, block).filter
        assert frozen is not None  # noqa: S101 (a reserved job's block is frozen)
        filters[block] = frozen
    return _View(
        viewer_id=viewer_id,
        names=names_of_principals(session, named, seen_from=source.tenant_id) if viewer_id is None else {},
        blocks=dict(blocks_of(session, source)),
        filters=filters,
        used=_used(session, source, reserved, viewer_id or ALL),
        jobs={row.id: row for row in session.execute(_jobs(source, job_ids))},
        steps={(str(row.job_id), row.kind): row.steps for row in session.execute(_steps(source, job_ids))},
    )


def _lines(source: Source, viewer_id: str | None) -> Select[LedgerEntry]:
    """The rows that lines begin with, oldest first: the reservations of a viewer's jobs and the acts about its allowance; or all."""
    of_source = (LedgerEntry.tenant_id == source.tenant_id, LedgerEntry.source_id == source.id)
    lines = select(LedgerEntry).where(*of_source).order_by(LedgerEntry.revision)
    if viewer_id is None:
        return lines.where(LedgerEntry.kind.in_(("reserve", *_ACTS)))
    its_jobs = and_(LedgerEntry.kind == "reserve", LedgerEntry.principal_id == viewer_id)
    its_allowance = and_(LedgerEntry.kind == "allowance", LedgerEntry.event["principal"].as_string() == viewer_id)
    return lines.where(or_(its_jobs, its_allowance))


def _jobs(source: Source, job_ids: Iterable[str]) -> Select[str, str, float, float, str, str, int]:
    """What the jobs are called by; the model of a query is None."""
    columns = (Job.id, Job.kind, Job.epsilon, Job.delta, Model.name.label("model"))
    return (
        select(*columns, Dataset.name.label("dataset"), Dataset.block)
        .join(Dataset, and_(Dataset.tenant_id == Job.tenant_id, Dataset.id == Job.dataset_id))
        .outerjoin(Model, and_(Model.tenant_id == Job.tenant_id, Model.id == Job.model_id))
        .where(Job.tenant_id == source.tenant_id, Job.id.in_(job_ids))
    )


def _steps(source: Source, job_ids: Iterable[str]) -> Select[str | None, str, int]:
    """How many steps all attempts of a job opened, and what it was settled for, where it was."""
    return (
        select(LedgerEntry.job_id, LedgerEntry.kind, func.sum(LedgerEntry.steps).label("steps"))
        .where(
            LedgerEntry.tenant_id == source.tenant_id,
            LedgerEntry.job_id.in_(job_ids),
            LedgerEntry.kind.in_(("chunk", "settle")),
        )
        .group_by(LedgerEntry.job_id, LedgerEntry.kind)
    )


def _used(session: Session, source: Source, reserved: Sequence[LedgerEntry], holder_id: str) -> dict[int, Used]:
    """What the holder had used of each reservation's block right after it."""
    revisions = {row.revision for row in reserved}
    of_source = (Balance.tenant_id == source.tenant_id, Balance.source_id == source.id)
    of_holder = (Balance.holder_id == holder_id, Balance.revision.in_(revisions))
    written = session.execute(select(Balance.revision, Balance.block, Balance.used).where(*of_source, *of_holder))
    block_of = {row.revision: row.block for row in reserved}
    used = {row.revision: Used.of_json(row.used) for row in written if row.block == block_of[row.revision]}
    return used if used.keys() == revisions else _derived(session, source, revisions, holder_id)


def _derived(session: Session, source: Source, revisions: set[int], holder_id: str) -> dict[int, Used]:
    """The same from the rows themselves: balances of the oldest ones were never written down."""
    books, used = Books(), {}
    of_source = (LedgerEntry.tenant_id == source.tenant_id, LedgerEntry.source_id == source.id)
    upto = LedgerEntry.revision <= max(revisions)
    for row in session.scalars(select(LedgerEntry).where(*of_source, upto).order_by(LedgerEntry.revision)):
        changed = books.enter(row)
        if row.revision in revisions:
            used[row.revision] = changed[row.block, holder_id]
    return used


def _revision(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdecimal() and len(cursor) < 10):
        raise Invalid("this cursor is of no page; pass `next` of the page before as it was given")
    return int(cursor)
