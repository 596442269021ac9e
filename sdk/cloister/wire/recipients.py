"""Parts of rows sealed for one tenant's recipient key (HPKE, RFC 9180): what lies between client and service sees no row.

Knows bytes and keys; nothing of HTTP, and never where a recipient's line comes from. docs/spec/recipients.md is its specification.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from cloister.wire._errors import CloisterError, InvalidArgument
from cloister.wire._hpke import KEY_BYTES, SUITE, body_of, is_public_key, line_of
from cloister.wire.columns import Column
from cloister.wire.rows import arrays_of, encode_rows, part_rows

__all__ = [
    "LINE_PREFIX",
    "SEALED_ROWS_TYPE",
    "InvalidSealedPart",
    "RecipientKey",
    "RecipientRefused",
    "open_part",
    "padded_bytes",
    "recipient_of",
    "seal_part",
]

SEALED_ROWS_TYPE = "application/vnd.cloister.sealed-rows"
"""The media type of a sealed part."""

_LINE = b"cloister.rows.sealed/1\n"
LINE_PREFIX = "cloister-recipient-1:"
_TENANT, _RECIPIENT = "tn_", "rcp_"
_ID_BYTES, _LENGTH_BYTES = 16, 8


class RecipientRefused(InvalidArgument):
    """A line that names no recipient; nothing was sealed or sent."""

    def __init__(self) -> None:
        super().__init__(
            f"this is no recipient: one line that begins with {LINE_PREFIX!r}, whole and with no character changed; "
            "get it from the server's operator again, by another way than from the server"
        )


class InvalidSealedPart(CloisterError):
    """A sealed part that does not open. One message for every reason."""

    def __init__(self) -> None:
        super().__init__(
            "the sealed part does not open: it was changed or cut short, or it was sealed for another recipient, dataset or part"
        )


@dataclass(frozen=True, slots=True)
class RecipientKey:
    """Whom parts are sealed for: a tenant's public key and its id. `str` of it is its line, which `parse` reads."""

    tenant: str
    id: str
    public: bytes
    """X25519, 32 bytes."""

    def __post_init__(self) -> None:
        if not (_is_id(self.tenant, _TENANT) and _is_id(self.id, _RECIPIENT) and is_public_key(self.public)):
            raise RecipientRefused

    def __str__(self) -> str:
        return line_of(LINE_PREFIX, _raw(self.tenant) + _raw(self.id) + self.public)

    @classmethod
    def parse(cls, line: str) -> RecipientKey:
        """The recipient in its line, at whose end a line feed may stand. Raises RecipientRefused."""
        named = body_of(LINE_PREFIX, line, length=2 * _ID_BYTES + KEY_BYTES) if isinstance(line, str) else None
        if named is None:
            raise RecipientRefused
        tenant, recipient, public = named[:_ID_BYTES], named[_ID_BYTES : 2 * _ID_BYTES], named[2 * _ID_BYTES :]
        return cls(_TENANT + tenant.hex(), _RECIPIENT + recipient.hex(), public)


def padded_bytes(columns: Mapping[str, Column], *, capacity_rows: int, part: int) -> int:
    """How long a part is made before it is sealed: as if it were full. From public numbers alone, so it tells nothing."""
    size = part_rows(columns)
    slots = min(size, capacity_rows - part * size)
    full = {name: np.zeros((slots, *shape), dtype) for name, dtype, shape in arrays_of(columns)}
    return _LENGTH_BYTES + len(encode_rows(columns, full))


def seal_part(recipient: RecipientKey, rows_body: bytes, *, dataset: str, part: int, padded_to: int) -> bytes:
    """A part's body for the recipient alone, and for this place alone; as long for every body of the same `padded_to`.

    Raises ValueError where the body does not fit in `padded_to`.
    """
    space = padded_to - _LENGTH_BYTES - len(rows_body)
    if space < 0:
        raise ValueError(f"a body of {len(rows_body)} bytes does not fit in {padded_to}; `padded_bytes` says what does")
    plaintext = len(rows_body).to_bytes(_LENGTH_BYTES, "big") + rows_body + bytes(space)
    info = _info(recipient.tenant, recipient.id, dataset, part)
    public = X25519PublicKey.from_public_bytes(recipient.public)
    return _LINE + _raw(recipient.id) + SUITE.encrypt(plaintext, public, info=info)


def open_part(
    private_key: X25519PrivateKey, sealed: bytes, *, tenant: str, recipient_id: str, dataset: str, part: int
) -> bytes:
    """The body that was sealed for this recipient and this place. Raises InvalidSealedPart, and gives out nothing."""
    if recipient_of(sealed) != recipient_id:
        raise InvalidSealedPart
    try:
        plaintext = SUITE.decrypt(
            sealed[len(_LINE) + _ID_BYTES :], private_key, info=_info(tenant, recipient_id, dataset, part)
        )
    except (InvalidTag, ValueError):
        raise InvalidSealedPart from None
    end = _LENGTH_BYTES + int.from_bytes(plaintext[:_LENGTH_BYTES], "big")
    if not _LENGTH_BYTES <= end <= len(plaintext) or plaintext[end:] != bytes(len(plaintext) - end):
        raise InvalidSealedPart
    return plaintext[_LENGTH_BYTES:end]


def recipient_of(sealed: bytes) -> str:
    """The id of the recipient that a part says it is sealed for: nothing vouches for it before it opens."""
    raw = sealed[len(_LINE) : len(_LINE) + _ID_BYTES]
    if sealed[: len(_LINE)] != _LINE or len(raw) < _ID_BYTES:
        raise InvalidSealedPart
    return _RECIPIENT + raw.hex()


def _info(tenant: str, recipient_id: str, dataset: str, part: int) -> bytes:
    """What the sealing is bound to, each field behind its length, so that no two places read alike."""
    fields = [field.encode("ascii") for field in (tenant, recipient_id, dataset, str(part))]
    return _LINE + b"".join(len(field).to_bytes(2, "big") + field for field in fields)


def _is_id(given: str, prefix: str) -> bool:
    return re.fullmatch(prefix + r"[0-9a-f]{32}", given) is not None


def _raw(given: str) -> bytes:
    return bytes.fromhex(given.rpartition("_")[2])
