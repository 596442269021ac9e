"""`cloister-admin group` and `policy`: groups of apps and people; who may do what, and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cloister.wire.policy import Explanation
from cloister_server.cli.terminal import JSON, Confirm, DryRun, InTenant, operate, refusals
from cloister_server.operations import policy
from cloister_server.operations.definition import InTenant as OneTenant

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
    with refusals(as_json):
        operate(policy.create_group, policy.CreateGroup(tenant=tenant, name=name), as_json, dry_run=dry_run)


@group_cli.command("add")
def add(group: Group, member: Who, tenant: InTenant, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Put a client or person into a group: what the group is granted, they may."""
    with refusals(as_json):
        request = policy.Membership(tenant=tenant, group=group, member=member)
        operate(policy.add_to_group, request, as_json, dry_run=dry_run)


@group_cli.command("remove")
def remove(group: Group, member: Who, tenant: InTenant, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Take somebody out of a group; from the next request on they may no more what the group is granted."""
    with refusals(as_json):
        request = policy.Membership(tenant=tenant, group=group, member=member)
        operate(policy.remove_from_group, request, as_json, dry_run=dry_run)


@group_cli.command("list")
def list_(tenant: InTenant, as_json: JSON = False) -> None:
    """List a tenant's groups and who is in them."""
    with refusals(as_json):
        operate(policy.list_groups, OneTenant(tenant=tenant), as_json)


@group_cli.command("delete")
def delete(
    group: Group, tenant: InTenant, confirm: Confirm = None, dry_run: DryRun = False, as_json: JSON = False
) -> None:
    """Delete a group with all its grants; its members stay, with their own."""
    with refusals(as_json):
        request = policy.OneGroup(tenant=tenant, group=group)
        operate(policy.delete_group, request, as_json, dry_run=dry_run, confirm=confirm)


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
    with refusals(as_json):
        request = policy.Explain(tenant=tenant, principal=principal, verb=verb, resource=resource, address=address)
        operate(policy.explain, request, as_json, in_words=_in_words)


@policy_cli.command("who-can")
def who_can(verb: Verb, resource: Resource, tenant: InTenant, as_json: JSON = False) -> None:
    """List the clients and people, of whatever tenant, that may do this now."""
    with refusals(as_json):
        operate(policy.who_can, policy.WhoCan(tenant=tenant, verb=verb, resource=resource), as_json)


def _in_words(answer: dict[str, Any]) -> dict[str, Any]:
    told = Explanation.model_validate(answer)
    bound = {} if told.grant is None else told.grant.model_dump(exclude={"id", "effect", "to", "to_name", "verb"})
    return {
        "decision": "allow" if told.allowed else "deny",
        "reason": told.reason,
        **{name: value for name, value in bound.items() if value is not None},
        "other_grants": [f"{each.effect} {each.id}" for each in told.others],
    }
