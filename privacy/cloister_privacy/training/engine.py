"""The training loop: sample, clip, add noise, step. Its caller charges each chunk before any row of it is read.

Guarantee: DP-SGD at the level of the plan's unit, add/remove adjacency, Poisson sampling, with the plan's rate, noise and steps;
what leaves is the weights after the last step and snapshots between steps. Nothing else that depends on rows is returned, raised
or logged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister.wire.plans import TrainingSpec
from cloister_privacy.architecture.weights import to_bytes
from cloister_privacy.errors import TrainingDiverged, TrainingError
from cloister_privacy.plan import DPPlan
from cloister_privacy.training import checkpoint
from cloister_privacy.training.examples import Batch, Examples, keeps_stem, synthetic
from cloister_privacy.training.sampler import PoissonSampler, UserSampler, sampler_of
from cloister_privacy.training.start import adapted, network_of, plain
from cloister_privacy.training.steps import GUARD_EXAMPLES, PrivateSteps
from cloister_privacy.training.updates import Updates

__all__ = ["train"]


def train(
    spec: TrainingSpec,
    rows: Mapping[str, NDArray[Any]],
    *,
    plan: DPPlan,
    device: str,
    chunk_steps: int,
    before_chunk: Callable[[int, int], None],
    after_chunk: Callable[[int, Callable[[], bytes]], bool],
    initial: bytes | None = None,
    resume: bytes | None = None,
    units: Callable[[], NDArray[np.integer[Any]]] | None = None,
) -> bytes | None:
    """Train `spec` on `rows` in chunks of `chunk_steps`; the weights as `to_bytes` writes them, or None where stopped.

    `before_chunk(first, end)` runs before any row is read for the steps [first, end): charge them there. `after_chunk(done,
    snapshot)` runs after the noise of step `done`; `snapshot()` gives the checkpoint that `resume` takes, and answering False
    stops the run. `initial` are the weights that `spec.initial` names, as safetensors. Sampling and noise are fresh in every
    call, so a resumed step is a new event. Where the plan's unit is a user,
    `units()` tells whose each row is: [rows], one number for each user; it is called when the rows are first read.

    Raises ArchitectureRefused, CheckpointRefused, RowsDoNotFit, TrainingDiverged, or what the callbacks raise.
    """
    if DPPlan.of(spec, unit=plan.unit, adjacency=plan.adjacency) != plan:
        raise TrainingError(
            "the plan is not the spec's; what is charged must be what is trained, so take DPPlan.of(spec)"
        )
    if chunk_steps < 1:
        raise TrainingError("chunk_steps must be at least 1")
    if (plan.unit == "user") != (units is not None):
        raise TrainingError("a plan by user needs `units`, which tell whose each row is, and a plan by row takes none")
    if (spec.initial is None) != (initial is None):
        raise TrainingError("a spec that starts from given weights needs them, and one that does not takes none")
    run = _Run(spec, plan, initial=initial, device=device)
    done = run.resume(resume) if resume is not None else 0
    examples: Examples | None = None
    sampler: PoissonSampler | UserSampler | None = None
    while done < spec.steps:
        end = min(done + chunk_steps, spec.steps)
        before_chunk(done, end)
        examples = examples or Examples(run.network, rows, slots=_slots(plan), device=device)
        sampler = sampler or sampler_of(plan, examples.count, units() if units is not None else None)
        run.steps(examples, sampler, done, end)
        done = end
        if not after_chunk(done, partial(run.snapshot, done)):
            return None
    return to_bytes(plain(run.updates.model) if spec.lora is not None else run.updates.model)


class _Run:
    """Network, steps and updates of one attempt."""

    def __init__(self, spec: TrainingSpec, plan: DPPlan, *, device: str, initial: bytes | None = None) -> None:
        network = network_of(spec.architecture, initial)
        self.network = (network if spec.lora is None else adapted(network, spec.lora)).to(device)
        self.updates = Updates(self.network, spec)
        self._spec, self._plan = spec, plan
        tried, targets = synthetic(spec.architecture, GUARD_EXAMPLES, device=device)
        if keeps_stem(self.network, slots=_slots(plan)):
            tried = self.network.stem(tried)
        self._private = PrivateSteps(
            self.network,
            _losses,
            plan=plan,
            optimizer=self.updates.optimizer,
            synthetic=(tried, targets),
            clipping=spec.clipping,
            precision=spec.precision,
        )

    def resume(self, body: bytes) -> int:
        return checkpoint.resume_from(
            body, self.network, self._private.optimizer, model=self.updates.model, spec=self._spec
        )

    def snapshot(self, done: int) -> bytes:
        return checkpoint.snapshot(
            self.network, self._private.optimizer, model=self.updates.model, spec=self._spec, step=done
        )

    def steps(self, examples: Examples, sampler: PoissonSampler | UserSampler, first: int, end: int) -> None:
        for step in range(first, end):
            self.updates.before(step)
            self._step(examples, sampler.draw())
            self.updates.after(step)
        # The noisy weights may tell this; a single example never may.
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.network.parameters()):
            raise TrainingDiverged("the weights are no longer finite; lower the learning rate")

    def _step(self, examples: Examples, drawn: NDArray[np.intp]) -> None:
        self._private.step(drawn, examples.batch)


def _slots(plan: DPPlan) -> int:
    """The most rows that there can be; 0 where the plan does not tell it, since a user may have any number of them."""
    return plan.capacity if plan.unit == "row" else 0


def _losses(network: nn.Module, batch: Batch) -> Tensor:
    columns, target = batch
    outputs = network(columns)
    losses: Tensor = network.losses(outputs, target)  # type: ignore[operator]  # a Network, or its twin
    return losses
