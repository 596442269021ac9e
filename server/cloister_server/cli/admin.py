"""`cloister-admin`: the operator's commands, on the deployment itself. Needs no running server; changes what one serves."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from cloister.wire.sources import CreateSource
from cloister_server import deployment, processes, recovery, vault
from cloister_server.cli import audit, backups, bundles, doctor, ledger, logins
from cloister_server.cli.issuers import issuer_cli
from cloister_server.cli.keys import key_cli, read_line
from cloister_server.cli.policy import group_cli, policy_cli
from cloister_server.cli.storage import storage_cli
from cloister_server.cli.tenants import tenant_cli
from cloister_server.cli.terminal import (
    JSON,
    LOCAL,
    Confirm,
    DryRun,
    InTenant,
    asked_for,
    operate,
    refusals,
    require_here,
    settings_here,
    show,
)
from cloister_server.cli.token_keys import token_cli, token_key_cli
from cloister_server.cli.users import user_cli
from cloister_server.errors import Invalid
from cloister_server.grants import Role
from cloister_server.keyring import LOCAL as LOCAL_PROVIDER
from cloister_server.operations import clients, policy, sources
from cloister_server.operations.definition import InTenant as OneTenant
from cloister_server.store import chain

__all__ = ["main"]

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
client_cli, grant_cli, source_cli, budget_cli = (
    typer.Typer(no_args_is_help=True, help=text)
    for text in (
        "OAuth clients (apps) of a tenant.",
        "Who may do what.",
        "The people behind data.",
        "What has been spent.",
    )
)
for name, group in {
    "tenant": tenant_cli,
    "storage": storage_cli,
    "group": group_cli, "policy": policy_cli,
    "key": key_cli, "user": user_cli, "client": client_cli, "grant": grant_cli, "source": source_cli, "budget": budget_cli,
    "audit": ledger.audit_cli, "ledger": ledger.ledger_cli, "token": token_cli, "token-key": token_key_cli,
    "issuer": issuer_cli, "operator": logins.operator_cli,
}.items():  # fmt: skip
    cli.add_typer(group, name=name)

tenant_cli.command("export")(bundles.export)
cli.command("backup")(backups.backup)
cli.command("restore")(backups.restore)
cli.command("login")(logins.login)
cli.command("logout")(logins.logout)
cli.command("first-admin")(logins.first_admin)
ledger.audit_cli.command("verify")(audit.verify)
ledger.audit_cli.command("tail")(audit.tail)
ledger.audit_cli.command("export")(audit.export)

Client = Annotated[str, typer.Argument(metavar="NAME", help="The client, by name or client id.")]
Effect = Annotated[Literal["allow", "deny"], typer.Option(help="A deny goes before every allow.")]
Resource = Annotated[str, typer.Option(help="The resource, by name or id, or * for all of this tenant's.")]
PublicKey = Annotated[
    Path | None,
    typer.Option(
        help="The client's public key, P-256 or Ed25519, as PEM or JWK: it has no secret then, which is safer."
    ),
]
_HOLDER = "The app or person: by name, as TENANT/NAME where it is another tenant's, or by id."


@cli.callback()
def _root(
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="The deployment that `login` was run for by this name.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="The deployment of this machine, whatever logins there are.")
    ] = False,
) -> None:
    """Operate a Cloister deployment: the one of this machine, by CLOISTER_* in the environment, or one where you are logged in."""
    if profile is not None and local:
        raise typer.BadParameter("--profile and --local are two deployments; name one")
    asked_for.set(LOCAL if local else profile)


@cli.command()
def init(
    key_file: Annotated[
        Path | None, typer.Option(help="The root key's file, made (0600) where it is absent; else CLOISTER_KEY_FILE.")
    ] = None,
    passphrase_fd: Annotated[
        int | None, typer.Option(help="Read the keystore's passphrase from this descriptor.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Make the data directory, the keystore, the schema and the service's keys; running it again upgrades the schema.

    The recovery key of a new keystore is printed this once: it opens the keystore when the key file or the passphrase is lost.
    Write it down, and keep it as you keep those. With other key providers there is none. While there is no operator, a token that
    makes the first one is printed on standard error.
    """
    with refusals(as_json):
        passphrase = None if passphrase_fd is None else read_line(passphrase_fd)
        settings = settings_here(**({} if key_file is None else {"key_file": key_file}))
        is_new = not deployment.has_keystore(settings)
        service = deployment.initialise(settings, passphrase=passphrase)
        keys = [vault.service_key(service, "certificate").public]
        told = {"data_dir": str(settings.data_dir), "key_dir": str(settings.key_dir), "certificate_keys": keys}
        if is_new and LOCAL_PROVIDER in service.keys:
            told["recovery_key"] = recovery.renew(service).text()
        show(told, as_json)
        logins.print_first_admin_token(service)


@cli.command("doctor")
def doctor_(
    audit: Annotated[
        bool, typer.Option("--audit", help="Try the training engine too, on synthetic rows (some seconds).")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Say what is sound here and what is not; exit status 1 where anything is at fault. Changes nothing."""
    with refusals(as_json):
        require_here()
        rows = list(doctor.diagnosed())
        if audit and rows[0]["state"] == "ok":
            rows += doctor.audited(settings_here())
    show(rows, as_json)
    if any(row["state"] == "FAULT" for row in rows):
        raise typer.Exit(1)


@client_cli.command("create")
def client_create(
    tenant: InTenant,
    name: Annotated[str, typer.Option(help="What people call it.")],
    role: Annotated[Role, typer.Option(help="What it may do to start with, on all of the tenant's.")] = "trainer",
    public_key: PublicKey = None,
    dpop: Annotated[
        bool, typer.Option("--dpop", help="Its tokens are bound to a key (RFC 9449): a stolen one is worth nothing.")
    ] = False,
    public: Annotated[
        bool,
        typer.Option("--public", help="It runs on people's own machines, has no secret, and acts for people alone."),
    ] = False,
    redirect_uri: Annotated[
        list[str] | None,
        typer.Option(help="Where it takes people back to, as it sends it; more than once for several."),
    ] = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Make an OAuth client; its secret, where it has no public key, is printed this once and kept nowhere."""
    with refusals(as_json):
        request = clients.CreateClient(
            tenant=tenant,
            name=name,
            role=role,
            public_key=_text_of(public_key),
            dpop=dpop,
            public=public,
            redirect_uris=tuple(redirect_uri or ()),
        )
        operate(clients.create, request, as_json, dry_run=dry_run)


@client_cli.command("list")
def client_list(tenant: InTenant, as_json: JSON = False) -> None:
    """List a tenant's OAuth clients."""
    with refusals(as_json):
        operate(clients.listed, OneTenant(tenant=tenant), as_json)


@client_cli.command("rotate")
def client_rotate(
    client: Client, tenant: InTenant, public_key: PublicKey = None, dry_run: DryRun = False, as_json: JSON = False
) -> None:
    """Give a client a new secret, shown this once, or a public key. The old one is refused now, its tokens in ten minutes."""
    with refusals(as_json):
        request = clients.RotateClient(tenant=tenant, client=client, public_key=_text_of(public_key))
        operate(clients.rotate, request, as_json, dry_run=dry_run)


@client_cli.command("remove")
def client_remove(
    client: Client, tenant: InTenant, confirm: Confirm = None, dry_run: DryRun = False, as_json: JSON = False
) -> None:
    """Remove a client with all its grants; its secret is refused from now on, its tokens within a second."""
    with refusals(as_json):
        request = clients.OneClient(tenant=tenant, client=client)
        operate(clients.remove, request, as_json, dry_run=dry_run, confirm=confirm)


@grant_cli.command("add")
def grant_add(
    tenant: InTenant,
    to: Annotated[str, typer.Option(help=_HOLDER)],
    verb: Annotated[str, typer.Option(help="One verb, e.g. model.predict.")],
    resource: Resource = "*",
    effect: Effect = "allow",
    until: Annotated[datetime | None, typer.Option(help="When it expires, UTC.")] = None,
    network: Annotated[
        str | None, typer.Option("--from", help="Where requests must come from: 10.0.0.0/8, or one address.")
    ] = None,
    max_epsilon: Annotated[float | None, typer.Option(help="Of one job; with dataset.train.")] = None,
    per_minute: Annotated[
        int | None, typer.Option(help="Requests a minute, by the clock, all API processes together.")
    ] = None,
    outputs: Annotated[
        str | None, typer.Option(help="labels alone, or rounded to two digits; with model.predict.")
    ] = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Let a client, a person or a group do one thing, or forbid it."""
    with refusals(as_json):
        request = policy.AddGrant(
            tenant=tenant,
            to=to,
            verb=verb,
            resource=resource,
            effect=effect,
            until=until,
            network=network,
            max_epsilon=max_epsilon,
            per_minute=per_minute,
            outputs=outputs,
        )
        operate(policy.add_grant, request, as_json, dry_run=dry_run)


@grant_cli.command("list")
def grant_list(
    tenant: InTenant,
    to: Annotated[str | None, typer.Option(help=f"Only this one's. {_HOLDER}")] = None,
    as_json: JSON = False,
) -> None:
    """List the grants on a tenant's resources."""
    with refusals(as_json):
        operate(policy.list_grants, policy.ListGrants(tenant=tenant, to=to), as_json)


@grant_cli.command("remove")
def grant_remove(
    tenant: InTenant,
    grant: Annotated[str | None, typer.Argument(help="The grant's id; or say what it grants.")] = None,
    to: Annotated[str | None, typer.Option(help=_HOLDER)] = None,
    verb: Annotated[str | None, typer.Option(help="The verb that it names.")] = None,
    resource: Annotated[
        str | None, typer.Option(help="The resource that it names, by name or id; * by default.")
    ] = None,
    effect: Annotated[Literal["allow", "deny"] | None, typer.Option(help="Allow by default.")] = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Take a grant away: by its id, or in the words that `grant add` was given."""
    with refusals(as_json):
        request = policy.RemoveGrant(tenant=tenant, grant=grant, to=to, verb=verb, resource=resource, effect=effect)
        operate(policy.remove_grant, request, as_json, dry_run=dry_run)


@source_cli.command("create")
def source_create(
    tenant: InTenant,
    name: Annotated[str, typer.Option(help="What people call it.")],
    epsilon: Annotated[float, typer.Option(help="The cap over all runs.")],
    delta: Annotated[float, typer.Option(help="Fixed for good.")],
    owner: Annotated[str, typer.Option(help="The app that owns it, by name or client id.")],
    unit: Annotated[Literal["row", "user"], typer.Option(help="Who is protected. Fixed for good.")] = "row",
    public: Annotated[bool, typer.Option("--public", help="Not about people at all. Fixed for good.")] = False,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Declare a source for an app that owns it."""
    with refusals(as_json):
        declared = CreateSource(name=name, unit=unit, epsilon=epsilon, delta=delta, public=public)
        operate(
            sources.create, sources.CreateSource(tenant=tenant, source=declared, owner=owner), as_json, dry_run=dry_run
        )


@source_cli.command("list")
def source_list(tenant: InTenant, as_json: JSON = False) -> None:
    """List a tenant's sources with their budgets."""
    with refusals(as_json):
        operate(sources.listed, OneTenant(tenant=tenant), as_json)


@budget_cli.command("show")
def budget_show(source: str, tenant: InTenant, as_json: JSON = False) -> None:
    """Show what a source's filter has used and what is left."""
    with refusals(as_json):
        operate(sources.show_budget, sources.OneSource(tenant=tenant, source=source), as_json)


def _text_of(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        with file.open("rb") as opened:
            return opened.read(2**16).decode(errors="replace")
    except OSError as error:
        raise Invalid(f"{file}: {error.strerror}; give the file with the client's public key") from None


def main() -> None:
    processes.refuse_core_dumps()
    # What is wrong with a chain is the answer of the commands that ask, and not a line of log before it.
    logging.getLogger(chain.__name__).addHandler(logging.NullHandler())
    cli()
