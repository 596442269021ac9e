"""Everything the SDK raises.

CloisterError
├── InvalidCertificate      a certificate that proves nothing
├── ConfigurationError      the client cannot be made, or is closed: no URL, no credentials, plain HTTP to another host
├── InvalidArgument         an argument that no server would accept; nothing was sent (also a ValueError)
├── RowsNotFit              rows that the declared schema does not allow; they were not sent
├── ConnectionFailed        no answer came
│   └── TimedOut
├── UnexpectedAnswer        an answer came that is not Cloister's
├── JobFailed               the job ended without a model
│   └── JobCancelled
├── StillRunning            wait(timeout_s=...) ended before the job did
├── PrivateInferenceFailed  a private prediction that was not made
│   ├── PartiesNotApart     two roles have one operator, host or certificate; nothing was sent
│   ├── StaleDeployment     the version was deployed anew, or no more
│   ├── PartyRefused        a certificate or permission that does not hold, or shares that the party does not take
│   ├── PartyBusy           too many requests wait at a party
│   ├── PartyUnavailable    a party or the dealer is away, late, or failed in the middle
│   └── PartyAnswerRefused  an answer that is none
└── APIError                the server refused: status, code, request_id, details
    ├── BadRequest          400
    ├── AuthenticationFailed 401
    ├── PermissionDenied    403
    │   └── TenantKeyRefused
    ├── NotFound            404: not there, or not shared with you
    ├── Conflict            409
    │   ├── UploadDiffers
    │   ├── BudgetExceeded
    │   └── RevisionMoved
    ├── TooLarge            413
    ├── InvalidRequest      422
    │   └── RowsRefused
    ├── RateLimited         429
    └── ServerFault         5xx

`InvalidCertificate` is raised offline, by cloister.wire.certificate; the root is cloister.wire's too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cloister.wire._errors import CloisterError, InvalidArgument
from cloister.wire._model import in_words

__all__ = [
    "APIError",
    "AuthenticationFailed",
    "BadRequest",
    "BudgetExceeded",
    "CloisterError",
    "ConfigurationError",
    "Conflict",
    "ConnectionFailed",
    "InvalidArgument",
    "InvalidRequest",
    "JobCancelled",
    "JobFailed",
    "NotFound",
    "PartiesNotApart",
    "PartyAnswerRefused",
    "PartyBusy",
    "PartyRefused",
    "PartyUnavailable",
    "PermissionDenied",
    "PrivateInferenceFailed",
    "RateLimited",
    "RevisionMoved",
    "RowsNotFit",
    "RowsRefused",
    "ServerFault",
    "StaleDeployment",
    "StillRunning",
    "TenantKeyRefused",
    "TimedOut",
    "TooLarge",
    "UnexpectedAnswer",
    "UploadDiffers",
    "from_answer",
    "name_the_job",
    "valid",
]

M = TypeVar("M", bound=BaseModel)


class ConfigurationError(CloisterError):
    """The client cannot be made safely from what it was given, or it is closed."""


class RowsNotFit(CloisterError):
    """Rows that the declared schema or the model does not allow, found here; they were not sent."""


class ConnectionFailed(CloisterError):
    """No answer came from the server, after the retries that are safe."""


class TimedOut(ConnectionFailed):
    """No answer came in time."""


class UnexpectedAnswer(CloisterError):
    """An answer came that is not Cloister's: another server, a proxy in between, or a newer protocol."""


class JobFailed(CloisterError):
    """The job ended without a model; the message is the server's."""

    def __init__(self, message: str, *, job: str, code: str | None, request_id: str | None) -> None:
        known = ", ".join(part for part in (code, f"request {request_id}" if request_id else None) if part)
        super().__init__(f"job {job}: {message}" + (f" [{known}]" if known else ""))
        self.job, self.code, self.request_id = job, code, request_id


class JobCancelled(JobFailed):
    """The job was cancelled; it published nothing, and steps that ran stay charged."""


class StillRunning(CloisterError):
    """The wait timed out; the job goes on."""


class PrivateInferenceFailed(CloisterError):
    """A private prediction that was not made."""


class PartiesNotApart(PrivateInferenceFailed):
    """Two of the parties and the dealer are one, as far as they say, and could put the shares together. Nothing was sent."""


class StaleDeployment(PrivateInferenceFailed):
    """The version was deployed privately anew, or is no more: ask for it again by `client.private(...)`."""


class PartyRefused(PrivateInferenceFailed):
    """A party's certificate does not hold, or it does not take the permission or the shares."""


class PartyBusy(PrivateInferenceFailed):
    """Too many requests wait at a party; try again in a moment."""


class PartyUnavailable(PrivateInferenceFailed):
    """A party or the dealer is away, late, or failed in the middle; what was shared is of no use to anybody."""


class PartyAnswerRefused(PrivateInferenceFailed):
    """A party answered what is no share of an answer."""


class APIError(CloisterError):
    """The server's refusal, in its own words, with the request id to quote."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        request_id: str,
        details: dict[str, Any],
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{message} [{status} {code}" + (f", request {request_id}]" if request_id else "]"))
        self.message, self.status, self.code, self.request_id, self.details = message, status, code, request_id, details
        self.retry_after_s = retry_after_s


class BadRequest(APIError):
    """400."""


class AuthenticationFailed(APIError):
    """401: the credentials or the token were not accepted."""


class PermissionDenied(APIError):
    """403: yours to see, not yours to do."""


class TenantKeyRefused(PermissionDenied):
    """The tenant's encryption key is disabled, withdrawn or destroyed: nothing of the tenant opens before it is given back."""


class NotFound(APIError):
    """404: not there, or not shared with you."""


class Conflict(APIError):
    """409."""


class BudgetExceeded(Conflict):
    """The run does not fit what is left of the source's budget; the ledger is unchanged."""

    @property
    def asked(self) -> float | None:
        """The epsilon that was asked for, where the server tells it."""
        asked = self.details.get("asked")
        return None if asked is None else float(asked)

    @property
    def left(self) -> float:
        """What is left of the source's epsilon."""
        return float(self.details.get("left", 0.0))

    @property
    def largest_epsilon(self) -> float | None:
        """The epsilon of the largest run of this shape that fits, if any does."""
        largest = self.details.get("largest_epsilon")
        return None if largest is None else float(largest)

    @property
    def owners(self) -> list[str]:
        """Who can raise the budget."""
        return list(self.details.get("owners", []))


class RevisionMoved(Conflict):
    """The source's ledger moved since the plan was made; plan again."""


class UploadDiffers(Conflict):
    """An earlier upload of this name was cut short, and what it sent is not what these rows would be."""


class TooLarge(APIError):
    """413."""


class InvalidRequest(APIError):
    """422: `details["fields"]` says which."""


class RowsRefused(InvalidRequest):
    """The server found rows that the schema does not allow; only their uploader is told which."""

    first_row = 0
    """The row of the data with which the refused part begins."""

    @property
    def column(self) -> str | None:
        column = self.details.get("column")
        return None if column is None else str(column)

    @property
    def row(self) -> int | None:
        """Counted from the first row of the data."""
        row = self.details.get("row")
        return None if row is None else self.first_row + int(row)

    def __str__(self) -> str:
        problem = self.details.get("problem")
        if self.row is None or problem is None:
            return super().__str__()
        column = f", column {self.column!r}" if self.column is not None else ""
        known = f"[{self.status} {self.code}" + (f", request {self.request_id}]" if self.request_id else "]")
        return f"row {self.row} of the data{column}: {problem}; correct the rows and upload them again {known}"


class RateLimited(APIError):
    """429."""


class ServerFault(APIError):
    """5xx: the server's own fault; quote the request id to its operator."""


_BY_CODE: dict[str, type[APIError]] = {
    "budget_exceeded": BudgetExceeded,
    "allowance_expired": BudgetExceeded,
    "revision_moved": RevisionMoved,
    "rows_refused": RowsRefused,
    "tenant_key_refused": TenantKeyRefused,
}
_BY_STATUS: dict[int, type[APIError]] = {
    400: BadRequest,
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: InvalidRequest,
    429: RateLimited,
}


def valid(model: type[M], /, **fields: Any) -> M:
    """A request's body. Raises InvalidArgument, naming each field that is wrong and never its value."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        words = in_words(error)
    raise InvalidArgument(f"nothing was sent; {words}")


def name_the_job(error: CloisterError, job: str) -> CloisterError:
    """The same error; its words also say which job was being watched, and how to watch it again."""
    error.args = (f"{error}; this was while watching job {job}: client.jobs.get({job!r}) finds it again",)
    return error


def from_answer(status: int, body: Any, headers: Mapping[str, str]) -> APIError:
    """The exception for a refusal; a body of no known shape still gives one. `headers` have lower-case names."""
    known = body if isinstance(body, dict) else {}
    is_ours = "code" in known  # the token endpoint answers as RFC 6749, section 5.2 says: there `error` is the code
    code = str(known.get("code" if is_ours else "error") or "unknown")
    sentence = known.get("error" if is_ours else "error_description")
    details = known.get("details")
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status) or (ServerFault if status >= 500 else APIError)
    return kind(
        str(sentence or f"the server answered {status}"),
        status=status,
        code=code,
        request_id=str(known.get("request_id") or headers.get("x-request-id", "")),
        details=details if isinstance(details, dict) else {},
        retry_after_s=_retry_after_s(headers.get("retry-after", "")),
    )


def _retry_after_s(told: str) -> float | None:
    """RFC 9110, section 10.2.3: seconds, or a date."""
    if told.isdecimal():
        return float(told)
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return None
