"""What may be shown once and never again: assertions and proofs, by digest, until they would be too old anyway. Knows SQL alone."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from sqlalchemy import Engine, delete
from sqlalchemy.exc import IntegrityError

from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import writing
from cloister_server.store.tables import SeenProof, now

__all__ = ["Replayed", "take_once"]


class Replayed(Exception):
    """It was shown before, to this process or another."""


def take_once(engine: Engine, *identity: str, until: float) -> None:
    """Remember this identity until then. Raises Replayed where it is remembered already; of two at once one is."""
    line = b"cloister.shown-once/1\n" + b"".join(f"{len(part)}:{part}\n".encode() for part in identity)
    digest = hashlib.sha256(line).digest()
    try:
        with writing(engine, ALL_TENANTS) as session:
            session.execute(delete(SeenProof).where(SeenProof.until < now()))
            session.add(SeenProof(digest=digest, until=datetime.fromtimestamp(until, UTC)))
    except IntegrityError:
        raise Replayed from None
