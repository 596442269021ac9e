"""The plan of a run, from public numbers only: q, steps, sigma, clip, divisor. Drives sampler, noise and event alike."""

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

__all__ = ["DPPlan"]

_SENSITIVITY_SLACK = 1e-5
"""Noise is calibrated to a clip this much larger, relatively, so that rounding in the clipping is covered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DPPlan:
    """DP-SGD with Poisson sampling: row-level, add/remove adjacency, `steps` Poisson-subsampled Gaussians.

    No number in it may come from the rows. `nominal_size` is what the owner declared, so the sampling rate, the steps and the
    divisor are the same for neighbouring datasets.
    """

    nominal_size: int
    batch_size: int
    steps: int
    noise_multiplier: float
    clip: float
    delta: float
    unit: str = "row"
    adjacency: str = "add_remove"

    def __post_init__(self) -> None:
        if self.nominal_size < 1 or self.batch_size < 1 or self.steps < 1:
            raise PlanImpossible("nominal_size, batch_size and steps must each be at least 1")
        if self.batch_size > self.nominal_size:
            raise BatchLargerThanNominal(
                f"batch larger than nominal_size: {self.batch_size} > {self.nominal_size}; lower batch_size"
            )
        if not LEAST_NOISE_MULTIPLIER <= self.noise_multiplier <= LARGEST_NOISE_MULTIPLIER:
            raise PlanImpossible(
                f"noise_multiplier {self.noise_multiplier} must lie between {LEAST_NOISE_MULTIPLIER} and "
                f"{LARGEST_NOISE_MULTIPLIER}"
            )
        if not 1e-6 <= self.clip <= 1e6:
            raise PlanImpossible(f"clip {self.clip} must lie between 1e-6 and 1e6, for float32's sake")
        if not 0 < self.delta < 1:
            raise PlanImpossible(f"delta {self.delta} must lie between 0 and 1")
        if self.unit != "row" or self.adjacency != "add_remove":
            raise UnitNotSupported(
                f"training protects rows under add/remove adjacency; this source's unit is {self.unit!r} under "
                f"{self.adjacency!r}, which the engine cannot train on yet"
            )

    @classmethod
    def of(cls, spec: TrainingSpec, *, unit: str = "row", adjacency: str = "add_remove") -> DPPlan:
        """The plan that a training spec carries; unit and adjacency are the source's."""
        return cls(
            nominal_size=spec.nominal_size,
            batch_size=spec.batch_size,
            steps=spec.steps,
            noise_multiplier=spec.noise_multiplier,
            clip=spec.clip,
            delta=spec.delta,
            unit=unit,
            adjacency=adjacency,
        )

    @classmethod
    def calibrated(
        cls,
        *,
        epsilon: float,
        nominal_size: int,
        batch_size: int,
        steps: int,
        delta: float,
        clip: float = 1.0,
        unit: str = "row",
        adjacency: str = "add_remove",
    ) -> DPPlan:
        """The plan with the least noise whose own epsilon by RDP is at most `epsilon`."""
        uncalibrated = cls(
            nominal_size=nominal_size,
            batch_size=batch_size,
            steps=steps,
            noise_multiplier=1.0,
            clip=clip,
            delta=delta,
            unit=unit,
            adjacency=adjacency,
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
        )
