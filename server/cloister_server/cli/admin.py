"""`cloister-admin`: the operator's commands, on the deployment itself. Needs no running server; changes what one serves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from sqlalchemy.orm import Session

from cloister.wire.sources import CreateSource
from cloister_server import (
    budgets,
    deployment,
    explanations,
    grants,
    policy,
    processes,
    recovery,
    sources,
    tenants,
    vault,
)
from cloister_server.cli import audit, backups, bundles, doctor, ledger
from cloister_server.cli.issuers import issuer_cli
from cloister_server.cli.keys import key_cli, read_line
from cloister_server.cli.policy import group_cli, policy_cli
from cloister_server.cli.storage import storage_cli
from cloister_server.cli.tenants import tenant_cli
from cloister_server.cli.terminal import JSON, Confirm, Confirmation, DryRun, InTenant, operator_in, refusals, run, show
from cloister_server.cli.token_keys import token_cli, token_key_cli
from cloister_server.cli.users import user_cli
from cloister_server.errors import Invalid
from cloister_server.grants import Role
from cloister_server.keyring import LOCAL
from cloister_server.oauth.signed import read_public_key, thumbprint
from cloister_server.service import Service
from cloister_server.settings import load_settings
from cloister_server.store import chain
from cloister_server.store.conditions import Conditions
from cloister_server.store.tables import App, Grant, Source

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
    "issuer": issuer_cli,
}.items():  # fmt: skip
    cli.add_typer(group, name=name)

tenant_cli.command("export")(bundles.export)
cli.command("backup")(backups.backup)
cli.command("restore")(backups.restore)
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
def _root() -> None:
    """Operate a Cloister deployment; settings come from CLOISTER_* in the environment."""


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
    Write it down, and keep it as you keep those. With other key providers there is none.
    """
    with refusals(as_json):
        passphrase = None if passphrase_fd is None else read_line(passphrase_fd)
        settings = load_settings(**({} if key_file is None else {"key_file": key_file}))
        is_new = not deployment.has_keystore(settings)
        service = deployment.initialise(settings, passphrase=passphrase)
        keys = [vault.service_key(service, "certificate").public]
        told = {"data_dir": str(settings.data_dir), "key_dir": str(settings.key_dir), "certificate_keys": keys}
        if is_new and LOCAL in service.keys:
            told["recovery_key"] = recovery.renew(service).text()
        show(told, as_json)


@cli.command("doctor")
def doctor_(
    audit: Annotated[
        bool, typer.Option("--audit", help="Try the training engine too, on synthetic rows (some seconds).")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Say what is sound here and what is not; exit status 1 where anything is at fault. Changes nothing."""
    rows = list(doctor.diagnosed())
    if audit and rows[0]["state"] == "ok":
        rows += doctor.audited(load_settings())
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

    def work(session: Session, service: Service) -> dict[str, Any]:
        operator, key = operator_in(session, tenant), _key_in(public_key)
        app, secret = tenants.create_client(
            session,
            service.keys,
            operator,
            name=name,
            role="none" if public else role,
            public_key=key,
            dpop=dpop,
            public=public,
            redirect_uris=redirect_uri or (),
        )
        kind = {"role": role, "dpop": dpop} if not public else {"public": True, "dpop": dpop}
        return {**_credentials(app, secret), "name": app.name, **kind, "redirect_uris": app.redirect_uris or []}

    run(work, as_json, dry_run=dry_run, fresh=("client_id", "client_secret"))


@client_cli.command("list")
def client_list(tenant: InTenant, as_json: JSON = False) -> None:
    """List a tenant's OAuth clients."""

    def work(session: Session, _: Service) -> list[dict[str, Any]]:
        apps = tenants.apps(session, operator_in(session, tenant))
        return [
            {
                "name": app.name,
                "client_id": app.id,
                "created": app.created,
                "secret_since": app.secret_since or app.created,
                "public_key": None if app.public_key is None else thumbprint(app.public_key),
                "dpop": app.dpop,
                "public": app.public,
                "redirect_uris": app.redirect_uris or [],
            }
            for app in apps
        ]

    run(work, as_json)


@client_cli.command("rotate")
def client_rotate(
    client: Client, tenant: InTenant, public_key: PublicKey = None, dry_run: DryRun = False, as_json: JSON = False
) -> None:
    """Give a client a new secret, shown this once, or a public key. The old one is refused now, its tokens in ten minutes."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        operator, key = operator_in(session, tenant), _key_in(public_key)
        app, secret = tenants.rotate_client(session, service.keys, operator, client, public_key=key)
        return {**_credentials(app, secret), "name": app.name}

    run(work, as_json, dry_run=dry_run, fresh=("client_secret",))


@client_cli.command("remove")
def client_remove(
    client: Client, tenant: InTenant, confirm: Confirm = None, dry_run: DryRun = False, as_json: JSON = False
) -> None:
    """Remove a client with all its grants; its secret is refused from now on, its tokens within a second."""

    def work(session: Session, service: Service) -> dict[str, Any]:
        removed = tenants.remove_client(session, service, operator_in(session, tenant), client)
        return {"removed": removed.client_id, "name": removed.name, "sources_without_owner": removed.sources}

    def name_in(session: Session) -> str:
        return grants.find_app(session, tenants.find_tenant(session, tenant), client).name

    warning = "The client is removed with all its grants, and nobody can undo that."
    run(work, as_json, dry_run=dry_run, confirm=Confirmation(name_in, confirm, warning))


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
    per_minute: Annotated[int | None, typer.Option(help="Requests a minute, of each API process.")] = None,
    outputs: Annotated[
        str | None, typer.Option(help="labels alone, or rounded to two digits; with model.predict.")
    ] = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Let a client, a person or a group do one thing, or forbid it."""

    def work(session: Session, _: Service) -> dict[str, Any]:
        operator = operator_in(session, tenant)
        expires = None if until is None else until.replace(tzinfo=UTC)
        bound = Conditions(max_epsilon, per_minute, outputs)
        of: dict[str, Any] = {"to": to, "verb": verb, "resource_id": resource, "effect": effect, "expires": expires}
        added = grants.add(session, operator, **of, network=network, conditions=bound)
        session.flush()  # its holder's name is asked for next
        return _grant_row(added, grants.names(session, operator))

    run(work, as_json, dry_run=dry_run, fresh=("id",))


@grant_cli.command("list")
def grant_list(
    tenant: InTenant,
    to: Annotated[str | None, typer.Option(help=f"Only this one's. {_HOLDER}")] = None,
    as_json: JSON = False,
) -> None:
    """List the grants on a tenant's resources."""

    def work(session: Session, _: Service) -> list[dict[str, Any]]:
        operator = operator_in(session, tenant)
        names = grants.names(session, operator)
        return [_grant_row(grant, names) for grant in grants.listed(session, operator, to=to)]

    run(work, as_json)


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

    def work(session: Session, _: Service) -> dict[str, Any]:
        operator = operator_in(session, tenant)
        if grant is not None and (to, verb, resource, effect) == (None, None, None, None):
            grants.remove(session, operator, grant)
            return {"removed": grant}
        if grant is not None or to is None or verb is None:
            raise Invalid(
                "give either a grant's id, or --to and --verb (and --resource) as they were given to `grant add`"
            )
        of: dict[str, Any] = {"to": to, "verb": verb, "resource_id": resource or "*", "effect": effect or "allow"}
        return {"removed": grants.remove_all(session, operator, **of)}

    run(work, as_json, dry_run=dry_run)


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

    def work(session: Session, _: Service) -> dict[str, Any]:
        body = CreateSource(name=name, unit=unit, epsilon=epsilon, delta=delta, public=public)
        operator = operator_in(session, tenant)
        owner_id = grants.find_app(session, tenants.find_tenant(session, tenant), owner).id
        made = sources.create(session, operator, body, owner_id=owner_id)
        return made.model_dump(mode="json")

    run(work, as_json, dry_run=dry_run, fresh=("id", "created"))


@source_cli.command("list")
def source_list(tenant: InTenant, as_json: JSON = False) -> None:
    """List a tenant's sources with their budgets."""

    def work(session: Session, _: Service) -> list[dict[str, Any]]:
        operator, found, cursor = operator_in(session, tenant), [], None
        while True:
            page = sources.listed(session, operator, cursor=cursor, limit=200)
            found += page.items
            cursor = page.next
            if cursor is None:
                return found

    run(work, as_json)


@budget_cli.command("show")
def budgetshow(source: str, tenant: InTenant, as_json: JSON = False) -> None:
    """Show what a source's filter has used and what is left."""

    def work(session: Session, _: Service) -> dict[str, Any]:
        row = policy.find(session, operator_in(session, tenant), "source.read", Source, source).resource
        return {"source": row.id, "name": row.name, **budgets.balance(session, row).model_dump(mode="json")}

    run(work, as_json)


def _key_in(file: Path | None) -> dict[str, str] | None:
    if file is None:
        return None
    try:
        with file.open("rb") as opened:
            return read_public_key(opened.read(2**16))
    except OSError as error:
        raise Invalid(f"{file}: {error.strerror}; give the file with the client's public key") from None


def _credentials(app: App, secret: str | None) -> dict[str, Any]:
    """What a client shows from now on: its secret, told this once, or its key, by thumbprint (RFC 7638)."""
    if app.public_key is not None:
        return {"client_id": app.id, "public_key": thumbprint(app.public_key)}
    if app.public:
        return {"client_id": app.id}
    return {"client_id": app.id, "client_secret": secret}


def _grant_row(grant: Grant, names: Mapping[str, str]) -> dict[str, Any]:
    told = explanations.view(grant, dict(names)).model_dump()
    bound = {name: value for name in _BOUND if (value := told.pop(name)) is not None}
    row = {**told, "resource_name": names.get(grant.resource_id), "conditions": bound or None}
    return {name: row[name] for name in (*_SHOWN, "conditions")}


_BOUND = ("first_address", "last_address", "max_epsilon", "requests_per_minute", "outputs")
_SHOWN = ("id", "to", "to_name", "effect", "verb", "resource", "resource_name", "expires")


def main() -> None:
    processes.refuse_core_dumps()
    # What is wrong with a chain is the answer of the commands that ask, and not a line of log before it.
    logging.getLogger(chain.__name__).addHandler(logging.NullHandler())
    cli()
