"""A keystore's own record: which it is, how its root key is come by, and how a wrong one is told at once."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister_privacy.sealing.context import length_prefixed
from cloister_privacy.sealing.derivation import KEY_BYTES
from cloister_privacy.sealing.errors import InvalidWrap, KeystoreDamaged, RootKeyRefused, WrongKey
from cloister_privacy.sealing.recovery import RecoveryKey
from cloister_privacy.sealing.root import Stretching
from cloister_privacy.sealing.wrapping import unwrap_secret, wrap_secret

__all__ = ["KeystoreRecord"]

_FORMAT = "cloister.keystore/1"
_FORMAT_2 = "cloister.keystore/2"
"""As 1, with a root key that is wrapped: for a passphrase that came later, or for a recovery key. Written where one is there."""
_ROOT_LINE, _RECOVERY_LINE = b"cloister.root/1\n", b"cloister.recovery/1\n"
_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class KeystoreRecord:
    """What `keystore.json` says. Nothing in it is secret, and a change to any of it makes the root key a wrong one, or loses the
    recovery key."""

    id: str
    check: str
    stretching: Stretching | None
    """Argon2id's parameters where the root is a passphrase; None where it is a key file."""
    by_passphrase: bytes | None = None
    """The root key, wrapped for what the passphrase is stretched to; None where it is that itself."""
    by_recovery: bytes | None = None
    """The root key, wrapped for the recovery key; None where there is none."""

    @classmethod
    def fresh(cls, root_key: bytes, stretching: Stretching | None) -> KeystoreRecord:
        store_id = secrets.token_hex(_ID_BYTES)
        return cls(id=store_id, check=_expand(root_key, store_id)[0].hex(), stretching=stretching)

    def check_root(self, root_key: bytes) -> None:
        """Raise WrongKey unless this is the root key that the keystore was made with."""
        if not hmac.compare_digest(self.check, _expand(root_key, self.id)[0].hex()):
            raise self._wrong()

    def root_of_passphrase(self, passphrase: str) -> bytes:
        """The root key that a passphrase gives, right or wrong: `check_root` tells. Raises RootKeyRefused or WrongKey."""
        if self.stretching is None:
            raise RootKeyRefused("this keystore is opened by its key file, not by a passphrase; give the file's path")
        stretched = self.stretching.root_key(passphrase)
        if self.by_passphrase is None:
            return stretched
        try:
            return unwrap_secret(self.by_passphrase, key=stretched, line=_ROOT_LINE, binding=self._binding())
        except InvalidWrap:
            raise self._wrong() from None

    def root_of_recovery(self, key: RecoveryKey) -> bytes:
        """The root key. Raises RootKeyRefused where the keystore has no recovery key, WrongKey where it is another."""
        if self.by_recovery is None:
            raise RootKeyRefused(
                "this keystore has no recovery key; restore its key file or passphrase, or the keystore from a copy that has one"
            )
        try:
            return unwrap_secret(self.by_recovery, key=key.secret, line=_RECOVERY_LINE, binding=self._binding())
        except InvalidWrap:
            raise WrongKey(
                "the recovery key is not this keystore's: another was made since, or it is of another keystore; find the newest"
            ) from None

    def with_recovery(self, root_key: bytes, key: RecoveryKey) -> KeystoreRecord:
        """The same keystore, which this recovery key opens from now on, and none from before."""
        wrapped = wrap_secret(root_key, key=key.secret, line=_RECOVERY_LINE, binding=self._binding())
        return replace(self, by_recovery=wrapped)

    def with_key_file(self) -> KeystoreRecord:
        """The same keystore, opened by a file of its root key, and no more by a passphrase."""
        return replace(self, stretching=None, by_passphrase=None)

    def with_passphrase(self, root_key: bytes, passphrase: str) -> KeystoreRecord:
        """The same keystore, opened by this passphrase, and by none from before."""
        stretching = Stretching.fresh()
        stretched = stretching.root_key(passphrase)
        wrapped = wrap_secret(root_key, key=stretched, line=_ROOT_LINE, binding=self._binding())
        return replace(self, stretching=stretching, by_passphrase=wrapped)

    def file_name(self, root_key: bytes, key_id: str) -> str:
        """The name of a key's file: of the root key's making, so that a listing tells no tenant and no name is chosen."""
        name_key = _expand(root_key, self.id)[1]
        return hmac.digest(name_key, key_id.encode("ascii"), hashlib.sha256).hex() + ".kek"

    def to_bytes(self) -> bytes:
        is_first = self.by_passphrase is None and self.by_recovery is None
        fields: dict[str, Any] = {"format": _FORMAT if is_first else _FORMAT_2, "id": self.id, "check": self.check}
        if self.stretching is None:
            fields["root"] = {"type": "key_file"}
        else:
            fields["root"] = {
                "type": "passphrase",
                "salt": self.stretching.salt.hex(),
                "memory_kib": self.stretching.memory_kib,
                "iterations": self.stretching.iterations,
                "lanes": self.stretching.lanes,
            }
            if self.by_passphrase is not None:
                fields["root"]["wrapped"] = self.by_passphrase.hex()
        if self.by_recovery is not None:
            fields["recovery"] = {"wrapped": self.by_recovery.hex()}
        return (json.dumps(fields, indent=2) + "\n").encode("ascii")

    @classmethod
    def from_bytes(cls, content: bytes) -> KeystoreRecord:
        """Read a record. Raises KeystoreDamaged for every spelling but the one that `to_bytes` writes."""
        try:
            record = cls._parse(json.loads(content))
            is_sound = record.to_bytes() == content
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            is_sound = False
        if not is_sound:
            raise KeystoreDamaged(
                f"keystore.json is damaged, or of neither {_FORMAT} nor {_FORMAT_2}; restore the keystore from its backup, "
                "or open it with the release that made it"
            )
        return record

    @classmethod
    def _parse(cls, fields: Any) -> KeystoreRecord:
        root, stretching = fields["root"], None
        if root["type"] == "passphrase":
            stretching = Stretching(
                salt=bytes.fromhex(root["salt"]),
                memory_kib=root["memory_kib"],
                iterations=root["iterations"],
                lanes=root["lanes"],
            )
        store_id, check = bytes.fromhex(fields["id"]), bytes.fromhex(fields["check"])
        if len(store_id) != _ID_BYTES or len(check) != KEY_BYTES:
            raise ValueError("an id or check value of another length")
        wrapped = (root.get("wrapped"), fields["recovery"]["wrapped"] if "recovery" in fields else None)
        by_passphrase, by_recovery = (None if each is None else bytes.fromhex(each) for each in wrapped)
        return cls(store_id.hex(), check.hex(), stretching, by_passphrase, by_recovery)

    def _binding(self) -> bytes:
        return length_prefixed(self.id)

    def _wrong(self) -> WrongKey:
        given = "passphrase" if self.stretching else "key file"
        return WrongKey(f"the {given} is not the one that this keystore is opened by; find the one that is")


def _expand(root_key: bytes, store_id: str) -> tuple[bytes, bytes]:
    """A check value to publish and a key for file names, both of this root key and keystore alone."""
    info = (_FORMAT + "\n").encode("ascii")
    material = HKDF(algorithm=SHA512(), length=2 * KEY_BYTES, salt=bytes.fromhex(store_id), info=info).derive(root_key)
    return material[:KEY_BYTES], material[KEY_BYTES:]
