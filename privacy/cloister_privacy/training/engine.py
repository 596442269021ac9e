"""The training loop: sample, clip, add noise, step. Its caller charges each chunk before any row of it is read.

Guarantee: DP-SGD at row level, add/remove adjacency, Poisson sampling, with the plan's rate, noise and steps; what leaves is
the weights after the last step and snapshots between steps. Nothing else that depends on rows is returned, raised or logged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloister.wire.plans import TrainingSpec
from cloister_privacy.architecture.network import Network, build
from cloister_privacy.architecture.weights import to_bytes
from cloister_privacy.errors import TrainingDiverged, TrainingError
from cloister_privacy.plan import DPPlan
from cloister_privacy.training import checkpoint
from cloister_privacy.training.clipping import ClippedGradients
from cloister_privacy.training.examples import Examples
from cloister_privacy.training.optimizer import NoisyOptimizer
from cloister_privacy.training.sampler import PoissonSampler

__all__ = ["train"]

_MICRO_BATCH_BYTES = 2**26
_COPIES = 6  # of a row's activations that a pass holds at once: values, gradients, masked copies


def train(
    spec: TrainingSpec,
    rows: Mapping[str, NDArray[Any]],
    *,
    plan: DPPlan,
    device: str,
    chunk_steps: int,
    before_chunk: Callable[[int, int], None],
    after_chunk: Callable[[int, Callable[[], bytes]], bool],
    resume: bytes | None = None,
) -> bytes | None:
    """Train `spec` on `rows` in chunks of `chunk_steps`; the weights as `to_bytes` writes them, or None where stopped.

    `before_chunk(first, end)` runs before any row is read for the steps [first, end): charge them there. `after_chunk(done,
    snapshot)` runs after the noise of step `done`; `snapshot()` gives the checkpoint that `resume` takes, and answering False
    stops the run. Sampling and noise are fresh in every call, so a resumed step is a new event.

    Raises CheckpointRefused, RowsDoNotFit, TrainingDiverged, or what the callbacks raise.
    """
    if DPPlan.of(spec, unit=plan.unit, adjacency=plan.adjacency) != plan:
        raise TrainingError(
            "the plan is not the spec's; what is charged must be what is trained, so take DPPlan.of(spec)"
        )
    if chunk_steps < 1:
        raise TrainingError("chunk_steps must be at least 1")
    run = _Run(spec, plan, device=device)
    done = run.resume(resume) if resume is not None else 0
    examples: Examples | None = None
    while done < spec.steps:
        end = min(done + chunk_steps, spec.steps)
        before_chunk(done, end)
        examples = examples or Examples(spec.architecture, rows, device=device)
        run.steps(examples, end - done)
        done = end
        if not after_chunk(done, partial(run.snapshot, done)):
            return None
    return to_bytes(run.network)


class _Run:
    """Network, clipping and optimizer of one attempt."""

    def __init__(self, spec: TrainingSpec, plan: DPPlan, *, device: str) -> None:
        self.network: Network = build(spec.architecture).to(device)
        self._spec, self._plan = spec, plan
        self._clipped = ClippedGradients(self.network)
        self._optimizer = NoisyOptimizer(self.network.parameters(), optimizer=spec.optimizer, plan=plan)
        widths = sum(sum(parameter.shape) for parameter in self.network.parameters())
        self._micro_batch = max(1, _MICRO_BATCH_BYTES // (4 * _COPIES * widths))

    def resume(self, body: bytes) -> int:
        return checkpoint.resume_from(body, self.network, self._optimizer, spec=self._spec)

    def snapshot(self, done: int) -> bytes:
        return checkpoint.snapshot(self.network, self._optimizer, spec=self._spec, step=done)

    def steps(self, examples: Examples, count: int) -> None:
        sampler = PoissonSampler(examples.count, batch_size=self._plan.batch_size, nominal_size=self._plan.nominal_size)
        self.network.train()
        with warnings.catch_warnings():
            # Inputs need no gradient; torch warns that the first layer's hook sees none for them.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            for _ in range(count):
                self._step(examples, sampler.draw())
        # The noisy weights may tell this; a single example never may.
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.network.parameters()):
            raise TrainingDiverged("the weights are no longer finite; lower the learning rate")

    def _step(self, examples: Examples, drawn: NDArray[np.intp]) -> None:
        """One step on the drawn rows, in micro-batches; with none drawn, a step of pure noise."""
        starts = range(0, max(1, len(drawn)), self._micro_batch)
        for start in starts:
            columns, target = examples.batch(drawn[start : start + self._micro_batch])
            self.network.loss(self._clipped(columns), target).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._clipped.write(self._plan.clip)
            self._optimizer.signal_skip_step(start != starts[-1])
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
