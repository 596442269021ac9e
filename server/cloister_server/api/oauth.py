"""/oauth/token: the one way to an access token."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from cloister_server.oauth.server import issue_token

__all__ = ["router"]

router = APIRouter(tags=["oauth"])

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-www-form-urlencoded": {
                "schema": {
                    "type": "object",
                    "required": ["grant_type"],
                    "properties": {
                        "grant_type": {"type": "string", "const": "client_credentials"},
                        "client_id": {"type": "string"},
                        "client_secret": {"type": "string"},
                    },
                }
            }
        },
    }
}


@router.post("/oauth/token", openapi_extra=_FORM)
async def get_token(request: Request) -> JSONResponse:
    # The raw body: our own strict reading of the form comes before anybody else's.
    body, query = await request.body(), request.scope["query_string"]
    service, headers = request.app.state.service, request.scope["headers"]
    status, answer, more = await run_in_threadpool(issue_token, service, headers, query=query, body=body)
    return JSONResponse(answer, status, {name: value for name, value in more.items() if name != "Content-Type"})
