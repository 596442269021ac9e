"""`cloister-admin token` and `token-key`: what becomes of access tokens, and of the keys that sign them."""

from __future__ import annotations

import getpass
import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from sqlalchemy.orm import Session

from cloister_server.cli.terminal import JSON, DryRun, request_id, run
from cloister_server.errors import Invalid, Unauthenticated
from cloister_server.oauth import signing_keys, tokens, verifier
from cloister_server.oauth.verifier import AccessToken
from cloister_server.service import Service
from cloister_server.store.tables import SigningKey

__all__ = ["token_cli", "token_key_cli"]

token_cli = typer.Typer(no_args_is_help=True, help="Access tokens, read from standard input and never from arguments.")
token_key_cli = typer.Typer(no_args_is_help=True, help="Keys that sign access tokens.")


@token_key_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List every key with its state: next, active, retiring (until when), revoked (since when)."""
    run(lambda session, _: [_row(key) for key in signing_keys.listed(session)], as_json)


@token_key_cli.command("rotate")
def rotate(dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Sign with the next key from now on. No valid token is refused: the old key retires after its last one."""
    run(lambda session, service: _row(signing_keys.rotate(session, service)), as_json, dry_run=dry_run)


@token_key_cli.command("revoke", context_settings={"ignore_unknown_options": True})  # an id may begin with -
def revoke(
    kid: Annotated[str, typer.Argument(help="The key's id, as `list` shows it.")],
    dry_run: DryRun = False,
    as_json: JSON = False,
) -> None:
    """Refuse every token of a key that may be stolen, within a second; clients get new ones by themselves."""
    run(lambda session, service: _row(signing_keys.revoke(session, service, kid)), as_json, dry_run=dry_run)


@token_cli.command("inspect")
def inspect_token(as_json: JSON = False) -> None:
    """Say of a token that is valid now whose it is, until when, and which key it is bound to."""
    token = _token()

    def work(_: Session, service: Service) -> dict[str, Any]:
        try:
            read, tenant_id = verifier.inspect(service, token)
        except Unauthenticated:
            raise _not_valid() from None
        return {"tenant": tenant_id, **_told(read)}

    run(work, as_json)


@token_cli.command("revoke")
def revoke_token(dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Refuse a token from now on, within a second everywhere; its client can get another: `client rotate` ends that."""
    token = _token()

    def work(session: Session, service: Service) -> dict[str, Any]:
        try:
            read = tokens.revoke_by_operator(session, service, token, request_id=request_id())
        except Unauthenticated:
            raise _not_valid() from None
        return {"revoked": read.jti, **_told(read)}

    run(work, as_json, dry_run=dry_run)


def _token() -> str:
    """A token in an argument would be in everybody's process list."""
    return (getpass.getpass("Token: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()


def _not_valid() -> Invalid:
    return Invalid("this is no token of this deployment that is valid now: it may be expired or revoked already")


def _told(read: AccessToken) -> dict[str, Any]:
    issued, expires = (datetime.fromtimestamp(each, UTC) for each in (read.issued, read.expires))
    return {"client_id": read.client_id, "issued": issued, "expires": expires, "key": read.key_id, "bound_to": read.jkt}


def _row(key: SigningKey) -> dict[str, Any]:
    return {"kid": key.id, "state": key.state, "created": key.created, "until": key.until}
