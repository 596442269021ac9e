"""Ledger and audit rows as what is hashed of them. Knows the tables' columns; nothing of chains or transactions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import Float
from sqlalchemy.types import TypeEngine

from cloister_server.store.tables import AuditRow, LedgerEntry, Table, Tenant

__all__ = ["GENESIS", "Row", "canonical", "canonical_of", "digest", "row_id", "uncanonical"]

GENESIS = hashlib.sha256(b"cloister.chain/1\n").digest()
"""What the first link of a chain follows."""

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode

Row = LedgerEntry | AuditRow


def canonical(row: Table) -> dict[str, Any]:
    """A row as its digest has it: every column that is not null, so that one which a later release adds alters no old digest.

    Times are UTC in microseconds. What was just written and what is read back, on either database, is the same.
    """
    return canonical_of(type(row), {column.key: getattr(row, column.key) for column in row.__table__.columns})


def canonical_of(table: type[Table], values: Mapping[str, Any]) -> dict[str, Any]:
    """`canonical` of a row's values by column. Raises TypeError or ValueError where one is none that we write."""
    return {  # most are words, which are as they are
        name: value if type(value) is str else _plain(value, type_)
        for name, type_ in _columns(table).items()
        if (value := values[name]) is not None
    }


def uncanonical(table: type[Table], values: Mapping[str, Any]) -> dict[str, Any]:
    """What `canonical` gave, as the values of a row to insert. Raises ValueError where it is no row of this table."""
    columns = _columns(table)
    if values.keys() - columns.keys():
        raise ValueError(f"there is no column {', '.join(sorted(values.keys() - columns.keys()))} here")
    times = {name for name, type_ in columns.items() if isinstance(type_, type(Tenant.__table__.c.created.type))}
    return {name: datetime.fromisoformat(values[name]) if name in times else values.get(name) for name in columns}


def digest(before: bytes, row: dict[str, Any]) -> bytes:
    """SHA-256 of the digest before and the row as length-prefixed JSON: sorted keys, no blanks, floats exact by repr."""
    content = _encode(row).encode("ascii")
    return hashlib.sha256(before + len(content).to_bytes(8, "big") + content).digest()


def row_id(row: Row) -> str:
    """What a link calls a row."""
    return f"{row.source_id}/{row.revision}" if isinstance(row, LedgerEntry) else row.id


@cache
def _columns(table: type[Table]) -> dict[str, TypeEngine[Any]]:
    return {column.key: column.type for column in table.__table__.columns}


def _plain(value: Any, type_: TypeEngine[Any]) -> Any:
    match value:
        case str():
            return value
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="microseconds")
        case dict():
            return json.loads(json.dumps(value, allow_nan=False))  # as a JSON column gives it back
        case int() | float() if isinstance(type_, Float):
            return _finite(float(value)) + 0.0  # databases know no negative zero
        case int():
            return value
        case _:
            raise TypeError(f"a {type(value).__name__} is no value of a linked row")


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("a number of a linked row is finite")
    return number
