"""One-run canary audit: a lower bound on epsilon from guesses at which synthetic rows a run was trained on. Knows no engine.

Steinke, Nasr and Jagielski, 'Privacy auditing with one (1) training run', arXiv 2305.08846: algorithm 1 and theorem 5.2.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from cloister_privacy.canaries.planted import contribution, dirac_network, dirac_rows
from cloister_privacy.canaries.trajectory import observe
from cloister_privacy.plan import DPPlan

__all__ = ["Audit", "audit_run", "epsilon_lower_bound"]

_LARGEST_EPSILON = 100.0


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Audit:
    """What one run gave away of its canaries. The bound is empirical and from below: never a guarantee, and never evidence
    that epsilon is as small as that."""

    claimed_epsilon: float
    """The plan's own epsilon at `delta`: the guarantee that was put to the test."""
    delta: float
    epsilon_lower_bound: float
    """With probability `confidence` the engine's true epsilon is at least this."""
    confidence: float
    canaries: int
    guesses: int
    correct: int

    @property
    def contradicts_claim(self) -> bool:
        """True where the claim cannot be true, but for a probability of 1 - `confidence`."""
        return self.epsilon_lower_bound > self.claimed_epsilon

    def __repr__(self) -> str:
        return (
            f"<Audit {self.correct} of {self.guesses} guesses right, so epsilon >= {self.epsilon_lower_bound:.2f} with "
            f"confidence {self.confidence:g}; empirical, not a privacy guarantee>"
        )


def audit_run(
    *,
    epsilon: float = 3.0,
    delta: float = 1e-5,
    canaries: int = 1000,
    guesses: int | None = None,
    sampling_rate: float = 1.0,
    steps: int = 8,
    confidence: float = 0.95,
    device: str = "cpu",
) -> Audit:
    """Train once, at this epsilon, on the canaries that coins chose, and guess the coins from the noisy sums of all steps.

    Each canary's clipped gradient is one coordinate, so its score is their inner product with the sums. The `guesses` (a fifth of
    the canaries by default; it must be chosen before the run) go to the highest scores, as included, and to the lowest.

    Raises TrainingDiverged where the weights ran away, TrainingError where a step was refused, PlanImpossible where no noise
    gives `epsilon`.
    """
    guesses = guesses or canaries // 5
    plan = DPPlan.calibrated(
        epsilon=epsilon,
        nominal_size=canaries,
        capacity=canaries,
        batch_size=max(1, round(sampling_rate * canaries)),
        steps=steps + 1,
        delta=delta,
    )
    included = _coins(canaries)
    run = observe(
        dirac_network(canaries),
        dirac_rows(canaries, np.flatnonzero(included)),
        nominal_size=plan.nominal_size,
        batch_size=plan.batch_size,
        steps=steps,
        noise_multiplier=plan.noise_multiplier,
        clip=plan.clip,
        device=device,
    )
    if run.broken:
        raise run.broken
    scores = (run.sums * contribution(run.before, clip=plan.clip)).sum(axis=0)
    ranked = included[np.argsort(scores)]
    correct = int(np.sum(~ranked[: guesses // 2]) + np.sum(ranked[canaries - (guesses - guesses // 2) :]))
    return Audit(
        claimed_epsilon=plan.epsilon(),
        delta=delta,
        epsilon_lower_bound=epsilon_lower_bound(
            canaries=canaries, guesses=guesses, correct=correct, delta=delta, confidence=confidence
        ),
        confidence=confidence,
        canaries=canaries,
        guesses=guesses,
        correct=correct,
    )


def epsilon_lower_bound(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest epsilon up to 100 that so many correct guesses refute at `delta`; 0 where they refute none."""
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError("correct must be at most guesses, and guesses at most canaries")

    def excess(epsilon: float) -> float:
        return _p_value(epsilon, canaries=canaries, guesses=guesses, correct=correct, delta=delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    if excess(_LARGEST_EPSILON) < 0:
        return _LARGEST_EPSILON
    return float(optimize.bisect(excess, 0.0, _LARGEST_EPSILON, xtol=1e-6))


def _p_value(epsilon: float, *, canaries: int, guesses: int, correct: int, delta: float) -> float:
    """Theorem 5.2: at most the probability of so many correct guesses under (epsilon, delta)-DP.

    Pure DP gives a binomial tail; delta adds 2 m delta max_i P[v - i <= B < v] / i.
    """
    chance = 1 / (1 + np.exp(-epsilon))
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance))
    alpha = float(np.max(below / np.arange(1, correct + 1), initial=0.0))
    return float(min(1.0, stats.binom.sf(correct - 1, guesses, chance) + 2 * canaries * delta * alpha))


def _coins(count: int) -> NDArray[np.bool_]:
    return (np.frombuffer(secrets.token_bytes(count), dtype=np.uint8) & 1).astype(np.bool_)
