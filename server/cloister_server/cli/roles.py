"""`cloister-server identity`, `party` and `dealer`: private inference's roles, each run by its own operator. Prints no key."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cloister_server import logs
from cloister_server.errors import StartRefused
from cloister_server.settings import load_role_settings

__all__ = ["add_to"]

Directory = Annotated[
    Path | None, typer.Option(help="The role's directory; by default CLOISTER_ROLE_DIRECTORY, or beside the data.")
]
RoleFile = Annotated[Path | None, typer.Option(help="The role file that the deployment's owner gave.")]
Keys = Annotated[
    Path | None, typer.Option(help="The platform's certificate keys, as JSON, got by another way than the role file.")
]
Listen = Annotated[str | None, typer.Option(help="The address to listen at; by default the record's host.")]


def add_to(cli: typer.Typer) -> None:
    for command in (identity, party, dealer):
        cli.command()(command)


def identity(
    role: Annotated[Literal["party", "dealer"] | None, typer.Option(help="What to make an identity for.")] = None,
    init: Annotated[bool, typer.Option("--init", help="Make it; without this it is printed.")] = False,
    operator: Annotated[str | None, typer.Option(help="Who runs the role, as clients are to see it.")] = None,
    host: Annotated[str | None, typer.Option(help="The name or address that the others reach it by.")] = None,
    port: Annotated[int, typer.Option(help="Where the other roles reach it.")] = 9444,
    client_port: Annotated[int, typer.Option(help="Where clients reach a party.")] = 9443,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long its certificate is valid.")] = 365,
    directory: Directory = None,
) -> None:
    """Make a role's identity, or print its public record as JSON, for the owner who deploys. Keys are never printed."""

    def do() -> None:
        from cloister_server.roles import identity as identities

        place = _directory(directory)
        if not init:
            made = identities.read(place)
        elif role is None or not operator or not host:
            raise StartRefused("--init takes --role, --operator and --host: others pin what is declared here")
        else:
            clients = client_port if role == "party" else None
            made = identities.create(place, operator=operator, host=host, port=port, client_port=clients, days=days)
        print(made.record.model_dump_json(indent=2))
        print(f"certificate {made.record.digest}, valid until {made.record.not_after:%Y-%m-%d}", file=sys.stderr)

    _told(do)


def party(
    file: RoleFile = None, certificate_keys: Keys = None, directory: Directory = None, listen: Listen = None
) -> None:
    """Run a party of a private deployment until SIGTERM."""
    _told(lambda: _run("party", file, certificate_keys, directory, listen))


def dealer(
    file: RoleFile = None, certificate_keys: Keys = None, directory: Directory = None, listen: Listen = None
) -> None:
    """Run the dealer of a private deployment until SIGTERM."""
    _told(lambda: _run("dealer", file, certificate_keys, directory, listen))


def _run(kind: Literal["party", "dealer"], *given: Any) -> None:
    names = ("file", "certificate_keys", "directory", "listen")
    settings = load_role_settings(**{n: v for n, v in zip(names, given, strict=True) if v is not None})
    logs.configure(settings)
    from cloister_server.roles.serving import run  # loads torch

    run(settings, kind)


def _directory(given: Path | None) -> Path:
    """As the role itself finds it; the settings that a role needs beside are not asked for."""
    more = {} if given is None else {"directory": given}
    return load_role_settings(file=Path(), certificate_keys=Path(), **more).directory


def _told(do: Callable[[], None]) -> None:
    try:
        do()
    except StartRefused as refusal:
        print(f"cloister-server: {refusal}", file=sys.stderr)
        raise typer.Exit(1) from None
