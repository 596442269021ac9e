"""Jobs and models as things to hold: re-attachable by id, sync and async over the same operations."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister._http import AsyncSender, Sender
from cloister._operations import Operations
from cloister._progress import Progress
from cloister.wire import jobs as wire
from cloister.wire.certificate import Certificate, InvalidCertificate, Keys, verify
from cloister.wire.plans import NetworkView
from cloister.wire.private_deployments import Role

__all__ = ["AsyncJob", "AsyncModel", "Job", "JobState", "Model"]


class JobState:
    """What was last seen of a job."""

    def __init__(self, operations: Operations, seen: wire.Job) -> None:
        self._operations, self._seen = operations, seen

    @property
    def id(self) -> str:
        return self._seen.id

    @property
    def status(self) -> str:
        """'queued', 'running', 'cancelling', 'done', 'failed' or 'cancelled', when last looked at."""
        return self._seen.status

    @property
    def steps(self) -> int:
        return self._seen.steps

    @property
    def steps_done(self) -> int:
        """At the last chunk boundary, when last looked at."""
        return self._seen.steps_done

    def _see(self, seen: wire.Job) -> None:
        self._seen = seen

    def _say_how_to_return(self) -> None:
        sys.stderr.write(f"\nStopped watching; the job goes on. client.jobs.get({self.id!r}) finds it again.\n")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.status} {self.steps_done}/{self.steps} steps>"


class Job(JobState):
    """A training run on the server. It goes on whether anyone watches or not."""

    def __init__(self, sender: Sender, operations: Operations, seen: wire.Job) -> None:
        super().__init__(operations, seen)
        self._sender = sender

    def refresh(self) -> Job:
        """Look again."""
        self._see(self._sender.run(self._operations.get("jobs", self.id, wire.Job)))
        return self

    def wait(self, *, progress: bool = False, timeout_s: float | None = None) -> Model:
        """Watch until the job is over; the model version it published.

        Ctrl-C stops watching and not the job. While the server is away (a restart, say) it goes on asking: until
        `timeout_s`, or for a minute without an answer where there is none. Raises JobFailed, JobCancelled, StillRunning
        after `timeout_s`, or what kept it from watching; every error names the job.
        """
        bar = Progress(wanted=progress)

        def show(seen: wire.Job) -> None:
            self._see(seen)
            bar(seen)

        try:
            done = self._sender.run(self._operations.watch(self.id, show=show, timeout_s=timeout_s))
        except KeyboardInterrupt:
            bar.close()  # before the hint, which would be drawn over
            self._say_how_to_return()
            raise
        finally:
            bar.close()
        return Model(self._sender, self._operations, done)

    def cancel(self) -> Job:
        """Ask the job to stop at its next chunk boundary. Steps that ran stay charged; nothing is published."""
        self._see(self._sender.run(self._operations.cancel(self.id)))
        return self


class AsyncJob(JobState):
    """A training run on the server, watched from an event loop."""

    def __init__(self, sender: AsyncSender, operations: Operations, seen: wire.Job) -> None:
        super().__init__(operations, seen)
        self._sender = sender

    async def refresh(self) -> AsyncJob:
        """Look again."""
        self._see(await self._sender.run(self._operations.get("jobs", self.id, wire.Job)))
        return self

    async def wait(self, *, progress: bool = False, timeout_s: float | None = None) -> AsyncModel:
        """As `Job.wait`."""
        bar = Progress(wanted=progress)

        def show(seen: wire.Job) -> None:
            self._see(seen)
            bar(seen)

        try:
            done = await self._sender.run(self._operations.watch(self.id, show=show, timeout_s=timeout_s))
        except asyncio.CancelledError:  # which is how Ctrl-C arrives here
            bar.close()
            if progress:
                self._say_how_to_return()
            raise
        finally:
            bar.close()
        return AsyncModel(self._sender, self._operations, done)

    async def cancel(self) -> AsyncJob:
        """As `Job.cancel`."""
        self._see(await self._sender.run(self._operations.cancel(self.id)))
        return self


class _ModelState:
    """One version of a model."""

    def __init__(self, operations: Operations, seen: wire.ModelVersion) -> None:
        self._operations, self._seen = operations, seen

    @property
    def id(self) -> str:
        """The model's; the version is `version`."""
        return self._seen.model

    @property
    def name(self) -> str:
        return self._seen.name

    @property
    def version(self) -> int:
        return self._seen.version

    @property
    def certificate(self) -> dict[str, Any]:
        """The signed envelope; `cloister.verify(model.certificate, keys)` opens it offline."""
        return self._seen.certificate

    def verify(self, keys: Keys) -> Certificate:
        """The certificate's statement, signed by one of `keys` and about this very version. Raises InvalidCertificate.

        Offline: `keys` are those that were pinned from `client.certificate_keys()`, or got from the operator.
        """
        statement = verify(self.certificate, keys)
        if (statement.model, statement.version) != (self.id, self.version):
            raise InvalidCertificate(
                f"the certificate is of {statement.model} version {statement.version}, and not of this model version"
            )
        return statement

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} version {self.version}>"


class Model(_ModelState):
    """A version of a model that answers predictions."""

    def __init__(self, sender: Sender, operations: Operations, seen: wire.ModelVersion) -> None:
        super().__init__(operations, seen)
        self._sender = sender

    def schema(self) -> wire.ModelSchema:
        """What this version reads and predicts: `inputs`, `target`, `output`, and `classes`, which the indices stand for."""
        return self._sender.run(self._operations.schema(self.id, self.version))

    def deployment_statement(self) -> dict[str, Any]:
        """The server's signed word that it answers with this version, about its certificate; see `cloister.wire.statements`."""
        return self._sender.run(self._operations.statement(self.id, self.version, "deployment"))

    def audit_statement(self) -> dict[str, Any]:
        """What canaries gave away, signed, where the run was planned with `audit=True`. Raises NotFound where it was not."""
        return self._sender.run(self._operations.statement(self.id, self.version, "audit"))

    def network(self) -> NetworkView:
        """The network as a table (`print`) and as a picture (in a notebook), for whoever may publish to the model."""
        return self._sender.run(self._operations.network(self.id, self.version))

    def predict(self, x: Any, *, decoded: bool = False) -> NDArray[Any]:
        """int64 indices of the predicted categories, or float32 values; one per row.

        `x` is one array where the model reads one input, else a dict with an array per input; always with a row axis. A
        category is given as in an upload: as its text, or as its index in an array of integers. `decoded` gives the
        categories themselves, as text, for their indices.
        """
        return self._sender.run(self._operations.predict(self.id, self.version, x, decoded=decoded))

    def predict_proba(self, x: Any) -> NDArray[np.float32]:
        """Probabilities, [rows, categories], in the order of `schema().classes`."""
        return self._sender.run(self._operations.predict_proba(self.id, self.version, x))

    def deploy_privately(
        self, public_rows: Any, *, parties: tuple[Role, Role], dealer: Role, development: bool = False
    ) -> dict[str, bytes]:
        """Share this version's weights between two parties; by role, the file for its operator, sealed for that role alone.

        The records are what `cloister-server identity` printed. `public_rows`, at most 64, as for `predict`, are nobody's secret: the
        error against the model in the clear is measured on them, and stated. Takes `model.deploy_private`.
        """
        asked = self._operations.deploy_privately(
            self.id, self.version, public_rows, parties=parties, dealer=dealer, development=development
        )
        return self._sender.run(asked)[1]

    def end_private(self) -> None:
        """End this version's private deployment: no client is permitted any more, within a minute."""
        self._sender.run(self._operations.end_private(self.id, self.version))


class AsyncModel(_ModelState):
    """A version of a model that answers predictions, asked from an event loop."""

    def __init__(self, sender: AsyncSender, operations: Operations, seen: wire.ModelVersion) -> None:
        super().__init__(operations, seen)
        self._sender = sender

    async def schema(self) -> wire.ModelSchema:
        """As `Model.schema`."""
        return await self._sender.run(self._operations.schema(self.id, self.version))

    async def deployment_statement(self) -> dict[str, Any]:
        """As `Model.deployment_statement`."""
        return await self._sender.run(self._operations.statement(self.id, self.version, "deployment"))

    async def audit_statement(self) -> dict[str, Any]:
        """As `Model.audit_statement`."""
        return await self._sender.run(self._operations.statement(self.id, self.version, "audit"))

    async def network(self) -> NetworkView:
        """As `Model.network`."""
        return await self._sender.run(self._operations.network(self.id, self.version))

    async def predict(self, x: Any, *, decoded: bool = False) -> NDArray[Any]:
        """As `Model.predict`."""
        return await self._sender.run(self._operations.predict(self.id, self.version, x, decoded=decoded))

    async def predict_proba(self, x: Any) -> NDArray[np.float32]:
        """As `Model.predict_proba`."""
        return await self._sender.run(self._operations.predict_proba(self.id, self.version, x))

    async def deploy_privately(
        self, public_rows: Any, *, parties: tuple[Role, Role], dealer: Role, development: bool = False
    ) -> dict[str, bytes]:
        """As `Model.deploy_privately`."""
        asked = self._operations.deploy_privately(
            self.id, self.version, public_rows, parties=parties, dealer=dealer, development=development
        )
        return (await self._sender.run(asked))[1]

    async def end_private(self) -> None:
        """As `Model.end_private`."""
        await self._sender.run(self._operations.end_private(self.id, self.version))
