"""Access tokens for requests: fetched once for all threads, renewed in time, sent to one origin and no other."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import AsyncGenerator, Generator

import httpx2
from pydantic import SecretStr, TypeAdapter

from cloister._errors import APIError, AuthenticationFailed, UnexpectedAnswer, from_answer

__all__ = ["ClientCredentials"]

_RENEW_S = 30.0
"""A token is renewed when it has this much life left."""
_TEXT = TypeAdapter(SecretStr)


class ClientCredentials(httpx2.Auth):
    """OAuth client_credentials with client_secret_basic (RFC 6749, sections 4.4 and 2.3.1)."""

    def __init__(self, base_url: str, client_id: str, client_secret: str) -> None:
        self._origin = _origin(httpx2.URL(base_url))
        self._token_url = f"{base_url.rstrip('/')}/oauth/token"
        self._basic = SecretStr(base64.b64encode(f"{client_id}:{client_secret}".encode()).decode())
        self._token, self._renew_at = SecretStr(""), 0.0
        self._lock, self._async_lock = threading.Lock(), asyncio.Lock()

    def sync_auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        """The request with a token; after a 401 once more with a new one."""
        if _origin(request.url) != self._origin:
            yield request  # without the token, which is for one origin
            return
        refused: SecretStr | None = None
        for _ in range(2):
            with self._lock:
                if self._must_renew(refused):
                    answer = yield self._ask(request)
                    answer.read()
                    self._take(answer)
                token = self._token
            response = yield _signed(request, token)
            if response.status_code != 401:
                return
            refused = token

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        """As `sync_auth_flow`."""
        if _origin(request.url) != self._origin:
            yield request
            return
        refused: SecretStr | None = None
        for _ in range(2):
            async with self._async_lock:
                if self._must_renew(refused):
                    answer = yield self._ask(request)
                    await answer.aread()
                    self._take(answer)
                token = self._token
            response = yield _signed(request, token)
            if response.status_code != 401:
                return
            refused = token

    def _must_renew(self, refused: SecretStr | None) -> bool:
        """True near expiry, or where nobody has yet replaced the token that was refused."""
        return time.monotonic() >= self._renew_at or self._token == refused

    def _ask(self, request: httpx2.Request) -> httpx2.Request:
        """For a token; within the time limits of the request that needs it."""
        return httpx2.Request(
            "POST",
            self._token_url,
            data={"grant_type": "client_credentials"},
            headers={"Authorization": f"Basic {self._basic.get_secret_value()}", "Accept": "application/json"},
            extensions={"timeout": request.extensions["timeout"]} if "timeout" in request.extensions else {},
        )

    def _take(self, answer: httpx2.Response) -> None:
        try:
            body = answer.json()
        except ValueError:
            body = None
        if answer.status_code >= 400:
            refusal = from_answer(answer.status_code, body, dict(answer.headers))
            raise _in_our_words(refusal) if refusal.code == "invalid_client" else refusal
        try:
            token, life_s = _TEXT.validate_python(body["access_token"]), float(body["expires_in"])
        except (KeyError, TypeError, ValueError):
            raise UnexpectedAnswer("the token endpoint gave no token; is this the URL of a Cloister server?") from None
        self._token, self._renew_at = token, time.monotonic() + max(1.0, life_s - _RENEW_S)


def _in_our_words(refusal: APIError) -> AuthenticationFailed:
    """Whoever uses the SDK has given an id and a secret, and knows nothing of how they are sent."""
    return AuthenticationFailed(
        "the server knows no client of this id with this secret; check client_id and client_secret "
        "(CLOISTER_CLIENT_ID, CLOISTER_CLIENT_SECRET), or ask its operator for a new client",
        status=refusal.status,
        code=refusal.code,
        request_id=refusal.request_id,
        details=refusal.details,
    )


def _signed(request: httpx2.Request, token: SecretStr) -> httpx2.Request:
    request.headers["Authorization"] = f"Bearer {token.get_secret_value()}"
    return request


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
