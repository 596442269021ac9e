"""/v1/sources: declare a source, and read its budget."""

from __future__ import annotations

from fastapi import APIRouter, Response

from cloister.wire.jobs import Page
from cloister.wire.sources import CreateSource, Source
from cloister_server import sources
from cloister_server.api.call import Cursor, Limit, ReadCall, WriteCall

__all__ = ["router"]

router = APIRouter(prefix="/v1/sources", tags=["sources"])


@router.post("", status_code=201, response_model=Source)
def create_source(body: CreateSource, call: WriteCall) -> Response:
    return call.once(body, lambda session: sources.create(session, call.principal, body))


@router.get("")
def list_sources(call: ReadCall, cursor: Cursor = None, limit: Limit = 50) -> Page:
    return call.read(lambda session: sources.listed(session, call.principal, cursor=cursor, limit=limit))


@router.get("/{source}")
def get_source(source: str, call: ReadCall) -> Source:
    return call.read(lambda session: sources.get(session, call.principal, source))
