"""Which indices are burned, on disk before their first use: a high-water mark for each number of rows. Knows a file; no keys.

What is written is a mark some way ahead, so that most burns cost no write; after a crash everything up to it counts as used.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from cloister_privacy.mpc.errors import IndexBurned
from cloister_privacy.mpc.keystream import Index

__all__ = ["Marks"]

_AHEAD = 64


class Marks:
    """The marks of one party. Never restored from a snapshot: an older file would let an index be used twice."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._generation = ""
        self._written: dict[int, int] = {}
        if path.exists():
            known = json.loads(path.read_text())
            self._generation = str(known["generation"])
            self._written = {int(rows): int(count) for rows, count in known["marks"].items()}
        self._used = dict(self._written)

    def burn(self, generation: str, index: Index) -> None:
        """Counts it as used from now on, whatever happens. Raises IndexBurned where it was, or one behind it; then nothing changes."""
        with self._lock:
            if generation != self._generation:
                self._generation, self._written, self._used = generation, {}, {}
            if index.count <= self._used.get(index.rows, 0):
                raise IndexBurned(
                    f"index {index.count} of {index.rows} rows was used before; its material is thrown away"
                )
            if index.count > self._written.get(index.rows, 0):
                self._write({**self._written, index.rows: index.count + _AHEAD - 1})
            self._used[index.rows] = index.count

    def _write(self, marks: dict[int, int]) -> None:
        draft = self._path.with_suffix(".new")
        with draft.open("w") as file:
            json.dump({"generation": self._generation, "marks": marks}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._written = marks
