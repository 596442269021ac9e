"""`cloister-admin tenant`: tenants from their making to their end."""

from __future__ import annotations

import os
import pwd
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from sqlalchemy.orm import Session

from cloister_server import approvals, policy, quotas, shredding, suspension, tenants
from cloister_server.audit import denials_kept
from cloister_server.cli.terminal import (
    JSON,
    DryRun,
    at_work,
    look,
    operator_in,
    refusals,
    request_id,
    require_confirmed,
    run,
    show,
)
from cloister_server.errors import Invalid
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import reading
from cloister_server.store.tables import Tenant

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

    def work(session: Session, service: Service) -> dict[str, Any]:
        if dry_run:  # a key that was made in its provider could not be rolled back
            chosen = tenants.plan_tenant(session, service.keys, name=name, provider=key_provider)
            return {"name": name, "key_provider": chosen, "two_person": two_person}
        given: dict[str, Any] = {"name": name, "provider": key_provider, "two_person": two_person}
        made = tenants.create_tenant(session, service.keys, request_id=request_id(), **given)
        return {"id": made.id, "name": made.name}

    run(work, as_json, dry_run=dry_run)


@tenant_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List the tenants."""
    run(
        lambda session, _: [
            {
                "id": t.id,
                "name": t.name,
                "created": t.created,
                "status": "suspended" if t.suspended and t.status == "active" else t.status,
                "two_person": t.two_person,
                "requests": [asdict(each) for each in approvals.told(t).requests],
            }
            for t in tenants.tenants(session)
        ],
        as_json,
    )


@tenant_cli.command("suspend")
def suspend(name: Named, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Let nobody act for a tenant or on what it has, for a while; all is kept. Its jobs stop at a chunk boundary, and wait."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        return asdict(suspension.suspend(session, service, operator_in(session, name)))

    run(work, as_json, dry_run=dry_run)


@tenant_cli.command("resume")
def resume(name: Named, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Let a suspended tenant act again, with all that it had; its jobs go on from their last checkpoints."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        return asdict(suspension.resume(session, service, operator_in(session, name)))

    run(work, as_json, dry_run=dry_run)


@tenant_cli.command("approvals")
def approvals_(
    name: Named,
    two_person: Annotated[
        bool | None,
        typer.Option(
            "--two-person/--one-person", help="Whether shredding it takes two operators; so does --one-person."
        ),
    ] = None,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take back what is asked for, whoever asked.")] = False,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Show whether a tenant's end takes two operators, and what is asked for now; or set that, or take back what is asked for.

    What one operator asks for another does within 24 hours, by the same command.
    """

    def work(session: Session, _: Service) -> dict[str, Any]:
        operator = _named(operator_in(session, name))
        if withdraw and two_person is not None:
            raise Invalid("take back what is asked for, or set who is needed: one at a time")
        if withdraw:
            return asdict(approvals.withdraw(session, operator))
        if two_person is not None:
            return asdict(approvals.set_two_persons(session, operator, required=two_person))
        tenant = session.get_one(Tenant, operator.tenant_id)
        return asdict(approvals.told(policy.authorize(session, operator, "tenant.administer", tenant).resource))

    run(work, as_json, dry_run=dry_run)


def _named(operator: Principal) -> Principal:
    """An operator at the machine itself goes by their user's name there: of that two can be told apart, and their deeds."""
    if operator.id != "operator":
        return operator
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # of a container's making
        user = str(os.geteuid())
    return replace(operator, id=f"os:{user}"[:40])


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
    given: dict[quotas.Kind, str | None] = {
        "storage": storage,
        "jobs": jobs,
        "requests_per_minute": requests_per_minute,
    }

    def work(session: Session, _: Service) -> dict[str, Any]:
        asked = {kind: _bound(kind, text) for kind, text in given.items() if text is not None}
        operator = operator_in(session, name)
        if asked:
            told = quotas.set_quotas(session, operator, asked)
        else:
            policy.authorize(session, operator, "tenant.administer", session.get_one(Tenant, operator.tenant_id))
            told = quotas.usage(session, operator.tenant_id)
        return {"tenant": name, **asdict(told)}

    run(work, as_json, dry_run=dry_run)


def _bound(kind: quotas.Kind, text: str) -> int | None:
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
            tenant = tenants.find_tenant(session, name)
        require_confirmed(tenant.name, confirm, warning="Nobody can undo a shredding.")
        operator = _named(tenants.operator_of(tenant, request_id=request_id()))
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
