"""What a sealed thing is bound to, and the one way to write it as bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Context", "length_prefixed"]

_FIELD = re.compile(r"[!-~]{1,255}")
"""Visible ASCII only: an id has one spelling, and no Unicode normalisation can give it a second."""


@dataclass(frozen=True, slots=True)
class Context:
    """Whose an object is, what kind of thing it is, and which one: immutable ids, never names that people give.

    Raises ValueError where a field is not 1 to 255 characters of visible ASCII.
    """

    tenant: str
    kind: str
    object: str

    def __post_init__(self) -> None:
        for field in ("tenant", "kind", "object"):
            if not _FIELD.fullmatch(getattr(self, field)):
                raise ValueError(f"the context's {field} must be 1 to 255 characters of visible ASCII")

    def to_bytes(self) -> bytes:
        """The three fields, each behind its length: no two contexts share these bytes."""
        return length_prefixed(self.tenant, self.kind, self.object)


def length_prefixed(*fields: str) -> bytes:
    """Every field as its length in two bytes, big-endian, and its ASCII bytes."""
    return b"".join(len(field).to_bytes(2) + field.encode("ascii") for field in fields)
