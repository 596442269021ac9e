"""/v1/queries: noisy answers about rows, priced for nothing and charged before a row is read."""

from __future__ import annotations

from fastapi import APIRouter, Response

from cloister.wire.answers import Answer, QueryPrice, StartQuery
from cloister.wire.jobs import Job
from cloister.wire.queries import QueryRequest
from cloister_server import answers
from cloister_server.api.call import ReadCall, WriteCall

__all__ = ["router"]

router = APIRouter(prefix="/v1/queries", tags=["queries"])


@router.post("/price")
def price_query(body: QueryRequest, call: ReadCall) -> QueryPrice:
    return call.read(lambda session: answers.price(session, call.principal, call.service, body))


@router.post("", status_code=201, response_model=Job)
def start_query(body: StartQuery, call: WriteCall) -> Response:
    # Models that are evaluated are opened here, where nobody waits for the write lock.
    call.read(lambda session: answers.price(session, call.principal, call.service, body.query))
    return call.once(body, lambda session: answers.start(session, call.principal, call.service, body))


@router.get("/{job}/answer")
def get_answer(job: str, call: ReadCall) -> Answer:
    return call.read(lambda session: answers.get(session, call.principal, call.service, job))
