"""A source's ledger as people read it: a line for each job, and the owner's acts. Every number of it is public or was charged for."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from cloister.wire._model import Identifier, Response

__all__ = ["BudgetEntry", "Charge", "LedgerPage"]


class Charge(Response):
    """The mechanism that a job runs, and what of it the ledger charges: composed `steps` times."""

    mechanism: Literal["poisson_subsampled_gaussian", "discrete_laplace"] | str
    steps: int
    noise_multiplier: float | None = None
    sampling_rate: float | None = None
    epsilon: float | None = None
    """Of a query, whose answers are a release of pure epsilon."""


class BudgetEntry(Response):
    """A job in one block that it reads, or an act of the source's owner. What does not belong to its kind is None.

    Owners see all of them and whose they are; everyone else sees its own jobs, and the acts about its own allowance, without
    their reasons.
    """

    revision: int
    """The ledger row that this begins with."""
    time: datetime
    """Of that row: when the job was started, or the act done."""
    kind: Literal["train", "query", "job", "block", "budget", "allowance", "write_off"] | str
    """'job' where a restore brought the charge back and not the job."""
    principal: str | None = None
    """Who started the job or did the act: told to owners alone."""
    principal_name: str | None = None
    """Its name, `TENANT/NAME` of another tenant's; None where there is no such client any more."""

    block: str | None = None
    """The name of the block that a job is charged to, with an entry in each where it reads several; or of the one that was opened."""
    job: Identifier | None = None
    model: str | None = None
    dataset: str | None = None
    """The first dataset of the job, where it is of this block."""
    steps_reserved: int | None = None
    steps_charged: int | None = None
    """Until the job is settled, the larger of what it reserved and what all of its attempts opened."""
    is_settled: bool | None = None
    charge: Charge | None = None
    epsilon: float | None = None
    """Of a job: its own, at `delta`, as if it were the only one ever. Of a budget: the cap from here on. Of an allowance: the most
    that `client` may use in each block; None where it is no longer bounded."""
    delta: float | None = None
    spent: float | None = None
    """Of a job: what was used of the block right after its reservation, by all for an owner, by the viewer alone for anyone else.
    A job that is settled for fewer steps gives the others back later."""

    was: float | None = None
    """Of a budget: the cap before."""
    client: str | None = None
    """Of an allowance: whom it bounds."""
    client_name: str | None = None
    expires: datetime | None = None
    """Of an allowance: when it ends."""
    reason: str | None = None
    """Of an act: why, in the owner's words."""


class LedgerPage(Response):
    """Some entries, oldest first; `next` is the cursor of the following page."""

    is_of_all: bool
    """Whether these are the entries of all (the viewer owns the source), or of the viewer alone."""
    items: tuple[BudgetEntry, ...]
    next: str | None = None
