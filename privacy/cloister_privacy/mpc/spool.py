"""Material that was dealt ahead, sealed files until it is used, within a budget. Knows files and a budget; it cannot open them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cloister_privacy.mpc.errors import MaterialExhausted
from cloister_privacy.mpc.keystream import Index
from cloister_privacy.sealing.files import make_directory

__all__ = ["Spool"]

_SUFFIX = ".material"


class Spool:
    """One generation's material at party 0. What an earlier one left is removed: nothing of it may be used."""

    def __init__(self, directory: Path, *, limit_bytes: int) -> None:
        make_directory(directory)
        for left in directory.glob("*" + _SUFFIX):
            left.unlink()
        self._directory, self._limit = directory, limit_bytes
        self._sizes: dict[Index, int] = {}

    def has_room(self, size: int) -> bool:
        return sum(self._sizes.values()) + size <= self._limit

    def count(self, rows: int) -> int:
        """How many requests of so many rows are ready."""
        return sum(index.rows == rows for index in self._sizes)

    def put(self, index: Index, sealed: bytes) -> None:
        """Raises MaterialExhausted where the budget does not take it."""
        if not self.has_room(len(sealed)):
            raise MaterialExhausted(
                f"material of {len(sealed)} bytes does not fit in the budget of {self._limit}; raise disk_bytes, or send fewer rows"
            )
        path = self._path(index)
        path.touch(mode=0o600, exist_ok=False)
        path.write_bytes(sealed)
        self._sizes[index] = len(sealed)

    def take(self, rows: int) -> tuple[Index, bytes] | None:
        """The next of so many rows, removed before it is used; None where none is ready."""
        ready = sorted(index for index in self._sizes if index.rows == rows)
        if not ready:
            return None
        index = ready[0]
        sealed = self._path(index).read_bytes()
        self._path(index).unlink()
        del self._sizes[index]
        return index, sealed

    def clear(self, *, but: Collection[int] = ()) -> None:
        """Of all numbers of rows but these."""
        for index in [each for each in self._sizes if each.rows not in but]:
            self._path(index).unlink(missing_ok=True)
            del self._sizes[index]

    def _path(self, index: Index) -> Path:
        return self._directory / f"{index.rows}-{index.count}{_SUFFIX}"
