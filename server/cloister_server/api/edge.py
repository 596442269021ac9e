"""What every request passes, whatever answers it: an id, limits, a token, one log line, headers. Knows ASGI; no framework.

From the outside in: `Edge` names the request, answers what nobody else did and logs one line; `Limits` bounds what is
read; `Guard` lets nobody past without a token but to the few public paths, and no tenant beyond its quota of requests;
`StrictJSON` refuses JSON that two readers could read differently.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, NoReturn

from starlette.concurrency import run_in_threadpool

from cloister_server import request_rate
from cloister_server.api.problems import response_to, to_server_error
from cloister_server.audit import keep_denial
from cloister_server.errors import BadRequest, NotFound, ServerError, TooLarge
from cloister_server.ids import random_hex
from cloister_server.oauth.verifier import authenticate, recall
from cloister_server.policy import Denied
from cloister_server.service import Service

__all__ = ["Edge", "Guard", "Limits", "StrictJSON"]

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

PAGES = frozenset(
    f"/oauth/{page}" for page in ("authorize", "consent", "device", "first-admin", "invitation", "sign-in", "sign-out")
)
"""What people see in a browser: pages say themselves what they may do, and browsers must tell us where a form came from."""

PUBLIC = frozenset(
    {
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/oauth/token",
        "/oauth/introspect",
        "/oauth/revoke",
        "/oauth/device_authorization",
        *PAGES,
        "/.well-known/oauth-authorization-server",
        "/.well-known/oauth-protected-resource",
        "/.well-known/jwks.json",
        "/.well-known/cloister-certificate-keys",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
    }
)
"""All that is answered without a token."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{8,64}")
_PART = re.compile(r"/v1/datasets/[^/]+/parts/[^/]+")
_MOST_HEADERS = 64
_MOST_HEADER_BYTES = 16 * 2**10
_MOST_PATH_BYTES = 4 * 2**10
_LONGEST_PATH = 500
"""Of a route that may be answered: it is kept with the answers to writes."""
_MOST_JSON_BYTES = 2**20

_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_OF_PAGES = {b"content-security-policy", b"referrer-policy"}
_TLS_HEADER = (b"strict-transport-security", b"max-age=31536000")


class Edge:
    """The outermost application: nothing leaves without an id and headers, no exception leaves at all."""

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._engine = app, service.engine
        self._headers = (*_HEADERS, _TLS_HEADER) if service.settings.issuer.startswith("https:") else _HEADERS
        self._ours = {b"x-request-id", *(name for name, _ in self._headers)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._handle(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id, started_at, status = _name(scope), time.perf_counter(), 0

        async def finish(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = self._headed(message.get("headers", ()), request_id, is_page=scope["path"] in PAGES)
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, finish)
        except Exception as error:
            _log_failure(error, request_id)
            if isinstance(error, Denied):
                await run_in_threadpool(keep_denial, self._engine, error)
            if status == 0:
                await response_to(error, request_id=request_id)(scope, receive, finish)
        finally:
            _log_request(scope, status, request_id, time.perf_counter() - started_at)

    def _headed(self, theirs: Iterable[Header], request_id: str, *, is_page: bool) -> list[Header]:
        """An answer's own headers and ours, which are the ones that count but for what a page says of itself."""
        theirs = list(theirs)
        kept = {name.lower() for name, _ in theirs} & _OF_PAGES if is_page else frozenset()
        ours = self._ours - kept if kept else self._ours
        headers = [pair for pair in theirs if pair[0].lower() not in ours]
        headers += [pair for pair in self._headers if pair[0] not in kept]
        headers.append((b"x-request-id", request_id.encode()))
        return headers


class Limits:
    """Refuses what is too large: by its declared length before a byte is read, and by its real length as it is read."""

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._most_bytes = app, service.settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _check_head(scope)
        limit = self._most_bytes if _is_raw(scope) else _MOST_JSON_BYTES
        if _declared_length(scope) > limit:
            raise _too_large(limit)
        count, is_over = 0, False

        async def counted() -> Message:
            nonlocal count, is_over
            message = await receive()
            count += len(message.get("body", b""))
            if count > limit:
                is_over = True
                raise _too_large(limit)
            return message

        async def unless_over(message: Message) -> None:
            if not is_over:  # whoever caught our refusal may answer it in other words than ours
                await send(message)

        try:
            await self._app(scope, counted, unless_over)
        except Exception:
            if not is_over:
                raise
        if is_over:
            raise _too_large(limit)


class Guard:
    """Before a body is read, nobody passes without a valid token but to what is public, or beyond their tenant's requests a minute."""

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and ("\x00" in scope["path"] or len(scope["path"]) > _LONGEST_PATH):
            raise NotFound("route")
        if scope["type"] == "http" and scope["path"] not in PUBLIC:
            client = scope.get("client")
            address = client[0] if client else None
            principal = recall(self._service, scope["headers"], address=address)
            if principal is None:
                place = {"method": scope["method"], "path": scope["path"]}  # what a proof of possession is for
                principal = await run_in_threadpool(
                    authenticate, self._service, scope["headers"], **place, address=address
                )
            scope["state"].update(principal=principal, principal_id=principal.id)
            if not request_rate.admit_from_memory(self._service, principal.tenant_id):
                await run_in_threadpool(request_rate.admit, self._service, principal.tenant_id)
        await self._app(scope, receive, send)


class StrictJSON:
    """Refuses bodies in which a name stands twice, or NaN or infinity for a number (RFC 8259, sections 4 and 6)."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("the request ended before its body did; send it again", code="body_truncated")
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if body:
            _check_json(bytes(body))
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)


def _name(scope: Scope) -> str:
    """The request's id, the caller's own if it is a valid one: from here on the one `x-request-id` among its headers."""
    given: list[Header] = []
    headers: list[Header] = []
    for pair in scope["headers"]:
        (given if pair[0].lower() == b"x-request-id" else headers).append(pair)
    is_valid = len(given) == 1 and _REQUEST_ID.fullmatch(given[0][1]) is not None
    request_id = given[0][1].decode() if is_valid else random_hex()
    headers.append((b"x-request-id", request_id.encode()))
    scope["headers"] = headers
    scope["state"] = {**(scope.get("state") or {}), "request_id": request_id}
    return request_id


def _check_head(scope: Scope) -> None:
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > _MOST_HEADERS or size > _MOST_HEADER_BYTES:
        raise BadRequest(f"the headers are over {_MOST_HEADERS}, or over {_MOST_HEADER_BYTES} bytes; send fewer")
    if len(scope["path"]) + len(scope.get("query_string", b"")) > _MOST_PATH_BYTES:
        raise BadRequest(f"the path and its query are over {_MOST_PATH_BYTES} bytes; no path here is as long")


def _declared_length(scope: Scope) -> int:
    declared = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
    if not declared:
        return 0
    if len(declared) > 1 or not re.fullmatch(rb"[0-9]{1,18}", declared[0]):
        raise BadRequest("the Content-Length is not one number; send it once")
    return int(declared[0])


def _is_raw(scope: Scope) -> bool:
    """Whether the body is tensors, rows or weights, and not a document."""
    method, path = scope["method"], scope["path"]
    is_part = method == "PUT" and _PART.fullmatch(path) is not None
    return path.startswith("/v2/") or is_part or (method == "POST" and path == "/v1/weights")


def _is_json(scope: Scope) -> bool:
    content_types = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    return any(b"json" in value.lower() for value in content_types) and not _is_raw(scope)


def _check_json(body: bytes) -> None:
    try:
        json.loads(body, parse_constant=_refuse_constant, object_pairs_hook=_refuse_twins)
    except BadRequest:
        raise
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON; send one JSON document in UTF-8") from None


def _refuse_constant(_: str) -> NoReturn:
    raise BadRequest("the body holds NaN or infinity, which are not JSON; send finite numbers")


def _refuse_twins(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise BadRequest("the body has an object in which one name stands twice; give each once")


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is over the {limit} bytes that this path takes; send less at a time")


def _log_failure(error: Exception, request_id: str) -> None:
    """A failure of ours by its type and places: its message may quote what nobody may read."""
    if not isinstance(error, ServerError) and to_server_error(error).status >= 500:
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        where = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}:{frame.lineno}" for frame in frames]
        log.error("request.failed", extra={"request_id": request_id, "error": type(error).__name__, "where": where})


def _log_request(scope: Scope, status: int, request_id: str, seconds: float) -> None:
    """One line a request. The route and never the path, which may hold names; never a query, a body or a token."""
    if not log.isEnabledFor(logging.INFO):
        return
    route = getattr(scope.get("route"), "path", None)
    log.info(
        "request",
        extra={
            "method": scope["method"],
            "route": route or ("/v2" if scope["path"].startswith("/v2") else None),
            "status": status,
            "ms": round(seconds * 1000, 2),
            "request_id": request_id,
            "principal": scope["state"].get("principal_id"),
        },
    )
