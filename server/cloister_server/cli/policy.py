"""`cloister-admin group` and `policy`: groups of apps and people; who may do what, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from sqlalchemy.orm import Session

from cloister.wire.policy import Explanation
from cloister_server import explanations, groups
from cloister_server.cli.terminal import JSON, Confirm, Confirmation, DryRun, InTenant, operator_in, run
from cloister_server.groups import GroupView
from cloister_server.service import Service

__all__ = ["group_cli", "policy_cli"]

group_cli = typer.Typer(help="Groups of clients and people, which grants are given to together.", no_args_is_help=True)
policy_cli = typer.Typer(help="Who may do what, and why.", no_args_is_help=True)

Group = Annotated[str, typer.Argument(metavar="GROUP", help="The group, by name or id.")]
Who = Annotated[str, typer.Argument(metavar="WHO", help="The client or person, by name or id.")]
Verb = Annotated[str, typer.Argument(metavar="VERB", help="One verb, e.g. model.predict.")]
Resource = Annotated[
    str, typer.Argument(metavar="RESOURCE", help="What it would be done to, by name or id; * for any.")
]


@group_cli.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    tenant: InTenant,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Make a group, with nobody in it; then `grant add --to` it."""

    def work(session: Session, _: Service) -> dict[str, Any]:
        made = groups.create(session, operator_in(session, tenant), name=name)
        return {"group_id": made.id, "name": made.name}

    run(work, as_json, dry_run=dry_run, fresh=("group_id",))


@group_cli.command("add")
def add(group: Group, member: Who, tenant: InTenant, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Put a client or person into a group: what the group is granted, they may."""

    def work(session: Session, _: Service) -> dict[str, Any]:
        return _row(groups.add(session, operator_in(session, tenant), group, member))

    run(work, as_json, dry_run=dry_run)


@group_cli.command("remove")
def remove(group: Group, member: Who, tenant: InTenant, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Take somebody out of a group; from the next request on they may no more what the group is granted."""

    def work(session: Session, _: Service) -> dict[str, Any]:
        return _row(groups.remove(session, operator_in(session, tenant), group, member))

    run(work, as_json, dry_run=dry_run)


@group_cli.command("list")
def list_(tenant: InTenant, as_json: JSON = False) -> None:
    """List a tenant's groups and who is in them."""
    run(lambda session, _: [_row(each) for each in groups.listed(session, operator_in(session, tenant))], as_json)


@group_cli.command("delete")
def delete(
    group: Group, tenant: InTenant, confirm: Confirm = None, dry_run: DryRun = False, as_json: JSON = False
) -> None:
    """Delete a group with all its grants; its members stay, with their own."""

    def work(session: Session, _: Service) -> dict[str, Any]:
        gone = groups.delete(session, operator_in(session, tenant), group)
        return {"deleted": gone.id, "name": gone.name}

    warning = "Its grants go with it, in whatever tenant they are."
    run(work, as_json, dry_run=dry_run, confirm=Confirmation(lambda _: group, confirm, warning))


@policy_cli.command("explain")
def explain(
    principal: Annotated[
        str, typer.Argument(metavar="PRINCIPAL", help="The client or person, by name or id, or TENANT/NAME.")
    ],
    verb: Verb,
    resource: Resource,
    tenant: InTenant,
    address: Annotated[str | None, typer.Option("--from", help="Where it would ask from.")] = None,
    as_json: JSON = False,
) -> None:
    """Say whether a client or person may do this now, and which grant decides."""

    def work(session: Session, _: Service) -> dict[str, Any]:
        operator = operator_in(session, tenant)
        asked: dict[str, Any] = {"who": principal, "verb": verb, "resource": resource, "address": address}
        told = explanations.explain(session, operator, **asked)
        return told.model_dump() if as_json else _in_words(told)

    run(work, as_json)


@policy_cli.command("who-can")
def who_can(verb: Verb, resource: Resource, tenant: InTenant, as_json: JSON = False) -> None:
    """List the clients and people, of whatever tenant, that may do this now."""

    def work(session: Session, _: Service) -> list[dict[str, Any]]:
        told = explanations.who_can(session, operator_in(session, tenant), verb=verb, resource=resource)
        return [
            {
                "principal": each.principal, "principal_name": each.name, "grant": each.grant.id, "by": each.grant.to,
                "by_name": each.grant.to_name, "resource": each.grant.resource, "expires": each.grant.expires,
            }
            for each in told.holders
        ]  # fmt: skip

    run(work, as_json)


def _row(group: GroupView) -> dict[str, Any]:
    row = asdict(group)
    return {"group_id": row["id"], "name": row["name"], "members": sorted(row["members"].values())}


def _in_words(told: Explanation) -> dict[str, Any]:
    bound = {} if told.grant is None else told.grant.model_dump(exclude={"id", "effect", "to", "to_name", "verb"})
    return {
        "decision": "allow" if told.allowed else "deny",
        "reason": told.reason,
        **{name: value for name, value in bound.items() if value is not None},
        "other_grants": [f"{each.effect} {each.id}" for each in told.others],
    }
