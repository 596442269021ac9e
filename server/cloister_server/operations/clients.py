"""Operations on OAuth clients: made, listed, given other credentials, removed."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints
from sqlalchemy.orm import Session

from cloister_server import grants, tenants
from cloister_server.grants import Role
from cloister_server.oauth.signed import read_public_key, thumbprint
from cloister_server.operations.definition import Acting, Destroys, Given, InTenant, operation
from cloister_server.service import Service
from cloister_server.store.tables import App

__all__ = ["CreateClient", "OneClient", "RotateClient", "create", "listed", "remove", "rotate"]

PublicKey = Annotated[str, StringConstraints(max_length=2**16)]
"""P-256 or Ed25519, as PEM or JWK."""


class CreateClient(InTenant):
    name: Given
    role: Role = "trainer"
    public_key: PublicKey | None = None
    dpop: bool = False
    public: bool = False
    redirect_uris: Annotated[tuple[Given, ...], Field(max_length=64)] = ()


class OneClient(InTenant):
    client: Given


class RotateClient(OneClient):
    public_key: PublicKey | None = None


@operation("client.create", CreateClient, changes=True, fresh=("client_id",), secret=("client_secret",))
def create(session: Session, service: Service, by: Acting, request: CreateClient) -> dict[str, Any]:
    principal, key = by.into(session, request.tenant), _key_in(request.public_key)
    app, secret = tenants.create_client(
        session,
        service.keys,
        principal,
        name=request.name,
        role="none" if request.public else request.role,
        public_key=key,
        dpop=request.dpop,
        public=request.public,
        redirect_uris=request.redirect_uris,
    )
    kind = {"public": True} if request.public else {"role": request.role}
    told = {"name": app.name, **kind, "dpop": request.dpop, "redirect_uris": app.redirect_uris or []}
    return {**_credentials(app, secret), **told}


@operation("client.list", InTenant)
def listed(session: Session, _: Service, by: Acting, request: InTenant) -> list[dict[str, Any]]:
    return [
        {
            "name": app.name,
            "client_id": app.id,
            "created": app.created,
            "secret_since": app.secret_since or app.created,
            "public_key": None if app.public_key is None else thumbprint(app.public_key),
            "dpop": app.dpop,
            "public": app.public,
            "redirect_uris": app.redirect_uris or [],
        }
        for app in tenants.apps(session, by.within(session, request.tenant))
    ]


@operation("client.rotate", RotateClient, changes=True, secret=("client_secret",))
def rotate(session: Session, service: Service, by: Acting, request: RotateClient) -> dict[str, Any]:
    principal, key = by.within(session, request.tenant), _key_in(request.public_key)
    app, secret = tenants.rotate_client(session, service.keys, principal, request.client, public_key=key)
    return {**_credentials(app, secret), "name": app.name}


def _name(session: Session, request: OneClient) -> str:
    return grants.find_app(session, tenants.find_tenant(session, request.tenant), request.client).name


_GONE: Destroys[OneClient] = Destroys(_name, "The client is removed with all its grants, and nobody can undo that.")


@operation("client.remove", OneClient, changes=True, destroys=_GONE)
def remove(session: Session, service: Service, by: Acting, request: OneClient) -> dict[str, Any]:
    removed = tenants.remove_client(session, service, by.within(session, request.tenant), request.client)
    return {"removed": removed.client_id, "name": removed.name, "sources_without_owner": removed.sources}


def _key_in(text: str | None) -> dict[str, str] | None:
    return None if text is None else read_public_key(text.encode())


def _credentials(app: App, secret: str | None) -> dict[str, Any]:
    """What a client shows from now on: its secret, told this once, or its key, by thumbprint (RFC 7638)."""
    if app.public_key is not None:
        return {"client_id": app.id, "public_key": thumbprint(app.public_key)}
    if app.public:
        return {"client_id": app.id}
    return {"client_id": app.id, "client_secret": secret}
