"""Being logged in as a person: the device flow (RFC 8628) once, then refresh tokens, each good once. Knows the HTTP library."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx2
from pydantic import SecretStr

from cloister._auth import ClientCredentials
from cloister._errors import (
    APIError,
    AuthenticationFailed,
    CloisterError,
    ConfigurationError,
    ConnectionFailed,
    UnexpectedAnswer,
    from_answer,
)
from cloister._possession import PrivateKey
from cloister._profiles import Profile, ProfileStore

__all__ = ["CLIENT_ID", "Device", "LoginCredentials", "begin", "log_out", "wait"]

CLIENT_ID = "cloister-cli"
"""The client that every server has for this."""
_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Device:
    """A login that waits for its person."""

    url: str
    client_id: str
    device_code: SecretStr
    user_code: str
    page: str
    """Where the person types the code in."""
    expires_s: float
    interval_s: float


class LoginCredentials(ClientCredentials):
    """Access tokens by the refresh token of a profile, which is used by one process at a time and replaced before anything else."""

    def __init__(self, store: ProfileStore, profile: Profile) -> None:
        super().__init__(profile.url, profile.client_id, "")
        self._store, self._profile = store, profile
        self._proves_by = _key_of(profile)

    def _alone(self) -> AbstractContextManager[None]:
        return self._store.alone()

    def _alone_async(self) -> AbstractAsyncContextManager[None]:
        return self._store.alone_async()

    def _ask(self, request: httpx2.Request) -> httpx2.Request:
        profile = self._store.read()  # another process may have used the one that was read before
        if profile is None or profile.url != self._profile.url:
            raise ConfigurationError(
                f"you are logged out of {self._profile.url}; run `{self._store.log_in} {self._profile.url}`"
            )
        self._profile, self._proves_by = profile, _key_of(profile)
        headers = {"Accept": "application/json"}
        if self._proves_by is not None:
            headers["DPoP"] = self._proves_by.proof("POST", self._token_url)
        return httpx2.Request(
            "POST",
            self._token_url,
            data={
                "grant_type": "refresh_token",
                "client_id": profile.client_id,
                "refresh_token": profile.refresh_token.get_secret_value(),
            },
            headers=headers,
            extensions={"timeout": request.extensions["timeout"]} if "timeout" in request.extensions else {},
        )

    def _take(self, answer: httpx2.Response) -> dict[str, Any]:
        told = super()._take(answer)
        following = told.get("refresh_token")
        if not isinstance(following, str) or not following:
            raise UnexpectedAnswer("the server gave no next refresh token; is this the URL of a Cloister server?")
        self._profile = replace(self._profile, refresh_token=SecretStr(following))
        self._store.write(self._profile)
        return told

    def _in_our_words(self, refusal: APIError) -> APIError:
        if refusal.code not in ("invalid_grant", "invalid_client"):
            return refusal
        return AuthenticationFailed(
            f"the login at {self._profile.url} is over; run `{self._store.log_in} {self._profile.url}`",
            status=refusal.status,
            code=refusal.code,
            request_id=refusal.request_id,
            details=refusal.details,
        )


def begin(url: str, client_id: str = CLIENT_ID, *, scope: str = "") -> Device:
    """Ask the server for a code. Raises APIError, ConnectionFailed or UnexpectedAnswer."""
    form = {"client_id": client_id, **({"scope": scope} if scope else {})}
    told = _answered(url, "/oauth/device_authorization", form)
    try:
        page = str(told["verification_uri"])
        device = Device(
            url,
            client_id,
            SecretStr(str(told["device_code"])),
            str(told["user_code"]),
            page,
            float(told["expires_in"]),
            float(told.get("interval", 5)),
        )
    except (KeyError, TypeError, ValueError):
        raise UnexpectedAnswer("the server gave no code; is this the URL of a Cloister server?") from None
    if urlsplit(page)[:2] != urlsplit(url)[:2]:
        raise UnexpectedAnswer(
            f"{url} sends you to another server to sign in; give the URL that the server calls itself"
        )
    return device


def wait(
    device: Device,
    *,
    pause: Callable[[float], None] = time.sleep,
    proves_by: PrivateKey | None = None,
    allow_insecure: bool = False,
    log_in: str = "cloister login",
) -> Profile:
    """The login, once its person has allowed it, bound to a key where one is given.

    Raises AuthenticationFailed where they refuse, ConfigurationError where they do not decide in time; both say to run `log_in` again.
    """
    form = {"grant_type": _GRANT, "client_id": device.client_id, "device_code": device.device_code.get_secret_value()}
    interval_s, waited_s = device.interval_s, 0.0
    while waited_s <= device.expires_s + interval_s:
        pause(interval_s)
        waited_s += interval_s
        try:
            told = _answered(device.url, "/oauth/token", form, proves_by)
        except ConnectionFailed:
            interval_s *= 2  # RFC 8628, section 3.5
        except APIError as refusal:
            if refusal.code == "slow_down":
                interval_s += 5
            elif refusal.code != "authorization_pending":
                raise _in_words(refusal, f"run `{log_in} {device.url}` again") from None
        else:
            token = told.get("refresh_token")
            if not isinstance(token, str) or not token:
                raise UnexpectedAnswer("the server gave no refresh token; is this the URL of a Cloister server?")
            key = None if proves_by is None else proves_by.for_keeping()
            return Profile(device.url, device.client_id, SecretStr(token), allow_insecure, key)
    raise ConfigurationError(f"nobody has allowed it in time; run `{log_in} {device.url}` again")


def log_out(store: ProfileStore) -> Profile:
    """Let the server end the login, and forget it here either way. Raises ConfigurationError where the server was not told."""
    with store.alone():
        profile = store.read()
        if profile is None:
            raise ConfigurationError(f"nobody is logged in (profile {store.name}); nothing was changed")
        try:
            _end(profile)
        except CloisterError as refusal:
            raise ConfigurationError(
                f"the login is forgotten here, but the server was not told: {refusal}; it goes on there until its operator ends it "
                "or two weeks have passed"
            ) from None
        finally:
            store.remove()
    return profile


def _key_of(profile: Profile) -> PrivateKey | None:
    try:
        return None if profile.key is None else PrivateKey.kept(profile.key.get_secret_value())
    except ValueError:
        raise ConfigurationError(f"the login at {profile.url} has no key that can be used; log in again") from None


def _end(profile: Profile) -> None:
    form = {"client_id": profile.client_id, "token": profile.refresh_token.get_secret_value()}
    _answered(profile.url, "/oauth/revoke", form)


def _answered(url: str, path: str, form: dict[str, str], proves_by: PrivateKey | None = None) -> dict[str, Any]:
    headers = {"Accept": "application/json"}
    if proves_by is not None:
        headers["DPoP"] = proves_by.proof("POST", f"{url}{path}")
    try:
        with httpx2.Client(timeout=_TIMEOUT_S, trust_env=url.startswith("https:")) as http:
            answer = http.post(f"{url}{path}", data=form, headers=headers)
    except httpx2.RequestError as error:
        raise ConnectionFailed(
            f"{url} could not be reached ({type(error).__name__}); see that the URL is right"
        ) from None
    try:
        body = answer.json()
    except ValueError:
        body = None
    if answer.status_code >= 400:
        raise from_answer(answer.status_code, body, dict(answer.headers))
    if answer.status_code >= 300 or not isinstance(body, dict):
        raise UnexpectedAnswer("the answer is no JSON object; is this the URL of a Cloister server?")
    return body


def _in_words(refusal: APIError, again: str) -> APIError:
    told = {
        "access_denied": f"it was not allowed; {again} if that was a mistake",
        "expired_token": f"nobody has allowed it in time; {again}",
    }.get(refusal.code)
    if told is None:
        return refusal
    return AuthenticationFailed(
        told, status=refusal.status, code=refusal.code, request_id=refusal.request_id, details=refusal.details
    )
