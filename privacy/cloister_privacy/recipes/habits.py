"""How a network is trained when a request does not say: batch, epochs and optimizer, from public numbers. Sees no rows.

The constants were chosen on public data (Fashion-MNIST, Adult, SST-2, spoken and handwritten digits, diabetes), on splits kept
back from training.
"""

from __future__ import annotations

import math
from typing import Protocol

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture, Loss
from cloister.wire.plans import SGD, Optimizer, Schedule, Tail
from cloister_privacy.plan import DPPlan
from cloister_privacy.recipes.networks import is_linear_on_fixed_features

__all__ = ["Habits", "habits_of"]

_MOMENTUM = 0.9


class Habits(Protocol):
    """What a request leaves out."""

    def batch_size(self, nominal_size: int) -> int:
        """The expected batch."""

    def steps(self, nominal_size: int, batch_size: int) -> int:
        """How many steps there are."""

    def optimizer(self, plan: DPPlan) -> Optimizer:
        """For steps of this plan."""


def habits_of(architecture: Architecture) -> Habits:
    """Those for a convex loss on fixed features, or those for any other network."""
    if is_linear_on_fixed_features(architecture.layers) and "entropy" in architecture.loss:
        return _Convex(architecture)
    return _General(architecture.loss)


class _Convex:
    """Linear layers from zero: every row in every step, since then the noise of a step is spread over most of them, and few steps."""

    def __init__(self, architecture: Architecture) -> None:
        kinds = {type(layer) for layer in architecture.layers}
        self._steps = 600 if wire.HashedText in kinds else 100
        self._rate = 64.0 if wire.Scattering in kinds else 4.0 if wire.HashedText in kinds else 8.0

    def batch_size(self, nominal_size: int) -> int:
        return nominal_size

    def steps(self, nominal_size: int, batch_size: int) -> int:
        return self._steps

    def optimizer(self, plan: DPPlan) -> Optimizer:
        rate = float(f"{self._rate / plan.clip:.3g}")
        return SGD(
            learning_rate=rate, momentum=_MOMENTUM, schedule=Schedule(shape="cosine"), averaging=Tail(share=0.25)
        )


class _General:
    """Any network: batches that grow with the root of the rows, and a rate that lets the noise of all steps move a weight so far."""

    _EPOCHS = 20
    _BATCH_PER_ROOT = 12  # batches of 12 sqrt(nominal_size): large ones drown the noise
    _LEAST_BATCH = 64
    _NOISE_WALK = 0.016
    """The learning rate lets the noise of all steps move a weight by about this, before momentum makes it ten times as much."""

    _LARGEST_RATE = 1.0
    _REGRESSION_WALK, _REGRESSION_LARGEST = 0.003, 0.05
    """The same where values are predicted: nothing squashes the last layer, so every unit of noise reaches the output."""

    def __init__(self, loss: Loss) -> None:
        is_regression = loss in ("mean_squared_error", "huber")
        self._walk = self._REGRESSION_WALK if is_regression else self._NOISE_WALK
        self._largest = self._REGRESSION_LARGEST if is_regression else self._LARGEST_RATE

    def batch_size(self, nominal_size: int) -> int:
        return min(nominal_size, max(self._LEAST_BATCH, round(self._BATCH_PER_ROOT * math.sqrt(nominal_size))))

    def steps(self, nominal_size: int, batch_size: int) -> int:
        return math.ceil(self._EPOCHS * nominal_size / batch_size)

    def optimizer(self, plan: DPPlan) -> Optimizer:
        noise_per_step = plan.noise_multiplier / plan.divisor  # of a gradient clipped to 1
        rate = min(self._largest, self._walk / (noise_per_step * math.sqrt(plan.steps)))
        return SGD(learning_rate=float(f"{rate / plan.clip:.3g}"), momentum=_MOMENTUM)
