"""The Vault key provider, which is OpenBao's too: keys of a transit engine, derived for each context. Knows hvac; no files.

Tried against a stand-in that speaks the documented part of the interface, and not against a live server.
A wrapped key is `cloister.transit/1\\n`, the version of the transit key in four bytes, and Vault's ciphertext, decoded.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.errors import (
    AccessRefused,
    InvalidAnswer,
    InvalidKeyId,
    InvalidWrap,
    KeyExists,
    KeyMissing,
    KeyProviderError,
    KeyUnfit,
    ProviderMissing,
    ProviderUnavailable,
)
from cloister_privacy.sealing.provider import LARGEST_SECRET, Destruction, check_key_id, check_secret
from cloister_privacy.sealing.remote import call_within, check_address, keep_silent

__all__ = ["VaultTransitKeyProvider"]

_LINE = b"cloister.transit/1\n"
_VERSION_BYTES = 4
_LARGEST_CIPHERTEXT = LARGEST_SECRET + 64
_MOUNT = re.compile(r"[a-zA-Z0-9_-]+(/[a-zA-Z0-9_-]+)*")
_CIPHERTEXT = re.compile(r"vault:v([1-9][0-9]{0,8}):([A-Za-z0-9+/]+={0,2})")
_FIT = {
    "type": "aes256-gcm96",
    "derived": True,
    "exportable": False,
    "allow_plaintext_backup": False,
}
_UNFIT_WHERE_TRUE = ("imported_key", "convergent_encryption", "soft_deleted")
_DESTRUCTION = Destruction(
    waiting_days=0,
    claim="The key was deleted in Vault, which had never given it out. Snapshots of Vault's storage from before, which "
    "its own barrier key encrypts, are not reached by that.",
)


class VaultTransitKeyProvider:
    """A KeyProvider over a transit engine: AES-256-GCM keys that cannot be exported, one derived for each context."""

    __slots__ = ("_make_transit", "_mount", "_timeout_s", "_transit_of")

    def __init__(
        self,
        address: str,
        *,
        token: str,
        mount: str = "transit",
        namespace: str | None = None,
        ca_file: Path | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        """Ask for a key that need not be there: a wrong address, token or mount is told at once.

        The token is not renewed here; a Vault agent that keeps one fresh is the operator's. Redirects are not followed,
        as they would carry the token elsewhere: name the active node, or what stands before it. Raises ProviderMissing,
        ProviderUnavailable, AccessRefused, InvalidAnswer, or ValueError for an address over which it would travel in
        the clear.
        """
        check_address(address)
        if not _MOUNT.fullmatch(mount):
            raise ValueError("a mount is a path of letters, digits, '_' and '-'")
        if not re.fullmatch(r"[!-~]+", token):
            raise AccessRefused("the Vault token is empty or not plain ASCII; see where it is read from")
        self._mount, self._timeout_s = mount, timeout_s

        def make_transit() -> Any:
            hvac, requests = _hvac()
            session = requests.Session()
            session.trust_env = False  # no proxy, no .netrc and no certificates but those that are named here
            session.verify = True if ca_file is None else str(ca_file)
            adapter = hvac.adapters.JSONAdapter(
                base_uri=address,
                token=token,
                session=session,
                namespace=namespace,
                timeout=(min(3.0, timeout_s), timeout_s),
                allow_redirects=False,
            )
            return hvac.api.secrets_engines.Transit(adapter)

        self._make_transit: Callable[[], Any] = make_transit
        self._transit_of: tuple[int, Any] = (0, None)
        self._read("cloister")

    @property
    def destruction(self) -> Destruction:
        return _DESTRUCTION

    def __repr__(self) -> str:
        return f"VaultTransitKeyProvider({self._mount!r})"

    def create_key(self, key_id: str) -> None:
        """Make a key. Raises KeyExists.

        An older Vault does not say that another made the same key in the same moment: both are then told that they made
        it, and share it. None replaces the other's.
        """
        name = _name(key_id)
        if self._read(name) is not None:
            raise _key_exists(key_id)
        made = self._ask(
            "create_key",
            name=name,
            key_type="aes256-gcm96",
            derived=True,
            exportable=False,
            allow_plaintext_backup=False,
        )
        warnings = made.get("warnings") if isinstance(made, dict) else None
        if isinstance(warnings, list) and any("already existed" in str(warning) for warning in warnings):
            raise _key_exists(key_id)
        self._fit(key_id)

    def has_key(self, key_id: str) -> bool:
        """Whether the key is here and not destroyed. Raises KeyUnfit for one that can be exported or is of another kind."""
        try:
            self._fit(key_id)
        except KeyMissing:
            return False
        return True

    def wrap(self, key_id: str, key: bytes, *, context: Context) -> bytes:
        """Encrypt a secret of up to 4,096 bytes in Vault, bound to its context.

        Looks for the key first: for a token that may create, Vault's encrypt would make a missing one anew.
        """
        check_secret(key)
        name = self._fit(key_id)
        data = self._data("encrypt_data", key_id, name=name, plaintext=_b64(key), context=_b64(context.to_bytes()))
        match = _CIPHERTEXT.fullmatch(data["ciphertext"]) if isinstance(data.get("ciphertext"), str) else None
        sealed = _decoded(match[2]) if match else None
        if match is None or sealed is None or len(sealed) > _LARGEST_CIPHERTEXT:
            raise InvalidAnswer("Vault's answer has no ciphertext; see what listens at its address")
        return _LINE + int(match[1]).to_bytes(_VERSION_BYTES) + sealed

    def unwrap(self, key_id: str, wrapped: bytes, *, context: Context) -> bytes:
        """The secret that was wrapped. Raises InvalidWrap or KeyMissing."""
        name = self._fit(key_id)
        body = len(_LINE) + _VERSION_BYTES
        version, sealed = int.from_bytes(wrapped[len(_LINE) : body]), wrapped[body:]
        if not wrapped.startswith(_LINE) or not version or not 1 <= len(sealed) <= _LARGEST_CIPHERTEXT:
            raise InvalidWrap()
        ciphertext = f"vault:v{version}:{_b64(sealed)}"
        try:
            data = self._data(
                "decrypt_data", key_id, name=name, ciphertext=ciphertext, context=_b64(context.to_bytes())
            )
        except _InvalidRequest:
            raise InvalidWrap() from None
        secret = _decoded(data["plaintext"]) if isinstance(data.get("plaintext"), str) else None
        if secret is None or not 1 <= len(secret) <= LARGEST_SECRET:
            raise InvalidAnswer("Vault's answer has no plaintext; see what listens at its address")
        return secret

    def destroy_key(self, key_id: str) -> None:
        """Delete the key, all its versions. Raises KeyMissing, or KeyUnfit for one that could have been exported."""
        name = self._fit(key_id)
        self._ask("update_key_configuration", name=name, deletion_allowed=True)
        self._ask("delete_key", name=name)
        if self._read(name) is not None:
            raise InvalidAnswer(f"Vault says that it deleted the key {key_id!r}, and still shows it; see to Vault")

    def _fit(self, key_id: str) -> str:
        """The key's name in Vault. Raises KeyMissing or KeyUnfit unless it can be used."""
        name = _name(key_id)
        there = self._read(name)
        if there is None:
            raise _key_missing(key_id)
        unfit = [field for field, value in _FIT.items() if there.get(field) != value]
        unfit += [field for field in _UNFIT_WHERE_TRUE if there.get(field)]
        if unfit:
            raise KeyUnfit(
                f"the key {key_id!r} was not made here, or was changed: see its {unfit[0]!r} in Vault, and where it came from"
            )
        return name

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            there = _data_of(self._ask("read_key", name=name))
        except _NotThere as exc:
            if exc.has_reason:  # an absent key is a 404 without a word
                raise
            return None
        if there.get("name") != name:
            raise InvalidAnswer(
                "Vault's answer is not about the key that was asked for; see what listens at its address"
            )
        return there

    def _data(self, operation: str, key_id: str, **fields: Any) -> dict[str, Any]:
        try:
            return _data_of(self._ask(operation, **fields))
        except (_NotThere, _InvalidRequest):
            self._fit(key_id)  # destroyed after it was found
            raise

    def _ask(self, operation: str, **fields: Any) -> Any:
        """One call, without retries. Raises _NotThere, _InvalidRequest, or the named error."""
        hvac, requests = _hvac()
        told = hvac.exceptions
        try:
            act = getattr(self._transit(), operation)
            answer = call_within(self._timeout_s, lambda: act(mount_point=self._mount, **fields), provider="Vault")
        except told.InvalidPath as exc:
            if not isinstance(exc.errors, list):
                raise InvalidAnswer(
                    "what answered with status 404 is not Vault; see what listens at its address"
                ) from None
            raise _NotThere(self._mount, has_reason=bool(exc.errors)) from None
        except told.InvalidRequest:
            raise _InvalidRequest() from None
        except (told.Forbidden, told.Unauthorized):
            raise AccessRefused(
                "Vault refuses the token: it expired, was revoked, or its policy does not allow this; see docs/keys.md"
            ) from None
        except told.VaultError as exc:
            raise ProviderUnavailable(
                f"Vault could not do it ({type(exc).__name__}): it may be sealed, a standby, or overloaded; try again"
            ) from None
        except requests.exceptions.RequestException as exc:
            raise ProviderUnavailable(
                f"Vault cannot be reached ({type(exc).__name__}); see that it runs and to its certificate, then try again"
            ) from None
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):  # hvac's, over what is no answer
            raise InvalidAnswer("Vault's answer could not be read; see what listens at its address") from None
        status = getattr(answer, "status_code", 200)
        if not isinstance(answer, dict) and status != 204:
            raise InvalidAnswer(
                f"what answered with status {status} is not Vault, or not itself; see what listens there"
            )
        return answer

    def _transit(self) -> Any:
        """Of this process: a child of a fork would share its parent's connections."""
        pid, transit = self._transit_of
        if pid != os.getpid():
            transit = self._make_transit()
            self._transit_of = (os.getpid(), transit)
        return transit


class _NotThere(KeyProviderError):
    """404: no such key where Vault gives no reason, no such path where it does."""

    def __init__(self, mount: str, *, has_reason: bool) -> None:
        super().__init__(f"Vault has no transit engine at {mount!r}; enable one there, or correct the mount")
        self.has_reason = has_reason


class _InvalidRequest(KeyProviderError):
    """400: the key, the context or the ciphertext does not go with the others."""

    def __init__(self) -> None:
        super().__init__("Vault refused the request as invalid; see docs/keys.md for what the provider asks of it")


def _hvac() -> tuple[Any, Any]:
    try:
        import hvac
        import hvac.adapters
        import hvac.api.secrets_engines
        import requests
    except ImportError:
        raise ProviderMissing("Vault needs hvac; run `pip install 'cloister[vault]'`") from None
    keep_silent("urllib3")
    return hvac, requests


def _name(key_id: str) -> str:
    check_key_id(key_id)
    if key_id.endswith("-"):
        raise InvalidKeyId("in Vault a key id does not end with '-'; take another id")
    return key_id


def _data_of(answer: Any) -> dict[str, Any]:
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, dict):
        raise InvalidAnswer("Vault's answer has no data; see what listens at its address")
    return data


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _key_exists(key_id: str) -> KeyExists:
    return KeyExists(f"Vault has a key {key_id!r} already, and nothing replaces a key; take another id")


def _key_missing(key_id: str) -> KeyMissing:
    return KeyMissing(f"there is no key {key_id!r} in Vault: it was destroyed, or this is another engine")
