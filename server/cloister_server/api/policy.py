"""/v1/policy: who may do what in one's tenant, and why."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from cloister.wire.policy import Explanation, Holders
from cloister_server import explanations
from cloister_server.api.call import ReadCall

__all__ = ["router"]

router = APIRouter(prefix="/v1/policy", tags=["policy"])

_Text = Annotated[str, Query(max_length=128)]


@router.get("/explain")
def explain(
    call: ReadCall,
    principal: _Text,
    verb: _Text,
    resource: _Text,
    address: Annotated[str | None, Query(max_length=64)] = None,
) -> Explanation:
    asked: dict[str, Any] = {"who": principal, "verb": verb, "resource": resource, "address": address}
    return call.read(lambda session: explanations.explain(session, call.principal, **asked))


@router.get("/who-can")
def who_can(call: ReadCall, verb: _Text, resource: _Text) -> Holders:
    return call.read(lambda session: explanations.who_can(session, call.principal, verb=verb, resource=resource))
