"""/v1/whoami: whose token this is."""

from __future__ import annotations

from fastapi import APIRouter

from cloister.wire.identities import Identity
from cloister_server import people
from cloister_server.api.call import ReadCall

__all__ = ["router"]

router = APIRouter(tags=["identities"])


@router.get("/v1/whoami")
def whoami(call: ReadCall) -> Identity:
    return call.read(lambda session: people.identity(session, call.principal))
