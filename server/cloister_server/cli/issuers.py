"""`cloister-admin issuer`: other issuers whose tokens are taken, and whom of a tenant's their subjects are."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cloister.wire._model import Body
from cloister_server.cli.terminal import JSON, Confirm, DryRun, InTenant, operate, refusals
from cloister_server.operations import issuers
from cloister_server.operations.definition import InTenant as OneTenant

__all__ = ["issuer_cli"]

URL = Annotated[str, typer.Argument(metavar="ISSUER", help="The issuer's URL, exactly as `iss` in its tokens has it.")]
Subject = Annotated[str, typer.Argument(metavar="SUBJECT", help="`sub` in its tokens. Never a name or an address.")]

issuer_cli = typer.Typer(no_args_is_help=True, help="Other issuers whose tokens are taken.")


@issuer_cli.command("add")
def add(
    issuer: URL,
    audience: Annotated[
        str | None, typer.Option(help="What `aud` must be or hold; this deployment's own issuer by default.")
    ] = None,
    algorithm: Annotated[
        list[str] | None, typer.Option(help="RS256, PS256, ES256 or EdDSA; more than once for several.")
    ] = None,
    typ: Annotated[
        Literal["at+jwt", "JWT"], typer.Option(help="What `typ` in the header must be; JWT for Entra and Keycloak.")
    ] = "at+jwt",
    network: Annotated[
        Literal["public", "private", "loopback"],
        typer.Option(help="Where it may be; loopback, which needs no TLS, is for development."),
    ] = "public",
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Take the tokens of an issuer, which is asked for its keys. Nobody is let in before a subject is mapped."""
    with refusals(as_json):
        request = issuers.AddIssuer(
            issuer=issuer, audience=audience, algorithms=tuple(algorithm or ()), typ=typ, network=network
        )
        operate(issuers.add, request, as_json, dry_run=dry_run)


@issuer_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List the issuers whose tokens are taken, by which rules, and how many subjects of each are somebody here."""
    operate(issuers.listed, Body(), as_json)


@issuer_cli.command("remove")
def remove(issuer: URL, confirm: Confirm = None, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Take an issuer off the list, with its subjects in all tenants: its tokens are refused within a second."""
    with refusals(as_json):
        operate(issuers.remove, issuers.OneIssuer(issuer=issuer), as_json, dry_run=dry_run, confirm=confirm)


@issuer_cli.command("map")
def map_subject(
    issuer: URL,
    subject: Subject,
    tenant: InTenant,
    to: Annotated[str, typer.Option(help="The person or app of the tenant that it is, by name or id.")],
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Let an issuer's subject in, as a person or app of a tenant, with what that one is granted."""
    with refusals(as_json):
        request = issuers.MapSubject(tenant=tenant, issuer=issuer, subject=subject, to=to)
        operate(issuers.map_, request, as_json, dry_run=dry_run)


@issuer_cli.command("unmap")
def unmap_subject(
    issuer: URL, subject: Subject, tenant: InTenant, dry_run: DryRun = False, as_json: JSON = False
) -> None:
    """Let an issuer's subject in no more, within a second; who it was stays, with what it made."""
    with refusals(as_json):
        request = issuers.OneSubject(tenant=tenant, issuer=issuer, subject=subject)
        operate(issuers.unmap, request, as_json, dry_run=dry_run)


@issuer_cli.command("subjects")
def subjects(tenant: InTenant, as_json: JSON = False) -> None:
    """List which subjects of which issuers are whom of a tenant's."""
    with refusals(as_json):
        operate(issuers.subjects, OneTenant(tenant=tenant), as_json)
