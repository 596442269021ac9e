"""`cloister-admin audit verify`, `tail` and `export`: the audit log, for people and for what collects logs. Decides nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cloister_server.audit_lines import Format
from cloister_server.cli.terminal import JSON, at_work, refusals, settings_here, show, told, write_file
from cloister_server.operations import audit
from cloister_server.store import audit_log
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import snapshot
from cloister_server.tenants import find_tenant

__all__ = ["export", "fail_on_problems", "tail", "verify"]

OneTenant = Annotated[str | None, typer.Option("--tenant", help="Only this tenant's, by name or id.")]

_LOOK_S = 1.0
"""Between looks at whether there are more rows."""


def verify(tenant: OneTenant = None, as_json: JSON = False) -> None:
    """Find the first ledger or audit row that was altered, removed, reordered or put in; exit status 1 where there is one."""
    with refusals(as_json):
        rows = told(audit.verify, audit.MaybeTenant(tenant=tenant))
        show(rows, as_json)
    fail_on_problems(rows)


def tail(
    tenant: OneTenant = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=10_000, help="How many rows to begin with.")] = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with those that come, until Ctrl-C; on this machine alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Print the newest rows of the audit log, oldest first: who did what to what, by which grant, or was denied it, and why."""
    with refusals(as_json):
        if follow:
            settings_here()
            _follow(audit.Tail(tenant=tenant, lines=lines), as_json)
        else:
            _print(told(audit.tail, audit.Tail(tenant=tenant, lines=lines)), as_json)


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
    with refusals(as_json):
        moment = None if since is None else since.replace(tzinfo=UTC)
        written = _lines(audit.Export(tenant=tenant, since=moment, format=kind))
        if to is None:
            for each in written:
                print(each)
            return
        size = write_file(to, (f"{each}\n".encode() for each in written))
        show({"file": str(to), "bytes": size, "format": kind}, as_json)


def fail_on_problems(rows: list[dict[str, Any]]) -> None:
    """Exit status 1 where a row tells of one."""
    if any(row["problem"] is not None for row in rows):
        raise typer.Exit(1)


def _lines(asked: audit.Export) -> Iterator[str]:
    """Some at a time, so that memory is bounded."""
    following: audit.Export | None = asked
    while following is not None:
        page = told(audit.export, following)
        yield from page["lines"]
        more = {"until": page["until"], "after": page["next"]}
        following = None if page["next"] is None else audit.Export.model_validate({**dict(asked), **more})


def _follow(asked: audit.Tail, as_json: bool) -> None:
    with at_work(as_json) as service:
        with snapshot(service.engine, ALL_TENANTS) as session:
            tenant_id = None if asked.tenant is None else find_tenant(session, asked.tenant).id
            seen = audit_log.heads(session, tenant_id)
            begin_with = audit.named(session, audit_log.newest(session, tenant_id, count=asked.lines))
        _print(begin_with, as_json)
        while True:
            try:
                time.sleep(_LOOK_S)
            except KeyboardInterrupt:
                return
            with snapshot(service.engine, ALL_TENANTS) as session:
                heads = audit_log.heads(session, tenant_id)
                later = audit.named(session, audit_log.later(session, seen, heads))
            _print(later, as_json)
            seen = heads


def _print(entries: Iterable[dict[str, Any]], as_json: bool) -> None:
    for entry in entries:
        print(json.dumps(entry) if as_json else _for_people(entry), flush=True)


def _for_people(entry: dict[str, Any]) -> str:
    by = f"  by {entry['grant']}" if entry["grant"] else ""
    outcome = entry["outcome"] + (f": {entry['reason']}" if entry["reason"] else "")
    who = entry["principal"] + (f" ({entry['principal_name']})" if entry["principal_name"] else "")
    deed = f"{entry['tenant_name']}  {who}  {entry['verb']}  {entry['resource']}"
    return f"{entry['time'][:19]}Z  {deed}  {outcome}{by}  ({entry['request_id']})"
