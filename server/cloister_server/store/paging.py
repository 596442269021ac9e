"""Pages of what a principal may see, oldest first; a cursor says where the next page begins."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from sqlalchemy import tuple_
from sqlalchemy.orm import Session

from cloister.wire._model import Response
from cloister.wire.jobs import Page
from cloister_server.errors import Invalid
from cloister_server.principal import Principal
from cloister_server.store.queries import visible_to
from cloister_server.store.tables import Dataset, Job, Model, Source

__all__ = ["page_of"]

R = TypeVar("R", Dataset, Job, Model, Source)


def page_of(
    session: Session,
    principal: Principal,
    table: type[R],
    *,
    cursor: str | None,
    limit: int,
    view: Callable[[R], Response],
) -> Page:
    """Up to `limit` visible rows after the cursor, as the wire shows them. Raises Invalid on a cursor of no page."""
    rows = visible_to(principal, table)
    if cursor is not None:
        rows = rows.where(tuple_(table.created, table.id) > _position(cursor))
    found = list(session.scalars(rows.order_by(table.created, table.id).limit(limit + 1)))
    more = len(found) > limit
    return Page(
        items=[view(row).model_dump(mode="json") for row in found[:limit]],
        next=f"{found[limit - 1].created.isoformat()}~{found[limit - 1].id}" if more else None,
    )


def _position(cursor: str) -> tuple[datetime, str]:
    created, _, row_id = cursor.partition("~")
    try:
        at = datetime.fromisoformat(created)
        if at.tzinfo is None or not row_id.isidentifier():
            raise ValueError
        return at.astimezone(UTC), row_id
    except (ValueError, OverflowError):
        raise Invalid("this cursor is of no page; pass `next` of the page before as it was given") from None
