"""Training jobs and the model versions that they publish."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from cloister.wire._model import Body, Identifier, Name, Response
from cloister.wire.columns import CategoryColumn, InputColumn
from cloister.wire.plans import TrainingSpec

__all__ = ["FINAL", "Job", "Model", "ModelSchema", "ModelVersion", "Page", "StartJob"]

FINAL = frozenset({"done", "failed", "cancelled"})
"""The states that a job never leaves."""


class StartJob(Body):
    """Reserve the run's whole budget and queue it. Refused, the ledger is unchanged."""

    training: TrainingSpec
    model: Name
    """The model that the new version goes to; made where the tenant has none of that name."""
    require_revision: int | None = Field(default=None, ge=0)
    """Refuse if the source's ledger moved since this revision."""


class Job(Response):
    id: Identifier
    kind: Literal["train", "query"] | str = "train"
    model: Identifier | None
    """What a training run publishes to; none for a query."""
    dataset: Identifier
    status: Literal["queued", "running", "cancelling", "done", "failed", "cancelled"] | str
    steps: int
    steps_done: int
    """Told at chunk boundaries only, and never with a time."""
    epsilon: float
    delta: float
    version: int | None = None
    """The published version, once done."""
    error: str | None = None
    """Why it failed, in words that say nothing of rows."""
    error_code: str | None = None
    request_id: str | None = None
    """The request that started it: what to quote to the operator."""
    created: datetime


class ModelVersion(Response):
    model: Identifier
    name: str
    version: int
    job: Identifier
    certificate: dict[str, Any]
    """A DSSE envelope; `cloister.wire.certificate.verify` opens it."""
    created: datetime


class Model(Response):
    id: Identifier
    name: str
    champion: int | None
    """The version that is served where none is named; none until one is published."""
    created: datetime


class ModelSchema(Response):
    """What a model version reads and predicts: the declared columns, all public numbers and names."""

    inputs: Annotated[dict[str, InputColumn], Field(min_length=1)]
    target: str
    output: InputColumn

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The values that a predicted index stands for, in order; None where a number is predicted."""
        return self.output.values if isinstance(self.output, CategoryColumn) else None


class Page(Response):
    """One page of a listing; `next` is the cursor of the following one."""

    items: list[dict[str, Any]]
    next: str | None = None
