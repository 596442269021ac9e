"""`cloister-admin tenant`: tenants from their making to their end."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from sqlalchemy.orm import Session

from cloister_server import tenants
from cloister_server.cli.terminal import JSON, request_id, run
from cloister_server.service import Service

__all__ = ["tenant_cli"]

tenant_cli = typer.Typer(no_args_is_help=True, help="Tenants.")


@tenant_cli.command("create")
def create(
    name: str,
    key_provider: Annotated[
        str | None,
        typer.Option(help="Where its key is made, by name in the key provider file; the default one otherwise."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Make a tenant, with an encryption key of its own."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        made = tenants.create_tenant(session, service.keys, name=name, request_id=request_id(), provider=key_provider)
        return {"id": made.id, "name": made.name}

    run(work, as_json)


@tenant_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List the tenants."""
    run(
        lambda session, _: [
            {"id": t.id, "name": t.name, "created": t.created, "status": t.status} for t in tenants.tenants(session)
        ],
        as_json,
    )
