"""The API's description: what FastAPI reads from the routes, and what it cannot: every refusal, and who a token's client is.

Of what is sent it says all that a schema can: that one of several kinds needs its `type`, and what a name looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.routing import Match, Route

from cloister.wire.errors import ErrorBody

__all__ = ["allowed_methods", "describe"]

_WHY = {
    400: "The request could not be read.",
    401: "There is no valid access token, or no client of these credentials.",
    403: "Yours to see, and not yours to do.",
    404: "Not there, or not yours.",
    409: "It does not fit what is there: a name is taken, a budget would be exceeded, something is not ready.",
    413: "The body is too large.",
    422: "The request can be read, and does not hold; `details` says where.",
    429: "The tenant has sent as many requests in this minute as its quota allows, or too many were tried from this address.",
    500: "The server failed. It never should; tell its operator the request id.",
    503: "Not at this moment; `Retry-After` says when to try again.",
}
_OF_ALL = (400, 413, 500, 503)
_OF_OAUTH = (*_OF_ALL, 401)
_OF_DEVICES = (*_OF_OAUTH, 429)
_OF_RESOURCES = tuple(_WHY)
_CHALLENGE = {"WWW-Authenticate": {"schema": {"type": "string"}}}
_RETRY = {"Retry-After": {"description": "Seconds until it may be tried again.", "schema": {"type": "integer"}}}
_HEADERS = {401: _CHALLENGE, 403: _CHALLENGE, 429: _RETRY, 503: _RETRY}
_REFUSAL = {"$ref": "#/components/schemas/ErrorBody"}
_OAUTH_ERROR = {"$ref": "#/components/schemas/OAuthError"}
_SCHEMAS = {
    "ErrorBody": ErrorBody.model_json_schema(mode="serialization"),
    "OAuthError": {
        "type": "object",
        "description": "RFC 6749, section 5.2.",
        "required": ["error"],
        "properties": {"error": {"type": "string"}, "error_description": {"type": "string"}},
    },
}
_CLIENT = {
    "type": "http",
    "scheme": "basic",
    "description": "A client's id and secret (RFC 6749, section 2.3.1); in the form where the client has none, or a key.",
}


def describe(api: FastAPI) -> Callable[[], dict[str, Any]]:
    """What is to be `api.openapi`: the whole document, made once."""
    made: dict[str, Any] = {}

    def document() -> dict[str, Any]:
        if not made:
            made.update(get_openapi(title=api.title, version=api.version, routes=api.routes))
            _complete(made)
        return made

    return document


def allowed_methods(request: Request) -> str:
    """What the path of this request takes, as `Allow` has it (RFC 9110, section 10.2.1): all of its routes together."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return ", ".join(sorted(found))


def _complete(document: dict[str, Any]) -> None:
    components = document["components"]
    components["schemas"].update(_SCHEMAS)
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    components["securitySchemes"]["Client"] = _CLIENT
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _add_refusals(path, operation)
    for schema in list(_objects(document)):
        _tighten(schema, components["schemas"])


def _add_refusals(path: str, operation: dict[str, Any]) -> None:
    is_oauth = path.startswith("/oauth/")
    if is_oauth:
        operation["security"] = [{}, {"Client": []}]
    for status in _statuses(path):
        schema = {"anyOf": [_OAUTH_ERROR, _REFUSAL]} if is_oauth else _REFUSAL
        answer: dict[str, Any] = {"description": _WHY[status], "content": {"application/json": {"schema": schema}}}
        if status in _HEADERS:
            answer["headers"] = _HEADERS[status]
        operation["responses"][str(status)] = answer


def _statuses(path: str) -> tuple[int, ...]:
    if path == "/oauth/device_authorization":
        return _OF_DEVICES
    if path.startswith("/oauth/"):
        return _OF_OAUTH
    return _OF_RESOURCES if path.startswith("/v1/") else _OF_ALL


def _tighten(schema: dict[str, Any], named: Mapping[str, Any]) -> None:
    """Say what is refused in any case: a kind without its tag, a name that is none."""
    tag = schema.get("discriminator")
    if isinstance(tag, dict):
        for reference in tag.get("mapping", {}).values():
            kind = named[reference.rpartition("/")[2]]
            kind["required"] = sorted({*kind.get("required", ()), tag["propertyName"]})
    if "patternProperties" in schema:
        schema.setdefault("additionalProperties", False)


def _objects(part: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in it, itself first."""
    if isinstance(part, dict):
        yield part
        for each in part.values():
            yield from _objects(each)
    elif isinstance(part, list):
        for each in part:
            yield from _objects(each)
