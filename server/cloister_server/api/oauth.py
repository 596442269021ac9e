"""/oauth/*: the one way to an access token, and what becomes of it afterwards."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from cloister_server.api.pages import address_of
from cloister_server.oauth.device_endpoint import authorize_device as authorize_device_
from cloister_server.oauth.server import GRANT_TYPES, issue_token
from cloister_server.oauth.tokens import introspect_token, revoke_token

__all__ = ["router"]

router = APIRouter(tags=["oauth"])

_CREDENTIALS = {
    name: {"type": "string"} for name in ("client_id", "client_secret", "client_assertion", "client_assertion_type")
}


def _form(**properties: Any) -> dict[str, Any]:
    """For the API's description alone: a form, all of whose own fields are required, and none given twice."""
    more = {"additionalProperties": {"type": "string"}}
    schema = {"type": "object", "required": list(properties), "properties": {**properties, **_CREDENTIALS}, **more}
    content = {"application/x-www-form-urlencoded": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


_TOKEN = _form(token={"type": "string"})


@router.post("/oauth/token", openapi_extra=_form(grant_type={"type": "string", "enum": list(GRANT_TYPES)}))
async def get_token(request: Request) -> JSONResponse:
    return await _answered(request, issue_token)


@router.post("/oauth/device_authorization", openapi_extra=_form())
async def authorize_device(request: Request) -> JSONResponse:
    address = address_of(request.app.state.service, request)
    return await _answered(request, partial(authorize_device_, address=address))


@router.post("/oauth/introspect", openapi_extra=_TOKEN)
async def introspect(request: Request) -> JSONResponse:
    return await _answered(request, introspect_token)


@router.post("/oauth/revoke", openapi_extra=_TOKEN)
async def revoke(request: Request) -> JSONResponse:
    return await _answered(request, revoke_token)


async def _answered(request: Request, answer_to: Any) -> JSONResponse:
    # The raw body: our own strict reading of the form comes before anybody else's.
    body, query = await request.body(), request.scope["query_string"]
    service, headers = request.app.state.service, request.scope["headers"]
    status, answer, more = await run_in_threadpool(answer_to, service, headers, query=query, body=body)
    return JSONResponse(answer, status, {name: value for name, value in more.items() if name != "Content-Type"})
