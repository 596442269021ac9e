"""`cloister-admin user`: accounts of people, whose passphrases the operator never sees."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from sqlalchemy.orm import Session

from cloister_server import people
from cloister_server.cli.terminal import JSON, Confirm, Confirmation, DryRun, InTenant, operator_in, run
from cloister_server.grants import Role
from cloister_server.people import Invitation
from cloister_server.service import Service

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

    def work(session: Session, service: Service) -> dict[str, Any]:
        invited = people.create(session, service, operator_in(session, tenant), name=name, role=role)
        return {**_told(service, invited), "role": role}

    run(work, as_json, dry_run=dry_run, fresh=("id", "invitation"))


@user_cli.command("list")
def listed(tenant: InTenant, as_json: JSON = False) -> None:
    """List a tenant's accounts."""

    def work(session: Session, _: Service) -> list[dict[str, Any]]:
        users = people.listed(session, operator_in(session, tenant))
        return [{"name": each.name, "id": each.id, "status": each.status, "created": each.created} for each in users]

    run(work, as_json)


@user_cli.command("reset")
def reset(user: Named, tenant: InTenant, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Begin an account anew, lost passphrase, lost phone or disabled: all its logins end, and a new invitation is printed."""
    run(
        lambda session, service: _told(service, people.reset(session, service, operator_in(session, tenant), user)),
        as_json,
        dry_run=dry_run,
        fresh=("invitation",),
    )


@user_cli.command("disable")
def disable(user: Named, tenant: InTenant, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Let nobody act for a person any more, within a second; their grants stay. `reset` is the way back."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        disabled = people.disable(session, service, operator_in(session, tenant), user)
        return {"id": disabled.id, "name": disabled.name, "status": disabled.status}

    run(work, as_json, dry_run=dry_run)


@user_cli.command("delete")
def delete(
    user: Named,
    tenant: InTenant,
    confirm: Confirm = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Delete an account with all its grants; what the person made stays."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        gone = people.remove(session, service, operator_in(session, tenant), user)
        return {"deleted": gone.id, "name": gone.name}

    warning = "An account that is deleted does not come back."
    run(work, as_json, dry_run=dry_run, confirm=Confirmation(lambda _: user, confirm, warning))


def _told(service: Service, invited: Invitation) -> dict[str, Any]:
    return {
        "id": invited.user_id,
        "account": invited.account,
        "invitation": invited.code.get_secret_value(),
        "page": f"{service.settings.issuer}/oauth/invitation",
    }
