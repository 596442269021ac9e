"""The audit log: who did what to what, by which grant, and who was denied it and why. Never a secret, never a row of data."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from cloister_server.errors import Unavailable
from cloister_server.ids import ordered_hex
from cloister_server.policy import Authorized, Denied
from cloister_server.principal import Principal
from cloister_server.store.acting import for_tenants
from cloister_server.store.session import writing
from cloister_server.store.tables import AuditRow, now

__all__ = ["NAMING", "allowed", "denials_kept", "keep_denial", "operated", "told", "values_of"]

log = logging.getLogger(__name__)

NAMING = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What a caller gives as an id or a name is kept only if it looks like one: a path may hold anything."""


def allowed(session: Session, authorized: Authorized[Any], verb: str, resource_id: str) -> None:
    """Tell of a deed in the transaction that does it: it is in the log if, and only if, it happened."""
    session.add(_row(authorized.principal, verb, resource_id, outcome="allowed", grant_id=authorized.grant_id))


def told(session: Session, principal: Principal, verb: str, resource_id: str) -> None:
    """Tell of what a person did about themselves, for which no grant is asked: that they let an app act for them."""
    session.add(_row(principal, verb, resource_id, outcome="allowed"))


def operated(session: Session, principal: Principal, verb: str, about: str, outcome: str) -> None:
    """Tell of an operation in the operators' own chain: by whom, about what, and how it ended."""
    session.add(_row(principal, verb, about, outcome=outcome))


@contextmanager
def denials_kept(engine: Engine) -> Iterator[None]:
    """Around a transaction: a denial that ends it is kept, and raised again."""
    try:
        yield
    except Denied as denied:
        keep_denial(engine, denied)
        raise


def keep_denial(engine: Engine, denied: Denied) -> None:
    """Write a denial in a transaction of its own, once: the one that it ended is rolled back.

    A log that cannot be written changes nothing for the caller: the denial stands either way.
    """
    if denied.is_kept:
        return
    denial, denied.is_kept = denied.denial, True
    resource_id = denial.resource_id if NAMING.fullmatch(denial.resource_id) else "(neither an id nor a name)"
    try:
        with writing(engine, for_tenants(denial.principal.tenant_id)) as session:
            session.add(_row(denial.principal, denial.verb, resource_id, outcome=f"denied: {denial.reason}"))
    except (SQLAlchemyError, Unavailable) as error:
        log.error(
            "audit.denial_not_written",
            extra={"error": type(error).__name__, "request_id": denial.principal.request_id},
        )


def values_of(
    principal: Principal, verb: str, resource_id: str, *, outcome: str, grant_id: str | None = None
) -> dict[str, Any]:
    """A row of now, as values by column."""
    return {
        "tenant_id": principal.tenant_id,
        "id": f"aud_{ordered_hex()}",
        "time": now(),
        "principal_id": principal.id,
        "verb": verb,
        "resource_id": resource_id,
        "outcome": outcome,
        "grant_id": grant_id,
        "request_id": principal.request_id,
    }


def _row(principal: Principal, verb: str, resource_id: str, **more: Any) -> AuditRow:
    return AuditRow(**values_of(principal, verb, resource_id, **more))
