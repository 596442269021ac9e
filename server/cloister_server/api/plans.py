"""/v1/plans: what a run would cost. Free, and nothing is stored."""

from __future__ import annotations

from fastapi import APIRouter

from cloister.wire.plans import Plan, PlanRequest
from cloister_server import plans
from cloister_server.api.call import ReadCall

__all__ = ["router"]

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post("")
def make_plan(body: PlanRequest, call: ReadCall) -> Plan:
    return call.read(lambda session: plans.make(session, call.principal, call.service, body))
