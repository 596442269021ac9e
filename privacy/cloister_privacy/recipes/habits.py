"""How a network is trained when a request does not say: batch, epochs and optimizer, from public numbers. Sees no rows.

The constants were chosen on public data (Fashion-MNIST, Adult, SST-2, spoken and handwritten digits, diabetes), on splits kept
back from training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture, Loss
from cloister.wire.plans import SGD, Clipping, Optimizer, Schedule, Tail
from cloister_privacy.plan import DPPlan
from cloister_privacy.recipes.networks import is_linear_on_fixed_features

__all__ = ["Habits", "habits_of"]

_MOMENTUM = 0.9


class Habits(Protocol):
    """What a request leaves out."""

    @property
    def clipping(self) -> Clipping:
        """How gradients are bounded."""

    def batch_size(self, nominal_size: int) -> int:
        """The expected batch."""

    def steps(self, nominal_size: int, batch_size: int) -> int:
        """How many steps there are."""

    def optimizer(self, plan: DPPlan) -> Optimizer:
        """For steps of this plan."""


def habits_of(architecture: Architecture) -> Habits:
    """Those for a convex loss on fixed features, or those for any other network."""
    if is_linear_on_fixed_features(architecture.layers) and "entropy" in architecture.loss:
        has_image = any(isinstance(layer, wire.Scattering) for layer in architecture.layers)
        return _IMAGES if has_image else _OTHERS
    return _General(architecture.loss)


@dataclass(frozen=True, slots=True)
class _Convex:
    """Linear layers from zero on fixed features: large batches, since the noise of a step is spread over them, and few steps."""

    share: int
    """The batch is one row in so many."""
    count: int
    walk: float
    """The learning rate lets the noise of all steps move a weight by about this, before momentum makes it ten times as much."""
    largest_rate: float
    """Momentum diverges beyond it: it follows from the features' length."""
    tail: float
    clipping: Clipping

    def batch_size(self, nominal_size: int) -> int:
        return max(1, nominal_size // self.share)

    def steps(self, nominal_size: int, batch_size: int) -> int:
        return self.count

    def optimizer(self, plan: DPPlan) -> Optimizer:
        rate = _rate(plan, walk=self.walk, largest=self.largest_rate)
        schedule, averaging = Schedule(shape="cosine"), Tail(share=self.tail)
        return SGD(learning_rate=rate, momentum=_MOMENTUM, schedule=schedule, averaging=averaging)


_IMAGES = _Convex(share=4, count=140, walk=0.048, largest_rate=16.0, tail=0.3, clipping="automatic")
_OTHERS = _Convex(share=1, count=400, walk=0.2, largest_rate=7.5, tail=0.25, clipping="flat")
"""Batches of all rows; features of length 1 and no bias bound the curvature by 1/2, and so the rate by 7.6."""


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
        self.clipping: Clipping = "flat"
        self._largest = self._REGRESSION_LARGEST if is_regression else self._LARGEST_RATE

    def batch_size(self, nominal_size: int) -> int:
        return min(nominal_size, max(self._LEAST_BATCH, round(self._BATCH_PER_ROOT * math.sqrt(nominal_size))))

    def steps(self, nominal_size: int, batch_size: int) -> int:
        return math.ceil(self._EPOCHS * nominal_size / batch_size)

    def optimizer(self, plan: DPPlan) -> Optimizer:
        return SGD(learning_rate=_rate(plan, walk=self._walk, largest=self._largest), momentum=_MOMENTUM)


def _rate(plan: DPPlan, *, walk: float, largest: float) -> float:
    """The learning rate that lets the noise of all steps move a weight by `walk`, or the largest."""
    noise_per_step = plan.noise_multiplier / plan.divisor  # of a gradient clipped to 1
    return float(f"{min(largest, walk / (noise_per_step * math.sqrt(plan.steps))) / plan.clip:.3g}")
