"""`cloister-admin audit` and `ledger`: whether anything was tampered with, and what to do after a restore. Decides nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from sqlalchemy.orm import Session

from cloister_server import evidence, restores, tenants
from cloister_server.cli.audit import fail_on_problems
from cloister_server.cli.terminal import (
    JSON,
    Confirm,
    Confirmation,
    DryRun,
    InTenant,
    look,
    operator_in,
    refusals,
    run,
    settings_here,
    show,
)
from cloister_server.errors import Invalid
from cloister_server.grants import NoSuch
from cloister_server.service import Service
from cloister_server.store.anchors import Anchors
from cloister_server.store.tables import Tenant

__all__ = ["audit_cli", "ledger_cli"]

audit_cli = typer.Typer(no_args_is_help=True, help="Who did what, and whether anything was tampered with.")
ledger_cli = typer.Typer(no_args_is_help=True, help="Ledgers, after a restore.")

OneTenant = Annotated[str | None, typer.Option("--tenant", help="Only this tenant, by name or id.")]


@audit_cli.command("head")
def audit_head(tenant: OneTenant = None, as_json: JSON = False) -> None:
    """Print how far each chain has come, signed: kept elsewhere, it tells a restored or rewritten database by `audit compare`."""
    with refusals(as_json):
        heads = look(
            lambda session, service: [
                evidence.signed_head(session, operator_in(session, each.id), service.keys)
                for each in _tenants(session, tenant)
            ]
        )
        print(json.dumps(heads))


@audit_cli.command("compare")
def audit_compare(
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="What `audit head` printed earlier.")],
    as_json: JSON = False,
) -> None:
    """Say whether the present chains go on from heads that were signed earlier; exit status 1 where one does not."""
    with refusals(as_json):
        envelopes = _envelopes(old)
        rows = look(lambda session, _: [_compared(session, evidence.opened_head(session, each)) for each in envelopes])
        show(rows, as_json)
    fail_on_problems(rows)


@ledger_cli.command("export")
def ledger_export(tenant: InTenant, as_json: JSON = False) -> None:
    """Print a tenant's ledger and audit log, link by link, as JSON lines: what `ledger replay` takes after a restore."""

    def work(session: Session, _: Service) -> None:
        for line in restores.export(session, operator_in(session, tenant)):
            print(json.dumps(line))

    with refusals(as_json):
        look(work)


@ledger_cli.command("replay")
def ledger_replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `ledger export` printed, before the restore.")],
    tenant: InTenant,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Put the rows back that a restored database lacks, each seen to be the one that was linked, up to the tenant's anchor."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        with _opened(file) as lines:
            done = restores.replay(session, operator_in(session, tenant), lines, Anchors(service.settings.anchor_dir))
        return {"tenant": tenant, "links": done.links, "beyond_anchor": done.beyond_anchor}

    run(work, as_json, dry_run=dry_run)


@ledger_cli.command("write-off")
def ledger_write_off(
    tenant: InTenant,
    reason: Annotated[str, typer.Option(help="Why; the ledger keeps it.")],
    even_if_nothing_is_missing: Annotated[bool, typer.Option(help="End the budgets of a sound ledger, too.")] = False,
    confirm: Confirm = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Admit nothing more to any of a tenant's budgets, ever, since what was spent is lost; all else goes on. There is no way back."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        anchors = Anchors(service.settings.anchor_dir)
        if _is_lost(session, tenant):
            kept = None if dry_run else str(anchors.set_aside(tenant))
            return {"tenant": tenant, "sources": [], "kept_anchor": kept}
        sources = restores.write_off(
            session,
            operator_in(session, tenant),
            reason=reason,
            anchors=anchors,
            is_forced=even_if_nothing_is_missing,
        )
        return {"tenant": tenant, "sources": [source.name for source in sources]}

    def name_in(session: Session) -> str:
        return tenant if _is_lost(session, tenant) else tenants.find_tenant(session, tenant).name

    warning = "None of the tenant's budgets will ever admit anything again."
    run(work, as_json, dry_run=dry_run, confirm=Confirmation(name_in, confirm, warning))


def _is_lost(session: Session, tenant: str) -> bool:
    """Whether this is the id of a tenant that has an anchor, and that the database does not know."""
    return tenant in Anchors(settings_here().anchor_dir).tenants() and session.get(Tenant, tenant) is None


def _tenants(session: Session, named: str | None) -> list[Tenant]:
    return tenants.tenants(session) if named is None else [tenants.find_tenant(session, named)]


def _compared(session: Session, then: evidence.ChainHead) -> dict[str, Any]:
    try:
        found = evidence.compare(session, operator_in(session, then.tenant), then)
    except NoSuch:
        return {
            "tenant": then.tenant,
            "then": then.count,
            "now": None,
            "problem": "the database does not know this tenant",
        }
    return {"tenant": then.tenant, "then": found.then, "now": found.now, "problem": found.problem}


def _envelopes(path: Path) -> list[dict[str, Any]]:
    """The one envelope of a file, or its list of them."""
    with _opened(path) as file:
        try:
            read = json.load(file)
        except (ValueError, RecursionError):
            read = None
    found = read if isinstance(read, list) else [read]
    if not all(isinstance(each, dict) for each in found):
        raise Invalid(f"{path} holds no chain heads; give what `audit head` printed")
    return found


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise Invalid(f"{path} cannot be read ({error.strerror}); give the file's path") from None
