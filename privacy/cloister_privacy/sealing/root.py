"""The root key: from a key file or from a passphrase. Knows nothing of the keys that it protects."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from cloister_privacy.sealing.derivation import KEY_BYTES
from cloister_privacy.sealing.errors import RootKeyRefused
from cloister_privacy.sealing.files import make_directory, read_private, write_new

__all__ = ["Stretching", "check_passphrase", "new_key_file", "read_key_file", "write_key_file"]

_PREFIX = "cloister-root-1:"
"""Told apart at sight, by people and by secret scanners."""
_KEY_LINE = re.compile(rb"cloister-root-1:([A-Za-z0-9_-]{48})\n?")
_CHECKSUM_BYTES = 4
_LEAST_PASSPHRASE = 12


def new_key_file(path: Path) -> bytes:
    """Make a key file, create-only and durable, mode 0600; its root key. Raises RootKeyRefused where one is there.

    The file is one line, `cloister-root-1:` and base64url of 32 random bytes and their checksum. Without it nothing
    that the keystore protects opens again: back it up apart from the data and from the keystore.
    """
    root_key = secrets.token_bytes(KEY_BYTES)
    write_key_file(path, root_key)
    return root_key


def write_key_file(path: Path, root_key: bytes) -> None:
    """A key file of this root key, as `new_key_file` makes it."""
    line = _PREFIX + base64.urlsafe_b64encode(root_key + _checksum(root_key)).decode("ascii") + "\n"
    make_directory(path.parent)
    try:
        write_new(path, line.encode("ascii"))
    except FileExistsError:
        raise RootKeyRefused(f"{path} exists and a key file is never overwritten; name another path") from None


def read_key_file(path: Path) -> bytes:
    """The root key in a key file that is ours alone. Raises KeyFileExposed or RootKeyRefused, and quotes nothing of it."""
    try:
        content = read_private(path, limit=len(_PREFIX) + 64)
    except FileNotFoundError:
        raise RootKeyRefused(
            f"there is no key file at {path}; restore it from its backup, or make another with `cloister-admin key recover`"
        ) from None
    except OSError as exc:
        raise RootKeyRefused(f"the key file {path} cannot be read: {exc.strerror}; check its path and owner") from exc
    match = _KEY_LINE.fullmatch(content)
    decoded = base64.urlsafe_b64decode(match[1]) if match else b""
    root_key, checksum = decoded[:KEY_BYTES], decoded[KEY_BYTES:]
    if not match or not hmac.compare_digest(checksum, _checksum(root_key)):
        raise RootKeyRefused(f"{path} is not a key file, or it was mistyped or cut; restore it from its backup")
    return root_key


@dataclass(frozen=True, slots=True)
class Stretching:
    """Argon2id's salt and cost; RFC 9106's second recommended option is the default."""

    salt: bytes
    memory_kib: int = 64 * 1024
    iterations: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        """A keystore from elsewhere must neither weaken a passphrase nor exhaust the machine."""
        costs = (self.memory_kib, self.iterations, self.lanes)
        if any(type(cost) is not int for cost in costs):
            raise ValueError("Argon2id's costs are whole numbers")
        bearable = 64 * 1024 <= self.memory_kib <= 2**21 and 3 <= self.iterations <= 64 and 1 <= self.lanes <= 64
        if len(self.salt) != 16 or not bearable:
            raise ValueError("Argon2id takes a salt of 16 bytes, 64 MiB to 2 GiB, 3 to 64 iterations, 1 to 64 lanes")

    @classmethod
    def fresh(cls) -> Stretching:
        return cls(salt=secrets.token_bytes(16))

    def root_key(self, passphrase: str) -> bytes:
        """The root key of a passphrase, taken as UTF-8 of its NFC form."""
        return Argon2id(
            salt=self.salt,
            length=KEY_BYTES,
            iterations=self.iterations,
            lanes=self.lanes,
            memory_cost=self.memory_kib,
        ).derive(_encoded(passphrase))


def check_passphrase(passphrase: str) -> None:
    """Raise RootKeyRefused where a passphrase is too short to protect a new keystore."""
    if len(_encoded(passphrase).decode("utf-8")) < _LEAST_PASSPHRASE:
        raise RootKeyRefused(f"the passphrase has under {_LEAST_PASSPHRASE} characters; take a few random words")


def _encoded(passphrase: str) -> bytes:
    try:
        return unicodedata.normalize("NFC", passphrase).encode("utf-8")
    except UnicodeEncodeError:  # the error carries the passphrase
        raise RootKeyRefused("the passphrase is not valid Unicode; check the terminal's locale") from None


def _checksum(root_key: bytes) -> bytes:
    """Finds a mistyped character; 4 bytes of a hash tell nothing useful of a key of 32."""
    return hashlib.sha256(_PREFIX.encode("ascii") + root_key).digest()[:_CHECKSUM_BYTES]
