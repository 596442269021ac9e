"""PKCS#11 libraries of this process and their tokens: one lock, one login, no PIN tried twice. Knows nothing of keys.

A library is initialised without threads of its own, so whoever uses any token of it holds the library's one lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister_privacy.sealing.errors import AccessRefused, KeyProviderError, ProviderMissing, ProviderUnavailable

__all__ = ["Token", "driver"]

_DIGEST_KEY = secrets.token_bytes(32)
"""Of this process: PINs are compared and remembered under it and never as they are."""


class Token:
    """A token of a library, by its label and, where two have the same one, its serial number.

    All of a process share one login to it. A token that was lost is logged in to again at the next use.
    """

    __slots__ = ("_digest", "_label", "_library", "_pin", "_serial", "_timeout_s", "_wanted_serial")

    def __init__(self, library: Path, *, label: str, serial: str | None, pin: str, timeout_s: float) -> None:
        """Log in. Raises ProviderMissing, ProviderUnavailable, or AccessRefused for a PIN that is wrong or untried."""
        self._label, self._wanted_serial, self._pin, self._timeout_s = label, serial, pin, timeout_s
        self._digest = hmac.digest(_DIGEST_KEY, _encoded(pin), hashlib.sha256)
        self._serial: bytes | None = None
        self._library = _open_library(library)
        with self.session():
            pass

    @property
    def label(self) -> str:
        return self._label

    @contextmanager
    def session(self) -> Iterator[Any]:
        """A session that is logged in and that nobody else uses meanwhile.

        A failure of the token within it that nobody caught raises ProviderUnavailable, and the login is given up.
        """
        library = self._library
        if library.pid != os.getpid():
            raise ProviderUnavailable(
                f"this process was forked off the one that opened the token {self._label!r}; open the provider in it anew"
            )
        if not library.lock.acquire(timeout=self._timeout_s):
            raise ProviderUnavailable(
                f"the token {self._label!r} was busy with others for {self._timeout_s:g} seconds; try again"
            )
        try:
            yield self._logged_in()
        except driver().PKCS11Error as exc:
            self._give_up()
            raise ProviderUnavailable(
                f"the token {self._label!r} failed ({type(exc).__name__}); see that it is plugged in and that its "
                "service runs, then try again"
            ) from None
        finally:
            library.lock.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold off all others on this machine who ask for the same: by a lock on the library's own file."""
        with self._library.path.open("rb") as file:
            give_up = time.monotonic() + self._timeout_s
            while not _is_locked(file.fileno()):
                if time.monotonic() > give_up:
                    raise ProviderUnavailable(f"another process is making keys with {self._library.path}; try again")
                time.sleep(0.01)
            yield

    def require_present(self, session: Any) -> None:
        """Raise the driver's own error unless the token itself answers: a lost one looks empty to some libraries."""
        if session.token.slot.get_token().serial != session.token.serial:
            raise driver().TokenNotPresent

    def _logged_in(self) -> Any:
        logins = self._library.logins
        if self._serial not in logins:
            self._log_in()
        assert self._serial is not None  # noqa: S101 (logged in)
        login = logins[self._serial]
        if not hmac.compare_digest(login.digest, self._digest):
            raise self._refused("is not the one that this process is logged in with")
        return login.session

    def _log_in(self) -> None:
        """Once with a PIN: a second try with a wrong one would bring the token nearer to locking itself."""
        p11, library = driver(), self._library
        token = self._find()
        self._serial = token.serial
        if token.serial in library.logins:
            return
        if (token.serial, self._digest) in library.refused:
            raise self._refused("was refused before, and is not tried twice")
        if p11.TokenFlag.USER_PIN_LOCKED in token.flags:
            raise self._refused("is locked; its security officer can set a new one")
        if p11.TokenFlag.USER_PIN_FINAL_TRY in token.flags:
            raise self._refused("has one try left, which is not taken here; log in once with the token's own tools")
        try:
            session = token.open(rw=True, user_pin=self._pin)
        except (p11.PinIncorrect, p11.PinInvalid, p11.PinLenRange):
            library.refused.add((token.serial, self._digest))
            raise self._refused("is wrong, and is not tried again") from None
        except (p11.PinLocked, p11.PinExpired, p11.UserPinNotInitialized) as exc:
            raise self._refused(f"cannot be used ({type(exc).__name__})") from None
        except p11.UserAlreadyLoggedIn:
            raise self._refused("cannot be checked, as other code of this process is logged in") from None
        library.logins[token.serial] = _Login(session, self._digest)

    def _find(self) -> Any:
        found = self._matching()
        if not found:  # some libraries see a token that came back only once they are begun anew
            self._library.restart()
            found = self._matching()
        if not found:
            raise ProviderUnavailable(f"there is no token {self._label!r} in the library's slots; plug it in")
        if len(found) > 1:
            raise KeyProviderError(f"{len(found)} tokens are called {self._label!r}; give the serial number of one")
        return found[0]

    def _matching(self) -> list[Any]:
        tokens = []
        with suppress(driver().PKCS11Error):
            for slot in self._library.handle.get_slots(token_present=True):
                with suppress(driver().PKCS11Error):
                    tokens.append(slot.get_token())
        named = [token for token in tokens if token.label == self._label]
        return [token for token in named if self._wanted_serial in (None, token.serial.decode("ascii", "replace"))]

    def _give_up(self) -> None:
        login = self._library.logins.pop(self._serial, None) if self._serial is not None else None
        if login is not None:
            with suppress(driver().PKCS11Error):
                login.session.close()

    def _refused(self, why: str) -> AccessRefused:
        return AccessRefused(f"the PIN of the token {self._label!r} {why}")


def driver() -> Any:
    """python-pkcs11. Raises ProviderMissing where it is not installed."""
    try:
        import pkcs11
    except ImportError:
        raise ProviderMissing("PKCS#11 needs python-pkcs11; run `pip install 'cloister[hsm]'`") from None
    return pkcs11


@dataclass(frozen=True, slots=True)
class _Login:
    session: Any
    digest: bytes = field(repr=False)


@dataclass(slots=True)
class _Library:
    path: Path
    handle: Any
    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    logins: dict[bytes, _Login] = field(default_factory=dict)
    """By the token's serial number."""
    refused: set[tuple[bytes, bytes]] = field(default_factory=set)

    def restart(self) -> None:
        """Begin the library anew: every session that it had is gone, and its users log in again."""
        self.logins.clear()
        with suppress(driver().PKCS11Error):
            self.handle.finalize()
        self.handle.initialize()


_LIBRARIES: dict[Path, _Library] = {}
_GUARD = threading.Lock()


def _open_library(path: Path) -> _Library:
    """The library, initialised once in this process."""
    p11, path = driver(), path.resolve()
    if not path.is_file():
        raise ProviderMissing(
            f"there is no PKCS#11 library at {path}; install the token's software or correct the path"
        )
    with _GUARD:
        if path not in _LIBRARIES or _LIBRARIES[path].pid != os.getpid():
            try:
                library = _Library(path, p11.lib(str(path)))
                if path in _LIBRARIES:  # inherited from a parent, whose state means nothing here
                    library.restart()
            except p11.PKCS11Error:
                raise ProviderMissing(f"{path} is no PKCS#11 library, or does not start; see its own log") from None
            _LIBRARIES[path] = library
        return _LIBRARIES[path]


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _encoded(pin: str) -> bytes:
    try:
        return pin.encode("utf-8")
    except UnicodeEncodeError:  # the error carries the PIN
        raise AccessRefused("the PIN is not valid Unicode; see where it is read from") from None


def _after_fork() -> None:
    """Another thread of the parent may have held the guard."""
    global _GUARD
    _GUARD = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
