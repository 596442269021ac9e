"""What a client and a party say to each other: frames over TLS, each 8 bytes of length and so many of content. Knows JSON; no sockets.

The client sends a `PrivateRequest` and its share of the inputs; the party answers TAKEN, and then ANSWERED with its share of the
outputs, or REFUSED with a `PartyRefusal`. Party 0 is asked when party 1 has said TAKEN. Several requests may follow each other.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from cloister.wire._model import Body, Identifier, Response

__all__ = [
    "ANSWERED",
    "HEAD_BYTES",
    "LENGTH",
    "LONGEST_PERMISSION_S",
    "PERMISSION_TYPE",
    "REFUSED",
    "TAKEN",
    "PartyRefusal",
    "PrivateRequest",
    "audience",
]

LENGTH = struct.Struct(">Q")
HEAD_BYTES = 4096
"""The most that a frame takes which holds no shares."""

TAKEN, ANSWERED, REFUSED = b"\x00", b"\x01", b"\x02"
"""The first byte of what a party says."""

PERMISSION_TYPE = "cloister-private+jwt"
"""The `typ` of a permission: no access token is one, and no permission is an access token."""

LONGEST_PERMISSION_S = 60


class PrivateRequest(Body):
    """What goes before a share."""

    format: Literal["cloister.private-request/1"] = "cloister.private-request/1"
    permission: Annotated[str, StringConstraints(max_length=2048)] = Field(repr=False)
    deployment: Identifier
    request: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    """16 fresh bytes, the same at both parties."""
    rows: Annotated[int, Field(ge=1, le=256)]


class PartyRefusal(Response):
    """Why a party does not answer."""

    code: Literal["busy", "too_many_links", "dropped", "stale", "not_permitted", "shares_refused", "exhausted"] | str
    error: str


def audience(deployment: str, party: int) -> str:
    """The `aud` of a permission: one party of one deployment."""
    return f"{deployment}/{party}"
