"""`cloister-admin backup` and `restore`: a deployment on SQLite, copied while it runs and put back where there is none."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cloister_server import backups
from cloister_server.cli.terminal import JSON, at_work, refusals, settings_here, show

__all__ = ["backup", "restore"]


def backup(
    to: Annotated[Path, typer.Option(help="The directory to make, outside the data directory and the keystore.")],
    as_json: JSON = False,
) -> None:
    """Copy the database, while the service goes on, and the sealed objects. There is no key in it: see `key backup`."""
    with refusals(as_json):
        backups.require_sqlite(settings_here())
    with at_work(as_json) as service:
        show(asdict(backups.backup(service, to)), as_json)


def restore(
    place: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="What `backup` made.")], as_json: JSON = False
) -> None:
    """Put a backup where there is no deployment, beside the keystore that it was made with; nothing live is overwritten."""
    with refusals(as_json):
        show(asdict(backups.restore(settings_here(), place)), as_json)
