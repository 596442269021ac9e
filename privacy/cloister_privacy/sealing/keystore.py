"""A keystore's own record: which it is, how its root key is come by, and how a wrong one is told at once."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister_privacy.sealing.derivation import KEY_BYTES
from cloister_privacy.sealing.errors import KeystoreDamaged, WrongKey
from cloister_privacy.sealing.root import Stretching

__all__ = ["KeystoreRecord"]

_FORMAT = "cloister.keystore/1"
_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class KeystoreRecord:
    """What `keystore.json` says. Nothing in it is secret, and a change to any of it makes the root key a wrong one."""

    id: str
    check: str
    stretching: Stretching | None
    """Argon2id's parameters where the root is a passphrase; None where it is a key file."""

    @classmethod
    def fresh(cls, root_key: bytes, stretching: Stretching | None) -> KeystoreRecord:
        store_id = secrets.token_hex(_ID_BYTES)
        return cls(id=store_id, check=_expand(root_key, store_id)[0].hex(), stretching=stretching)

    def check_root(self, root_key: bytes) -> None:
        """Raise WrongKey unless this is the root key that the keystore was made with."""
        if not hmac.compare_digest(self.check, _expand(root_key, self.id)[0].hex()):
            given = "passphrase" if self.stretching else "key file"
            raise WrongKey(f"the {given} is not the one that this keystore was made with; find the one that is")

    def file_name(self, root_key: bytes, key_id: str) -> str:
        """The name of a key's file: of the root key's making, so that a listing tells no tenant and no name is chosen."""
        name_key = _expand(root_key, self.id)[1]
        return hmac.digest(name_key, key_id.encode("ascii"), hashlib.sha256).hex() + ".kek"

    def to_bytes(self) -> bytes:
        fields: dict[str, Any] = {"format": _FORMAT, "id": self.id, "check": self.check}
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
                f"keystore.json is damaged, or not of {_FORMAT}; restore the keystore from its backup, "
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
        return cls(id=store_id.hex(), check=check.hex(), stretching=stretching)


def _expand(root_key: bytes, store_id: str) -> tuple[bytes, bytes]:
    """A check value to publish and a key for file names, both of this root key and keystore alone."""
    info = (_FORMAT + "\n").encode("ascii")
    material = HKDF(algorithm=SHA512(), length=2 * KEY_BYTES, salt=bytes.fromhex(store_id), info=info).derive(root_key)
    return material[:KEY_BYTES], material[KEY_BYTES:]
