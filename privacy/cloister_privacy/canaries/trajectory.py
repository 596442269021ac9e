"""The noisy sum of every step of a run, read from what the run releases. Knows `train` and its snapshots; nothing inside them.

With plain SGD a step moves the weights by learning rate / divisor times the noisy sum, so two snapshots give that sum back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.wire.architecture import Architecture
from cloister.wire.plans import SGD, TrainingSpec
from cloister_privacy import tensors
from cloister_privacy.errors import CheckpointRefused, TrainingError
from cloister_privacy.plan import DPPlan
from cloister_privacy.training import train

__all__ = ["SENSITIVITY_SLACK", "Trajectory", "observe"]

SENSITIVITY_SLACK = 1e-5
"""Rounding may let a contribution exceed the clip by this much, relatively, and the noise is calibrated to that."""

_FORMAT = "cloister.checkpoint/1"
_DATASET = "ds_" + "0" * 32  # of synthetic rows: no dataset at all

_MOVE = 2.0**-10
"""How far one standard deviation of noise moves a weight: little for the weights, and much for float32's last bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """All steps of a run but the first, before which the weights are not released."""

    sums: NDArray[np.float64]
    """[steps, parameters]: the clipped sums plus noise."""
    before: NDArray[np.float64]
    """[steps, parameters]: the weights that each step started from."""
    tensors: Mapping[str, slice]
    """Where each parameter tensor lies."""
    noise_std: float
    """What the standard deviation of the noise must be, by the public numbers."""
    broken: TrainingError | None
    """Why the run ended before its time: its weights ran away, or the engine refused a step."""


def observe(
    architecture: Architecture,
    rows: Mapping[str, NDArray[Any]],
    *,
    nominal_size: int,
    batch_size: int,
    steps: int,
    noise_multiplier: float,
    clip: float,
    device: str = "cpu",
) -> Trajectory:
    """Train on public or synthetic rows and give back the noisy sums of `steps` steps (one more runs before them)."""
    spec = _spec(
        architecture,
        nominal_size=nominal_size,
        batch_size=batch_size,
        steps=steps + 1,
        noise_multiplier=noise_multiplier,
        clip=clip,
        optimizer=SGD(learning_rate=batch_size * _MOVE / (noise_multiplier * clip)),
    )
    released: list[dict[str, NDArray[np.float64]]] = []

    def keep(_done: int, snapshot: Callable[[], bytes]) -> bool:
        state, _ = tensors.read(snapshot(), format=_FORMAT, refused=CheckpointRefused)
        released.append(
            {
                name: weight.numpy().astype(np.float64).ravel()
                for name, weight in state.items()
                if name.startswith("weights.")
            }
        )
        return True

    broken: TrainingError | None = None
    try:
        train(
            spec,
            rows,
            plan=DPPlan.of(spec),
            device=device,
            chunk_steps=1,
            before_chunk=lambda first, end: None,
            after_chunk=keep,
        )
    except TrainingError as error:
        broken = error
    places, end = {}, 0
    for name, weight in sorted(released[0].items()) if released else ():  # a snapshot keeps no order of its own
        places[name] = slice(end, end + len(weight))
        end += len(weight)
    weights = np.array([np.concatenate([each[name] for name in places]) for each in released]).reshape(
        len(released), end
    )
    return Trajectory(
        sums=(weights[:-1] - weights[1:]) * (noise_multiplier * clip / _MOVE),
        before=weights[:-1],
        tensors=places,
        noise_std=noise_multiplier * clip * (1 + SENSITIVITY_SLACK),
        broken=broken,
    )


def _spec(
    architecture: Architecture,
    *,
    nominal_size: int,
    batch_size: int,
    steps: int,
    noise_multiplier: float,
    clip: float,
    optimizer: SGD,
) -> TrainingSpec:
    """Every spec that an audit runs is made here: what is not about the audit gets the plainest value there is."""
    return TrainingSpec(
        dataset=_DATASET,
        architecture=architecture,
        nominal_size=nominal_size,
        capacity=nominal_size,
        batch_size=batch_size,
        steps=steps,
        noise_multiplier=noise_multiplier,
        clip=clip,
        delta=1e-5,  # nothing is charged for synthetic rows
        optimizer=optimizer,
    )
