"""The device authorization endpoint (RFC 8628, section 3.1): what a client shows that has no browser. Knows no framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from authlib.oauth2.rfc6749 import InvalidScopeError, OAuth2Error

from cloister_server.errors import RateLimited
from cloister_server.oauth.access_tokens import ADMIN_SCOPE
from cloister_server.oauth.authorizations import ADMIN, DEVICE_S, INTERVAL_S, new_device
from cloister_server.oauth.clients import authenticate_client
from cloister_server.oauth.form import read_token_request
from cloister_server.service import Service
from cloister_server.store.tables import App

__all__ = ["authorize_device"]


def authorize_device(
    service: Service, headers: Sequence[tuple[bytes, bytes]], *, query: bytes, body: bytes, address: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON body and headers; `address`: whose device it is, of which not too many may wait at once."""
    try:
        request = read_token_request(headers, query, body)
        client = authenticate_client(service, request)
        _require_scope(client, request.parameters.get("scope"))
    except OAuth2Error as error:
        status, answer, more = error()
        return status, answer, dict(more)
    try:
        device = new_device(service, client, address=address)
    except RateLimited as refusal:
        return 429, {"error": "slow_down", "error_description": refusal.message}, {"Retry-After": "60"}
    page = f"{service.settings.issuer}/oauth/device"
    return 200, {
        "device_code": device.device_code.get_secret_value(),
        "user_code": device.user_code,
        "verification_uri": page,
        "verification_uri_complete": f"{page}?user_code={device.user_code}",
        "expires_in": DEVICE_S,
        "interval": INTERVAL_S,
    }, {"Cache-Control": "no-store"}  # fmt: skip


def _require_scope(client: App, scope: str | None) -> None:
    """One client asks for the one scope, and knows that it does; all others for none. Raises InvalidScopeError."""
    if client is ADMIN and scope != ADMIN_SCOPE:
        raise InvalidScopeError(f"this client acts for operators alone; ask for scope={ADMIN_SCOPE}")
    if client is not ADMIN and scope:
        raise InvalidScopeError("there are no scopes here; what a person may do is in their grants; ask for none")
