"""A recovery key: the root key's understudy on paper, typed by people. Knows its own form; nothing of keystores."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

from cloister_privacy.sealing.derivation import KEY_BYTES
from cloister_privacy.sealing.errors import RootKeyRefused

__all__ = ["RecoveryKey"]

_PREFIX = "CR1"
"""Recovery key, version 1. Told apart at sight, by people and by secret scanners."""
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Douglas Crockford's base 32: no I, L, O and U."""
_MISREAD = str.maketrans("OIL", "011")
_CHECKSUM_BYTES = 3
_DIGITS = (KEY_BYTES + _CHECKSUM_BYTES) * 8 // 5
_GROUP = 4
_TYPED = re.compile(rf"{_PREFIX}([{_ALPHABET}]{{{_DIGITS}}})")


@dataclass(frozen=True, slots=True)
class RecoveryKey:
    """32 random bytes."""

    secret: bytes = field(repr=False)

    @classmethod
    def fresh(cls) -> RecoveryKey:
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def parse(cls, typed: str) -> RecoveryKey:
        """Read one however it is typed: in either case, in other groups, with O for 0, and I or L for 1.

        Raises RootKeyRefused, and quotes nothing of it.
        """
        digits = re.sub(r"[\s-]", "", typed).upper().translate(_MISREAD)
        match = _TYPED.fullmatch(digits)
        number = 0
        for each in match[1] if match else "":
            number = number * 32 + _ALPHABET.index(each)
        content = number.to_bytes(KEY_BYTES + _CHECKSUM_BYTES)
        secret, checksum = content[:KEY_BYTES], content[KEY_BYTES:]
        if not match or not hmac.compare_digest(checksum, _checksum(secret)):
            raise RootKeyRefused(
                f"this is no recovery key, or a character of it is mistyped: one is {_PREFIX} and {_DIGITS // _GROUP} groups of "
                f"{_GROUP}; read it once more"
            )
        return cls(secret)

    def text(self) -> str:
        """As it is shown, once."""
        number = int.from_bytes(self.secret + _checksum(self.secret))
        digits = "".join(_ALPHABET[number >> 5 * each & 31] for each in reversed(range(_DIGITS)))
        return "-".join([_PREFIX, *(digits[at : at + _GROUP] for at in range(0, _DIGITS, _GROUP))])


def _checksum(secret: bytes) -> bytes:
    """Finds a mistyped character; 3 bytes of a hash tell nothing useful of a key of 32."""
    return hashlib.sha256(_PREFIX.encode("ascii") + secret).digest()[:_CHECKSUM_BYTES]
