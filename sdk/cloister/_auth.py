"""Access tokens for requests: fetched once for all threads, renewed in time, sent to one origin and no other."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from time import monotonic
from typing import Any

import httpx2
from pydantic import SecretStr, TypeAdapter

from cloister._errors import APIError, AuthenticationFailed, UnexpectedAnswer, from_answer
from cloister._possession import PrivateKey

__all__ = ["ClientCredentials"]

_RENEW_S = 30.0
"""A token is renewed when it has this much life left."""
_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_TEXT = TypeAdapter(SecretStr)


class ClientCredentials(httpx2.Auth):
    """OAuth client_credentials (RFC 6749, section 4.4) by a secret or, better, by a key; tokens bound to a key with `dpop`.

    An assertion names the URL that was given as its audience, and never one that a server calls itself: else any server that
    this client is led to could use it elsewhere.
    """

    def __init__(self, base_url: str, client_id: str, credential: str | PrivateKey, *, dpop: bool = False) -> None:
        self._issuer, self._client_id = base_url.rstrip("/"), client_id
        self._origin = _origin(httpx2.URL(base_url))
        self._token_url = f"{self._issuer}/oauth/token"
        self._key = credential if isinstance(credential, PrivateKey) else None
        secret = "" if isinstance(credential, PrivateKey) else credential
        self._basic = SecretStr(base64.b64encode(f"{client_id}:{secret}".encode()).decode())
        self._proves_by = PrivateKey.generate() if dpop else None
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
                    with self._alone():
                        answer = yield self._ask(request)
                        answer.read()
                        self._take(answer)
                token = self._token
            response = yield self._signed(request, token)
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
                    async with self._alone_async():
                        answer = yield self._ask(request)
                        await answer.aread()
                        self._take(answer)
                token = self._token
            response = yield self._signed(request, token)
            if response.status_code != 401:
                return
            refused = token

    def _alone(self) -> AbstractContextManager[None]:
        """Held while a token is asked for, against other processes that do the same with what only one can use."""
        return nullcontext()

    def _alone_async(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def _must_renew(self, refused: SecretStr | None) -> bool:
        """True near expiry, or where nobody has yet replaced the token that was refused."""
        return monotonic() >= self._renew_at or self._token == refused

    def _ask(self, request: httpx2.Request) -> httpx2.Request:
        """For a token; within the time limits of the request that needs it."""
        form, headers = {"grant_type": "client_credentials"}, {"Accept": "application/json"}
        if self._key is None:
            headers["Authorization"] = f"Basic {self._basic.get_secret_value()}"
        else:
            form |= {"client_assertion_type": _ASSERTION, "client_assertion": self._assertion(self._key)}
        if self._proves_by is not None:
            headers["DPoP"] = self._proves_by.proof("POST", self._token_url)
        return httpx2.Request(
            "POST",
            self._token_url,
            data=form,
            headers=headers,
            extensions={"timeout": request.extensions["timeout"]} if "timeout" in request.extensions else {},
        )

    def _assertion(self, key: PrivateKey) -> str:
        return key.assertion(self._client_id, self._issuer)

    def _signed(self, request: httpx2.Request, token: SecretStr) -> httpx2.Request:
        """With the token and, where that is bound to our key, with a proof that is made anew each time the request is sent."""
        shown = token.get_secret_value()
        if self._proves_by is None:
            request.headers["Authorization"] = f"Bearer {shown}"
        else:
            url = str(request.url.copy_with(query=None, fragment=None))
            request.headers["Authorization"] = f"DPoP {shown}"
            request.headers["DPoP"] = self._proves_by.proof(request.method, url, shown)
        return request

    def _take(self, answer: httpx2.Response) -> dict[str, Any]:
        """Keep the token that was given; all that the server said. Raises what it refused with."""
        try:
            body = answer.json()
        except ValueError:
            body = None
        if answer.status_code >= 400:
            refusal = from_answer(answer.status_code, body, dict(answer.headers))
            raise self._in_our_words(refusal)
        try:
            if body.get("token_type", "Bearer").lower() != ("bearer" if self._proves_by is None else "dpop"):
                raise UnexpectedAnswer("the server gave a token of another kind than was asked for; it is not used")
            token, life_s = _TEXT.validate_python(body["access_token"]), float(body["expires_in"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UnexpectedAnswer("the token endpoint gave no token; is this the URL of a Cloister server?") from None
        self._token, self._renew_at = token, monotonic() + max(1.0, life_s - _RENEW_S)
        told: dict[str, Any] = body
        return told

    def _in_our_words(self, refusal: APIError) -> APIError:
        """Whoever uses the SDK has given an id and a secret or key, and knows nothing of how they are sent."""
        if refusal.code == "invalid_dpop_proof" and self._proves_by is None:
            told = "this client's tokens must be bound to a key: pass dpop=True, or set CLOISTER_DPOP=1"
        elif refusal.code == "invalid_dpop_proof":
            told = (
                f"the server does not take our proofs; see that this machine's clock is right, and that {self._issuer} is what "
                "the server calls itself (CLOISTER_ISSUER there)"
            )
        elif refusal.code == "invalid_client" and self._key is not None:
            told = (
                "the server knows no client of this id with this key; check client_id and private_key (CLOISTER_CLIENT_ID, "
                f"CLOISTER_PRIVATE_KEY), this machine's clock, and that {self._issuer} is what the server calls itself "
                "(CLOISTER_ISSUER there), or ask its operator to register the public key"
            )
        elif refusal.code == "invalid_client":
            told = (
                "the server knows no client of this id with this secret; check client_id and client_secret "
                "(CLOISTER_CLIENT_ID, CLOISTER_CLIENT_SECRET), or ask its operator for a new client"
            )
        else:
            return refusal
        return AuthenticationFailed(
            told, status=refusal.status, code=refusal.code, request_id=refusal.request_id, details=refusal.details
        )


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
