"""`cloister-admin storage`: what of the sealed objects is left over."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cloister_server import collection
from cloister_server.cli.terminal import JSON, at_work, show

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
