"""`cloister-admin key`: the life of the keys that wrap every data key."""

from __future__ import annotations

from dataclasses import asdict

import typer

from cloister_server import keys
from cloister_server.cli.terminal import JSON, run

__all__ = ["key_cli"]

key_cli = typer.Typer(no_args_is_help=True, help="Key-encryption keys: tenants' and the service's own.")


@key_cli.callback()
def _root() -> None:
    """Key-encryption keys: tenants' and the service's own."""


@key_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List every key by tenant and version, where it is kept, its state, and how many keys it wraps."""
    run(lambda session, _: [asdict(each) for each in keys.listed(session)], as_json)
