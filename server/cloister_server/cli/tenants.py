"""`cloister-admin tenant`: tenants from their making to their end."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

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
    two_person: Annotated[bool, typer.Option("--two-person", help="Shredding it takes two operators.")] = False,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Make a tenant, with an encryption key of its own."""
    with refusals(as_json):
        request = tenants.CreateTenant(name=name, key_provider=key_provider, two_person=two_person)
        operate(tenants.create, request, as_json, dry_run=dry_run)


@tenant_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List the tenants."""
    operate(tenants.listed, Body(), as_json, in_words=lambda rows: [_in_words(each) for each in rows])


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


@tenant_cli.command("approvals")
def approvals_(
    name: Named,
    two_person: Annotated[
        bool | None,
        typer.Option(
            "--two-person/--one-person", help="Whether shredding it takes two operators; so does --one-person."
        ),
    ] = None,
    shred: Annotated[
        bool, typer.Option("--shred", help="Ask for its end, which another operator brings about by `tenant shred`.")
    ] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take back what is asked for, whoever asked.")] = False,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Show whether a tenant's end takes two operators, and what is asked for now; or set that, ask for it, or take that back.

    What one operator asks for another does within 24 hours. An operator is a login, or a user of the deployment's machine.
    """
    with refusals(as_json):
        request = tenants.Approve(tenant=name, two_person=two_person, shred=shred, withdraw=withdraw)
        operate(tenants.approve, request, as_json, dry_run=dry_run, in_words=_in_words)


def _in_words(row: dict[str, Any]) -> dict[str, Any]:
    """With what is asked for of operators in a line each, under a name that is not that of requests a minute."""
    asked = [
        f"{each['deed']} by {each['by']} until {datetime.fromisoformat(each['until']):%Y-%m-%d %H:%M}"
        for each in row["requests"]
    ]
    return {**{name: value for name, value in row.items() if name != "requests"}, "asked_for": asked}


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

    Where the tenant takes two operators, this asks for it, or does what another operator asked for within the last 24 hours. What was
    cut short is finished by running it again.
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
            asked = shredding.ask(service, operator)
            if asked is not None:
                note = "nothing is shredded: another operator runs the same command, or `tenant approvals --withdraw`"
                show({"request": asdict(asked), "note": note}, as_json)
                return
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
