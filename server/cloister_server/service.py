"""What a process of the service is made of, put together once and passed down; knows nothing of who calls."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine

from cloister_server.keyring import KeyRing
from cloister_server.settings import Settings
from cloister_server.store.blobs import Blobs

__all__ = ["Service"]


@dataclass(frozen=True, slots=True)
class Service:
    """The settings, the database, the keys and the blobs of one deployment, as one process holds them."""

    settings: Settings
    engine: Engine
    keys: KeyRing
    blobs: Blobs
