"""The collections of a client: sources, datasets, jobs, models; sync and async over the same operations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime
from typing import Literal, TypeVar

from pydantic import BaseModel

from cloister._errors import valid
from cloister._handles import AsyncJob, AsyncModel, Job, Model
from cloister._http import AsyncSender, Sender
from cloister._operations import Operations, id_or_blank
from cloister._queries import AsyncQueryJob, QueryJob
from cloister._uploads import RowData
from cloister.wire import jobs as wire
from cloister.wire.columns import Column
from cloister.wire.sources import (
    Allowance,
    Block,
    CreateDataset,
    CreateSource,
    Dataset,
    OpenBlock,
    SetAllowance,
    SetBudget,
    Source,
)

__all__ = [
    "AsyncDatasets",
    "AsyncJobs",
    "AsyncModels",
    "AsyncSources",
    "Datasets",
    "Jobs",
    "Models",
    "Sources",
]

M = TypeVar("M", bound=BaseModel)


class _Sync:
    def __init__(self, sender: Sender, operations: Operations) -> None:
        self._sender, self._operations = sender, operations

    def _items(self, kind: str, model: type[M]) -> Iterator[M]:
        cursor = None
        while True:
            items, cursor = self._sender.run(self._operations.page(kind, model, cursor=cursor))
            yield from items
            if cursor is None:
                return


class _Async:
    def __init__(self, sender: AsyncSender, operations: Operations) -> None:
        self._sender, self._operations = sender, operations

    async def _items(self, kind: str, model: type[M]) -> AsyncIterator[M]:
        cursor = None
        while True:
            items, cursor = await self._sender.run(self._operations.page(kind, model, cursor=cursor))
            for item in items:
                yield item
            if cursor is None:
                return


class Sources(_Sync):
    """The people behind the data: owners of unit, adjacency and budget."""

    def create(
        self, name: str, *, epsilon: float, delta: float, unit: Literal["row", "user"] = "row", public: bool = False
    ) -> Source:
        """Declare a source, an audited act. All but epsilon is fixed for good."""
        body = valid(CreateSource, name=name, epsilon=epsilon, delta=delta, unit=unit, public=public)
        return self._sender.run(self._operations.create_source(body))

    def set_budget(self, source: Source | str, *, epsilon: float, reason: str) -> Source:
        """Change what a source allows, as its owner; the ledger keeps the reason.

        Raises InvalidRequest below what is used. The guarantee stays the largest epsilon that was ever in force.
        """
        body = valid(SetBudget, epsilon=epsilon, reason=reason)
        return self._sender.run(self._operations.set_budget(source, body))

    def allow(
        self,
        source: Source | str,
        *,
        client: str,
        epsilon: float | None = None,
        expires: datetime | None = None,
        reason: str,
    ) -> Allowance:
        """Bound what one app or person may use of a source, in each of its blocks, and until when; with neither, lift the bound.

        `client`: the app's or the person's id, or the name where it is of the source's own tenant. It grants nothing: what the
        app or person may do is the operator's to say.
        """
        body = valid(SetAllowance, epsilon=epsilon, expires=expires, reason=reason)
        return self._sender.run(self._operations.allow(source, client, body))

    def open_block(self, source: Source | str, name: str, *, reason: str) -> Block:
        """Open a block for people who are in none of the earlier ones: your word as the owner. It has a budget of its own."""
        return self._sender.run(self._operations.open_block(source, valid(OpenBlock, name=name, reason=reason)))

    def get(self, id_or_name: str) -> Source:
        """One source, with its budget."""
        return self._sender.run(self._operations.get("sources", id_or_name, Source))

    def list(self) -> Iterator[Source]:
        """All that are visible; pages are fetched as they are needed."""
        return self._items("sources", Source)


class AsyncSources(_Async):
    """As `Sources`."""

    async def create(
        self, name: str, *, epsilon: float, delta: float, unit: Literal["row", "user"] = "row", public: bool = False
    ) -> Source:
        """As `Sources.create`."""
        body = valid(CreateSource, name=name, epsilon=epsilon, delta=delta, unit=unit, public=public)
        return await self._sender.run(self._operations.create_source(body))

    async def set_budget(self, source: Source | str, *, epsilon: float, reason: str) -> Source:
        """As `Sources.set_budget`."""
        body = valid(SetBudget, epsilon=epsilon, reason=reason)
        return await self._sender.run(self._operations.set_budget(source, body))

    async def allow(
        self,
        source: Source | str,
        *,
        client: str,
        epsilon: float | None = None,
        expires: datetime | None = None,
        reason: str,
    ) -> Allowance:
        """As `Sources.allow`."""
        body = valid(SetAllowance, epsilon=epsilon, expires=expires, reason=reason)
        return await self._sender.run(self._operations.allow(source, client, body))

    async def open_block(self, source: Source | str, name: str, *, reason: str) -> Block:
        """As `Sources.open_block`."""
        return await self._sender.run(self._operations.open_block(source, valid(OpenBlock, name=name, reason=reason)))

    async def get(self, id_or_name: str) -> Source:
        """As `Sources.get`."""
        return await self._sender.run(self._operations.get("sources", id_or_name, Source))

    def list(self) -> AsyncIterator[Source]:
        """As `Sources.list`."""
        return self._items("sources", Source)


class Datasets(_Sync):
    """Rows under a source, sealed."""

    def upload(
        self,
        name: str,
        data: RowData,
        *,
        source: Source | str,
        block: str | None = None,
        columns: Mapping[str, Column],
        nominal_size: int,
        capacity: int,
        capacity_rows: int | None = None,
        ignore_undeclared: bool = False,
        seal_to: str | None = None,
    ) -> Dataset:
        """Stream rows to the server, about 4 MiB at a time, and close the dataset.

        `data`: column name -> array or path of a `.npy` file; or the path of a `.csv` or `.csv.gz` in UTF-8 whose header
        names the columns. Integers in a category's column are indices, text is one of the declared values. `nominal_size`
        and `capacity` are public numbers, what you would tell a stranger: never the number of rows itself. `source`:
        itself, its id or its name. `block`: the name of the one that its people came in, by default the source's first. A
        column that is not declared is an error, or with `ignore_undeclared` left out. In a CSV, blanks around names, numbers,
        categories and user ids are no part of them. `seal_to`: the line of the tenant's recipient
        (`cloister-recipient-1:...`), as its operator gave it to you by another way than from the server; every part is then
        sealed here, so that nothing between you and the server reads a row. By default the client's own, where it has one.

        All rows are checked here before anything is sent: RowsNotFit leaves no dataset behind. Called again with the same
        rows after an interruption, it goes on where the server stands; raises UploadDiffers where what was sent before
        was not the same. Raises RowsRefused if the server finds more.
        """
        body = _declaration(name, source, block, columns, nominal_size, capacity, capacity_rows)
        return self._sender.run(
            self._operations.upload(body, data, source=source, ignore_undeclared=ignore_undeclared, seal_to=seal_to)
        )

    def delete(self, dataset: Dataset | str) -> None:
        """Delete a dataset whose upload was not completed, so that its name is free again. Frees no budget."""
        return self._sender.run(self._operations.delete_dataset(dataset))

    def get(self, id_or_name: str) -> Dataset:
        """One dataset's public declaration."""
        return self._sender.run(self._operations.get("datasets", id_or_name, Dataset))

    def list(self) -> Iterator[Dataset]:
        """All that are visible."""
        return self._items("datasets", Dataset)


class AsyncDatasets(_Async):
    """As `Datasets`."""

    async def upload(
        self,
        name: str,
        data: RowData,
        *,
        source: Source | str,
        block: str | None = None,
        columns: Mapping[str, Column],
        nominal_size: int,
        capacity: int,
        capacity_rows: int | None = None,
        ignore_undeclared: bool = False,
        seal_to: str | None = None,
    ) -> Dataset:
        """As `Datasets.upload`."""
        body = _declaration(name, source, block, columns, nominal_size, capacity, capacity_rows)
        return await self._sender.run(
            self._operations.upload(body, data, source=source, ignore_undeclared=ignore_undeclared, seal_to=seal_to)
        )

    async def delete(self, dataset: Dataset | str) -> None:
        """As `Datasets.delete`."""
        return await self._sender.run(self._operations.delete_dataset(dataset))

    async def get(self, id_or_name: str) -> Dataset:
        """As `Datasets.get`."""
        return await self._sender.run(self._operations.get("datasets", id_or_name, Dataset))

    def list(self) -> AsyncIterator[Dataset]:
        """As `Datasets.list`."""
        return self._items("datasets", Dataset)


class Jobs(_Sync):
    """Training runs and queries, found again by id."""

    def get(self, job: str) -> Job | QueryJob:
        """A job to watch, cancel or wait for again."""
        return self._handle(self._sender.run(self._operations.get("jobs", job, wire.Job)))

    def list(self) -> Iterator[Job | QueryJob]:
        """All that are visible."""
        return (self._handle(seen) for seen in self._items("jobs", wire.Job))

    def _handle(self, seen: wire.Job) -> Job | QueryJob:
        return (QueryJob if seen.kind == "query" else Job)(self._sender, self._operations, seen)


class AsyncJobs(_Async):
    """As `Jobs`."""

    async def get(self, job: str) -> AsyncJob | AsyncQueryJob:
        """As `Jobs.get`."""
        return self._handle(await self._sender.run(self._operations.get("jobs", job, wire.Job)))

    async def list(self) -> AsyncIterator[AsyncJob | AsyncQueryJob]:
        """As `Jobs.list`."""
        async for seen in self._items("jobs", wire.Job):
            yield self._handle(seen)

    def _handle(self, seen: wire.Job) -> AsyncJob | AsyncQueryJob:
        return (AsyncQueryJob if seen.kind == "query" else AsyncJob)(self._sender, self._operations, seen)


class Models(_Sync):
    """Published models."""

    def get(self, id_or_name: str, *, version: int | None = None) -> Model:
        """A version of a model; the champion where none is named."""
        return Model(self._sender, self._operations, self._sender.run(self._operations.version(id_or_name, version)))

    def list(self) -> Iterator[wire.Model]:
        """All that are visible."""
        return self._items("models", wire.Model)


class AsyncModels(_Async):
    """As `Models`."""

    async def get(self, id_or_name: str, *, version: int | None = None) -> AsyncModel:
        """As `Models.get`."""
        seen = await self._sender.run(self._operations.version(id_or_name, version))
        return AsyncModel(self._sender, self._operations, seen)

    def list(self) -> AsyncIterator[wire.Model]:
        """As `Models.list`."""
        return self._items("models", wire.Model)


def _declaration(
    name: str,
    source: Source | str,
    block: str | None,
    columns: Mapping[str, Column],
    nominal_size: int,
    capacity: int,
    capacity_rows: int | None,
) -> CreateDataset:
    return valid(
        CreateDataset,
        source=id_or_blank(source, "src"),
        name=name,
        block=block,
        columns=dict(columns),
        nominal_size=nominal_size,
        capacity=capacity,
        capacity_rows=capacity_rows,
    )
