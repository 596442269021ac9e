"""Users: a user's rows belong to one source of a tenant, and to one block of it. Knows MACs; refuses to keep an id.

Where this is kept, nobody pays for one user twice, and nobody is protected by two budgets instead of one. Between tenants, and
where a row is the unit, it is an assumption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Insert, delete, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from cloister.wire.rows import RowsRefused
from cloister_server import vault
from cloister_server.principal import Principal
from cloister_server.store.tables import Dataset, Tenant, Unit

__all__ = ["forget", "ready", "register"]

_AT_ONCE = 500
"""Users in one statement: databases bound the parameters of one."""

_TABLE = Unit.metadata.tables[Unit.__tablename__]
_INSERT_NEW: Mapping[str, Insert] = {
    "sqlite": sqlite.insert(_TABLE).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(_TABLE).on_conflict_do_nothing(),
}
"""By dialect: another part of the dataset may hold the same user, and may be coming in at the same moment."""


def ready(session: Session, dataset: Dataset) -> None:
    """See that the tenant's key for users is to be had, if this dataset's rows say whose they are."""
    if _unit_column(dataset) is not None:
        vault.units_key(session, tenant_id=dataset.tenant_id)


def register(session: Session, principal: Principal, dataset: Dataset, rows: dict[str, Any]) -> None:
    """Note that the users of these rows are in the dataset's source and block, if its rows say whose they are.

    Raises RowsRefused, for the uploader alone, where one is in another: the caller rolls back, and nothing is left of it.
    It locks the tenant's chain, which is a transaction's last lock: whatever else is locked must be locked before.
    """
    name = _unit_column(dataset)
    if name is None:
        return
    first_rows = _first_rows(rows[name], rows[f"{name}.length"])
    macs = vault.unit_macs(session, first_rows, tenant_id=dataset.tenant_id)
    row_of = dict(sorted(zip(macs, first_rows.values(), strict=True)))
    _insert(session, dataset, list(row_of))
    # Of two that register one user at the same time the second looks when the first is done, and sees it. An uploader from
    # another tenant is audited there: both are locked, in the order of the ids, as for the chains.
    for tenant_id in sorted({dataset.tenant_id, principal.tenant_id}):
        session.execute(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update())
    elsewhere = dict(_elsewhere(session, dataset, list(row_of)))
    if elsewhere:
        mac = min(elsewhere, key=row_of.__getitem__)
        raise _refusal(name, row_of[mac], is_same_source=elsewhere[mac] == dataset.source_id)


def forget(session: Session, dataset: Dataset) -> None:
    """The dataset goes: users who are in no other one are free to be registered anywhere."""
    session.execute(delete(Unit).where(Unit.tenant_id == dataset.tenant_id, Unit.dataset_id == dataset.id))


def _unit_column(dataset: Dataset) -> str | None:
    return next((name for name, column in dataset.columns.items() if column["type"] == "unit"), None)


def _first_rows(ids: Any, lengths: Any) -> dict[bytes, int]:
    """Each user's id, as it was given, and the first row of that user. Zero bytes pad an id, and may end one too."""
    padded, width = ids.tobytes(), ids.shape[1]
    first_rows: dict[bytes, int] = {}
    for row, length in enumerate(lengths.tolist()):
        first_rows.setdefault(padded[row * width : row * width + length], row)
    return first_rows


def _insert(session: Session, dataset: Dataset, macs: Sequence[bytes]) -> None:
    """In order of the MACs: parts of one dataset that come at the same time wait for one another, and in no circle."""
    place = {"tenant_id": dataset.tenant_id, "source_id": dataset.source_id, "block": dataset.block}
    values = {**place, "dataset_id": dataset.id}
    session.execute(_INSERT_NEW[session.get_bind().dialect.name], [{**values, "mac": mac} for mac in macs])


def _elsewhere(session: Session, dataset: Dataset, macs: Sequence[bytes]) -> Iterator[tuple[bytes, str]]:
    """Which of these users are in another source or block of the tenant, with the source."""
    another = or_(Unit.source_id != dataset.source_id, Unit.block != dataset.block)
    for first in range(0, len(macs), _AT_ONCE):
        some = Unit.mac.in_(macs[first : first + _AT_ONCE])
        where = (Unit.tenant_id == dataset.tenant_id, some, another)
        yield from session.execute(select(Unit.mac, Unit.source_id).where(*where))


def _refusal(column: str, row: int, *, is_same_source: bool) -> RowsRefused:
    where, there = ("another block of this source", "block") if is_same_source else ("another source", "source")
    return RowsRefused(
        column,
        row,
        f"its user belongs to {where} already, and would be charged for twice; leave such rows out, "
        f"or upload them under that {there}",
    )
