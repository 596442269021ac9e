"""`cloister-admin storage`: what sealed objects take, who may store how much, and what is left over."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from sqlalchemy.orm import Session

from cloister_server import collection, marking, policy, quotas
from cloister_server.cli.terminal import JSON, InTenant, at_work, operator_in, require_confirmed, run, show
from cloister_server.errors import Invalid
from cloister_server.service import Service
from cloister_server.store.tables import Tenant

__all__ = ["storage_cli"]

storage_cli = typer.Typer(no_args_is_help=True, help="What sealed objects take.")


@storage_cli.command("collect")
def collect(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what is left over, and delete nothing.")] = False,
    as_json: JSON = False,
) -> None:
    """Delete what nothing names: sealed bytes without a key, keys of work that is over. The worker does it every hour."""
    with at_work(as_json) as service:
        collected = collection.collect(service, dry_run=dry_run)
        show({**asdict(collected), "dry_run": dry_run}, as_json)


@storage_cli.command("adopt")
def adopt(
    confirm: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="The store's place once more; asked for at the terminal otherwise."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Mark the store that the settings name as this deployment's: of objects that were copied there, or from before markers."""
    with at_work(as_json) as service:
        place = marking.place_of(service)
        warning = "Objects there that this database does not know are deleted by the next collection."
        require_confirmed(place, confirm, warning=warning)
        marking.adopt(service)
        show({"adopted": place}, as_json)


@storage_cli.command("quota")
def quota(
    tenant: InTenant,
    quota_bytes: Annotated[int | None, typer.Option("--bytes", help="The most that it may take from now on.")] = None,
    is_lifted: Annotated[bool, typer.Option("--none", help="Lift the bound.")] = False,
    as_json: JSON = False,
) -> None:
    """Show what a tenant's sealed objects take and the most that they may, or set that."""

    def work(session: Session, _: Service) -> dict[str, Any]:
        if is_lifted and quota_bytes is not None:
            raise Invalid("give either --bytes or --none")
        operator = operator_in(session, tenant)
        if is_lifted or quota_bytes is not None:
            return _told(tenant, quotas.set_quota(session, operator, quota_bytes))
        policy.authorize(session, operator, "tenant.administer", session.get_one(Tenant, operator.tenant_id))
        return _told(tenant, quotas.usage(session, operator.tenant_id))

    run(work, as_json)


def _told(tenant: str, usage: quotas.Usage) -> dict[str, Any]:
    return {"tenant": tenant, "used_bytes": usage.used, "quota_bytes": usage.allowed}
