"""Logins of a person on this machine: which server, and its refresh token, in the OS keyring or in a file of mode 0600. No HTTP.

A refresh token is good once: whoever uses it holds the profile's lock until the next one is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from cloister._errors import ConfigurationError

__all__ = ["Profile", "ProfileStore"]

_FORMAT = "cloister.profile/1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_LARGEST = 2**16
_LONGEST_WAIT_S = 60.0
_PAUSE_S = 0.02
_SERVICE = "cloister"


@dataclass(frozen=True, slots=True)
class Profile:
    """One login."""

    url: str
    client_id: str
    refresh_token: SecretStr = field(repr=False)
    allow_insecure: bool = False
    """Whether whoever logged in has allowed plain HTTP to another machine."""
    key: SecretStr | None = field(default=None, repr=False)
    """The private key that the login is bound to (RFC 9449); None where it is bound to none."""


class ProfileStore:
    """The profile of one name in one directory, whether or not there is one."""

    def __init__(self, directory: Path, name: str, *, log_in: str = "cloister login") -> None:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name[:64]!r} is no name for a profile: letters, digits, _ and -; see CLOISTER_PROFILE"
            )
        self.name = name
        self.log_in = log_in
        """The command that makes such a login, up to the URL: refusals say to run it."""
        self._directory, self._file = directory, directory / f"{name}.json"

    def read(self) -> Profile | None:
        """The profile, if there is one. Raises ConfigurationError where it cannot be used, and quotes nothing of it."""
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error.strerror or "it cannot be opened") from None
        with os.fdopen(descriptor, "rb") as opened:
            found = os.fstat(descriptor)
            if found.st_mode & 0o077 or found.st_uid != os.geteuid():
                raise self._unusable(f"others can read or change it; run `chmod 600 {self._file}`, and log in again")
            content = opened.read(_LARGEST)
        try:
            return self._profile_of(json.loads(content))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._unusable("it is no profile of this release") from None

    def write(self, profile: Profile) -> None:
        """Keep a profile, the whole of it or the one before. Inside `alone`, but for the first login."""
        content: dict[str, Any] = {
            "format": _FORMAT,
            "url": profile.url,
            "client_id": profile.client_id,
            "allow_insecure": profile.allow_insecure,
        }
        token = profile.refresh_token.get_secret_value()
        if profile.key is not None:
            token = f"{token} {profile.key.get_secret_value()}"
        keyring = _keyring()
        if keyring is not None and self._put(keyring, token):
            content["kept_in"] = "keyring"
        else:
            content |= {"kept_in": "file", "refresh_token": token}
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._directory / f".{self.name}.draft"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(draft, flags, 0o600)
            with os.fdopen(descriptor, "wb") as opened:
                os.fchmod(descriptor, 0o600)  # a draft that was left over may have had any mode
                opened.write(json.dumps(content).encode())
                opened.flush()
                os.fsync(descriptor)
            draft.replace(self._file)
        except OSError as error:
            raise self._unusable(error.strerror or "it cannot be written") from None

    def remove(self) -> None:
        """Forget the login on this machine."""
        keyring = _keyring()
        if keyring is not None:
            with contextlib.suppress(Exception):  # there may be nothing to delete; backends have errors of their own
                keyring.delete_password(_SERVICE, self._account)
        self._file.unlink(missing_ok=True)
        (self._directory / f".{self.name}.draft").unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While one process uses the refresh token, no other does. Raises ConfigurationError after a minute."""
        until = time.monotonic() + _LONGEST_WAIT_S
        with self._lock_file() as descriptor:
            while not _locked(descriptor):
                self._give_up(until)
                time.sleep(_PAUSE_S)
            yield

    @asynccontextmanager
    async def alone_async(self) -> AsyncIterator[None]:
        """As `alone`; other tasks go on, of which one may be the one that is waited for."""
        until = time.monotonic() + _LONGEST_WAIT_S
        with self._lock_file() as descriptor:
            while not _locked(descriptor):
                self._give_up(until)
                await asyncio.sleep(_PAUSE_S)
            yield

    @property
    def _account(self) -> str:
        return f"{self.name} in {self._directory}"

    def _profile_of(self, content: dict[str, Any]) -> Profile:
        if content["format"] != _FORMAT or not all(isinstance(content[name], str) for name in ("url", "client_id")):
            raise ValueError
        if content["kept_in"] == "keyring":
            keyring = _keyring()
            token = None if keyring is None else keyring.get_password(_SERVICE, self._account)
        else:
            token = content["refresh_token"]
        if not isinstance(token, str) or not token:
            raise ConfigurationError(
                f"the login {self.name!r} has no token any more; run `{self.log_in} {content['url']}`"
            )
        token, _, key = token.partition(" ")
        is_insecure = content["allow_insecure"] is True
        return Profile(
            content["url"], content["client_id"], SecretStr(token), is_insecure, SecretStr(key) if key else None
        )

    def _put(self, keyring: Any, token: str) -> bool:
        """Whether the keyring has it now."""
        try:
            keyring.set_password(_SERVICE, self._account, token)
        except Exception:  # a keyring that is locked or away has errors of its backend's own
            return False
        return True

    @contextmanager
    def _lock_file(self) -> Iterator[int]:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._directory / f".{self.name}.lock", flags, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)  # and with it the lock goes, however the process ends

    def _give_up(self, until: float) -> None:
        if time.monotonic() > until:
            raise ConfigurationError(
                f"another process holds the login {self.name!r} for a minute already; end it, or try again"
            )

    def _unusable(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"the login in {self._file} cannot be used: {why}")


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _keyring() -> Any:
    """The OS keyring's module, where it is installed and there is a keyring; else None."""
    try:
        import keyring
        from keyring.backends.fail import Keyring as NoKeyring
    except ImportError:
        return None
    return None if isinstance(keyring.get_keyring(), NoKeyring) else keyring
