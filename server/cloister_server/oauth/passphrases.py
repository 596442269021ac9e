"""Passphrases: Argon2id under a pepper, a few at a time, and as much work where there is nobody. Knows neither SQL nor HTTP."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from cloister_server.errors import Invalid, Unavailable

__all__ = ["SHORTEST", "at_work", "hashed", "matches"]

SHORTEST = 12
LONGEST = 256
MEMORY_KIB, ITERATIONS, LANES = 47_104, 1, 1
"""OWASP's Password Storage Cheat Sheet, the first of its equal settings: 46 MiB, some 50 ms."""

_AT_ONCE = 2
_MOST_WAITING = 16
_LONGEST_WAIT_S = 10.0
_slots = threading.BoundedSemaphore(_AT_ONCE)
_waiting = threading.BoundedSemaphore(_AT_ONCE + _MOST_WAITING)
_nobodys: dict[bytes, str] = {}


@contextmanager
def at_work() -> Iterator[None]:
    """Take one of the places in which passphrases are worked on: whoever floods the service with tries fills no memory.

    Raises Unavailable where too many wait already.
    """
    if not _waiting.acquire(blocking=False):
        raise _busy()
    try:
        if not _slots.acquire(timeout=_LONGEST_WAIT_S):
            raise _busy()
        try:
            yield
        finally:
            _slots.release()
    finally:
        _waiting.release()


def hashed(passphrase: str, *, pepper: bytes, account: str) -> str:
    """What is stored of a new passphrase, in PHC form; inside `at_work`. Raises Invalid where it is too short or too easy."""
    text = unicodedata.normalize("NFKC", passphrase)
    if not SHORTEST <= len(text) <= LONGEST:
        raise Invalid(
            f"a passphrase has {SHORTEST} to {LONGEST} characters; four words that nobody would guess do well"
        )
    if len(set(text)) < 5 or account.rpartition("/")[2].lower() in text.lower():
        raise Invalid("this passphrase repeats itself, or holds your name; choose one that nobody would guess")
    return _argon2id(secrets.token_bytes(16), pepper).derive_phc_encoded(text.encode())


def matches(passphrase: str, stored: str | None, *, pepper: bytes) -> bool:
    """Whether this is the passphrase; inside `at_work`. Where none is stored, the answer is no, and costs as much."""
    text = unicodedata.normalize("NFKC", passphrase[: 2 * LONGEST]).encode("utf-8", "replace")
    try:
        Argon2id.verify_phc_encoded(text, stored or _of_nobody(pepper), secret=_secret(pepper))
    except InvalidKey:
        return False
    return stored is not None


def _of_nobody(pepper: bytes) -> str:
    """Of 256 random bits: compared where there is no account, or none with a passphrase."""
    place = hashlib.sha256(pepper).digest()
    if place not in _nobodys:
        _nobodys[place] = _argon2id(secrets.token_bytes(16), pepper).derive_phc_encoded(secrets.token_bytes(32))
    return _nobodys[place]


def _argon2id(salt: bytes, pepper: bytes) -> Argon2id:
    return Argon2id(
        salt=salt, length=32, iterations=ITERATIONS, lanes=LANES, memory_cost=MEMORY_KIB, secret=_secret(pepper)
    )


def _secret(pepper: bytes) -> bytes:
    return hmac.digest(pepper, b"cloister.passphrase/1\n", "sha256")


def _busy() -> Unavailable:
    return Unavailable("too many people sign in at this moment; try again in a few seconds")
