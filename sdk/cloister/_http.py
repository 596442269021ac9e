"""The one module that knows the HTTP library: sends what operations ask for, retries what is safe, names what went wrong.

An operation is a generator that yields `Ask`s and `Pause`s and returns its result. `Sender` drives it with blocking calls,
`AsyncSender` on an event loop; the operation is written once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import random
import re
import time
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import httpx2

from cloister._auth import ClientCredentials
from cloister._errors import (
    APIError,
    CloisterError,
    ConfigurationError,
    ConnectionFailed,
    TimedOut,
    UnexpectedAnswer,
    from_answer,
)

__all__ = ["Answer", "Ask", "AsyncSender", "Operation", "Pause", "Sender", "asked", "check_url", "is_passing"]

T = TypeVar("T")

_RETRIED = frozenset({408, 429, 502, 503, 504})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_API_PATH = re.compile(r"/(v1|v2|oauth)(/.*)?$")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LONGEST_RETRY_AFTER_S = 60.0
"""Whoever is told to come back later than this decides for themselves: the error carries `retry_after_s`."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request. Every write carries an idempotency key, so that a retried one happens once."""

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait this long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: Any
    headers: Mapping[str, str]


Operation = Generator[Ask | Pause, Answer, T]


def asked(ask: Ask, *, max_retries: int) -> Operation[dict[str, Any]]:
    """Send, retry what may be retried, and return the JSON object. Raises APIError, ConnectionFailed, UnexpectedAnswer."""
    ask = _identified(ask)
    for attempt in itertools.count():
        try:
            return _accepted((yield ask))
        except (APIError, ConnectionFailed) as failure:
            pause_s = _pause_s(failure, attempt)
            if pause_s is None or attempt >= max_retries:
                raise
        yield Pause(pause_s)
    raise AssertionError("unreachable")


def is_passing(failure: CloisterError) -> bool:
    """Whether the server is away or busy, and may well answer a later attempt."""
    return isinstance(failure, ConnectionFailed) or (isinstance(failure, APIError) and failure.status in _RETRIED)


def _identified(ask: Ask) -> Ask:
    """The same ask with a request id and, if it writes, an idempotency key: one of each over all retries."""
    headers = {"X-Request-Id": uuid.uuid4().hex, **ask.headers}
    if ask.method != "GET":
        headers = {"Idempotency-Key": uuid.uuid4().hex, **headers}
    return replace(ask, headers=headers)


def _accepted(answer: Answer) -> dict[str, Any]:
    if answer.status >= 400:
        raise from_answer(answer.status, answer.body, answer.headers)
    if answer.status == 204:
        return {}
    if not 200 <= answer.status < 300:
        raise UnexpectedAnswer(
            f"the server answered {answer.status} and points elsewhere, where no token is sent; give the URL it points to"
        )
    if not isinstance(answer.body, dict):
        raise UnexpectedAnswer(
            "the answer is no JSON object; is this the URL of a Cloister server, or of a proxy before it?"
        )
    return answer.body


def _pause_s(failure: APIError | ConnectionFailed, attempt: int) -> float | None:
    """How long to wait before the next attempt; None where another would be refused too, or only welcome much later."""
    if not is_passing(failure):
        return None
    if isinstance(failure, APIError) and failure.retry_after_s is not None:
        return failure.retry_after_s if failure.retry_after_s <= _LONGEST_RETRY_AFTER_S else None
    longest = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
    return random.uniform(longest / 2, longest)  # noqa: S311 (jitter)


def check_url(url: str, *, allow_insecure: bool) -> str:
    """The base URL, if secrets may travel to it."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL()
    if parsed.userinfo:
        raise ConfigurationError("the URL holds a password; secrets travel in client_secret, never in a URL")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise ConfigurationError(
            f"{url!r} is not the base URL of a server; give http(s)://host[:port][/path], e.g. https://cloister.example"
        )
    if _API_PATH.search(parsed.path):
        base = _API_PATH.sub("", url)
        raise ConfigurationError(f"{url!r} is not the base URL of a server but a path of its API; give {base!r}")
    if parsed.scheme == "http" and not allow_insecure and not _is_loopback(parsed.host):
        raise ConfigurationError(
            f"{url!r} is plain HTTP to another machine, where secrets and rows could be read on the way; use https, or pass "
            "allow_insecure=True (--allow-insecure) if this network is yours alone"
        )
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Sender:
    """Drives operations with blocking calls. Safe to share between threads."""

    def __init__(
        self, base_url: str, auth: ClientCredentials, *, timeout_s: float | None, transport: Any = None
    ) -> None:
        self._http = httpx2.Client(
            base_url=base_url, auth=auth, timeout=timeout_s, transport=transport, trust_env=_may_use_proxies(base_url)
        )

    def run(self, operation: Operation[T]) -> T:
        """What the operation returns, or what it raises."""
        try:
            step = next(operation)
            while True:
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                    step = next(operation)
                else:
                    step = _resume(operation, self._send(step))
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            operation.close()

    def close(self) -> None:
        self._http.close()

    def _send(self, ask: Ask) -> Answer | CloisterError:
        if self._http.is_closed:
            return _closed()
        try:
            return _read(self._http.send(_request(self._http, ask)))
        except CloisterError as refusal:  # the token endpoint's
            return refusal
        except httpx2.RequestError as error:
            return _failure(error)


class AsyncSender:
    """Drives operations on an event loop."""

    def __init__(
        self, base_url: str, auth: ClientCredentials, *, timeout_s: float | None, transport: Any = None
    ) -> None:
        self._http = httpx2.AsyncClient(
            base_url=base_url, auth=auth, timeout=timeout_s, transport=transport, trust_env=_may_use_proxies(base_url)
        )

    async def run(self, operation: Operation[T]) -> T:
        """As `Sender.run`."""
        try:
            step = next(operation)
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = next(operation)
                else:
                    step = _resume(operation, await self._send(step))
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            operation.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, ask: Ask) -> Answer | CloisterError:
        if self._http.is_closed:
            return _closed()
        try:
            return _read(await self._http.send(_request(self._http, ask)))
        except CloisterError as refusal:  # the token endpoint's
            return refusal
        except httpx2.RequestError as error:
            return _failure(error)


def _may_use_proxies(base_url: str) -> bool:
    """Only TLS goes through the environment's proxies: plain HTTP would show them tokens and rows."""
    return base_url.startswith("https:")


def _resume(operation: Operation[T], outcome: Answer | CloisterError) -> Ask | Pause:
    return operation.throw(outcome) if isinstance(outcome, CloisterError) else operation.send(outcome)


def _request(http: httpx2.Client | httpx2.AsyncClient, ask: Ask) -> httpx2.Request:
    return http.build_request(
        ask.method, ask.path, params=dict(ask.params), json=ask.json, content=ask.content, headers=dict(ask.headers)
    )


def _read(response: httpx2.Response) -> Answer:
    try:
        body = response.json()
    except ValueError:
        body = None
    return Answer(response.status_code, body, dict(response.headers))


def _closed() -> ConfigurationError:
    return ConfigurationError("this client is closed; make another, and keep it open for as long as it is used")


def _failure(error: httpx2.RequestError) -> ConnectionFailed:
    url, request_id = error.request.url, error.request.headers.get("x-request-id", "")
    named = f" [request {request_id}]" if request_id else ""
    place = f"{url.host}:{url.port or _DEFAULT_PORTS.get(url.scheme)}"
    if isinstance(error, httpx2.TimeoutException):
        return TimedOut(
            f"{place} did not answer in time: the server may be down or busy; retry later, or raise timeout_s{named}"
        )
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return ConnectionFailed(f"{place} could not be reached ({told}): {_likely(error, url.scheme)}{named}")


def _likely(error: httpx2.RequestError, scheme: str) -> str:
    """What most often lies behind an error of this kind, and what to do."""
    if scheme == "https" and "CERTIFICATE_VERIFY" in str(error):
        return "its TLS certificate is not trusted on this machine; ask the operator which authority signed it"
    if scheme == "https" and "SSL" in str(error):
        return "what listens there may speak plain HTTP; if so, the URL begins with http://"
    if scheme == "http" and isinstance(error, httpx2.RemoteProtocolError):
        return "what listens there may be down, or speak TLS; if it does, the URL begins with https://"
    return "the server may be down, or the URL or the network wrong"
