"""Many rows in few statements, past the ORM, and kept to the session's tenants all the same. Knows SQL; no feature."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import insert
from sqlalchemy.dialects.sqlite import dialect as sqlite
from sqlalchemy.orm import Session

from cloister_server.store.isolation import OtherTenant, acts_for
from cloister_server.store.tables import Table

__all__ = ["insert_rows"]

_AT_ONCE = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Rows of a statement on SQLite. Its driver lets go of the interpreter for each statement, and waits until it is free again."""


def insert_rows(session: Session, table: type[Table], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows that name every column. Raises OtherTenant where one is of a tenant that the session does not act for."""
    if not acts_for(session, *{row["tenant_id"] for row in rows}):
        raise OtherTenant(f"a {table.__name__} of a tenant that this transaction does not act for")
    connection = session.connection()
    if connection.dialect.name != "sqlite":
        connection.execute(insert(table), rows)  # which the driver sends in one piece
        return
    columns = _columns(table)
    at = 0
    for number in _AT_ONCE:
        while len(rows) - at >= number:
            given = tuple(
                row[name] if to_driver is None else to_driver(row[name])
                for row in rows[at : at + number]
                for name, to_driver in columns
            )
            connection.exec_driver_sql(_statement(table, number), given)
            at += number


@cache
def _columns(table: type[Table]) -> list[tuple[str, Any]]:
    """Names, and what makes of a value one of the driver's, if anything."""
    dialect = sqlite()
    return [(each.key, each.type.dialect_impl(dialect).bind_processor(dialect)) for each in table.__table__.columns]


@cache
def _statement(table: type[Table], number: int) -> str:
    names = [name for name, _ in _columns(table)]
    marks = f"({', '.join('?' * len(names))})"
    return f"INSERT INTO {table.__tablename__} ({', '.join(names)}) VALUES {', '.join([marks] * number)}"  # noqa: S608 (our tables')
