"""What becomes of tokens that are out: introspection (RFC 7662) and revocation (RFC 7009). Knows SQL; no framework.

Each answers an authenticated client alone. A client revokes its own tokens, and introspects those of its own tenant; of all
others it is told what it would be told of noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from authlib.oauth2.rfc6749 import OAuth2Error
from authlib.oauth2.rfc6749.errors import InvalidRequestError
from sqlalchemy import delete
from sqlalchemy.orm import Session

from cloister_server import audit, policy
from cloister_server.errors import Unauthenticated
from cloister_server.oauth import logins, verifier
from cloister_server.oauth.access_tokens import AccessToken
from cloister_server.oauth.clients import authenticate_client
from cloister_server.oauth.form import invalid_client, read_token_request
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import writing
from cloister_server.store.tables import App, RevokedToken, Tenant, now

__all__ = ["introspect_token", "revoke_access_token", "revoke_by_operator", "revoke_token"]

Answer = tuple[int, dict[str, Any], dict[str, str]]


def introspect_token(service: Service, headers: Sequence[tuple[bytes, bytes]], *, query: bytes, body: bytes) -> Answer:
    """Is a token of the client's own tenant valid now, and what does it say? Status, JSON body and headers."""
    try:
        app, token = _asked(service, headers, query, body)
        if app.public:  # RFC 7662, section 2.1: whoever may ask is known
            raise invalid_client()
    except OAuth2Error as error:
        return _refused(error)
    login = logins.of_refresh_token(service, token)
    if login is not None and login.client_id == app.id:
        told = {"client_id": app.id, "sub": login.user_id, "iss": service.settings.issuer}
        return 200, {"active": True, **told, "exp": int(login.until.timestamp())}, {}
    try:
        read, tenant_id = verifier.inspect(service, token)
    except Unauthenticated:
        return 200, {"active": False}, {}
    if tenant_id != app.tenant_id:
        return 200, {"active": False}, {}
    issuer = service.settings.issuer
    return 200, {
        "active": True,
        "token_type": "Bearer" if read.jkt is None else "DPoP",
        **({} if read.jkt is None else {"cnf": {"jkt": read.jkt}}),
        **({"scope": read.scope} if read.scope else {}),
        "client_id": read.client_id,
        "sub": read.subject,
        "iss": issuer,
        "aud": issuer,
        "iat": read.issued,
        "exp": read.expires,
        "jti": read.jti,
    }, {}  # fmt: skip


def revoke_token(service: Service, headers: Sequence[tuple[bytes, bytes]], *, query: bytes, body: bytes) -> Answer:
    """Revoke an access token of the client's own, or a refresh token and with it the whole login.

    What is no valid token of its own is as revoked as it can be: 200, too.
    """
    try:
        app, token = _asked(service, headers, query, body)
    except OAuth2Error as error:
        return _refused(error)
    if logins.end_by_refresh_token(service, token, client_id=app.id):
        return 200, {}, {}
    try:
        read, _ = verifier.inspect(service, token)
    except Unauthenticated:
        return 200, {}, {}
    if read.client_id == app.id:
        with writing(service.engine, ALL_TENANTS) as session:
            revoke_access_token(session, service, read)
    return 200, {}, {}


def revoke_access_token(session: Session, service: Service, token: AccessToken) -> None:
    """Refuse a token from here on: in this process from the next request, in others within a second."""
    session.execute(delete(RevokedToken).where(RevokedToken.until < now()))
    session.merge(RevokedToken(jti=token.jti, until=datetime.fromtimestamp(token.expires + 60, UTC)))
    verifier.forget_after(session, service)


def revoke_by_operator(
    session: Session, service: Service, token: str, *, request_id: str, by: str = "operator"
) -> AccessToken:
    """Revoke any app's token, and tell of it in its tenant's audit log. Raises Unauthenticated where it is not valid anyway."""
    read, tenant_id = verifier.inspect(service, token, within=session)
    operator = Principal.operator(tenant_id, request_id=request_id, by=by)
    tenant = session.get_one(Tenant, tenant_id)
    authorized = policy.authorize(session, operator, "tenant.administer", tenant)
    revoke_access_token(session, service, read)
    audit.allowed(session, authorized, "token.revoke", read.client_id)
    return read


def _asked(service: Service, headers: Sequence[tuple[bytes, bytes]], query: bytes, body: bytes) -> tuple[App, str]:
    request = read_token_request(headers, query, body)
    app = authenticate_client(service, request)
    token = request.parameters.get("token")
    if token is None:
        raise InvalidRequestError("there is no token; send it in the form as token=...")
    return app, token


def _refused(error: OAuth2Error) -> Answer:
    status, answer, more = error()
    return status, answer, dict(more)
