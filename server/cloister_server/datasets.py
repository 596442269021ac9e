"""Datasets: declared, filled part by part, closed. Knows sealing; refuses to know, or tell, how many rows there are.

Every part has the same sealed size, and a closed dataset has every part that its capacity asks for, empty ones
included: number and size of what is sealed follow from public numbers alone.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from cloister.wire import sources as wire
from cloister.wire.columns import Schema, UnitColumn
from cloister.wire.jobs import Page
from cloister.wire.rows import RowsRefused, part_rows, row_bytes, seal_form
from cloister_server import audit, grants, policy, quotas, units, vault
from cloister_server.errors import Conflict, Invalid, NotFound
from cloister_server.policy import Authorized
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.paging import page_of
from cloister_server.store.queries import FIRST_BLOCK, blocks_of
from cloister_server.store.tables import Dataset, Part, Source, new_id

__all__ = [
    "add_part",
    "complete",
    "create",
    "fill",
    "forget",
    "get",
    "listed",
    "may_upload",
    "missing",
    "part_objects",
    "schema_of",
]

MAX_BYTES = 2**36
"""The most a dataset may take on the disk: 64 GiB."""

MAX_PARTS = 2**14
"""The most parts that a dataset may be cut into: completing it seals every one."""

_SCHEMA: TypeAdapter[dict[str, Any]] = TypeAdapter(Schema)


def create(session: Session, principal: Principal, body: wire.CreateDataset) -> wire.Dataset:
    """Declare a dataset under a source, before its first row."""
    authorized = policy.find(session, principal, "dataset.create", Source, body.source)
    source = authorized.resource
    _check_declaration(source, body)
    taken = select(Dataset.id).where(Dataset.tenant_id == source.tenant_id, Dataset.name == body.name)
    if session.scalar(taken) is not None:
        raise Conflict(f"a dataset named {body.name!r} is already there; choose another name")
    slots = part_rows(body.columns)
    rows = body.capacity_rows or body.capacity
    if rows > slots * MAX_PARTS:
        raise Invalid(f"a capacity of {rows} rows needs over {MAX_PARTS} parts of {slots} rows; declare a smaller one")
    dataset = Dataset(
        tenant_id=source.tenant_id,
        id=new_id("ds"),
        source_id=source.id,
        block=_block(session, source, body.block),
        name=body.name,
        columns=_SCHEMA.dump_python(body.columns, mode="json"),
        nominal_size=body.nominal_size,
        capacity=body.capacity,
        capacity_rows=rows,
        part_rows=min(slots, rows),
        parts=-(-rows // slots),
        status="uploading",
    )
    session.add(dataset)
    session.flush()  # the grants name the row
    grants.grant_to_creator(session, principal, dataset)
    quotas.require(session, principal, tenant_id=dataset.tenant_id)
    audit.allowed(session, authorized, "dataset.create", dataset.id)
    return view(dataset)


def get(session: Session, principal: Principal, id_or_name: str) -> wire.Dataset:
    return view(policy.find(session, principal, "dataset.read", Dataset, id_or_name).resource)


def listed(session: Session, principal: Principal, *, cursor: str | None, limit: int) -> Page:
    """The datasets that the principal may see."""
    return page_of(session, principal, Dataset, cursor=cursor, limit=limit, view=view)


def may_upload(
    session: Session, principal: Principal, dataset_id: str, *, number: int | None = None
) -> Authorized[Dataset]:
    """The dataset, if it still takes rows (and this part) from this principal."""
    authorized = policy.find(session, principal, "dataset.upload", Dataset, dataset_id)
    dataset = authorized.resource
    if number is not None and not 0 <= number < dataset.parts:
        raise Invalid(
            f"there is no part {number}: the capacity asks for parts 0 to {dataset.parts - 1}; "
            "upload within the declared capacity, or declare a larger dataset"
        )
    if dataset.status != "uploading":
        raise Conflict("the dataset is complete and takes no more rows; declare a new one under the same source")
    return authorized


def add_part(
    session: Session, principal: Principal, service: Service, *, dataset_id: str, number: int, rows: dict[str, Any]
) -> wire.PartReceipt:
    """Seal one part of validated rows under its own key.

    A part that is there already is a Conflict; whoever uploaded it, and nobody else, is told whether it holds the same.
    """
    authorized = may_upload(session, principal, dataset_id, number=number)
    dataset = authorized.resource
    count = len(next(iter(rows.values())))
    slots = _slots(dataset, number)
    if count > slots:
        raise RowsRefused(None, slots, f"part {number} takes at most {slots} rows within the declared capacity")
    stored = session.get(Part, (dataset.tenant_id, dataset.id, number))
    if stored is not None:
        raise _stored_already(session, principal, service, dataset, stored, rows)
    units.ready(session, dataset)  # its key is there before anything is sealed, which happens once
    _seal_part(session, principal, service, dataset, number, rows)
    session.flush()  # the part locks the dataset's row, and the tenant's row, which its users lock, is locked last
    try:
        units.register(session, principal, dataset, rows)
    except RowsRefused:
        part = session.get_one(Part, (dataset.tenant_id, dataset.id, number))
        vault.abandon_object(service.blobs, part.object_id, tenant_id=dataset.tenant_id)
        raise
    audit.allowed(session, authorized, "dataset.upload", dataset.id)
    return wire.PartReceipt(part=number)


def missing(session: Session, principal: Principal, dataset_id: str) -> list[int]:
    """The parts that the capacity asks for and that were not uploaded."""
    return list(_missing(session, may_upload(session, principal, dataset_id).resource))


def fill(session: Session, principal: Principal, service: Service, dataset_id: str, *, number: int) -> None:
    """Seal one empty part where none was uploaded."""
    dataset = may_upload(session, principal, dataset_id, number=number).resource
    if session.get(Part, (dataset.tenant_id, dataset.id, number)) is None:
        _seal_part(session, principal, service, dataset, number, {})


def complete(session: Session, principal: Principal, service: Service, dataset_id: str) -> wire.Dataset:
    """Close the dataset: its manifest is sealed, and it takes no more rows. Every part must be there."""
    authorized = may_upload(session, principal, dataset_id)
    dataset = _locked(session, authorized.resource)
    if dataset.status != "uploading":
        raise Conflict("the dataset was completed by another request at the same moment; go on, it is ready")
    if next(_missing(session, dataset), None) is not None:
        raise Conflict("a part went missing while the dataset was being completed; retry")
    parts = session.scalars(
        select(Part).where(Part.tenant_id == dataset.tenant_id, Part.dataset_id == dataset.id).order_by(Part.number)
    )
    manifest = {
        "format": "cloister.manifest/1",
        "dataset": dataset.id,
        "parts": [{"object": part.object_id, "slots": _slots(dataset, part.number)} for part in parts],
    }
    dataset.manifest_id = vault.seal_object(
        session,
        service.blobs,
        json.dumps(manifest).encode(),
        tenant_id=dataset.tenant_id,
        kind="manifest",
    )
    dataset.status = "ready"
    audit.allowed(session, authorized, "dataset.complete", dataset.id)
    return view(dataset)


def forget(session: Session, principal: Principal, service: Service, dataset_id: str) -> wire.Dataset:
    """Delete a dataset that was never completed, with its parts, their keys and the grants on it. Raises Conflict on any other.

    No job ever read it, so no ledger knows of it, and nothing is refunded. Answers the dataset as it was.
    """
    authorized = policy.find(session, principal, "dataset.upload", Dataset, dataset_id)
    dataset = _locked(session, authorized.resource)
    if dataset.status != "uploading":
        raise Conflict(
            "the dataset is complete, and only an upload that was not completed can be deleted; "
            "declare a new one under the same source and train on that"
        )
    answer = view(dataset).model_copy(update={"status": "deleted"})
    of_dataset = (Part.tenant_id == dataset.tenant_id, Part.dataset_id == dataset.id)
    objects = session.scalars(select(Part.object_id).where(*of_dataset)).all()
    vault.forget_objects(session, service.blobs, objects, tenant_id=dataset.tenant_id)
    session.execute(delete(Part).where(*of_dataset))
    units.forget(session, dataset)
    grants.forget_resource(session, dataset)
    session.delete(dataset)
    audit.allowed(session, authorized, "dataset.delete", dataset.id)
    return answer


def part_objects(session: Session, service: Service, dataset: Dataset) -> list[str]:
    """The sealed parts of a complete dataset, in order, as its sealed manifest names them."""
    assert dataset.manifest_id is not None  # noqa: S101 (jobs start on complete datasets only)
    manifest = vault.open_object(session, service.blobs, tenant_id=dataset.tenant_id, object_id=dataset.manifest_id)
    return [part["object"] for part in json.loads(manifest)["parts"]]


def schema_of(dataset: Dataset) -> dict[str, Any]:
    """The dataset's columns, as the wire's models."""
    return _SCHEMA.validate_python(dataset.columns)


def view(dataset: Dataset) -> wire.Dataset:
    return wire.Dataset(
        id=dataset.id,
        name=dataset.name,
        source=dataset.source_id,
        block=dataset.block,
        columns=schema_of(dataset),
        nominal_size=dataset.nominal_size,
        capacity=dataset.capacity,
        capacity_rows=dataset.capacity_rows,
        status=dataset.status,
        created=dataset.created,
    )


def _block(session: Session, source: Source, name: str | None) -> int:
    numbers = {each: number for number, each in blocks_of(session, source)}
    if name is None and len(numbers) > 1:
        raise Invalid(
            f"source {source.name!r} has the blocks {', '.join(numbers)}; say by block which one these people are in"
        )
    number = numbers.get(name or FIRST_BLOCK)
    if number is None:
        raise Invalid(
            f"source {source.name!r} has no block {name!r}; it has {', '.join(numbers)}, and its owner opens more"
        )
    return number


def _check_declaration(source: Source, body: wire.CreateDataset) -> None:
    if source.delta * body.nominal_size >= 1:
        raise Invalid(
            f"the source's delta {source.delta:g} is not below 1 / nominal_size = {1 / body.nominal_size:g}, so that revealing one "
            "person's row whole would be within its promise; declare a source with a smaller delta"
        )
    has_unit = any(isinstance(column, UnitColumn) for column in body.columns.values())
    if source.unit == "user" and not has_unit:
        raise Invalid("the source's unit is a user: declare one column of type 'unit' that says whose each row is")
    if source.unit == "user" and body.capacity_rows is None:
        raise Invalid("the source's unit is a user: declare capacity_rows, the most rows there can be, as well")
    if source.unit == "row" and (has_unit or body.capacity_rows is not None):
        raise Invalid("the source's unit is a row: a unit column and capacity_rows belong to sources of unit 'user'")
    size = row_bytes(body.columns) * (body.capacity_rows or body.capacity)
    if size > MAX_BYTES:
        raise Invalid(
            f"a capacity of {size} bytes is over the {MAX_BYTES} that a dataset may take; declare a smaller one"
        )


def _slots(dataset: Dataset, number: int) -> int:
    """How many rows part `number` has room for: the last one ends at the capacity."""
    return min(dataset.part_rows, dataset.capacity_rows - number * dataset.part_rows)


def _missing(session: Session, dataset: Dataset) -> Iterator[int]:
    there = set(
        session.scalars(select(Part.number).where(Part.tenant_id == dataset.tenant_id, Part.dataset_id == dataset.id))
    )
    return (number for number in range(dataset.parts) if number not in there)


def _locked(session: Session, dataset: Dataset) -> Dataset:
    """The dataset as it is now, for this transaction alone: one of two that complete or delete it waits for the other."""
    key = (dataset.tenant_id, dataset.id)
    found = session.get(Dataset, key, populate_existing=True, with_for_update=True)
    if found is None:
        raise NotFound("dataset")
    return found


def _seal_part(
    session: Session, principal: Principal, service: Service, dataset: Dataset, number: int, rows: dict[str, Any]
) -> None:
    tenant_id, body = dataset.tenant_id, seal_form(schema_of(dataset), rows, _slots(dataset, number))
    object_id = vault.seal_object(session, service.blobs, body, tenant_id=tenant_id, kind="part")
    mac = vault.content_mac(session, body, tenant_id=tenant_id, object_id=object_id)
    session.add(
        Part(
            tenant_id=tenant_id,
            dataset_id=dataset.id,
            number=number,
            object_id=object_id,
            uploader_id=principal.id,
            content_mac=mac,
        )
    )


def _stored_already(
    session: Session, principal: Principal, service: Service, dataset: Dataset, part: Part, rows: dict[str, Any]
) -> Conflict:
    """The refusal of a part that is there. Told to others, 'the same' would let them try out what the rows are."""
    if part.content_mac is None or part.uploader_id != principal.id:
        return Conflict(
            f"part {part.number} is stored already, by another client, and is never overwritten; "
            "let that client go on, or delete the dataset and upload it again"
        )
    body = seal_form(schema_of(dataset), rows, _slots(dataset, part.number))
    mac = vault.content_mac(session, body, tenant_id=dataset.tenant_id, object_id=part.object_id)
    is_same = hmac.compare_digest(part.content_mac, mac)
    return Conflict(
        f"part {part.number} is stored already, with the same content; go on with the next part"
        if is_same
        else f"part {part.number} is stored already, with other content, and is never overwritten; "
        "delete the dataset and upload it again",
        details={"part_exists": True, "same_content": is_same},
    )
