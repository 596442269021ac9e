"""/v1/sources: declare a source, read and change its budget, open blocks, read its ledger."""

from __future__ import annotations

from fastapi import APIRouter, Response

from cloister.wire.jobs import Page
from cloister.wire.ledger import LedgerPage
from cloister.wire.sources import Allowance, Block, CreateSource, OpenBlock, SetAllowance, SetBudget, Source
from cloister_server import sources, spending
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


@router.get("/{source}/ledger")
def get_ledger(source: str, call: ReadCall, cursor: Cursor = None, limit: Limit = 50) -> LedgerPage:
    return call.read(lambda session: spending.of_source(session, call.principal, source, cursor=cursor, limit=limit))


@router.put("/{source}/budget", response_model=Source)
def set_budget(source: str, body: SetBudget, call: WriteCall) -> Response:
    return call.once(body, lambda session: sources.set_budget(session, call.principal, source, body), status=200)


@router.put("/{source}/allowances/{client}", response_model=Allowance)
def set_allowance(source: str, client: str, body: SetAllowance, call: WriteCall) -> Response:
    return call.once(body, lambda session: sources.allow(session, call.principal, source, client, body), status=200)


@router.post("/{source}/blocks", status_code=201, response_model=Block)
def open_block(source: str, body: OpenBlock, call: WriteCall) -> Response:
    return call.once(body, lambda session: sources.open_block(session, call.principal, source, body))
