"""`cloister-admin tenant export`: all that a tenant has here, sealed for a key of its own, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.wire.bundles import public_key_of
from cloister_server import asking, bundles
from cloister_server.audit import denials_kept
from cloister_server.cli.terminal import JSON, at_work, operator_in, show, write_file
from cloister_server.errors import Invalid
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import snapshot, writing

__all__ = ["export"]


def export(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="The tenant, by name or id.")],
    recipient: Annotated[
        str, typer.Option("--for", help="The public line that the tenant's `cloister bundle key` printed.")
    ],
    to: Annotated[Path, typer.Option(help="The bundle's file; nothing is overwritten.")],
    as_json: JSON = False,
) -> None:
    """Write all that a tenant has here into a bundle that nobody but the holder of the tenant's own key can open."""
    with at_work(as_json) as service:
        try:
            public_key = public_key_of(recipient)
        except ValueError as error:
            raise Invalid(str(error)) from None
        with denials_kept(service.engine), writing(service.engine, ALL_TENANTS) as session:
            operator = operator_in(session, tenant)
            bundles.note(session, operator)
        size = asking.run(
            lambda: snapshot(service.engine, ALL_TENANTS),
            service.keys,
            lambda session: write_file(to, bundles.sealed(session, operator, service, recipient=public_key)),
        )
        show({"tenant": operator.tenant_id, "bundle": str(to), "bytes": size}, as_json)
