"""What anyone may ask without a token: is it up, is it ready, whose keys are these."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from cloister_server.deployment import check_ready
from cloister_server.oauth import metadata
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import reading

__all__ = ["router"]

router = APIRouter(tags=["discovery"])


@router.get("/healthz")
async def is_up() -> dict[str, Any]:
    return {"status": "up"}


@router.get("/readyz")
def is_ready(request: Request) -> dict[str, Any]:
    check_ready(request.app.state.service)
    return {"status": "ready"}


@router.get("/.well-known/oauth-authorization-server")
def server_metadata(request: Request) -> dict[str, Any]:
    return metadata.server_metadata(request.app.state.service.settings)


@router.get("/.well-known/oauth-protected-resource")
def resource_metadata(request: Request) -> dict[str, Any]:
    return metadata.resource_metadata(request.app.state.service.settings)


@router.get("/.well-known/jwks.json")
def token_keys(request: Request) -> dict[str, Any]:
    with reading(request.app.state.service.engine, ALL_TENANTS) as session:
        return metadata.token_keys(session)


@router.get("/.well-known/cloister-certificate-keys")
def certificate_keys(request: Request) -> dict[str, Any]:
    with reading(request.app.state.service.engine, ALL_TENANTS) as session:
        return metadata.certificate_keys(session)
