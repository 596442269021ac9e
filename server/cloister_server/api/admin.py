"""/v1/admin: the operators' operations, one route each, for tokens of scope `admin`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from cloister_server.api.call import Call, WriteCall
from cloister_server.audit import denials_kept
from cloister_server.operations import OPERATIONS, Acting, Asked, Operation, plain, running

__all__ = ["Answer", "router"]

router = APIRouter(prefix="/v1/admin", tags=["admin"])


class Answer(BaseModel):
    """What an operation answers: an object, or a list of them."""

    answer: Any


def _answer(operation: Operation[Any], call: Call, asked: Asked[Any]) -> Response | Answer:
    service, by = call.service, Acting.remote(call.principal)
    call.noted.is_told = True  # in words of their own
    with running.accounted(service, operation, by, asked):
        if not operation.changes:
            return Answer(answer=plain(running.read(service, operation, by, asked)))
        ready = running.prepared(service, operation, by, asked)
        if asked.dry_run:
            return Answer(answer=plain(running.planned(service, operation, by, ready)))

        def work(session: Session) -> Answer:
            return Answer(answer=plain(running.done(session, service, operation, by, ready)))

        operating = replace(call, operates=partial(running.repeated, operation=operation, by=by, asked=asked))
        return operating.once(asked, work, status=200, is_secret=bool(operation.secret))


def _route(operation: Operation[Any]) -> Callable[..., Any]:
    """A function for the framework, which reads what it takes from its annotations."""

    def entitled(call: WriteCall) -> Call:  # before the body is looked at
        with denials_kept(call.service.engine):
            running.require_scope(call.principal, operation.name)
        return call

    def run(body: Any, call: Any) -> Response | Answer:
        return _answer(operation, call, body)

    run.__name__ = operation.name
    run.__annotations__ |= {"body": Asked[operation.request], "call": Annotated[Call, Depends(entitled)]}  # type: ignore[name-defined]  # made as it runs
    return run


for _each in OPERATIONS.values():
    router.post(f"/{_each.name}", response_model=Answer)(_route(_each))
