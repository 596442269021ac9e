"""Many rows in few statements, past the ORM, and kept to the session's tenants all the same. Knows SQL; no feature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import insert
from sqlalchemy.dialects.sqlite import dialect as sqlite
from sqlalchemy.orm import Session

from cloister_server.store.isolation import past_the_orm
from cloister_server.store.tables import Table

__all__ = ["insert_rows"]

_AT_ONCE = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Rows of a statement on SQLite. Its driver lets go of the interpreter for each statement, and waits until it is free again."""


def insert_rows(session: Session, table: type[Table], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows that name every column. Raises OtherTenant where one is of a tenant that the session does not act for."""
    connection = past_the_orm(session, *{row["tenant_id"] for row in rows})
    if connection.dialect.name != "sqlite":
        connection.execute(insert(table), rows)  # which the driver sends in one piece
        return
    columns = _columns(table)
    at = 0
    for number in _AT_ONCE:
        while len(rows) - at >= number:
            given: list[Any] = []
            for row in rows[at : at + number]:
                values = list(columns.values_of(row))
                for place, to_driver in columns.to_driver:
                    values[place] = to_driver(values[place])
                given += values
            connection.exec_driver_sql(_statement(table, number), tuple(given))
            at += number


class _Columns(NamedTuple):
    values_of: Callable[[dict[str, Any]], tuple[Any, ...]]
    to_driver: list[tuple[int, Any]]
    """The places of those whose values the driver does not take as they are, and what it does."""


@cache
def _columns(table: type[Table]) -> _Columns:
    columns, dialect = table.__table__.columns, sqlite()
    processors = [each.type.dialect_impl(dialect).bind_processor(dialect) for each in columns]
    return _Columns(
        itemgetter(*columns.keys()), [(place, each) for place, each in enumerate(processors) if each is not None]
    )


@cache
def _statement(table: type[Table], number: int) -> str:
    names = table.__table__.columns.keys()
    marks = f"({', '.join('?' * len(names))})"
    return f"INSERT INTO {table.__tablename__} ({', '.join(names)}) VALUES {', '.join([marks] * number)}"  # noqa: S608 (our tables')
