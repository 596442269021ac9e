"""`cloister-admin tenant`: tenants from their making to their end."""

from __future__ import annotations

from typing import Annotated

import typer

from cloister.wire._model import Body
from cloister_server import shredding
from cloister_server import tenants as tenants_
from cloister_server.audit import denials_kept
from cloister_server.cli.terminal import (
    JSON,
    DryRun,
    at_work,
    look,
    operate,
    operator_in,
    refusals,
    require_confirmed,
    show,
)
from cloister_server.errors import Invalid
from cloister_server.operations import tenants
from cloister_server.operations.definition import InTenant
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import reading

__all__ = ["tenant_cli"]

Named = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant, by name or id.")]

tenant_cli = typer.Typer(no_args_is_help=True, help="Tenants.")


@tenant_cli.command("create")
def create(
    name: str,
    key_provider: Annotated[
        str | None,
        typer.Option(help="Where its key is made, by name in the key provider file; the default one otherwise."),
    ] = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Make a tenant, with an encryption key of its own."""
    with refusals(as_json):
        operate(tenants.create, tenants.CreateTenant(name=name, key_provider=key_provider), as_json, dry_run=dry_run)


@tenant_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List the tenants."""
    operate(tenants.listed, Body(), as_json)


@tenant_cli.command("suspend")
def suspend(name: Named, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Let nobody act for a tenant or on what it has, for a while; all is kept. Its jobs stop at a chunk boundary, and wait."""
    with refusals(as_json):
        operate(tenants.suspend, InTenant(tenant=name), as_json, dry_run=dry_run)


@tenant_cli.command("resume")
def resume(name: Named, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Let a suspended tenant act again, with all that it had; its jobs go on from their last checkpoints."""
    with refusals(as_json):
        operate(tenants.resume, InTenant(tenant=name), as_json, dry_run=dry_run)


@tenant_cli.command("quota")
def quota(
    name: Named,
    storage: Annotated[
        str | None, typer.Option(metavar="BYTES|none", help="The most that its sealed objects may take.")
    ] = None,
    jobs: Annotated[
        str | None, typer.Option(metavar="N|none", help="The most jobs that may be queued or running at once.")
    ] = None,
    requests_per_minute: Annotated[
        str | None,
        typer.Option(metavar="N|none", help="The most requests of all its apps and people together, in each minute."),
    ] = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Show what a tenant uses and the most that it may, or set that from now on; `none` lifts a bound."""
    given = {"storage": storage, "jobs": jobs, "requests_per_minute": requests_per_minute}
    with refusals(as_json):
        bounds = {kind: _bound(kind, text) for kind, text in given.items() if text is not None}
        operate(tenants.quota, tenants.SetQuota(tenant=name, **bounds), as_json, dry_run=dry_run)


def _bound(kind: str, text: str) -> int | None:
    if text == "none":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise Invalid(f"a quota of {kind} is a whole number, or none; {text!r} is neither")
    return int(text)


@tenant_cli.command("shred")
def shred(
    name: Named,
    confirm: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The tenant's name once more; asked for at the terminal otherwise."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be destroyed, and change nothing.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Destroy a tenant's keys and delete what they sealed, for good; with --json, print the signed receipt.

    What was cut short is finished by running it again.
    """
    if dry_run:
        with refusals(as_json):
            show(look(lambda session, _: shredding.plan(session, operator_in(session, name))), as_json=True)
        return
    with at_work(as_json) as service:
        with reading(service.engine, ALL_TENANTS) as session:
            tenant, operator = tenants_.find_tenant(session, name), operator_in(session, name)
        require_confirmed(tenant.name, confirm, warning="Nobody can undo a shredding.")
        with denials_kept(service.engine):
            signed = shredding.shred(service, operator)
        if as_json:
            show(signed, as_json)
        else:
            print(f"tenant {tenant.name} is shredded; `cloister-admin tenant receipt {tenant.name}` prints the receipt")


@tenant_cli.command("receipt")
def receipt(name: Named, as_json: JSON = False) -> None:
    """Print the signed receipt of a tenant that was shredded, as JSON: `cloister verify` checks it."""
    with refusals(as_json):
        show(look(lambda session, _: shredding.receipt(session, operator_in(session, name))), as_json=True)
