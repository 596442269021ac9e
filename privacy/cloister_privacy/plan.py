"""The plan of a run, from public numbers only: q, steps, sigma, clip, slots, divisor. Drives sampler, noise and event alike.

It refuses to know a single row, and how many there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cloister.wire.plans import Event, TrainingSpec
from cloister_privacy.accounting import (
    LARGEST_NOISE_MULTIPLIER,
    LEAST_NOISE_MULTIPLIER,
    costs_at_most,
    epsilon_by_pld,
    epsilon_by_rdp,
    least_noise_multiplier,
)
from cloister_privacy.errors import BatchLargerThanNominal, PlanImpossible, UnitNotSupported
from cloister_privacy.overflow import least_slots, log_overflow, log_weight

__all__ = ["DPPlan"]

_SENSITIVITY_SLACK = 1e-5
"""Noise is calibrated to a clip this much larger, relatively, so that rounding in the clipping is covered."""

_OVERFLOW_SHARE = 1e-6
"""Of delta: what overflowing steps of one run may add to it."""

_LEAST_CLIP, _LARGEST_CLIP = 1e-6, 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class DPPlan:
    """DP-SGD with Poisson sampling of units (rows, or users), add/remove adjacency: `steps` Poisson-subsampled Gaussians.

    No number in it may come from the rows. `nominal_size` and `capacity` are what the owner declared, in units, so the
    sampling rate, the steps, the divisor and the work of a step are the same for neighbouring datasets. Where the unit is a
    user, a step reads at most `rows_per_unit` rows of each drawn user, each clipped to `row_clip`, so that a user's
    contribution is at most `clip`: no group factor is due. Assumes that there are at most `capacity` units.

    `guarantee` is the (epsilon, delta) that the source promises of all its runs together, where there is a source: the slots
    are chosen for the stronger of it and the run's own.
    """

    nominal_size: int
    capacity: int
    batch_size: int
    steps: int
    noise_multiplier: float
    clip: float
    delta: float
    rows_per_unit: int = 1
    unit: str = "row"
    adjacency: str = "add_remove"
    guarantee: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.nominal_size < 1 or self.batch_size < 1 or self.steps < 1:
            raise PlanImpossible("nominal_size, batch_size and steps must each be at least 1")
        if self.batch_size > self.nominal_size:
            raise BatchLargerThanNominal(
                f"batch larger than nominal_size: {self.batch_size} > {self.nominal_size}; lower batch_size"
            )
        if self.capacity < self.nominal_size:
            raise PlanImpossible(
                f"capacity {self.capacity} is the most units there can be, so at least nominal_size {self.nominal_size}; "
                "declare a larger one"
            )
        if not LEAST_NOISE_MULTIPLIER <= self.noise_multiplier <= LARGEST_NOISE_MULTIPLIER:
            raise PlanImpossible(
                f"noise_multiplier {self.noise_multiplier} must lie between {LEAST_NOISE_MULTIPLIER} and "
                f"{LARGEST_NOISE_MULTIPLIER}"
            )
        if not _LEAST_CLIP <= self.clip <= _LARGEST_CLIP:
            raise PlanImpossible(f"clip {self.clip} must lie between 1e-6 and 1e6, for float32's sake")
        if not 0 < self.delta < 1:
            raise PlanImpossible(f"delta {self.delta} must lie between 0 and 1")
        if self.guarantee is not None and not (0 < self.guarantee[0] < math.inf and 0 < self.guarantee[1] < 1):
            raise PlanImpossible(f"a guarantee needs 0 < epsilon and 0 < delta < 1, not {self.guarantee}")
        self._check_unit()

    def _check_unit(self) -> None:
        if self.unit not in ("row", "user") or self.adjacency != "add_remove":
            raise UnitNotSupported(
                "training protects rows or users under add/remove adjacency; this source's unit is "
                f"{self.unit!r} under {self.adjacency!r}, which the engine cannot train on"
            )
        if self.rows_per_unit < 1:
            raise PlanImpossible(f"rows_per_unit {self.rows_per_unit} must be at least 1")
        if self.rows_per_unit > 1 and self.unit == "row":
            raise PlanImpossible(
                f"rows_per_unit {self.rows_per_unit} needs a source whose unit is a user; here a row is the unit: leave it out"
            )
        if self.row_clip < _LEAST_CLIP:
            raise PlanImpossible(
                f"clip / rows_per_unit is {self.row_clip:g}, below {_LEAST_CLIP:g}, for float32's sake; raise clip"
            )

    @classmethod
    def of(cls, spec: TrainingSpec, *, unit: str = "row", adjacency: str = "add_remove") -> DPPlan:
        """The plan that a training spec carries; unit and adjacency are the source's."""
        return cls(
            nominal_size=spec.nominal_size,
            capacity=spec.capacity,
            batch_size=spec.batch_size,
            steps=spec.steps,
            noise_multiplier=spec.noise_multiplier,
            clip=spec.clip,
            delta=spec.delta,
            rows_per_unit=spec.rows_per_unit,
            unit=unit,
            adjacency=adjacency,
            guarantee=(spec.guarantee.epsilon, spec.guarantee.delta) if spec.guarantee is not None else None,
        )

    @classmethod
    def calibrated(
        cls,
        *,
        epsilon: float,
        nominal_size: int,
        capacity: int,
        batch_size: int,
        steps: int,
        delta: float,
        clip: float = 1.0,
        rows_per_unit: int = 1,
        unit: str = "row",
        adjacency: str = "add_remove",
        guarantee: tuple[float, float] | None = None,
    ) -> DPPlan:
        """The plan with the least noise whose own epsilon by RDP is at most `epsilon`."""
        uncalibrated = cls(
            nominal_size=nominal_size,
            capacity=capacity,
            batch_size=batch_size,
            steps=steps,
            noise_multiplier=1.0,
            clip=clip,
            delta=delta,
            rows_per_unit=rows_per_unit,
            unit=unit,
            adjacency=adjacency,
            guarantee=guarantee,
        )
        return uncalibrated.calibrated_to(epsilon)

    def calibrated_to(self, epsilon: float) -> DPPlan:
        """This plan with the least noise whose own epsilon by RDP is at most `epsilon`, within the limits of noise."""
        if not 0 < epsilon < math.inf:
            raise PlanImpossible(f"epsilon {epsilon} must be a number above 0")
        rate, steps, delta = self.sampling_rate, self.steps, self.delta
        noise_multiplier = least_noise_multiplier(
            lambda candidate: costs_at_most(epsilon, rate, candidate, steps=steps, delta=delta)
        )
        if noise_multiplier is None:
            raise PlanImpossible(
                f"no noise_multiplier up to {LARGEST_NOISE_MULTIPLIER:g} brings {self.steps} steps of batch {self.batch_size} of "
                f"{self.nominal_size} to epsilon {epsilon} at delta {self.delta}; lower epochs or batch_size, or raise epsilon"
            )
        return replace(self, noise_multiplier=noise_multiplier)

    @property
    def sampling_rate(self) -> float:
        """The probability with which each unit enters each step, independently."""
        return self.batch_size / self.nominal_size

    @property
    def divisor(self) -> int:
        """What the noisy sum is divided by: the expected batch, whatever was drawn."""
        return self.batch_size

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise on every coordinate of the clipped sum."""
        return self.noise_multiplier * self.clip * (1 + _SENSITIVITY_SLACK)

    @property
    def row_clip(self) -> float:
        """The L2 norm to which each row's gradient is clipped: `rows_per_unit` of them together stay within `clip`."""
        return self.clip / self.rows_per_unit

    @property
    def slots(self) -> int:
        """The public number of units that every step has room for, each with `rows_per_unit` rows; never above `capacity`.

        The least for which overflowing steps, which run longer and so can be seen, add at most a millionth to delta.
        """
        epsilon, delta = self._strongest()
        return least_slots(
            self.capacity, self.batch_size, self.nominal_size,
            log_bound=math.log(delta) + math.log(_OVERFLOW_SHARE) - math.log(self.steps) - log_weight(epsilon),
        )  # fmt: skip

    @property
    def overflow(self) -> float:
        """The most that overflowing steps of this run may add to delta: steps * P[more than `slots`] * (1 + e^epsilon).

        If the run differs from one without overflows with probability p on any dataset, then (epsilon, delta) of the latter
        makes (epsilon, delta + p (1 + e^epsilon)) of the run. So epsilon is that of the guarantee it is added to.
        """
        log_chance = log_overflow(self.slots, self.capacity, self.batch_size, self.nominal_size)
        if log_chance == -math.inf:
            return 0.0
        return math.exp(math.log(self.steps) + log_chance + log_weight(self._strongest()[0]))

    def epsilon(self) -> float:
        """The run's own epsilon at `delta`, by RDP: what it would cost as the only run ever."""
        return epsilon_by_rdp(self.sampling_rate, self.noise_multiplier, steps=self.steps, delta=self.delta)

    def epsilon_by_pld(self) -> float:
        """The same by privacy-loss distributions: displayed, never deciding."""
        return epsilon_by_pld(self.sampling_rate, self.noise_multiplier, steps=self.steps, delta=self.delta)

    def event(self) -> Event:
        """What the ledger charges for the whole run."""
        return Event(
            mechanism="poisson_subsampled_gaussian",
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.steps,
            unit=self.unit,
            adjacency=self.adjacency,
            overflow=self.overflow,
        )

    def _strongest(self) -> tuple[float, float]:
        """The largest epsilon and the least delta among the guarantees that overflows must be negligible beside."""
        own = (self.epsilon(), self.delta)
        return own if self.guarantee is None else (max(own[0], self.guarantee[0]), min(own[1], self.guarantee[1]))
