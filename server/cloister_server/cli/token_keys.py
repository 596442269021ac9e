"""`cloister-admin token` and `token-key`: what becomes of access tokens, and of the keys that sign them."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated

import typer
from pydantic import SecretStr

from cloister.wire._model import Body
from cloister_server.cli.terminal import JSON, DryRun, operate, refusals
from cloister_server.operations import tokens

__all__ = ["token_cli", "token_key_cli"]

token_cli = typer.Typer(no_args_is_help=True, help="Access tokens, read from standard input and never from arguments.")
token_key_cli = typer.Typer(no_args_is_help=True, help="Keys that sign access tokens.")


@token_key_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List every key with its state: next, active, retiring (until when), revoked (since when)."""
    operate(tokens.list_keys, Body(), as_json)


@token_key_cli.command("rotate")
def rotate(dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Sign with the next key from now on. No valid token is refused: the old key retires after its last one."""
    operate(tokens.rotate_key, Body(), as_json, dry_run=dry_run)


@token_key_cli.command("revoke", context_settings={"ignore_unknown_options": True})  # an id may begin with -
def revoke(
    kid: Annotated[str, typer.Argument(help="The key's id, as `list` shows it.")],
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Refuse every token of a key that may be stolen, within a second; clients get new ones by themselves."""
    with refusals(as_json):
        operate(tokens.revoke_key, tokens.OneKey(kid=kid), as_json, dry_run=dry_run)


@token_cli.command("inspect")
def inspect_token(as_json: JSON = False) -> None:
    """Say of a token that is valid now whose it is, until when, and which key it is bound to."""
    operate(tokens.inspect, tokens.OneToken(token=_token()), as_json)


@token_cli.command("revoke")
def revoke_token(dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Refuse a token from now on, within a second everywhere; its client can get another: `client rotate` ends that."""
    operate(tokens.revoke, tokens.OneToken(token=_token()), as_json, dry_run=dry_run)


def _token() -> SecretStr:
    """A token in an argument would be in everybody's process list."""
    return SecretStr((getpass.getpass("Token: ") if sys.stdin.isatty() else sys.stdin.readline()).strip())
