"""How a network is trained when a request does not say: batch, epochs and optimizer, from public numbers. Sees no rows.

The constants were chosen on public data (Fashion-MNIST, Adult, SST-2, spoken and handwritten digits, diabetes), on splits kept
back from training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture
from cloister.wire.plans import SGD, Clipping, Optimizer, Schedule, Tail
from cloister_privacy.plan import DPPlan
from cloister_privacy.recipes.networks import is_linear_on_fixed_features

__all__ = ["Convex", "General", "habits_of"]

_MOMENTUM = 0.9
_EPOCHS = 20
_BATCH_PER_ROOT = 12  # batches of 12 sqrt(nominal_size): large ones drown the noise
_LEAST_BATCH = 64


def habits_of(architecture: Architecture) -> Convex | General:
    """Those for a convex loss on fixed features, or those for any other network."""
    if is_linear_on_fixed_features(architecture.layers) and "entropy" in architecture.loss:
        has_image = any(isinstance(layer, wire.Scattering) for layer in architecture.layers)
        return _IMAGES if has_image else _OTHERS
    return _NUMBERS if architecture.loss in ("mean_squared_error", "huber") else _CATEGORIES


@dataclass(frozen=True, slots=True)
class Convex:
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


_IMAGES = Convex(share=4, count=140, walk=0.048, largest_rate=16.0, tail=0.3, clipping="automatic")
_OTHERS = Convex(share=1, count=400, walk=0.2, largest_rate=7.5, tail=0.25, clipping="flat")
"""Batches of all rows; features of length 1 and no bias bound the curvature by 1/2, and so the rate by 7.6."""


@dataclass(frozen=True, slots=True)
class General:
    """Any network: batches that grow with the root of the rows, and a rate that lets the noise of all steps move a weight so far."""

    walk: float
    largest_rate: float
    clipping: Clipping = "flat"

    def batch_size(self, nominal_size: int) -> int:
        return min(nominal_size, max(_LEAST_BATCH, round(_BATCH_PER_ROOT * math.sqrt(nominal_size))))

    def steps(self, nominal_size: int, batch_size: int) -> int:
        return math.ceil(_EPOCHS * nominal_size / batch_size)

    def optimizer(self, plan: DPPlan) -> Optimizer:
        return SGD(learning_rate=_rate(plan, walk=self.walk, largest=self.largest_rate), momentum=_MOMENTUM)


_CATEGORIES = General(walk=0.016, largest_rate=1.0)
_NUMBERS = General(walk=0.003, largest_rate=0.05)
"""Nothing squashes the last layer, so every unit of noise reaches the output."""


def _rate(plan: DPPlan, *, walk: float, largest: float) -> float:
    """The learning rate that lets the noise of all steps move a weight by `walk`, or the largest."""
    noise_per_step = plan.noise_multiplier / plan.divisor  # of a gradient clipped to 1
    return float(f"{min(largest, walk / (noise_per_step * math.sqrt(plan.steps))) / plan.clip:.3g}")
