"""Which app asks, by the credentials that came with its request; everybody else gets one and the same refusal. Knows SQL and keys."""

from __future__ import annotations

import re

from sqlalchemy.orm import Session

from cloister_server import vault
from cloister_server.oauth import client_secrets
from cloister_server.oauth.form import TokenRequest, invalid_client
from cloister_server.service import Service
from cloister_server.store.queries import app_of_id
from cloister_server.store.tables import App

__all__ = ["authenticate_client"]

_CLIENT_ID = re.compile(r"ap_[0-9a-f]{32}")


def authenticate_client(service: Service, session: Session, request: TokenRequest) -> App:
    """The app whose credentials these are. An unknown client and a wrong secret cost and read the same: InvalidClientError."""
    client_id, secret = request.client_id, request.client_secret.get_secret_value()
    if not _CLIENT_ID.fullmatch(client_id) or not client_secrets.is_well_formed(secret):
        raise invalid_client()
    app = app_of_id(session, client_id)
    pepper = vault.signing_key(session, service.keys, "pepper").secret
    if not client_secrets.matches(pepper, client_id, secret, stored=app.secret_mac if app else None) or app is None:
        raise invalid_client()
    return app
