"""What a process of the service is made of, put together once and passed down; knows nothing of who calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from cloister_server import asking
from cloister_server.keyring import KeyRing
from cloister_server.settings import Settings
from cloister_server.store.acting import Acting
from cloister_server.store.blobs import Blobs
from cloister_server.store.session import reading, writing

__all__ = ["Service"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Service:
    """The settings, the database, the keys and the blobs of one deployment, as one process holds them."""

    settings: Settings
    engine: Engine
    keys: KeyRing
    blobs: Blobs

    def read(self, acting: Acting, work: Callable[[Session], T]) -> T:
        """What `work` gives in a transaction that writes nothing, for whom it says; key providers that it needs are asked outside."""
        return asking.run(lambda: reading(self.engine, acting), self.keys, work)

    def write(self, acting: Acting, work: Callable[[Session], T]) -> T:
        """The same in a transaction that is committed at its end."""
        return asking.run(lambda: writing(self.engine, acting), self.keys, work)
