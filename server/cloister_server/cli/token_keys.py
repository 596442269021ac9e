"""`cloister-admin token-key`: the life of the keys that sign access tokens."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cloister_server.cli.terminal import JSON, run
from cloister_server.oauth import signing_keys
from cloister_server.store.tables import SigningKey

__all__ = ["token_key_cli"]

token_key_cli = typer.Typer(no_args_is_help=True, help="Keys that sign access tokens.")


@token_key_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List every key with its state: next, active, retiring (until when), revoked (since when)."""
    run(lambda session, _: [_row(key) for key in signing_keys.listed(session)], as_json)


@token_key_cli.command("rotate")
def rotate(as_json: JSON = False) -> None:
    """Sign with the next key from now on. No valid token is refused: the old key retires after its last one."""
    run(lambda session, service: _row(signing_keys.rotate(session, service)), as_json)


@token_key_cli.command("revoke", context_settings={"ignore_unknown_options": True})  # an id may begin with -
def revoke(
    kid: Annotated[str, typer.Argument(help="The key's id, as `list` shows it.")], as_json: JSON = False
) -> None:
    """Refuse every token of a key that may be stolen, within a second; clients get new ones by themselves."""
    run(lambda session, service: _row(signing_keys.revoke(session, service, kid)), as_json)


def _row(key: SigningKey) -> dict[str, Any]:
    return {"kid": key.id, "state": key.state, "created": key.created, "until": key.until}
