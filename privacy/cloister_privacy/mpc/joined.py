"""Requests that are computed as one program: how many rows pay, how they are announced and answered. Knows rows and ids; no link.

What one of them holds, or lacks, changes no other: each row is computed by itself, and zeros stand where a share is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cloister.wire.shares import Shares
from cloister_privacy.mpc.deployment import Limits
from cloister_privacy.mpc.errors import RequestDropped, SharesOfAnother
from cloister_privacy.mpc.keystream import Index
from cloister_privacy.mpc.ring import Ring

__all__ = ["DIFFERENT", "MISSING", "TAKEN", "USED", "Announcement", "Asked", "inputs_of", "most_joined", "refusals_of"]

TAKEN: Final = 0
MISSING, DIFFERENT, USED = 1, 2, 3
_REFUSALS = {
    MISSING: "no share of this request came; send one to each party",
    DIFFERENT: "the shares of the two parties have different numbers of rows; share them again",
    USED: "the index was used before; its material is thrown away",
}
"""Party 1 answers by a byte for each request."""

_REQUEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """A request and how many rows it has."""

    request: bytes
    rows: int


@dataclass(frozen=True, slots=True)
class Announcement:
    """What party 0 leads next: its rows are those of these requests, one behind the other."""

    count: int
    asked: tuple[Asked, ...]

    @property
    def index(self) -> Index:
        return Index(sum(each.rows for each in self.asked), self.count)

    def to_bytes(self) -> bytes:
        return json.dumps(
            {"count": self.count, "requests": [[each.request.hex(), each.rows] for each in self.asked]}
        ).encode()

    @classmethod
    def from_bytes(cls, frame: bytes, *, most_rows: int) -> Announcement:
        """Raises RequestDropped for anything else."""
        try:
            told = json.loads(frame)
            asked = tuple(Asked(bytes.fromhex(request), int(rows)) for request, rows in told["requests"])
            found = cls(int(told["count"]), asked)
        except (ValueError, TypeError, KeyError):
            found = cls(0, ())
        are_rows = all(len(each.request) == _REQUEST_BYTES and each.rows > 0 for each in found.asked)
        if not are_rows or not 0 < found.index.rows <= most_rows:
            raise RequestDropped("the other party sent what is no announcement; form anew and try again")
        return found


def refusals_of(answer: bytes, count: int) -> list[SharesOfAnother | None]:
    """Of each announced request why the other party does not take it, if so. Raises RequestDropped for what is no answer."""
    if len(answer) != count or any(code != TAKEN and code not in _REFUSALS for code in answer):
        raise RequestDropped("the other party sent what is no answer; form anew and try again")
    return [None if code == TAKEN else SharesOfAnother(f"the other party: {_REFUSALS[code]}") for code in answer]


def inputs_of(
    asked: Sequence[Asked], found: Sequence[Shares | None], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Ring]:
    """A party's share of all rows: zeros for what is not computed."""
    return {
        name: np.concatenate(
            [
                np.zeros((each.rows, *shape), np.uint64) if shares is None else shares.tensors[name]
                for each, shares in zip(asked, found, strict=True)
            ]
        )
        for name, shape in shapes.items()
    }


def most_joined(row_bytes: int, limits: Limits, *, in_time: float) -> int:
    """The most rows that are joined, a power of two: as many as pay and as are expected `in_time`.

    The material ahead of them and of all smaller powers takes half of the disk's budget at most: joining throws nothing away.
    """
    most, fitting = 1, min(limits.joined, limits.rows, in_time)
    while 2 * most <= fitting and 2 * (4 * most - 1) * row_bytes * limits.ahead <= limits.disk_bytes:
        most *= 2
    return most
