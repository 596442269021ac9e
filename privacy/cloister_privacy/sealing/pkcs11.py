"""The PKCS#11 key provider: keys that never leave a token. Knows mechanisms and attributes; nothing of logins.

A wrapped key is `cloister.pkcs11/1\\n`, the number of its suite in one byte, and:

1. AES-256-GCM with an IV of ours: `iv (12) | ciphertext | tag (16)`; AAD is all that stands before the IV, and the context.
2. AES key wrap (RFC 3394), for tokens that take no IV from outside: of `SHA-256(AAD) | length (2) | secret | zeros`,
   filled up to a multiple of 8 bytes.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.errors import (
    InvalidAnswer,
    InvalidWrap,
    KeyExists,
    KeyMissing,
    KeyProviderError,
    KeyUnfit,
    ProviderUnavailable,
)
from cloister_privacy.sealing.provider import LARGEST_SECRET, Destruction, check_key_id, check_secret
from cloister_privacy.sealing.tokens import Token, driver

__all__ = ["PKCS11KeyProvider"]

_LINE = b"cloister.pkcs11/1\n"
_LABEL = "cloister/"
_IV_BYTES = 12
_TAG_BYTES = 16
_DIGEST_BYTES = 32
_DESTRUCTION = Destruction(
    waiting_days=0,
    claim="The key was destroyed in the token, which had never given it out. Backups that the token's own software "
    "made of it are not reached by that.",
)


class _Suite(enum.IntEnum):
    """In the second line of every wrapped key; a number is never used again."""

    GCM = 1
    KEY_WRAP = 2


class PKCS11KeyProvider:
    """A KeyProvider over a token: AES-256 keys that are sensitive, never extractable, and made in the token itself.

    Nothing of a key is remembered between two calls, so one that any process destroys is gone for all at once.
    """

    __slots__ = ("_suite", "_token")

    def __init__(
        self,
        library: Path,
        *,
        token_label: str,
        pin: str,
        token_serial: str | None = None,
        wrapping: Literal["auto", "gcm", "key_wrap"] = "auto",
        timeout_s: float = 10.0,
    ) -> None:
        """Log in to the token, at once and with one try. A token that is used for nothing else is wanted.

        `wrapping` says how the keys that are made from now on wrap: with "auto" by GCM where the token takes our IVs.
        `timeout_s` bounds the wait for other threads; how long the token itself may take is its library's to bound.
        Raises ProviderMissing, ProviderUnavailable, or AccessRefused for the PIN.
        """
        self._suite = {"auto": None, "gcm": _Suite.GCM, "key_wrap": _Suite.KEY_WRAP}[wrapping]
        self._token = Token(library, label=token_label, serial=token_serial, pin=pin, timeout_s=timeout_s)

    @property
    def destruction(self) -> Destruction:
        return _DESTRUCTION

    def __repr__(self) -> str:
        return f"PKCS11KeyProvider({self._token.label!r})"

    def create_key(self, key_id: str) -> None:
        """Make a fresh key in the token. Raises KeyExists, also where another process makes it in the same moment."""
        check_key_id(key_id)
        with self._token.alone(), self._token.session() as session:
            self._suite = self._suite or _suite_of(session)
            for attempt in range(8):
                if _objects(session, key_id) and (attempt == 0 or _stays(session, key_id)):
                    raise KeyExists(
                        f"the token has a key {key_id!r} already, and nothing replaces a key; take another id"
                    )
                made = _make(session, key_id, self._suite)
                if len(_objects(session, key_id)) == 1:
                    return
                # PKCS#11 knows no unique labels, and another machine may use the token: whoever sees two takes its own
                # back, waits, and looks again. So only one can have seen its key alone, and none that was is taken back.
                made.destroy()
                time.sleep(random.uniform(0, 0.1))  # noqa: S311 (jitter)
        raise ProviderUnavailable(f"others keep making the key {key_id!r}; try again")

    def has_key(self, key_id: str) -> bool:
        """Whether the key is here and not destroyed. Raises KeyUnfit for one that could have left the token."""
        check_key_id(key_id)
        with self._token.session() as session:
            try:
                self._key(session, key_id)
            except KeyMissing:
                return False
            return True

    def wrap(self, key_id: str, key: bytes, *, context: Context) -> bytes:
        """Encrypt a secret of up to 4,096 bytes in the token, bound to its context."""
        check_key_id(key_id)
        check_secret(key)
        with self._token.session() as session:
            kek, suite = self._key(session, key_id)
            head = _LINE + bytes([suite])
            with self._destruction_told(session, key_id):
                return head + _SUITES[suite][0](session, kek, key, head + context.to_bytes())

    def unwrap(self, key_id: str, wrapped: bytes, *, context: Context) -> bytes:
        """The secret that was wrapped. Raises InvalidWrap or KeyMissing."""
        check_key_id(key_id)
        head, body = wrapped[: len(_LINE) + 1], wrapped[len(_LINE) + 1 :]
        with self._token.session() as session:
            kek, suite = self._key(session, key_id)
            if head != _LINE + bytes([suite]) or len(body) > LARGEST_SECRET + 64:
                raise InvalidWrap()
            with self._destruction_told(session, key_id):
                try:
                    return _SUITES[suite][1](session, kek, body, head + context.to_bytes())
                except driver().PKCS11Error as exc:
                    if not isinstance(exc, _handle_errors()):
                        _prove(session, kek, suite)
                        raise InvalidWrap() from None
                    raise

    def destroy_key(self, key_id: str) -> None:
        """Destroy the key's object in the token. Raises KeyMissing, or KeyUnfit for one that could have left it."""
        check_key_id(key_id)
        with self._token.session() as session:
            found = self._objects_there(session, key_id)
            with self._destruction_told(session, key_id):
                for key in found:
                    _suite_checked(key, key_id)
            for key in found:
                with suppress(driver().ObjectHandleInvalid):  # another process was faster
                    key.destroy()
            if _objects(session, key_id):
                raise ProviderUnavailable(f"the token still shows the key {key_id!r}; try again")
            self._token.require_present(session)

    def _objects_there(self, session: Any, key_id: str) -> list[Any]:
        found = _objects(session, key_id)
        if not found:
            self._token.require_present(session)
            raise _key_missing(key_id)
        return found

    def _key(self, session: Any, key_id: str) -> tuple[Any, _Suite]:
        found = self._objects_there(session, key_id)
        if len(found) > 1:
            raise KeyUnfit(
                f"the token has {len(found)} keys {key_id!r}; remove with its own tools those that wrap nothing"
            )
        with self._destruction_told(session, key_id):
            return found[0], _suite_checked(found[0], key_id)

    @contextmanager
    def _destruction_told(self, session: Any, key_id: str) -> Iterator[None]:
        """Raise KeyMissing for a key that was destroyed after it was found."""
        try:
            yield
        except _handle_errors():
            self._token.require_present(session)
            raise _key_missing(key_id) from None


def _prove(session: Any, kek: Any, suite: _Suite) -> None:
    """Return where the key works, so that wrapped bytes are at fault: tokens say the same of a bad tag and of a failure."""
    seal, unseal = _SUITES[suite]
    probe, binding = os.urandom(16), b"cloister.probe"
    if unseal(session, kek, seal(session, kek, probe, binding), binding) != probe:
        raise InvalidAnswer("the token does not decrypt what it encrypts; see to it before anything is sealed")


def _stays(session: Any, key_id: str) -> bool:
    """Whether the key is one for good, and not one that its maker takes back, as we just did."""
    give_up = time.monotonic() + 1
    while time.monotonic() < give_up:
        if not _objects(session, key_id):
            return False
        time.sleep(0.05)
    return True


def _handle_errors() -> tuple[type[Exception], ...]:
    p11 = driver()
    return (p11.ObjectHandleInvalid, p11.KeyHandleInvalid, p11.WrappingKeyHandleInvalid, p11.UnwrappingKeyHandleInvalid)


def _objects(session: Any, key_id: str) -> list[Any]:
    p11 = driver()
    wanted = {
        p11.Attribute.CLASS: p11.ObjectClass.SECRET_KEY,
        p11.Attribute.TOKEN: True,
        p11.Attribute.LABEL: _LABEL + key_id,
    }
    with suppress(p11.ObjectHandleInvalid):  # one was destroyed while they were listed: once more
        return list(session.get_objects(wanted))
    return list(session.get_objects(wanted))


def _suite_checked(key: Any, key_id: str) -> _Suite:
    """What the key may do. Raises KeyUnfit unless it has all attributes of a key that was made here."""
    attribute = driver().Attribute
    wanted = {
        attribute.KEY_TYPE: driver().KeyType.AES,
        attribute.VALUE_LEN: 32,
        attribute.LOCAL: True,
        attribute.PRIVATE: True,
        attribute.SENSITIVE: True,
        attribute.ALWAYS_SENSITIVE: True,
        attribute.EXTRACTABLE: False,
        attribute.NEVER_EXTRACTABLE: True,
        attribute.DERIVE: False,
    }
    roles = (attribute.ENCRYPT, attribute.DECRYPT, attribute.WRAP, attribute.UNWRAP)
    told = key.get_attributes([*wanted, *roles])
    for name, value in wanted.items():
        if told.get(name) != value:
            raise KeyUnfit(
                f"the key {key_id!r} was not made here, or was changed: the token does not say that its {name.name} is "
                f"{value}; see with the token's own tools where it came from"
            )
    for suite, role in ((_Suite.GCM, (True, True, False, False)), (_Suite.KEY_WRAP, (False, False, True, True))):
        if tuple(told.get(name) for name in roles) == role:
            return suite
    raise KeyUnfit(f"the key {key_id!r} was not made here: it may encrypt and wrap at once, or neither")


def _make(session: Any, key_id: str, suite: _Suite) -> Any:
    """One that encrypts never wraps: a key that did both would unwrap other keys into the open."""
    p11 = driver()
    encrypts = p11.MechanismFlag.ENCRYPT | p11.MechanismFlag.DECRYPT
    wraps = p11.MechanismFlag.WRAP | p11.MechanismFlag.UNWRAP
    return session.generate_key(
        p11.KeyType.AES,
        256,
        id=os.urandom(16),
        label=_LABEL + key_id,
        store=True,
        capabilities=encrypts if suite is _Suite.GCM else wraps,
        template={p11.Attribute.SENSITIVE: True, p11.Attribute.EXTRACTABLE: False, p11.Attribute.MODIFIABLE: False},
    )


def _suite_of(session: Any) -> _Suite:
    """How this token can wrap. Raises KeyProviderError where it can neither way."""
    p11 = driver()
    offered = session.token.slot.get_mechanisms()
    if p11.Mechanism.AES_GCM in offered and _takes_our_iv(session):
        return _Suite.GCM
    if p11.Mechanism.AES_KEY_WRAP in offered:
        return _Suite.KEY_WRAP
    raise KeyProviderError("the token offers neither AES-GCM with IVs of ours nor AES key wrap; use another token")


def _takes_our_iv(session: Any) -> bool:
    """Tried with a key of this session: some tokens refuse a caller's IV, others write one of their own over it."""
    p11 = driver()
    iv = os.urandom(_IV_BYTES)
    kept, probe, key = bytes(bytearray(iv)), os.urandom(32), None
    try:
        key = session.generate_key(
            p11.KeyType.AES,
            256,
            capabilities=p11.MechanismFlag.ENCRYPT | p11.MechanismFlag.DECRYPT,
            template={p11.Attribute.SENSITIVE: True, p11.Attribute.EXTRACTABLE: False},
        )
        sealed = key.encrypt(probe, mechanism=p11.Mechanism.AES_GCM, mechanism_param=_gcm(iv, b"probe"))
        opened = key.decrypt(sealed, mechanism=p11.Mechanism.AES_GCM, mechanism_param=_gcm(kept, b"probe"))
        return bool(iv == kept and len(sealed) == len(probe) + _TAG_BYTES and opened == probe)
    except p11.PKCS11Error:
        return False
    finally:
        if key is not None:
            key.destroy()


def _gcm(iv: bytes, binding: bytes) -> Any:
    return driver().GCMParams(iv, binding, 8 * _TAG_BYTES)


def _encrypt(session: Any, kek: Any, secret: bytes, binding: bytes) -> bytes:
    iv = os.urandom(_IV_BYTES)
    sealed = kek.encrypt(secret, mechanism=driver().Mechanism.AES_GCM, mechanism_param=_gcm(iv, binding))
    if len(sealed) != len(secret) + _TAG_BYTES:
        raise InvalidAnswer("the token's ciphertext is not as long as AES-GCM makes it; see to the token")
    return iv + bytes(sealed)


def _decrypt(session: Any, kek: Any, body: bytes, binding: bytes) -> bytes:
    if len(body) <= _IV_BYTES + _TAG_BYTES:
        raise InvalidWrap()
    iv, sealed = body[:_IV_BYTES], body[_IV_BYTES:]
    return bytes(kek.decrypt(sealed, mechanism=driver().Mechanism.AES_GCM, mechanism_param=_gcm(iv, binding)))


def _wrap_key(session: Any, kek: Any, secret: bytes, binding: bytes) -> bytes:
    """C_WrapKey takes keys and no bytes, so the secret becomes a key of this session for that moment."""
    p11 = driver()
    carried = hashlib.sha256(binding).digest() + len(secret).to_bytes(2) + secret
    carrier = session.create_object(
        {
            p11.Attribute.CLASS: p11.ObjectClass.SECRET_KEY,
            p11.Attribute.KEY_TYPE: p11.KeyType.GENERIC_SECRET,
            p11.Attribute.TOKEN: False,
            p11.Attribute.PRIVATE: True,
            p11.Attribute.SENSITIVE: True,
            p11.Attribute.EXTRACTABLE: True,
            p11.Attribute.VALUE: carried + bytes(-len(carried) % 8),
        }
    )
    try:
        return bytes(kek.wrap_key(carrier, mechanism=p11.Mechanism.AES_KEY_WRAP))
    finally:
        carrier.destroy()


def _unwrap_key(session: Any, kek: Any, body: bytes, binding: bytes) -> bytes:
    p11 = driver()
    if len(body) % 8 or len(body) < _DIGEST_BYTES + 16:
        raise InvalidWrap()
    carrier = kek.unwrap_key(
        p11.ObjectClass.SECRET_KEY,
        p11.KeyType.GENERIC_SECRET,
        body,
        mechanism=p11.Mechanism.AES_KEY_WRAP,
        capabilities=0,
        template={p11.Attribute.PRIVATE: True, p11.Attribute.SENSITIVE: False, p11.Attribute.EXTRACTABLE: True},
    )
    try:
        carried = bytes(carrier[p11.Attribute.VALUE])
    finally:
        carrier.destroy()
    length = int.from_bytes(carried[_DIGEST_BYTES : _DIGEST_BYTES + 2])
    secret = carried[_DIGEST_BYTES + 2 :][:length]
    if not hmac.compare_digest(carried[:_DIGEST_BYTES], hashlib.sha256(binding).digest()) or len(secret) != length:
        raise InvalidWrap()
    return secret


_Step = Callable[[Any, Any, bytes, bytes], bytes]
_SUITES: dict[_Suite, tuple[_Step, _Step]] = {
    _Suite.GCM: (_encrypt, _decrypt),
    _Suite.KEY_WRAP: (_wrap_key, _unwrap_key),
}


def _key_missing(key_id: str) -> KeyMissing:
    return KeyMissing(f"there is no key {key_id!r} in the token: it was destroyed, or this is another token")
