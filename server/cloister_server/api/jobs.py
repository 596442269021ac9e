"""/v1/jobs: start a training run, watch it, cancel it."""

from __future__ import annotations

from fastapi import APIRouter, Response

from cloister.wire.jobs import Job, Page, StartJob
from cloister_server import jobs
from cloister_server.api.call import Cursor, Limit, ReadCall, WriteCall

__all__ = ["router"]

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post("", status_code=201, response_model=Job)
def start_job(body: StartJob, call: WriteCall) -> Response:
    room = call.read(lambda session: jobs.require_start(session, call.principal, call.service, body))
    return call.once(body, lambda session: jobs.start(session, call.principal, call.service, body, reserved_bytes=room))


@router.get("")
def list_jobs(call: ReadCall, cursor: Cursor = None, limit: Limit = 50) -> Page:
    return call.read(lambda session: jobs.listed(session, call.principal, cursor=cursor, limit=limit))


@router.get("/{job}")
def get_job(job: str, call: ReadCall) -> Job:
    return call.read(lambda session: jobs.get(session, call.principal, job))


@router.post("/{job}/cancel", response_model=Job)
def cancel_job(job: str, call: WriteCall) -> Response:
    return call.once(job.encode(), lambda session: jobs.cancel(session, call.principal, job), status=200)
