"""What providers over HTTP share: a bound on every call, and an address that gets no secret in the clear. Knows no protocol."""

from __future__ import annotations

import ipaddress
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import NoReturn, TypeVar
from urllib.parse import urlsplit

from cloister_privacy.sealing.errors import ProviderUnavailable

__all__ = ["call_within", "check_address", "keep_silent"]

_Result = TypeVar("_Result")


def call_within(timeout_s: float, call: Callable[[], _Result], *, provider: str) -> _Result:
    """What the call returns or raises, within so many seconds, its retries included.

    HTTP libraries bound single reads, so an answer that trickles in would be waited for without end. Raises
    ProviderUnavailable when the time is up; the call is left behind in its thread.
    """
    answers: queue.SimpleQueue[Callable[[], _Result]] = queue.SimpleQueue()

    def run() -> None:
        try:
            result = call()
        except BaseException as exc:
            answers.put(partial(_raise, exc))
        else:
            answers.put(lambda: result)

    threading.Thread(target=run, name=f"cloister-{provider}", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise ProviderUnavailable(
            f"{provider} gave no answer within {timeout_s:g} seconds; see that it runs and is reachable, then try again"
        ) from None
    return answer()


def check_address(address: str) -> None:
    """Raise ValueError unless the address is https, or http on this machine, and holds no credentials."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a provider's address is https://host[:port]")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("a provider's address holds no credentials and no query: addresses are logged")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ValueError(f"keys for {parts.hostname!r} would travel in the clear; use https")


def keep_silent(*libraries: str) -> None:
    """Let these libraries log nothing below a warning: at DEBUG they print the keys that they send and receive."""
    for name in libraries:
        logging.getLogger(name).setLevel(logging.WARNING)


def _raise(exc: BaseException) -> NoReturn:
    raise exc


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
