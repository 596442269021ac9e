"""`cloister-admin audit tail` and `export`: the audit log, for people and for what collects logs. Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy.orm import Session

from cloister_server import tenants
from cloister_server.audit_lines import FORMATS, Format, json_line, told
from cloister_server.cli.terminal import JSON, at_work, show, write_file
from cloister_server.store import audit_log
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.audit_log import Entry
from cloister_server.store.session import snapshot

__all__ = ["export", "tail"]

OneTenant = Annotated[str | None, typer.Option("--tenant", help="Only this tenant's, by name or id.")]

_LOOK_S = 1.0
"""Between looks at whether there are more rows."""


def tail(
    tenant: OneTenant = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=10_000, help="How many rows to begin with.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with those that come, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Print the newest rows of the audit log, oldest first: who did what to what, by which grant, or was denied it, and why."""
    with at_work(as_json) as service:
        with snapshot(service.engine, ALL_TENANTS) as session:
            tenant_id = _id(session, tenant)
            seen = audit_log.heads(session, tenant_id)
            _print(audit_log.newest(session, tenant_id, count=lines), as_json)
        while follow:
            try:
                time.sleep(_LOOK_S)
            except KeyboardInterrupt:
                return
            with snapshot(service.engine, ALL_TENANTS) as session:
                heads = audit_log.heads(session, tenant_id)
                _print(audit_log.later(session, seen, heads), as_json)
            seen = heads


def export(
    since: Annotated[datetime | None, typer.Option(help="From when on, UTC; from the beginning otherwise.")] = None,
    tenant: OneTenant = None,
    kind: Annotated[Format, typer.Option("--format", help="JSON lines, or syslog messages (RFC 5424).")] = "jsonl",
    to: Annotated[
        Path | None, typer.Option(help="A new file, mode 0600; standard output otherwise. Nothing is overwritten.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Write the audit log out, oldest row first, for what collects logs. There is no secret in it, and no row of data."""
    with at_work(as_json) as service, snapshot(service.engine, ALL_TENANTS) as session:
        moment = None if since is None else since.replace(tzinfo=UTC)
        line = FORMATS[kind]
        written = (line(each) for each in audit_log.since(session, _id(session, tenant), moment))
        if to is None:
            for each in written:
                print(each)
            return
        size = write_file(to, _encoded(written))
        show({"file": str(to), "bytes": size, "format": kind}, as_json)


def _id(session: Session, tenant: str | None) -> str | None:
    return None if tenant is None else tenants.find_tenant(session, tenant).id


def _print(entries: Iterable[Entry], as_json: bool) -> None:
    for entry in entries:
        print(json_line(entry) if as_json else _for_people(entry), flush=True)


def _for_people(entry: Entry) -> str:
    by = f"  by {entry.grant}" if entry.grant else ""
    who = f"{entry.tenant_name}  {entry.principal}  {entry.verb}  {entry.resource}"
    return f"{told(entry)['time'][:19]}Z  {who}  {entry.outcome}{by}  ({entry.request_id})"


def _encoded(lines: Iterator[str]) -> Iterator[bytes]:
    return (f"{line}\n".encode() for line in lines)
