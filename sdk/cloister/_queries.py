"""Noisy answers about rows, asked and waited for; sync and async over the same operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cloister._errors import InvalidArgument, valid
from cloister._handles import AsyncModel, JobState, Model
from cloister._http import AsyncSender, Sender
from cloister._operations import Operations, id_or_blank
from cloister.wire import jobs as wire
from cloister.wire.answers import Answer, QueryPrice
from cloister.wire.queries import Evaluation, Query, QueryRequest, QueryResult
from cloister.wire.sources import Dataset

__all__ = ["AsyncQueries", "AsyncQueryJob", "Queries", "QueryJob"]


class QueryJob(JobState):
    """A release on the server. It goes on whether anyone watches or not."""

    def __init__(self, sender: Sender, operations: Operations, seen: wire.Job) -> None:
        super().__init__(operations, seen)
        self._sender = sender

    def refresh(self) -> QueryJob:
        """Look again."""
        self._see(self._sender.run(self._operations.get("jobs", self.id, wire.Job)))
        return self

    def wait(self, *, timeout_s: float | None = None) -> tuple[QueryResult, ...]:
        """Watch until the release is made; one result for each question, in their order. Raises as `Job.wait`."""
        return self._sender.run(self._operations.watch_query(self.id, show=self._see, timeout_s=timeout_s)).results

    def cancel(self) -> QueryJob:
        """Ask it to stop. What is charged already stays charged."""
        self._see(self._sender.run(self._operations.cancel(self.id)))
        return self


class AsyncQueryJob(JobState):
    """As `QueryJob`, from an event loop."""

    def __init__(self, sender: AsyncSender, operations: Operations, seen: wire.Job) -> None:
        super().__init__(operations, seen)
        self._sender = sender

    async def refresh(self) -> AsyncQueryJob:
        """As `QueryJob.refresh`."""
        self._see(await self._sender.run(self._operations.get("jobs", self.id, wire.Job)))
        return self

    async def wait(self, *, timeout_s: float | None = None) -> tuple[QueryResult, ...]:
        """As `QueryJob.wait`."""
        answer: Answer = await self._sender.run(
            self._operations.watch_query(self.id, show=self._see, timeout_s=timeout_s)
        )
        return answer.results

    async def cancel(self) -> AsyncQueryJob:
        """As `QueryJob.cancel`."""
        self._see(await self._sender.run(self._operations.cancel(self.id)))
        return self


class Queries:
    """Noisy answers about rows, for a part of the source's budget.

    `queries` are `cloister.queries.Count()`, `Mean(column=...)`, `Histogram(column=...)` and their like; `epsilon` is what all of
    them cost together. `rows_per_unit` is the most rows of one user that are read.
    """

    def __init__(self, sender: Sender, operations: Operations) -> None:
        self._sender, self._operations = sender, operations

    def price(
        self, dataset: Dataset | str, queries: Sequence[Query], *, epsilon: float, rows_per_unit: int = 1
    ) -> QueryPrice:
        """What the answers would cost, and how noisy they would be. Free."""
        body = _request(dataset, queries, epsilon, rows_per_unit)
        return self._sender.run(self._operations.price_query(body, dataset))

    def ask(
        self, dataset: Dataset | str, queries: Sequence[Query], *, epsilon: float, rows_per_unit: int = 1
    ) -> QueryJob:
        """Pay for the answers and queue their release. Raises BudgetExceeded, with nothing charged."""
        body = _request(dataset, queries, epsilon, rows_per_unit)
        return QueryJob(self._sender, self._operations, self._sender.run(self._operations.start_query(body, dataset)))

    def evaluate(self, model: Model, dataset: Dataset | str, *, epsilon: float, rows_per_unit: int = 1) -> QueryJob:
        """How well a model version predicts a dataset, held-out or not: accuracy, confusion and AUC, noisy and charged."""
        return self.ask(dataset, [_evaluation(model)], epsilon=epsilon, rows_per_unit=rows_per_unit)


class AsyncQueries:
    """As `Queries`."""

    def __init__(self, sender: AsyncSender, operations: Operations) -> None:
        self._sender, self._operations = sender, operations

    async def price(
        self, dataset: Dataset | str, queries: Sequence[Query], *, epsilon: float, rows_per_unit: int = 1
    ) -> QueryPrice:
        """As `Queries.price`."""
        body = _request(dataset, queries, epsilon, rows_per_unit)
        return await self._sender.run(self._operations.price_query(body, dataset))

    async def ask(
        self, dataset: Dataset | str, queries: Sequence[Query], *, epsilon: float, rows_per_unit: int = 1
    ) -> AsyncQueryJob:
        """As `Queries.ask`."""
        body = _request(dataset, queries, epsilon, rows_per_unit)
        seen = await self._sender.run(self._operations.start_query(body, dataset))
        return AsyncQueryJob(self._sender, self._operations, seen)

    async def evaluate(
        self, model: AsyncModel, dataset: Dataset | str, *, epsilon: float, rows_per_unit: int = 1
    ) -> AsyncQueryJob:
        """As `Queries.evaluate`."""
        return await self.ask(dataset, [_evaluation(model)], epsilon=epsilon, rows_per_unit=rows_per_unit)


def _request(dataset: Dataset | str, queries: Any, epsilon: float, rows_per_unit: int) -> QueryRequest:
    if isinstance(queries, str) or not isinstance(queries, Sequence):
        raise InvalidArgument("queries is a sequence of questions; give [cloister.queries.Count()], say")
    return valid(
        QueryRequest,
        dataset=id_or_blank(dataset, "ds"),
        queries=tuple(queries),
        epsilon=epsilon,
        rows_per_unit=rows_per_unit,
    )


def _evaluation(model: Model | AsyncModel) -> Evaluation:
    if not isinstance(model, Model | AsyncModel):
        raise InvalidArgument("give the model itself, as client.models.get(...) finds it")
    return valid(Evaluation, model=model.id, version=model.version)
