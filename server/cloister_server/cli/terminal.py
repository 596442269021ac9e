"""What the operator's commands have in common: one transaction each, refusals in a sentence, answers as text or as JSON."""

from __future__ import annotations

import json
import os
import pwd
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from sqlalchemy.orm import Session

from cloister.wire._errors import CloisterError
from cloister.wire._model import Body
from cloister_privacy.errors import PrivacyError
from cloister_privacy.sealing.files import write_new
from cloister_server import asking, deployment
from cloister_server.audit import denials_kept
from cloister_server.errors import Conflict, Invalid, LedgerRolledBack, NotFound, ServerError
from cloister_server.grants import NoSuch
from cloister_server.operations import Acting, Asked, Operation, running
from cloister_server.operations.audit import HOW_TO_MEND
from cloister_server.policy import Denied
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.settings import (
    Settings,
    load_settings,
    names_deployment,
    profile_asked_for,
    profile_directory,
)
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.queries import OPERATOR_VERBS
from cloister_server.store.session import reading, snapshot

__all__ = [
    "DEFAULT_PROFILE",
    "JSON",
    "LOCAL",
    "Confirm",
    "Confirmation",
    "DryRun",
    "InTenant",
    "asked_for",
    "at_work",
    "look",
    "me",
    "operate",
    "operator_in",
    "profile",
    "refusals",
    "request_id",
    "require_confirmed",
    "require_here",
    "run",
    "settings_here",
    "show",
    "told",
    "write_file",
]

T = TypeVar("T")

_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(\+00:00|Z)")

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
Confirm = Annotated[
    str | None, typer.Option(metavar="NAME", help="Its name once more; asked for at the terminal otherwise.")
]
InTenant = Annotated[str, typer.Option("--tenant", help="The tenant, by name or id.")]

DEFAULT_PROFILE = "default"
LOCAL = "-"
"""In the place of a profile's name: the deployment of this machine, whatever profiles there are."""

asked_for: ContextVar[str | None] = ContextVar("asked_for", default=None)
"""The profile, or `LOCAL`, that the command line names."""


class _LocalOnly(Conflict):
    default_code = "local_only"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"this is done at the deployment itself, by whoever has its keys and disk, and never through profile {name!r}; run it "
            "there, or with --local for the one of this machine"
        )


def profile() -> str | None:
    """The login at a deployment elsewhere that the command is for; None where it is for the deployment of this machine.

    What was asked for goes before the environment, and a deployment that this names before a login that there is.
    """
    chosen = asked_for.get() or profile_asked_for()
    if chosen is None and not names_deployment() and (profile_directory() / f"{DEFAULT_PROFILE}.json").exists():
        chosen = DEFAULT_PROFILE
    return None if chosen == LOCAL else chosen


def settings_here(**given: Any) -> Settings:
    """The settings of the deployment of this machine. Raises as `require_here` does, and StartRefused."""
    require_here()
    return load_settings(**given)


def require_here() -> None:
    """Raise Conflict `local_only` where the command is for another deployment than that of this machine."""
    elsewhere = profile()
    if elsewhere is not None:
        raise _LocalOnly(elsewhere)


def operate(
    operation: Operation[Any],
    request: Body,
    as_json: bool,
    *,
    dry_run: bool = False,
    confirm: str | None = None,
    in_words: Callable[[Any], Any] | None = None,
) -> None:
    """Run one operation, here or through a profile, and show its answer; `in_words` makes of it what people read."""
    with refusals(as_json):
        answer = told(operation, request, dry_run=dry_run, confirm=confirm)
        show(answer if as_json or in_words is None else in_words(answer), as_json)


def told(operation: Operation[Any], request: Body, *, dry_run: bool = False, confirm: str | None = None) -> Any:
    """What an operation answers, here or through a profile. The name of what is destroyed is asked for where there is a terminal."""
    asked: Asked[Any] = Asked.model_construct(request=request, dry_run=dry_run, confirm=confirm)
    elsewhere = profile()
    if elsewhere is None:
        service = deployment.open_service(load_settings())
        ask: Callable[[Asked[Any]], Any] = partial(running.run, service, operation, me())
    else:
        from cloister_server.cli import remote  # and an HTTP library with it

        ask = remote.asking(elsewhere, operation)
    try:
        return ask(asked)
    except (Invalid, CloisterError) as refusal:
        details = getattr(refusal, "details", {})
        if getattr(refusal, "code", "") != "not_confirmed" or confirm is not None or not sys.stdin.isatty():
            raise
        typed = typer.prompt(f"{details['warning']} Type {details['name']} to go on", err=True)
        return ask(asked.model_copy(update={"confirm": typed}))


def me() -> Acting:
    """Whoever runs the command: the user of the operating system, as the kernel has it."""
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        name = str(os.geteuid())
    return Acting.local(name)


def run(
    work: Callable[[Session, Service], Any],
    as_json: bool,
    *,
    dry_run: bool = False,
    confirm: Confirmation | None = None,
) -> None:
    """One command of this machine alone, one transaction; its answer is shown.

    A dry run does the work, too, and rolls it back: its plan is the answer, and it is refused what the command would be. What
    destroys is confirmed first, in no transaction.
    """
    with refusals(as_json):
        service = deployment.open_service(settings_here())
        if confirm is not None and not dry_run:
            with reading(service.engine, ALL_TENANTS) as session:
                name = confirm.name_in(session)
            require_confirmed(name, confirm.given, warning=confirm.warning)

        def done(session: Session) -> Any:
            answer = work(session, service)
            if dry_run:
                session.flush()  # the database's own checks, too
                raise _Planned(answer)
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
        service = deployment.open_service(settings_here())
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
    service = deployment.open_service(settings_here())
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
    except CloisterError as refusal:
        code, message = getattr(refusal, "code", "") or "refused", str(refusal)
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
        case str() if _MOMENT.fullmatch(value):  # the same from elsewhere, as JSON has it
            return value[:16].replace("T", " ")
        case [str(), *_]:
            return ", ".join(value)
        case list():
            return "; ".join(map(_text, value))
        case dict():
            return "  ".join(f"{name}={_text(each)}" for name, each in value.items())
        case _:
            return str(value)


def operator_in(session: Session, tenant: str) -> Principal:
    """Whoever runs the command, at work in the tenant of this name or id. Raises NoSuch."""
    return me().within(session, tenant)


def request_id() -> str:
    return me().request_id
