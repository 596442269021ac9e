"""What the operator's commands have in common: one transaction each, refusals in a sentence, answers as text or as JSON."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from sqlalchemy.orm import Session

from cloister_privacy.errors import PrivacyError
from cloister_privacy.sealing.files import write_new
from cloister_server import asking, deployment, tenants
from cloister_server.audit import denials_kept
from cloister_server.errors import Conflict, Invalid, LedgerRolledBack, NotFound, ServerError
from cloister_server.grants import NoSuch
from cloister_server.policy import Denied
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.settings import load_settings
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.queries import OPERATOR_VERBS
from cloister_server.store.session import reading, snapshot

__all__ = [
    "HOW_TO_MEND",
    "JSON",
    "Confirm",
    "Confirmation",
    "DryRun",
    "InTenant",
    "at_work",
    "look",
    "operator_in",
    "refusals",
    "request_id",
    "require_confirmed",
    "run",
    "show",
    "write_file",
]

T = TypeVar("T")

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
Confirm = Annotated[
    str | None, typer.Option(metavar="NAME", help="Its name once more; asked for at the terminal otherwise.")
]
InTenant = Annotated[str, typer.Option("--tenant", help="The tenant, by name or id.")]

HOW_TO_MEND = (
    "restore the newest database, or run `cloister-admin ledger replay` with an export of its ledger; where what was charged is "
    "lost, `cloister-admin ledger write-off`"
)
"""What there is to do about a ledger that is older than its anchor."""


def run(
    work: Callable[[Session, Service], Any],
    as_json: bool,
    *,
    dry_run: bool = False,
    fresh: Collection[str] = (),
    confirm: Confirmation | None = None,
) -> None:
    """One command, one transaction; its answer is shown.

    A dry run does the work, too, and rolls it back: its plan is the answer, without what is `fresh` in it (ids and secrets that
    another run would not give), and it is refused what the command would be. What destroys is confirmed first, in no transaction.
    """
    with refusals(as_json):
        service = deployment.open_service(load_settings())
        if confirm is not None and not dry_run:
            with reading(service.engine, ALL_TENANTS) as session:
                name = confirm.name_in(session)
            require_confirmed(name, confirm.given, warning=confirm.warning)

        def done(session: Session) -> Any:
            answer = work(session, service)
            if dry_run:
                session.flush()  # the database's own checks, too
                raise _Planned({name: value for name, value in answer.items() if name not in fresh})
            return answer

        try:
            with denials_kept(service.engine):
                answer = service.write(ALL_TENANTS, done)
        except _Planned as planned:
            answer = {"dry_run": True, **planned.answer}
        show(answer, as_json)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """The name of what a command destroys, as a session finds it, and what was given of it with `--confirm`."""

    name_in: Callable[[Session], str]
    given: str | None
    warning: str


class _Planned(Exception):
    """Ends the transaction of a dry run, and says what it would have answered."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__()
        self.answer = answer


@contextmanager
def at_work(as_json: bool) -> Iterator[Service]:
    """For a command that commits more than once, or never."""
    with refusals(as_json):
        service = deployment.open_service(load_settings())
        try:
            yield service
        finally:
            service.engine.dispose()


def require_confirmed(name: str, given: str | None, *, warning: str) -> None:
    """Ask at the terminal for the name of what is to be destroyed, where it was not given. Raises Invalid unless it is that."""
    if given is None and sys.stdin.isatty():
        given = typer.prompt(f"{warning} Type {name} to go on", err=True)
    if given != name:
        raise Invalid(f"nothing was changed: confirm it with --confirm {name}. {warning}", code="not_confirmed")


def look(work: Callable[[Session, Service], T]) -> T:
    """For a command that only reads, maybe for long: a snapshot, so that nobody waits for it."""
    service = deployment.open_service(load_settings())
    with denials_kept(service.engine):
        return asking.run(
            lambda: snapshot(service.engine, ALL_TENANTS), service.keys, lambda session: work(session, service)
        )


@contextmanager
def refusals(as_json: bool) -> Iterator[None]:
    """A refusal is one sentence on standard error and exit status 1."""
    try:
        yield
    except Denied as denied:
        code, message = denied.code, _denied(denied)
    except LedgerRolledBack as refusal:
        code, message = refusal.code, f"tenant {refusal.tenant_id}: {refusal.why}; {HOW_TO_MEND}"
    except (ServerError, PrivacyError) as refusal:
        code = refusal.code if isinstance(refusal, ServerError) else "refused"
        message = refusal.message if isinstance(refusal, ServerError) else str(refusal)
        if isinstance(refusal, ServerError) and refusal.cause:
            message = f"{message} (it was told: {refusal.cause})"
    except ValidationError as refusal:
        code = "invalid_request"
        message = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in refusal.errors())
    else:
        return
    print(json.dumps({"error": message, "code": code}) if as_json else f"cloister-admin: {message}", file=sys.stderr)
    raise typer.Exit(1)


def _denied(denied: Denied) -> str:
    """In the operator's words: there is nobody to ask for a grant."""
    kind = OPERATOR_VERBS[denied.denial.verb].__name__.lower() if denied.denial.verb in OPERATOR_VERBS else "resource"
    if isinstance(denied, NotFound):
        return NoSuch(kind, denied.denial.resource_id).message
    return f"{denied.denial.verb!r} on this {kind} is not the operator's to do; let a client do it that is granted it"


def show(answer: Any, as_json: bool) -> None:
    """One JSON document, or lines of `name: value`; a list as a table."""
    if as_json:
        print(json.dumps(answer, default=lambda value: value.isoformat()))
    elif isinstance(answer, list):
        _show_table(answer)
    else:
        print("\n".join(f"{name}: {_text(value)}" for name, value in answer.items()))


def _show_table(rows: list[dict[str, Any]]) -> None:
    """Aligned columns; of an id and a name the name is shown, where there is one."""
    if not rows:
        print("(none)")
        return
    columns = [name for name in rows[0] if not name.endswith("_name")]
    lines = [columns, *([_text(row.get(f"{name}_name") or row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_file(path: Path, pieces: Iterable[bytes]) -> int:
    """A new file of mode 0600, whole and durable, or none; its length. Raises Conflict or Invalid."""
    try:
        return write_new(path, pieces)
    except FileExistsError:
        raise Conflict(f"{path} is there already, and nothing is overwritten; name another file") from None
    except FileNotFoundError:
        raise Invalid(f"{path} is in no directory that there is; name another place") from None


def _text(value: Any) -> str:
    match value:
        case None | []:
            return "-"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M}"
        case [str(), *_]:
            return ", ".join(value)
        case list():
            return json.dumps(value)
        case dict():
            return "  ".join(f"{name}={_text(each)}" for name, each in value.items())
        case _:
            return str(value)


def operator_in(session: Session, tenant: str) -> Principal:
    """The operator at work in the tenant of this name or id. Raises NoSuch."""
    return tenants.operator_of(tenants.find_tenant(session, tenant), request_id=request_id())


def request_id() -> str:
    return f"cli_{secrets.token_hex(12)}"
