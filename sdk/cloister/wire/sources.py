"""Sources (the people behind the data, who own unit and budget) and the datasets that are uploaded under them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from cloister.wire._model import Body, Count, Identifier, Name, PositiveFloat, Probability, Response
from cloister.wire.columns import Schema, UnitColumn

__all__ = [
    "Allowance",
    "Block",
    "BlockBudget",
    "Budget",
    "CreateDataset",
    "CreateSource",
    "Dataset",
    "OpenBlock",
    "PartReceipt",
    "SetAllowance",
    "SetBudget",
    "Source",
]

Unit = Literal["row", "user"]
_Epsilon = Annotated[PositiveFloat, Field(le=1000)]
_Reason = Annotated[str, Field(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""One line of text."""


class CreateSource(Body):
    """Declare a source: an owner's audited act. Unit, adjacency, delta and `public` never change afterwards."""

    name: Name
    unit: Unit = "row"
    adjacency: Literal["add_remove"] = "add_remove"
    epsilon: _Epsilon
    delta: Annotated[Probability, Field(le=0.1)]
    public: bool = False
    """Declared public: audits may train on it. Never true of data about people."""


class SetBudget(Body):
    """Change what a source allows: an owner's audited act. Never below what is used."""

    epsilon: _Epsilon
    reason: _Reason


class SetAllowance(Body):
    """Bound what one app may use of a source, in each of its blocks, and until when. With neither, the bound is lifted."""

    epsilon: _Epsilon | None = None
    expires: AwareDatetime | None = None
    """Afterwards the app may use nothing more."""
    reason: _Reason


class Allowance(Response):
    """An app's or a person's part of a source's budget, as its owner set it."""

    source: Identifier
    client: Identifier
    epsilon: float | None
    expires: datetime | None


class OpenBlock(Body):
    """Open a block under a source: its owner's word that whoever comes in it is in no earlier one. New people, new budget."""

    name: Name
    reason: _Reason
    """Why its people are new ones."""


class Block(Response):
    """A part of a source's people, disjoint from the others, with a budget of its own. Every source begins with block 0."""

    source: Identifier
    number: int
    name: str


class BlockBudget(Response):
    number: int
    name: str
    spent: float
    left: float


class Budget(Response):
    """What the filter has used: 'spent' is filter usage, not a DP statement of its own.

    Owners see what all have used; everyone else sees their own use, their allowance, and what is left for them.
    """

    epsilon: float
    """The cap of each block."""
    delta: float
    spent: float
    """In the block where it is most."""
    left: float
    """In the block where it is least."""
    revision: int
    """The number of ledger rows of this source; a plan is quoted at one revision."""
    blocks: tuple[BlockBudget, ...] = ()
    allowance: float | None = None
    """The most that you may use, in each block; None where only the cap bounds it."""
    allowance_expires: datetime | None = None


class Source(Response):
    id: Identifier
    name: str
    unit: Unit | str
    adjacency: str
    public: bool
    budget: Budget
    created: datetime


class CreateDataset(Body):
    """Declare a dataset before its rows: all numbers here are public, and none may default to a row count."""

    source: Identifier
    name: Name
    block: Name | None = None
    """The block that its people belong to, by name; by default the source's first."""
    columns: Schema
    nominal_size: Count
    """About how many units there are, as you would tell a stranger: q, steps and divisor follow from it."""
    capacity: Count
    """The most units there can be, >= nominal_size: sealed size and work follow from it."""
    capacity_rows: Count | None = None
    """The most rows there can be, where the unit is a user; otherwise a row is a unit."""

    @model_validator(mode="after")
    def _numbers_agree(self) -> CreateDataset:
        if self.capacity < self.nominal_size:
            raise ValueError(f"capacity ({self.capacity}) must be at least nominal_size ({self.nominal_size})")
        units = [name for name, column in self.columns.items() if isinstance(column, UnitColumn)]
        if len(units) > 1:
            raise ValueError(f"at most one column may be the unit; here are {', '.join(units)}")
        if self.capacity_rows is not None and self.capacity_rows < self.capacity:
            raise ValueError(f"capacity_rows ({self.capacity_rows}) must be at least capacity ({self.capacity})")
        return self


class Dataset(Response):
    """A dataset as anyone who may see it sees it. The number of rows is nobody's business, and not here."""

    id: Identifier
    name: str
    source: Identifier
    block: int = 0
    columns: Schema
    nominal_size: int
    capacity: int
    capacity_rows: int
    status: Literal["uploading", "ready"] | str
    created: datetime


class PartReceipt(Response):
    """What the uploader hears of an accepted part. Its answer is kept for retries, so it says nothing of the rows."""

    part: int
