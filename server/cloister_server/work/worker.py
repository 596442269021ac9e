"""The one worker of a data directory: it owns the durable queue, sweeps job rows into it and runs their attempts.

API processes only write job rows. The sweeper enqueues each under its own id, so enqueuing twice is enqueuing once;
a job whose worker died is taken up again by the next worker from its last checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
import threading
from dataclasses import asdict
from typing import Any

from dbos import DBOS, SetWorkflowID
from dbos._serialization import Serializer
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from cloister.wire.jobs import FINAL
from cloister_privacy.sealing import KeyProviderError
from cloister_server import collection, deployment, logs, processes
from cloister_server.budgets import TenantSuspended
from cloister_server.errors import LedgerRolledBack, StartRefused, TenantKeyRefused, Unavailable
from cloister_server.keyring import KeyRing
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store import chain
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.queries import is_suspended, jobs_not_of
from cloister_server.store.session import anchors_of, reading
from cloister_server.work.attempts import GRACE_S, abandon, run_attempt
from cloister_server.work.template import Template

log = logging.getLogger(__name__)

WORKFLOW_VERSION = "1"
"""The schema of the workflow below. Recovery matches it: it changes only when the steps do, never with a release."""

_QUEUE = "train"
_SWEEP_S = 0.3
_LOOK_S = 60.0
"""Between looks at whether what is left over is to be collected."""
_NO_KEY_S = 2.0
"""The pause after a job whose tenant's key was not to be had."""
_UNDER_WAY = ("PENDING", "ENQUEUED", "DELAYED")


class _JSON(Serializer):
    """Ids and words only, as JSON: what is no plain JSON is refused, and nothing is ever unpickled."""

    def serialize(self, data: Any) -> str:
        return json.dumps(data)

    def deserialize(self, serialized_data: str) -> Any:
        return json.loads(serialized_data)

    def name(self) -> str:
        return "cloister_json"


def main() -> int:
    message = processes.receive(follows_thread=True)
    settings = Settings.model_validate_json(message["settings"])
    logs.configure(settings)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    with processes.locked(
        settings.data_dir / "locks" / "worker.lock", wait_s=10, what="the worker of this data directory"
    ):
        service = deployment.open_service(settings, keys=KeyRing.from_message(message["keys"]))
        try:
            _run(service, stopping)
        except BaseException as error:
            log.error("worker.failed", extra={"error": type(error).__name__})
            logging.shutdown()
            os._exit(1)  # DBOS's threads would live on, without our lock; the supervisor starts the next worker
    return 0


def _run(service: Service, stopping: threading.Event) -> None:
    running, template = _Running(), Template()
    frozen: dict[str, str] = {}  # jobs whose last turn ended before they did, and the workflow that it was
    DBOS(
        config={
            "name": "cloister",
            "system_database_url": service.settings.workflow_database_url,
            "application_version": WORKFLOW_VERSION,
            "executor_id": "worker",
            "serializer": _JSON(),
            "run_migrations": service.settings.is_sqlite,
            "log_level": "ERROR",
        }
    )

    @DBOS.step()
    def attempt(tenant_id: str, job_id: str) -> str:
        try:
            with running:
                return run_attempt(service, tenant_id, job_id, template=template, stopping=stopping)
        except (LedgerRolledBack, TenantSuspended):
            return "frozen"
        except (TenantKeyRefused, KeyProviderError) as error:
            # The tenant's key is withdrawn, or its provider is at fault: the job waits for it, and others have their turn.
            log.error("attempt.no_key", extra={"job_id": job_id, "error": type(error).__name__})
            stopping.wait(_NO_KEY_S)
            return "frozen"
        except (SQLAlchemyError, Unavailable, StartRefused) as error:
            # A step never raises: its error would be stored, and who knows what it says.
            log.error("attempt.not_run", extra={"job_id": job_id, "error": type(error).__name__})
            return "again"
        except Exception as error:
            log.error("attempt.impossible", extra={"job_id": job_id, "error": type(error).__name__})
            abandon(service, tenant_id, job_id)
            return "over"

    @DBOS.workflow(name="train", max_recovery_attempts=1_000_000)
    def train(tenant_id: str, job_id: str) -> str:
        # 'frozen' ends this turn: the tenant, its ledger or its key keeps the job waiting. The sweeper takes it up again.
        while (outcome := attempt(tenant_id, job_id)) == "again":
            if stopping.wait(1.0):
                threading.Event().wait()  # never returns: the process ends, and the next worker goes on here
        if outcome == "frozen":
            frozen[job_id] = str(DBOS.workflow_id)
        return outcome

    DBOS.launch()
    queue = DBOS.register_queue(
        _QUEUE,
        worker_concurrency=service.settings.jobs_at_once,
        polling_interval_sec=_SWEEP_S,
        on_conflict="always_update",
    )
    log.info("worker.ready")
    threading.Thread(target=_collect, args=(service, stopping), name="collection", daemon=True).start()
    enqueued: set[str] = set()
    while not stopping.wait(_SWEEP_S):
        try:
            waiting = _waiting(service)
            for job_id, workflow_id in list(frozen.items()):
                status = DBOS.get_workflow_status(workflow_id)
                if status is None or status.status not in _UNDER_WAY:  # a turn that is ending counts as under way
                    enqueued.discard(job_id)
                    del frozen[job_id]
            for tenant_id, job_id in waiting:
                if job_id not in enqueued:
                    with SetWorkflowID(_workflow_id(job_id)):
                        queue.enqueue(train, tenant_id, job_id)
            enqueued = {job_id for _, job_id in waiting}
        except Exception as error:  # the database was away: look again
            log.error("worker.sweep_failed", extra={"error": type(error).__name__})
    log.info("worker.stopping")
    running.wait_for_none(GRACE_S + 1)
    # Not DBOS.destroy(): it waits for workflows, and these are meant to go on in the next worker.
    logging.shutdown()
    os._exit(0)


class _Running:
    """Counts the attempts that are under way, so that a stopping worker can see them to their chunk boundaries."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def __enter__(self) -> None:
        with self._changed:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait_for_none(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._count == 0, timeout_s)


def _collect(service: Service, stopping: threading.Event) -> None:
    """Collect what is left over when that is due. What keeps it from that keeps it from nothing else; it is tried again."""
    while not stopping.wait(_LOOK_S):
        try:
            if collection.is_due(service):
                log.info("collection.done", extra=asdict(collection.collect(service)))
        except Exception as error:
            log.error("collection.failed", extra={"error": type(error).__name__})


def _workflow_id(job_id: str) -> str:
    """The job's own id, so that enqueuing twice is enqueuing once; another one where a turn of that id ended and the job did not."""
    status = DBOS.get_workflow_status(job_id)
    return job_id if status is None or status.status in _UNDER_WAY else f"{job_id}.{secrets.token_hex(8)}"


def _waiting(service: Service) -> list[tuple[str, str]]:
    """The jobs that are not over, oldest first, but for those of tenants that are suspended or whose ledger is behind its anchor."""
    with reading(service.engine, ALL_TENANTS) as session:
        rows = session.execute(jobs_not_of(FINAL)).all()
        frozen = {tenant_id for tenant_id in {row.tenant_id for row in rows} if _is_frozen(service, session, tenant_id)}
        return [(tenant_id, job_id) for tenant_id, job_id in rows if tenant_id not in frozen]


def _is_frozen(service: Service, session: Session, tenant_id: str) -> bool:
    if is_suspended(session, tenant_id):
        return True
    try:
        chain.require_current(session, anchors_of(service.engine), tenant_id)
    except LedgerRolledBack:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
