"""`cloister-admin user`: accounts of people, whose passphrases the operator never sees."""

from __future__ import annotations

from typing import Annotated

import typer

from cloister_server.cli.terminal import JSON, Confirm, DryRun, InTenant, operate, refusals
from cloister_server.grants import Role
from cloister_server.operations import people
from cloister_server.operations.definition import InTenant as OneTenant

__all__ = ["user_cli"]

Named = Annotated[str, typer.Argument(metavar="NAME", help="The person, by name or id.")]

user_cli = typer.Typer(no_args_is_help=True, help="Accounts of people.")


@user_cli.command("create")
def create(
    tenant: InTenant,
    name: Annotated[str, typer.Option(help="What they are called: they sign in as TENANT/NAME.")],
    role: Annotated[Role, typer.Option(help="What they may do to start with, on all of the tenant's.")] = "none",
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Make an account. The invitation code, good once and for a day, is printed this once: hand it over in private."""
    with refusals(as_json):
        operate(people.create, people.CreateUser(tenant=tenant, name=name, role=role), as_json, dry_run=dry_run)


@user_cli.command("list")
def listed(tenant: InTenant, as_json: JSON = False) -> None:
    """List a tenant's accounts."""
    with refusals(as_json):
        operate(people.listed, OneTenant(tenant=tenant), as_json)


@user_cli.command("reset")
def reset(user: Named, tenant: InTenant, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Begin an account anew, lost passphrase, lost phone or disabled: all its logins end, and a new invitation is printed."""
    with refusals(as_json):
        operate(people.reset, people.OneUser(tenant=tenant, user=user), as_json, dry_run=dry_run)


@user_cli.command("disable")
def disable(user: Named, tenant: InTenant, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Let nobody act for a person any more, within a second; their grants stay. `reset` is the way back."""
    with refusals(as_json):
        operate(people.disable, people.OneUser(tenant=tenant, user=user), as_json, dry_run=dry_run)


@user_cli.command("delete")
def delete(
    user: Named,
    tenant: InTenant,
    confirm: Confirm = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Delete an account with all its grants; what the person made stays."""
    with refusals(as_json):
        operate(people.delete, people.OneUser(tenant=tenant, user=user), as_json, dry_run=dry_run, confirm=confirm)
