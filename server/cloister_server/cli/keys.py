"""`cloister-admin key`: the life of the keys that wrap every data key."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from sqlalchemy.orm import Session

from cloister.wire.recipients import LINE_PREFIX, RecipientKey
from cloister_server import deployment, keys, keystore_backups, recipients, recovery, tenants, vault
from cloister_server.cli.terminal import (
    JSON,
    InTenant,
    at_work,
    me,
    operator_in,
    refusals,
    require_confirmed,
    run,
    settings_here,
    show,
)
from cloister_server.errors import Invalid
from cloister_server.keys import NotRotated, Outcome, Plan, Rotation
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import reading

__all__ = ["key_cli", "read_line"]

key_cli = typer.Typer(no_args_is_help=True, help="Key-encryption keys: tenants' and the service's own.")

recipient_cli = typer.Typer(
    no_args_is_help=True, help="Keys that a tenant's uploads are sealed for before they are sent."
)
key_cli.add_typer(recipient_cli, name="recipient")

OfTenant = Annotated[str | None, typer.Option("--tenant", help="The tenant, by name or id.")]
OfSystem = Annotated[bool, typer.Option("--system", help="The service's own key, which wraps its signing keys.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print as JSON what would be done, and do nothing.")]

_OLD_BACKUPS = (
    "Backups of the database from before the rotation hold keys that this version alone opens: they will be of no use."
)


@key_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List every key by tenant and version, where it is kept, its state, and how many keys it wraps."""
    run(lambda session, _: [asdict(each) for each in keys.listed(session)], as_json)


@key_cli.command("rotate")
def rotate(
    tenant: OfTenant = None,
    system: OfSystem = False,
    everyone: Annotated[bool, typer.Option("--all", help="Every tenant's, and the service's own.")] = False,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Make a new key where the old one is, and rewrap every data key for it. Run it again where it was cut short."""
    with at_work(as_json) as service:
        if [tenant is not None, system, everyone].count(True) != 1:
            raise Invalid("name one of --tenant, --system and --all")
        tenant_id = None if everyone else _id(service, tenant)
        if dry_run:
            with reading(service.engine, ALL_TENANTS) as session:
                _show_plan(keys.plan_rotation(session, service.keys, tenant_id), [])
            return
        tell = _teller(service, as_json)
        if tenant_id is None:
            outcome = keys.rotate_all(service, **_by(), on_progress=tell)
        else:
            outcome = Outcome([keys.rotate(service, tenant_id, **_by(), on_progress=tell)], [], [])
        _show(outcome, as_json)


@key_cli.command("migrate")
def migrate(
    to: Annotated[str, typer.Option(help="The provider that takes the keys, by name in the key provider file.")],
    tenant: OfTenant = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Give every tenant, or one, and the service itself a new key with another provider. Run it again where it was cut short.

    Tenants whose key is with a provider of their own are left where they are, unless one is named. New tenants' keys go to the
    default of the key provider file.
    """
    with at_work(as_json) as service:
        tenant_id = None if tenant is None else _id(service, tenant)
        if dry_run:
            with reading(service.engine, ALL_TENANTS) as session:
                _show_plan(*keys.plan_migration(session, service.keys, to=to, tenant_id=tenant_id))
            return
        tell = _teller(service, as_json)
        _show(keys.migrate(service, to=to, tenant_id=tenant_id, **_by(), on_progress=tell), as_json)


@key_cli.command("destroy")
def destroy(
    version: Annotated[int, typer.Option(help="The version, as `key list` shows it; never the active one.")],
    tenant: OfTenant = None,
    system: OfSystem = False,
    confirm: Annotated[
        str | None, typer.Option(help="The tenant's name (or system), which is asked for at the terminal otherwise.")
    ] = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Destroy an old key that wraps nothing any more, for good: no backup of the database from before its rotation opens then."""
    with at_work(as_json) as service:
        if (tenant is not None) == system:
            raise Invalid("name one of --tenant and --system")
        tenant_id = _id(service, tenant)
        with reading(service.engine, ALL_TENANTS) as session:
            planned = keys.plan_destruction(session, tenant_id, version=version)
        if dry_run:
            show(asdict(planned), True)
            return
        warning = f"Version {version} in {planned.provider!r} is destroyed for good. {_OLD_BACKUPS}"
        require_confirmed(planned.tenant_name, confirm, warning=warning)
        show(asdict(keys.destroy(service, tenant_id, version=version, **_by())), as_json)


@key_cli.command("backup")
def backup(
    to: Annotated[Path, typer.Option(help="The file to make, outside the data directory and the keystore.")],
    as_json: JSON = False,
) -> None:
    """Copy the local keystore into a new tar file, without its root key; the copy is on record.

    Keep the root key (the key file, or the passphrase) somewhere else: the copy opens with it, and with nothing else. The
    key of a tenant that is shredded lives on in the copy until that is destroyed too: the receipt names it.
    """
    with at_work(as_json) as service:
        made = keystore_backups.backup(service, to)
        root = "its key file" if service.settings.key_file else "its passphrase"
        note = (
            f"keep {root} elsewhere, since the copy opens with it; the key of a tenant shredded from now on lives on in this copy "
            "until that is destroyed"
        )
        show({**asdict(made), "note": note}, as_json)


@key_cli.command("recovery-renew")
def recovery_renew(dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Make a recovery key for the local keystore, shown this once; the one from before opens nothing any more.

    Whoever has the keystore, or a copy of it from this key's time, and the recovery key has every key in it: keep it as the root key.
    """
    with at_work(as_json) as service:
        had = recovery.has_key(service)
        if dry_run:
            show({"dry_run": True, "replaces": had}, True)
            return
        show({"recovery_key": recovery.renew(service).text(), "replaces": had}, as_json)


@key_cli.command("recover")
def recover(
    key_file: Annotated[
        Path | None,
        typer.Option(help="The root key's file to make; else CLOISTER_KEY_FILE; else a new passphrase is asked for."),
    ] = None,
    passphrase_fd: Annotated[int | None, typer.Option(help="Read the new passphrase from this descriptor.")] = None,
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Open the local keystore by its recovery key, where its key file or passphrase is lost, and make a new one of these.

    The recovery key is asked for at the terminal, or read from standard input; it stays in force. With --dry-run it is tried, and
    nothing is changed. Keys that were destroyed stay destroyed.
    """
    with refusals(as_json):
        settings = settings_here(**({} if key_file is None else {"key_file": key_file}))
        if settings.key_file is not None and passphrase_fd is not None:
            raise Invalid("a key file and a passphrase were given; unset CLOISTER_KEY_FILE for a passphrase")
        typed = getpass.getpass("Recovery key: ") if sys.stdin.isatty() else sys.stdin.readline()
        opened_by = "a passphrase" if settings.key_file is None else str(settings.key_file)
        if dry_run:
            recovery.try_key(settings, typed)
            show({"dry_run": True, "key_dir": str(settings.key_dir), "opened_by": opened_by}, True)
            return
        passphrase = None
        if settings.key_file is None:
            recovery.try_key(settings, typed)  # before anybody thinks of a passphrase
            passphrase = deployment.new_passphrase() if passphrase_fd is None else read_line(passphrase_fd)
        recovery.recover(settings, typed, passphrase=passphrase)
        show({"key_dir": str(settings.key_dir), "opened_by": opened_by}, as_json)


@recipient_cli.command("create")
def recipient_create(tenant: InTenant, as_json: JSON = False) -> None:
    """Make a recipient; hand its line to whoever uploads by another way than this service."""
    run(
        lambda session, service: _recipient(recipients.create(session, operator_in(session, tenant), service)),
        as_json,
    )


@recipient_cli.command("list")
def recipient_list(tenant: InTenant, as_json: JSON = False) -> None:
    """List a tenant's recipients, oldest first."""
    run(
        lambda session, service: [
            _recipient(line) for line in recipients.listed(session, operator_in(session, tenant), service)
        ],
        as_json,
    )


@recipient_cli.command("remove")
def recipient_remove(
    recipient: Annotated[str, typer.Argument(help="The recipient's id, as `recipient list` shows it, or its line.")],
    tenant: InTenant,
    as_json: JSON = False,
) -> None:
    """Remove a recipient: what is sealed for it is refused from now on."""

    def work(session: Session, service: Service) -> dict[str, str]:
        removed = RecipientKey.parse(recipient).id if recipient.startswith(LINE_PREFIX) else recipient
        recipients.remove(session, operator_in(session, tenant), service, removed)
        return {"removed": removed}

    run(work, as_json)


def read_line(descriptor: int) -> str:
    """What a descriptor gives, to the end of its first line: a secret that no argument may hold."""
    with os.fdopen(descriptor) as given:
        return given.readline().rstrip("\n")


def _recipient(line: str) -> dict[str, str]:
    return {"id": RecipientKey.parse(line).id, "recipient": line}


def _id(service: Service, tenant: str | None) -> str:
    if tenant is None:
        return vault.SYSTEM
    with reading(service.engine, ALL_TENANTS) as session:
        return tenants.find_tenant(session, tenant).id


def _teller(service: Service, as_json: bool) -> Callable[[str, str, int], None]:
    """Progress, a line each on standard error; a terminal that is watched wants to know."""
    if as_json:
        return lambda *_: None
    with reading(service.engine, ALL_TENANTS) as session:
        names = {each.id: each.name for each in tenants.tenants(session)}
    said = {"begun": "begun", "made": "key made", "active": "new key in use"}
    return lambda tenant_id, step, rewrapped: print(
        f"{names.get(tenant_id, tenant_id)}: {said.get(step, f'{rewrapped} rewrapped')}", file=sys.stderr
    )


def _show_plan(plans: list[Plan], left: list[NotRotated]) -> None:
    show({"plan": [asdict(each) for each in plans], "left": [asdict(each) for each in left]}, True)


def _show(outcome: Outcome, as_json: bool) -> None:
    """What was done; exit status 1 where anything was refused or did not open."""
    if as_json:
        show(asdict(outcome), True)
    else:
        show([asdict(each) for each in outcome.rotated], False)
        for what, some in (("left", outcome.left), ("refused", outcome.refused)):
            for each in some:
                print(f"{what}: {each.tenant_name}: {each.why}", file=sys.stderr)
        for rotated in outcome.rotated:
            if rotated.unopened:
                print(_unopened(rotated), file=sys.stderr)
    if outcome.refused or any(each.unopened for each in outcome.rotated):
        raise typer.Exit(1)


def _unopened(rotated: Rotation) -> str:
    return (
        f"{rotated.tenant_name}: {len(rotated.unopened)} data keys do not open under their own version and are left as they were: "
        f"{', '.join(rotated.unopened)}; restore these rows from a backup, and run the command again"
    )


def _by() -> dict[str, Any]:
    """Who it is that acts, and for which request, as `keys` takes it."""
    who = me()
    return {"request_id": who.request_id, "by": who.id}
