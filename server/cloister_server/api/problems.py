"""Every exception as the one error shape. Decides what a caller is told; what it does not know is `internal`, and no more.

No answer ever repeats a value that was sent, names another tenant's things, or quotes a library's message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cloister.wire.errors import ErrorBody
from cloister.wire.rows import RowsRefused
from cloister_privacy.errors import (
    AccountingError,
    ArchitectureRefused,
    BatchLargerThanNominal,
    InitialRefused,
    InputRefused,
    PlanImpossible,
    PrivacyError,
    QueryRefused,
    UnitNotSupported,
)
from cloister_server.api.document import allowed_methods
from cloister_server.errors import (
    BadRequest,
    Forbidden,
    Invalid,
    NotFound,
    RateLimited,
    ServerError,
    StartRefused,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

__all__ = ["respond", "response_to", "to_server_error"]

_MOST_FIELDS = 20
_LONGEST_NAME = 64

_PRIVACY_CODES: Mapping[type[PrivacyError], str] = {
    BatchLargerThanNominal: "batch_too_large",
    PlanImpossible: "plan_impossible",
    AccountingError: "plan_impossible",
    UnitNotSupported: "unit_not_supported",
    ArchitectureRefused: "invalid_request",
    InitialRefused: "weights_refused",
    InputRefused: "invalid_request",
    QueryRefused: "invalid_request",
}
"""What the privacy library refuses because of the request. All else that it raises (a seal, a key) is our own fault."""


async def respond(request: Request, error: Exception) -> Response:
    """FastAPI's one exception handler."""
    response = response_to(error, request_id=request.headers.get("x-request-id", ""))
    if response.status_code == 405:
        response.headers["Allow"] = allowed_methods(request)
    return response


def response_to(error: Exception, *, request_id: str) -> Response:
    """The answer to a request that ended in this exception."""
    refusal = to_server_error(error)
    body = ErrorBody(error=refusal.message, code=refusal.code, request_id=request_id, details=refusal.details)
    headers = {}
    if isinstance(refusal, Unauthenticated):
        headers["WWW-Authenticate"] = refusal.challenge
    if isinstance(refusal, Forbidden):  # RFC 6750, section 3: the token is fine, and does not reach as far
        headers["WWW-Authenticate"] = 'Bearer realm="cloister", error="insufficient_scope"'
    if isinstance(refusal, (RateLimited, Unavailable)):
        headers["Retry-After"] = str(refusal.details.get("retry_after_s", 1))
    return Response(json.dumps(body.model_dump()), refusal.status, headers, media_type="application/json")


def to_server_error(error: Exception) -> ServerError:
    """What a caller may be told of an exception: itself where it is a refusal of ours, else as much as its kind says."""
    match error:
        case StartRefused():
            return Unavailable("the server is not in order, and its operator must see to it; retry later")
        case ServerError():
            return error
        case RowsRefused():
            details = {"column": error.column, "row": error.row, "problem": error.problem}
            return Invalid(f"{error}; correct the rows and send the part again", code="rows_refused", details=details)
        case PrivacyError():
            return _of_privacy(error)
        case RequestValidationError():
            return _of_validation(error.errors())
        case HTTPException():
            return _of_http(error)
        case ClientDisconnect():
            return BadRequest("the request ended before its body did; send it again", code="body_truncated")
        case IntegrityError():
            return Unavailable("another request wrote the same thing at the same moment; retry, and see what it wrote")
        case OperationalError() | InterfaceError() | PoolTimeout():
            return Unavailable("the database did not answer in time; nothing was written; retry in a moment")
        case DBAPIError() if error.connection_invalidated:
            return Unavailable("the database did not answer in time; nothing was written; retry in a moment")
        case _:
            return _internal()


def _internal() -> ServerError:
    return ServerError("the server failed, and it is not your fault; tell its operator the request id")


def _of_privacy(error: PrivacyError) -> ServerError:
    code = next((code for kind, code in _PRIVACY_CODES.items() if isinstance(error, kind)), None)
    return _internal() if code is None else Invalid(str(error), code=code)


def _of_http(error: HTTPException) -> ServerError:
    if error.status_code == 404:
        return NotFound("route")
    if error.status_code == 413:
        return TooLarge("the body is too large; send less at a time")
    refusal = BadRequest("the request could not be read; see the API's description at /openapi.json")
    if error.status_code == 405:
        refusal = _MethodNotAllowed("this path does not take this method; see the API's description at /openapi.json")
    return refusal if error.status_code < 500 else _internal()


class _MethodNotAllowed(BadRequest):
    status = 405


def _of_validation(problems: Sequence[Any]) -> ServerError:
    if any(problem["type"] == "json_invalid" for problem in problems):
        return BadRequest("the body is not JSON; send one JSON document, with Content-Type: application/json")
    fields = [{"field": _field(problem["loc"]), "problem": _problem(problem)} for problem in problems[:_MOST_FIELDS]]
    named = ", ".join(dict.fromkeys(field["field"] for field in fields[:3]))
    return Invalid(f"the request does not hold: see {named}; details.fields says why", details={"fields": fields})


def _field(location: Sequence[str | int]) -> str:
    """Where: `columns.age.low`, without the words that only say which part of the request it was in."""
    parts = location[1:] if location and location[0] in ("body", "query", "path", "header") else location
    return ".".join(str(part)[:_LONGEST_NAME] for part in parts) or "body"


def _problem(problem: Mapping[str, Any]) -> str:
    """What is wrong, without the value that was sent: pydantic quotes it in the messages about tags alone."""
    if problem["type"] == "union_tag_invalid":
        return f"Type should be one of {problem['ctx']['expected_tags']}"
    return str(problem["msg"])
