"""Files that the commands are given: read with a bound, and refused in a sentence where they are of no use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cloister.wire._errors import InvalidArgument

__all__ = ["read", "read_keys", "unusable", "write"]

_MOST_BYTES = 2**20


def read_keys(path: Path) -> Any:
    """A service's public keys, in whatever form they were kept."""
    text = read(path)
    try:
        keys = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidArgument(
            f"{path} is not JSON; give what `cloister-admin init --json` printed, or key id -> hexadecimal"
        ) from None
    return keys.get("certificate_keys", keys) if isinstance(keys, dict) else keys


def read(path: Path) -> bytes:
    """A file's bytes, a little over the largest that any reader takes."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES + 1)  # what is longer is refused by whoever reads it
    except OSError as exc:
        raise unusable(path, exc) from exc


def write(path: Path, text: str) -> None:
    """Write a text."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise unusable(path, exc) from exc


def unusable(path: Path, exc: OSError) -> InvalidArgument:
    """The refusal of a path that cannot be read or written."""
    return InvalidArgument(f"{path} cannot be used: {exc.strerror or exc}; give another path")
