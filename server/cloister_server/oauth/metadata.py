"""What clients may know before they have a token: RFC 8414 metadata and public keys. Knows SQL; nothing of HTTP."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from cloister_server.oauth.access_tokens import ADMIN_SCOPE
from cloister_server.oauth.server import GRANT_TYPES
from cloister_server.oauth.signed import ALGORITHMS
from cloister_server.settings import Settings
from cloister_server.store import queries

__all__ = ["certificate_keys", "resource_metadata", "server_metadata", "token_keys"]

_ENDPOINTS = ("token", "introspection", "revocation")
_CLIENT_METHODS = ["private_key_jwt", "client_secret_basic", "client_secret_post"]


def server_metadata(settings: Settings) -> dict[str, Any]:
    """The authorization server's metadata (RFC 8414): it says no more than what works."""
    return {
        "issuer": settings.issuer,
        "token_endpoint": f"{settings.issuer}/oauth/token",
        "introspection_endpoint": f"{settings.issuer}/oauth/introspect",
        "revocation_endpoint": f"{settings.issuer}/oauth/revoke",
        "authorization_endpoint": f"{settings.issuer}/oauth/authorize",
        "device_authorization_endpoint": f"{settings.issuer}/oauth/device_authorization",
        "jwks_uri": f"{settings.issuer}/.well-known/jwks.json",
        "scopes_supported": [ADMIN_SCOPE],
        "grant_types_supported": list(GRANT_TYPES),
        "response_types_supported": ["code"],
        "response_modes_supported": ["query"],
        "code_challenge_methods_supported": ["S256"],
        "authorization_response_iss_parameter_supported": True,
        "dpop_signing_alg_values_supported": list(ALGORITHMS),
        **{f"{endpoint}_endpoint_auth_methods_supported": _methods(endpoint) for endpoint in _ENDPOINTS},
        **{f"{endpoint}_endpoint_auth_signing_alg_values_supported": list(ALGORITHMS) for endpoint in _ENDPOINTS},
    }


def _methods(endpoint: str) -> list[str]:
    """Public clients say no more than their id, and cannot ask what others' tokens say."""
    return _CLIENT_METHODS if endpoint == "introspection" else [*_CLIENT_METHODS, "none"]


def resource_metadata(settings: Settings) -> dict[str, Any]:
    """The API's metadata as a resource (RFC 9728): who gives tokens for it, and how they are sent."""
    return {
        "resource": settings.issuer,
        "authorization_servers": [settings.issuer],
        "bearer_methods_supported": ["header"],
        "scopes_supported": [ADMIN_SCOPE],
        "dpop_signing_alg_values_supported": list(ALGORITHMS),
        "resource_name": "Cloister",
    }


def token_keys(session: Session) -> dict[str, Any]:
    """The keys of access tokens, as a JWK set: the one that signs, the one that will, and those whose tokens are not all expired."""
    return {"keys": [key.public for key in queries.token_keys(session)]}


def certificate_keys(session: Session) -> dict[str, Any]:
    """The keys of certificates, as a JWK set: every one that ever signed."""
    return {"keys": queries.public_keys(session, "certificate")}
