"""Operations on access tokens, and on the keys that sign them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import SecretStr, field_serializer
from sqlalchemy.orm import Session

from cloister.wire._model import Body
from cloister_server.errors import Invalid, Unauthenticated
from cloister_server.oauth import signing_keys, tokens, verifier
from cloister_server.oauth.access_tokens import AccessToken
from cloister_server.operations.definition import Acting, Given, operation
from cloister_server.service import Service
from cloister_server.store.tables import SigningKey

__all__ = ["OneKey", "OneToken", "inspect", "list_keys", "revoke", "revoke_key", "rotate_key"]


class OneToken(Body):
    """It is in the body alone, and in no log."""

    token: SecretStr

    @field_serializer("token", when_used="json")
    def _shown(self, token: SecretStr) -> str:
        return token.get_secret_value()


class OneKey(Body):
    kid: Given


@operation("token.inspect", OneToken)
def inspect(session: Session, service: Service, __: Acting, request: OneToken) -> dict[str, Any]:
    try:
        read, tenant_id = verifier.inspect(service, request.token.get_secret_value(), within=session)
    except Unauthenticated:
        raise _not_valid() from None
    return {"tenant": tenant_id, **_told(read)}


@operation("token.revoke", OneToken, changes=True)
def revoke(session: Session, service: Service, by: Acting, request: OneToken) -> dict[str, Any]:
    given = request.token.get_secret_value()
    try:
        read = tokens.revoke_by_operator(session, service, given, request_id=by.request_id, by=by.id)
    except Unauthenticated:
        raise _not_valid() from None
    return {"revoked": read.jti, **_told(read)}


@operation("token-key.list", Body)
def list_keys(session: Session, _: Service, __: Acting, ___: Body) -> list[dict[str, Any]]:
    return [_key(each) for each in signing_keys.listed(session)]


@operation("token-key.rotate", Body, changes=True)
def rotate_key(session: Session, service: Service, _: Acting, __: Body) -> dict[str, Any]:
    return _key(signing_keys.rotate(session, service))


@operation("token-key.revoke", OneKey, changes=True)
def revoke_key(session: Session, service: Service, _: Acting, request: OneKey) -> dict[str, Any]:
    return _key(signing_keys.revoke(session, service, request.kid))


def _not_valid() -> Invalid:
    return Invalid("this is no token of this deployment that is valid now: it may be expired or revoked already")


def _told(read: AccessToken) -> dict[str, Any]:
    issued, expires = (datetime.fromtimestamp(each, UTC) for each in (read.issued, read.expires))
    return {"client_id": read.client_id, "issued": issued, "expires": expires, "key": read.key_id, "bound_to": read.jkt}


def _key(key: SigningKey) -> dict[str, Any]:
    return {"kid": key.id, "state": key.state, "created": key.created, "until": key.until}
