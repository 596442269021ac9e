"""/healthz: the process is up. /readyz: the database answers at this release's schema, and the keys open."""

from __future__ import annotations

from fastapi import APIRouter, Request

from cloister_server import vault
from cloister_server.errors import StartRefused, Unavailable
from cloister_server.service import Service
from cloister_server.store.migrate import check_current
from cloister_server.store.session import reading

__all__ = ["router"]

router = APIRouter(tags=["health"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    return {"status": "up"}


@router.get("/readyz")
def readyz(request: Request) -> dict[str, str]:
    service: Service = request.app.state.service
    try:
        check_current(service.engine)
        with reading(service.engine) as session:
            vault.signing_key(session, service.keys, "token")
    except StartRefused as refusal:
        raise Unavailable(str(refusal)) from None
    return {"status": "ready"}
