"""What clients may know before they have a token: RFC 8414 metadata and public keys. Knows SQL; nothing of HTTP."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from cloister_server.settings import Settings
from cloister_server.store.queries import public_keys

__all__ = ["certificate_keys", "server_metadata", "token_keys"]


def server_metadata(settings: Settings) -> dict[str, Any]:
    """The authorization server's metadata (RFC 8414): it says no more than what works."""
    return {
        "issuer": settings.issuer,
        "token_endpoint": f"{settings.issuer}/oauth/token",
        "jwks_uri": f"{settings.issuer}/.well-known/jwks.json",
        "grant_types_supported": ["client_credentials"],
        "response_types_supported": [],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
    }


def token_keys(session: Session) -> dict[str, Any]:
    """The keys of access tokens, as a JWK set."""
    return {"keys": public_keys(session, "token")}


def certificate_keys(session: Session) -> dict[str, Any]:
    """The keys of certificates, as a JWK set: every one that ever signed."""
    return {"keys": public_keys(session, "certificate")}
