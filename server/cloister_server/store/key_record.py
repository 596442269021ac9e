"""Every key-encryption key that was ever made, on record before it was: outside the database and its backups. Knows files alone.

A database that was restored from an older copy does not know the keys that were made since; whoever ends a tenant finds them here.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cloister_server.errors import Unavailable
from cloister_server.store.tables import now

__all__ = ["KeyRecord", "RecordedKey"]

_FORMAT = "cloister.key-record/1"
_KEY_ID = re.compile(r"(?P<tenant>[a-z][a-z0-9_-]*)\.[a-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class RecordedKey:
    """A key that was about to be made; whether it came to that, its provider knows."""

    key_id: str
    provider: str
    created: datetime


class KeyRecord:
    """A directory, beside the ledgers' anchors, with a file for each key: whole or not there, and never changed."""

    __slots__ = ("directory",)

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def note(self, key_id: str, *, provider: str) -> None:
        """Write a key down, for good before this returns; one that is on record stays as it is. Raises Unavailable."""
        if not _KEY_ID.fullmatch(key_id) or len(key_id) > 128:
            raise Unavailable("a key of a name that no file can have cannot be put on record, and is not made")
        path = self.directory / key_id
        draft = self.directory / f".{secrets.token_hex(8)}.draft"
        told = {"format": _FORMAT, "key": key_id, "provider": provider, "created": now().isoformat()}
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with draft.open("x") as file:
                file.write(json.dumps(told) + "\n")
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(draft, path)
            draft.unlink()
            for place in (self.directory, self.directory.parent):
                _sync(place)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise Unavailable(
                f"the record of keys cannot be written ({error.strerror}), and a key that is on no record is not made; the server's "
                "operator must see to the keystore's directory"
            ) from None

    def of(self, tenant_id: str) -> list[RecordedKey]:
        """The tenant's keys, in the order in which they were made. Raises Unavailable where one cannot be read."""
        try:
            found = [_read(path) for path in self.directory.iterdir() if _tenant_of(path.name) == tenant_id]
        except FileNotFoundError:
            return []  # nothing was ever noted
        except (OSError, ValueError, LookupError, TypeError):
            raise Unavailable(
                f"the record of keys in {self.directory} cannot be read, or is damaged; restore it from the keystore's backup"
            ) from None
        return sorted(found, key=lambda each: (each.created, each.key_id))


def _read(path: Path) -> RecordedKey:
    read = json.loads(path.read_bytes())
    if read["format"] != _FORMAT or read["key"] != path.name:
        raise ValueError("another format, or another key's")
    return RecordedKey(read["key"], read["provider"], datetime.fromisoformat(read["created"]))


def _tenant_of(name: str) -> str | None:
    named = _KEY_ID.fullmatch(name)
    return None if named is None else named["tenant"]


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
