"""/v1/datasets: declare a dataset, stream its parts in as raw bodies, close it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Lock

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from cloister.wire.jobs import Page
from cloister.wire.recipients import SEALED_ROWS_TYPE
from cloister.wire.rows import decode_rows
from cloister.wire.sources import CreateDataset, Dataset, PartReceipt
from cloister_server import datasets, recipients
from cloister_server.api.call import Call, Cursor, Limit, ReadCall, WriteCall
from cloister_server.errors import BadRequest, Conflict, Unavailable
from cloister_server.store.queries import forget_answers
from cloister_server.store.tables import Dataset as Declared

__all__ = ["router"]

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

_FILLING: dict[str, Lock] = {}
"""By tenant."""
_FILL_WAIT_S = 2.0
"""Sealing empty parts takes long for a large capacity: a tenant may hold one of the API's threads with it, and not all of them."""

_BYTES = {"schema": {"type": "string", "format": "binary"}}
_DIGEST = {"name": "Content-Digest", "in": "header", "required": True, "schema": {"type": "string"}}
_PART = {
    "requestBody": {"required": True, "content": {"application/vnd.cloister.rows": _BYTES, SEALED_ROWS_TYPE: _BYTES}},
    "parameters": [_DIGEST],
}


@router.post("", status_code=201, response_model=Dataset)
def create_dataset(body: CreateDataset, call: WriteCall) -> Response:
    return call.once(body, lambda session: datasets.create(session, call.principal, body))


@router.get("")
def list_datasets(call: ReadCall, cursor: Cursor = None, limit: Limit = 50) -> Page:
    return call.read(lambda session: datasets.listed(session, call.principal, cursor=cursor, limit=limit))


@router.get("/{dataset}")
def get_dataset(dataset: str, call: ReadCall) -> Dataset:
    return call.read(lambda session: datasets.get(session, call.principal, dataset))


@router.put("/{dataset}/parts/{number}", status_code=201, response_model=PartReceipt, openapi_extra=_PART)
async def upload_part(dataset: str, number: int, request: Request, call: WriteCall) -> Response:
    # Authorised before the body is read; the body is read as raw bytes, which no framework spools to a disk.
    declared = await run_in_threadpool(
        call.read, lambda session: datasets.may_upload(session, call.principal, dataset, number=number).resource
    )
    body = await request.body()
    _check_digest(body, request.headers.get("content-digest"))
    # By the id whatever the path says: a name may mean another dataset, once this one is deleted.
    once = replace(call, route=f"{_parts_route(declared.id)}{number}")
    return await run_in_threadpool(_store_part, once, declared, number, body, request.headers.get("content-type", ""))


@router.delete("/{dataset}", response_model=Dataset)
def delete_dataset(dataset: str, call: WriteCall) -> Response:
    return call.once(dataset.encode(), partial(_delete, call, dataset), status=200)


@router.post("/{dataset}/complete", response_model=Dataset)
def complete_dataset(dataset: str, call: WriteCall) -> Response:
    _fill(call, dataset)
    return call.once(
        dataset.encode(),
        lambda session: datasets.complete(session, call.principal, call.service, dataset),
        status=200,
    )


def _store_part(call: Call, dataset: Declared, number: int, body: bytes, content_type: str) -> Response:
    rows = decode_rows(datasets.schema_of(dataset), _opened(call, dataset, number, body, content_type))
    return call.once(
        hashlib.sha256(body).digest(),
        lambda session: datasets.add_part(
            session, call.principal, call.service, dataset_id=dataset.id, number=number, rows=rows
        ),
    )


def _opened(call: Call, dataset: Declared, number: int, body: bytes, content_type: str) -> bytes:
    """The part's rows: the body itself, or what it holds where its type says that it is sealed."""
    if content_type.partition(";")[0].strip().lower() != SEALED_ROWS_TYPE:
        return body
    return call.read(
        lambda session: recipients.open_part(
            session, call.service, tenant_id=dataset.tenant_id, dataset_id=dataset.id, number=number, sealed=body
        )
    )


def _delete(call: Call, dataset: str, session: Session) -> Dataset:
    """Delete the dataset and, with it, the digests that the answers to its parts were kept by."""
    deleted = datasets.forget(session, call.principal, call.service, dataset)
    forget_answers(session, routes=_parts_route(deleted.id))
    return deleted


def _parts_route(dataset_id: str) -> str:
    return f"PUT {router.prefix}/{dataset_id}/parts/"


def _fill(call: Call, dataset: str) -> None:
    """Seal the empty parts one transaction at a time, so that nobody waits behind all of them; one dataset of a tenant at a time."""
    filling = _FILLING.setdefault(call.principal.tenant_id, Lock())
    if not filling.acquire(timeout=_FILL_WAIT_S):
        raise Unavailable("another large dataset of the tenant is being completed; retry in a while")
    try:
        with suppress(Conflict):  # complete already: `once` replays the answer, or refuses in words
            for number in call.read(lambda session: datasets.missing(session, call.principal, dataset)):
                call.write(partial(_fill_one, call, dataset, number))
    finally:
        filling.release()


def _fill_one(call: Call, dataset: str, number: int, session: Session) -> None:
    datasets.fill(session, call.principal, call.service, dataset, number=number)


def _check_digest(body: bytes, declared: str | None) -> None:
    """RFC 9530 Content-Digest, sha-256 only."""
    if declared is None:
        raise BadRequest(
            "a part needs a Content-Digest header (sha-256=:…:, RFC 9530); the SDK sends it", code="digest_mismatch"
        )
    algorithm, _, value = declared.partition("=")
    try:
        expected = base64.b64decode(value.strip(":"), validate=True)
    except binascii.Error:
        expected = b""
    if algorithm != "sha-256" or not hmac.compare_digest(expected, hashlib.sha256(body).digest()):
        raise BadRequest(
            "the body is not what its Content-Digest says: it was changed or cut short on the way; send the part again",
            code="digest_mismatch",
        )
