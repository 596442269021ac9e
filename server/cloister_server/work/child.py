"""The child process: one attempt of one job, training or query. Knows its job's keys and nobody else's; writes only what it may.

Every chunk is in the ledger before its first read of data. What leaves this process is sealed (checkpoints, weights) or
one word about how it ended. Nothing of rows is ever logged: an error is told by its type and place alone.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from cloister.wire.answers import Answer
from cloister.wire.columns import Column, UnitColumn
from cloister.wire.jobs import ModelSchema
from cloister.wire.plans import TrainingSpec
from cloister.wire.queries import QueryRequest
from cloister.wire.rows import arrays_of, open_form
from cloister_privacy.errors import TrainingDiverged
from cloister_privacy.plan import DPPlan
from cloister_privacy.sealing import Arena, open_sealed, seal
from cloister_privacy.sealing.sources import Sealed
from cloister_server import answers, budgets, datasets, logs, models, processes
from cloister_server.errors import Unavailable
from cloister_server.settings import Settings
from cloister_server.store.acting import for_tenants
from cloister_server.store.anchors import Anchors
from cloister_server.store.blobs import Blobs
from cloister_server.store.session import new_engine, reading, writing
from cloister_server.store.tables import Attempt, Dataset, Job, ModelVersion, SealedObject, Source
from cloister_server.vault import DataKey, forget_objects

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cloister_privacy.architecture import Network

log = logging.getLogger(__name__)

AUDIT_STEPS = 8

_Ending = Literal["trained", "answered", "paused", "cancelled", "budget", "diverged", "internal"]


class _Paused(Exception):
    """The worker is stopping, and this attempt has reached a chunk boundary."""


def main() -> int:
    message = processes.receive()
    stop_asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop_asked.append(1))
    attempt = _Running(message)
    logs.configure(attempt.settings)
    try:
        if attempt.kind == "query":
            attempt.end("answered", attempt.answer())
        else:
            result = attempt.train(stop_asked=lambda: bool(stop_asked))
            attempt.end("trained" if result else "cancelled", result)
    except (_Paused, budgets.TenantSuspended):
        attempt.end("paused")
    except budgets.Cancelled:
        attempt.end("cancelled")
    except budgets.StaleAttempt:
        log.info("attempt.stale", extra={"job_id": attempt.job_id})
    except budgets.ChunkRefused:
        attempt.end("budget")
    except TrainingDiverged:
        attempt.end("diverged")
    except (SQLAlchemyError, Unavailable) as error:
        # No outcome: this attempt counts as died, and the next goes on from the checkpoint once the database is back.
        log.error("attempt.interrupted", extra={"job_id": attempt.job_id, "error": type(error).__name__})
        return 1
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.name}:{place.lineno}"
        log.error("attempt.failed", extra={"job_id": attempt.job_id, "error": type(error).__name__, "where": where})
        attempt.end("internal")
        return 1
    return 0


class _Running:
    """The attempt as its message describes it."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        self.settings = Settings.model_validate_json(message["settings"])
        self.tenant_id: str = message["tenant"]
        self.job_id: str = message["job"]
        self.kind: str = message["kind"]
        self._message = message
        self._number: int = message["attempt"]
        self._spec_key = self._key(message["spec"])
        self._part_keys = [self._key(part) for part in message["parts"]]
        self._checkpoint_keys = [self._key(each) for each in message.get("checkpoints", ())]
        url, anchors = self.settings.database_url.get_secret_value(), Anchors(self.settings.anchor_dir)
        self._engine: Engine = new_engine(url, anchors=anchors)
        self._blobs = Blobs.open_at(self.settings)

    def train(self, *, stop_asked: Callable[[], bool]) -> dict[str, Any] | None:
        """Run the steps that are left; what the weights are, or None where the job was cancelled."""
        from cloister_privacy.training import train

        spec = TrainingSpec.model_validate_json(bytes(self._open(self._spec_key)))
        with reading(self._engine, for_tenants(self.tenant_id)) as session:
            job = session.get_one(Job, (self.tenant_id, self.job_id))
            source = session.get_one(Source, (self.tenant_id, job.source_id))
            columns = datasets.schema_of(session.get_one(Dataset, (self.tenant_id, job.dataset_id)))

        def after_chunk(steps_done: int, snapshot: Callable[[], bytes]) -> bool:
            if steps_done < spec.steps:
                self._save(steps_done, snapshot())
                if stop_asked():
                    raise _Paused
            return True

        rows, message = self._rows(columns), self._message
        plan, device = DPPlan.of(spec, unit=source.unit, adjacency=source.adjacency), device_of(self.settings.device)
        weights_key = self._key(message["weights"])
        weights = train(
            spec,
            rows,
            units=rows.units if source.unit == "user" else None,
            plan=plan,
            device=device,
            chunk_steps=message["chunk_steps"],
            before_chunk=self._open_chunk,
            after_chunk=after_chunk,
            initial=bytes(self._open(self._key(message["initial"]))) if message["initial"] else None,
            resume=bytes(self._open(self._key(message["resume"]))) if message["resume"] else None,
        )
        if weights is None:
            return None
        sealed = self._seal(weights_key, weights)
        self._blobs.put(self.tenant_id, weights_key.object_id, sealed)
        return {
            "weights_id": weights_key.object_id,
            "sealed_bytes": len(sealed),
            "sealed_digest": hashlib.sha256(sealed).hexdigest(),
            **_digests(weights),
            **({"audit": _audit(plan, device=device)} if spec.audit else {}),
        }

    def answer(self) -> dict[str, Any]:
        """Release the answers to a query: charged as one step, before the first row is read."""
        from cloister_privacy.queries import QueryPlan, release

        query = QueryRequest.model_validate_json(bytes(self._open(self._spec_key)))
        with reading(self._engine, for_tenants(self.tenant_id)) as session:
            job = session.get_one(Job, (self.tenant_id, self.job_id))
            source = session.get_one(Source, (self.tenant_id, job.source_id))
            dataset = session.get_one(Dataset, (self.tenant_id, job.dataset_id))
        columns = datasets.schema_of(dataset)
        arena = Arena(sys.maxsize)
        networks = {(each["model"], each["version"]): self._network(each, arena) for each in self._message["models"]}
        schemas = {
            version: ModelSchema(
                inputs=network.architecture.inputs,
                target=network.architecture.target,
                output=network.architecture.output,
            )
            for version, network in networks.items()
        }
        plan = QueryPlan.of(query, schema=columns, unit=source.unit, adjacency=source.adjacency, models=schemas)
        self._open_chunk(0, 1)
        rows = self._rows(columns)
        results = release(
            plan,
            rows,
            units=rows.units() if source.unit == "user" else None,
            predictions=self._predictions(networks, rows, slots=dataset.capacity_rows),
        )
        told = Answer(job=self.job_id, dataset=query.dataset, epsilon=plan.epsilon, results=results)
        key = self._key(self._message["answer"])
        sealed = self._seal(key, answers.padded(told))
        self._blobs.put(self.tenant_id, key.object_id, sealed)
        return {"answer_id": key.object_id, "sealed_bytes": len(sealed)}

    def _predictions(
        self, networks: Mapping[tuple[str, int], Network], rows: _Rows, *, slots: int
    ) -> dict[tuple[str, int], NDArray[np.float32]]:
        """Of each model that is asked about."""
        if not networks:
            return {}
        from cloister_privacy.queries.predictions import predictions

        device = device_of(self.settings.device)
        return {
            version: predictions(network, rows, count=rows.count, slots=slots, device=device)
            for version, network in networks.items()
        }

    def _network(self, message: Mapping[str, Any], arena: Arena) -> Network:
        """A version's network, as the API opens it to serve."""
        key, place = self._key(message["weights"]), (self.tenant_id, message["model"], message["version"])
        with reading(self._engine, for_tenants(self.tenant_id)) as session:
            certificate = models.certified(session, self.settings, session.get_one(ModelVersion, place))
        return models.open_network(self._sealed(key), key, arena=arena, certificate=certificate)

    def _rows(self, columns: Mapping[str, Column]) -> _Rows:
        return _Rows(lambda: (open_form(columns, self._open(key)) for key in self._part_keys), columns)

    def end(self, outcome: _Ending, result: dict[str, Any] | None = None) -> None:
        """Say how this attempt ended, unless a newer one has taken over."""
        with writing(self._engine, for_tenants(self.tenant_id)) as session:
            job = session.get_one(Job, (self.tenant_id, self.job_id), with_for_update=True)
            if job.attempt != self._number:
                return
            row = session.get_one(Attempt, (self.tenant_id, self.job_id, self._number))
            row.outcome, row.result = outcome, result
            if outcome in ("trained", "answered"):
                job.steps_done = job.steps

    def _open_chunk(self, first: int, last: int) -> None:
        with writing(self._engine, for_tenants(self.tenant_id)) as session:
            budgets.open_chunk(
                session,
                tenant_id=self.tenant_id,
                job_id=self.job_id,
                attempt=self._number,
                first_step=first,
                steps=last - first,
            )

    def _save(self, steps_done: int, checkpoint: bytes) -> None:
        """Seal a checkpoint under its own key, then point the job at it; the one before is removed, with its key."""
        key = self._checkpoint_keys.pop()
        sealed = self._seal(key, checkpoint)
        self._blobs.put(self.tenant_id, key.object_id, sealed)
        with writing(self._engine, for_tenants(self.tenant_id)) as session:
            job = session.get_one(Job, (self.tenant_id, self.job_id), with_for_update=True)
            if job.attempt != self._number:
                raise budgets.StaleAttempt("a newer attempt has taken this job over; this one must stop")
            before, job.checkpoint_id, job.steps_done = job.checkpoint_id, key.object_id, steps_done
            session.get_one(SealedObject, (self.tenant_id, key.object_id)).size = len(sealed)
            if before is not None:
                forget_objects(session, self._blobs, [before], tenant_id=self.tenant_id)

    def _key(self, message: dict[str, str]) -> DataKey:
        return DataKey.from_message(self.tenant_id, message)

    def _open(self, key: DataKey) -> memoryview:
        return open_sealed(self._sealed(key), key=key.secret, context=key.context)

    def _sealed(self, key: DataKey) -> Sealed:
        return self._blobs.sealed(self.tenant_id, key.object_id)

    def _seal(self, key: DataKey, plaintext: bytes) -> bytes:
        return seal(plaintext, key=key.secret, context=key.context)


class _Rows(Mapping[str, "np.ndarray[Any, Any]"]):
    """The dataset's columns, opened from their sealed parts at the first look and not before."""

    def __init__(
        self, parts: Callable[[], Iterator[dict[str, np.ndarray[Any, Any]]]], columns: Mapping[str, Column]
    ) -> None:
        self._parts, self._columns = parts, columns
        self._names = [name for name, _, _ in arrays_of(columns)]
        self._opened: dict[str, np.ndarray[Any, Any]] | None = None

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        if name not in self._names:
            raise KeyError(name)
        return self._arrays()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def count(self) -> int:
        """How many there are: private."""
        return len(next(iter(self._arrays().values())))

    def units(self) -> np.ndarray[Any, Any]:
        """Whose each row is, as one whole number per user: int64 [rows]."""
        import numpy as np

        (name,) = (name for name, column in self._columns.items() if isinstance(column, UnitColumn))
        ids, lengths = self._arrays()[name], self._arrays()[f"{name}.length"]
        # Ids are padded with zero bytes, which may also end an id: only with its length is it the user's own.
        keys = np.concatenate([ids, lengths.astype(np.uint8)[:, None]], axis=1)
        numbers: np.ndarray[Any, Any] = np.unique(keys.view(f"V{keys.shape[1]}").ravel(), return_inverse=True)[1]
        return numbers

    def _arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        if self._opened is None:
            import numpy as np

            parts = list(self._parts())
            self._opened = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self._opened


def _digests(weights: bytes) -> dict[str, str]:
    """What the certificate states of the weights, read from the bytes that were sealed."""
    from cloister_privacy.architecture import from_bytes

    network = from_bytes(weights)
    return {
        "weights_digest": hashlib.sha256(weights).hexdigest(),
        "architecture_digest": hashlib.sha256(network.architecture.model_dump_json().encode()).hexdigest(),
        "initial_digest": network.initial_digest,
    }


def _audit(plan: DPPlan, *, device: str) -> dict[str, Any]:
    """What canaries give away of the engine here at the run's own epsilon and delta; the run itself is public."""
    from cloister_privacy.canaries import audit_run

    audit = audit_run(epsilon=plan.epsilon(), delta=plan.delta, steps=AUDIT_STEPS, device=device)
    return {
        "canaries": audit.canaries,
        "steps": AUDIT_STEPS,
        "confidence": audit.confidence,
        "epsilon_lower_bound": audit.epsilon_lower_bound,
        "claimed_epsilon": audit.claimed_epsilon,
        "delta": audit.delta,
        "contradicts_claim": audit.contradicts_claim,
    }


def device_of(asked: str) -> str:
    """The device that `CLOISTER_DEVICE` asks for: `auto` is CUDA where there is one."""
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
