"""`cloister-admin issuer`: other issuers whose tokens are taken, and whom of a tenant's their subjects are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from sqlalchemy.orm import Session

from cloister_server import issuers
from cloister_server.cli.terminal import (
    JSON,
    Confirm,
    Confirmation,
    DryRun,
    InTenant,
    operator_in,
    refusals,
    request_id,
    run,
)
from cloister_server.issuers import DEFAULT_ALGORITHMS
from cloister_server.service import Service

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
    with refusals(as_json):  # before the transaction, which would keep others waiting
        found = issuers.discover(issuer, network=network, algorithms=algorithm or DEFAULT_ALGORITHMS)

    def work(session: Session, service: Service) -> dict[str, Any]:
        added = issuers.add(session, service, found, audience=audience, typ=typ)
        return {**_told(added), "keys": found.key_ids}

    run(work, as_json, dry_run=dry_run)


@issuer_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List the issuers whose tokens are taken, by which rules, and how many subjects of each are somebody here."""
    run(
        lambda session, _: [{**_told(each), "subjects": count} for each, count in issuers.listed(session)],
        as_json,
    )


@issuer_cli.command("remove")
def remove(issuer: URL, confirm: Confirm = None, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Take an issuer off the list, with its subjects in all tenants: its tokens are refused within a second."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        gone = issuers.remove(session, service, issuer, request_id=request_id())
        return {"removed": issuer, "subjects": gone}

    warning = "Whoever comes by this issuer is let in no more, and each would have to be mapped anew."
    confirmation = Confirmation(lambda session: issuers.find(session, issuer).url, confirm, warning)
    run(work, as_json, dry_run=dry_run, confirm=confirmation)


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

    def work(session: Session, service: Service) -> dict[str, Any]:
        operator = operator_in(session, tenant)
        row = issuers.map_subject(session, service, operator, url=issuer, subject=subject, to=to)
        return {"issuer": issuer, "subject": row.subject, "principal": row.principal_id}

    run(work, as_json, dry_run=dry_run)


@issuer_cli.command("unmap")
def unmap_subject(
    issuer: URL, subject: Subject, tenant: InTenant, dry_run: DryRun = False, as_json: JSON = False
) -> None:
    """Let an issuer's subject in no more, within a second; who it was stays, with what it made."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        row = issuers.unmap_subject(session, service, operator_in(session, tenant), url=issuer, subject=subject)
        return {"issuer": issuer, "unmapped": row.subject, "principal": row.principal_id}

    run(work, as_json, dry_run=dry_run)


@issuer_cli.command("subjects")
def subjects(tenant: InTenant, as_json: JSON = False) -> None:
    """List which subjects of which issuers are whom of a tenant's."""

    def work(session: Session, _: Service) -> list[dict[str, Any]]:
        rows = issuers.subjects(session, operator_in(session, tenant))
        return [
            {"issuer": of.url, "subject": each.subject, "principal": each.principal_id, "created": each.created}
            for each, of in rows
        ]

    run(work, as_json)


def _told(issuer: Any) -> dict[str, Any]:
    return {
        "issuer": issuer.url,
        "jwks_uri": issuer.jwks_uri,
        "audience": issuer.audience,
        "algorithms": issuer.algorithms,
        "typ": issuer.typ,
        "network": issuer.network,
    }
