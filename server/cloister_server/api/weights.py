"""/v1/weights: stream weights in, as one raw body, to start training from."""

from __future__ import annotations

import hashlib

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from cloister.wire.weights import WEIGHTS_TYPE, Weights
from cloister_server import weights
from cloister_server.api.call import Call, WriteCall

__all__ = ["router"]

router = APIRouter(prefix="/v1/weights", tags=["weights"])

_RAW_BODY = {
    "requestBody": {"required": True, "content": {WEIGHTS_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


@router.post("", status_code=201, response_model=Weights, openapi_extra=_RAW_BODY)
async def create_weights(request: Request, call: WriteCall) -> Response:
    # Authorised before the body is read; the body is read as raw bytes, which no framework spools to a disk.
    await run_in_threadpool(call.read, lambda session: weights.may_create(session, call.principal))
    body = await request.body()
    return await run_in_threadpool(_create, call, body)


def _create(call: Call, body: bytes) -> Response:
    digest = weights.digest_of(body)  # before the transaction, which keeps other writers waiting
    return call.once(
        hashlib.sha256(body).digest(),
        lambda session: weights.create(session, call.principal, call.service, body, digest=digest),
    )
