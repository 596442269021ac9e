"""`cloister-admin storage`: what of the sealed objects is left over, and whose store they lie in."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cloister_server import collection, marking
from cloister_server.cli.terminal import JSON, at_work, require_confirmed, show

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
