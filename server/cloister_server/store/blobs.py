"""Sealed bytes by id: written once, synced, never changed. Knows object stores; never sees a plaintext byte."""

from __future__ import annotations

import os
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore

from cloister_server.errors import Unavailable

__all__ = ["Blobs"]


class Blobs:
    """A directory of sealed objects, one file each, named by tenant and object id.

    An object is on the disk for good (synced, its directory too) before `put` returns, so that a row that
    names it can be committed.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root
        self._store = LocalStore(prefix=root)

    def put(self, tenant_id: str, object_id: str, sealed: bytes) -> None:
        """Create the object; an id that is taken is a fault of ours and raises, never overwrites."""
        path = f"{tenant_id}/{object_id}"
        try:
            obstore.put(self._store, path, sealed, mode="create", use_multipart=False)
        except AlreadyExistsError:
            raise Unavailable("an object of this id is already stored; retry the request") from None
        for place in (self._root / path, (self._root / path).parent, self._root):
            _sync(place)

    def get(self, tenant_id: str, object_id: str) -> bytes:
        """The sealed bytes. Raises Unavailable where they are missing."""
        try:
            return bytes(obstore.get(self._store, f"{tenant_id}/{object_id}").bytes())
        except FileNotFoundError:
            raise Unavailable(
                "a sealed object that the database names is missing from the blob store; restore it from a backup"
            ) from None

    def delete(self, tenant_id: str, object_id: str) -> None:
        """Remove an object that nothing names any more; not there is fine."""
        (self._root / tenant_id / object_id).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
