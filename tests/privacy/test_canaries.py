"""The audits catch every fault that is planted in the engine, raise no alarm without one, and never promise anything."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch

from cloister.wire.architecture import Architecture
from cloister_privacy import canaries
from cloister_privacy.canaries import (
    Finding,
    Report,
    audit_run,
    check_clip,
    check_divisor,
    check_engine,
    check_noise,
    check_sampling,
    epsilon_lower_bound,
)
from cloister_privacy.errors import TrainingDiverged
from cloister_privacy.training.noise import NoiseDraws

# The seams of the production path at which faults are planted, from outside.
NOISE = "cloister_privacy.training.noise.NoiseDraws.take"
"""take(self) -> Tensor: all noise of a step."""
DRAW = "cloister_privacy.training.sampler.PoissonSampler.draw"
"""draw(self) -> the indices of a step."""
CLIPPED = "cloister_privacy.training.steps.ClippedGradients"
"""ClippedGradients(network, losses, *, clip, clipping), where a step uses it and not where the guard tries it."""
DIVISOR = "cloister_privacy.plan.DPPlan.divisor"
"""What a noisy sum is divided by."""
TRAIN = "cloister_privacy.canaries.trajectory.train"
"""Where the audits enter the production path: faults read the run's numbers there."""

CLEAN_RUNS = 20 if os.environ.get("SHORT") else 200
REPETITIONS = 2 if os.environ.get("SHORT") else 20

Plant = Callable[[pytest.MonkeyPatch, dict[str, Any]], None]


@pytest.fixture
def run_now(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The number of rows, the plan and whatever a fault keeps, of the run that is going on."""
    now: dict[str, Any] = {}
    train = resolve_name(TRAIN)

    def noted(spec: Any, rows: Any, **rest: Any) -> Any:
        now.clear()
        now.update(rows=len(next(iter(rows.values()))), spec=spec)
        return train(spec, rows, **rest)

    monkeypatch.setattr(TRAIN, noted)
    return now


def _noise(change: Callable[[Callable[..., torch.Tensor], int, float, dict[str, Any]], torch.Tensor]) -> Plant:
    def plant(monkeypatch: pytest.MonkeyPatch, run_now: dict[str, Any]) -> None:
        take = resolve_name(NOISE)

        def sound(count: int, *, std: float) -> torch.Tensor:
            with NoiseDraws(count, std=std, device="cpu") as draws:
                drawn: torch.Tensor = take(draws)
            return drawn

        monkeypatch.setattr(NOISE, lambda draws: change(sound, draws._count, draws._std, run_now))

    return plant


def _draw(change: Callable[[Callable[[], np.ndarray], dict[str, Any]], np.ndarray]) -> Plant:
    def plant(monkeypatch: pytest.MonkeyPatch, run_now: dict[str, Any]) -> None:
        sound = resolve_name(DRAW)
        monkeypatch.setattr(DRAW, lambda sampler: change(lambda: sound(sampler), run_now))

    return plant


def _clip(change: Callable[[float], dict[str, Any]]) -> Plant:
    def plant(monkeypatch: pytest.MonkeyPatch, run_now: dict[str, Any]) -> None:
        sound = resolve_name(CLIPPED)
        monkeypatch.setattr(CLIPPED, lambda *args, clip, **rest: sound(*args, **(rest | {"clip": clip} | change(clip))))

    return plant


def _divisor_from_rows(monkeypatch: pytest.MonkeyPatch, run_now: dict[str, Any]) -> None:
    def divisor(plan: Any) -> float:
        return max(1, run_now["rows"]) * plan.batch_size / plan.nominal_size

    monkeypatch.setattr(DIVISOR, property(divisor))


def _divisor_from_batch(monkeypatch: pytest.MonkeyPatch, run_now: dict[str, Any]) -> None:
    monkeypatch.setattr(DIVISOR, property(lambda plan: plan.batch_size // 2))


def _seeded(count: int, std: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(count, generator=generator) * std


def _seeded_by_run(_sound: Any, count: int, std: float, now: dict[str, Any]) -> torch.Tensor:
    return _seeded(count, std, now.setdefault("generator", torch.Generator().manual_seed(7)))


def _without_the_last(sound: Callable[..., torch.Tensor], count: int, std: float, _now: Any) -> torch.Tensor:
    noise = sound(count, std=std)
    noise[-1] = 0
    return noise


def _only_without_rows(sound: Callable[..., torch.Tensor], count: int, std: float, now: dict[str, Any]) -> torch.Tensor:
    return sound(count, std=std / 2 if now["rows"] else std)


def _shuffled(sound: Callable[[], np.ndarray], now: dict[str, Any]) -> np.ndarray:
    """Epochs of a shuffled loader, in batches of the expected size."""
    if not len(now.get("epoch", ())):
        now["epoch"] = np.random.default_rng().permutation(now["rows"])
    batch, now["epoch"] = np.split(now["epoch"], [now["spec"].batch_size])
    return np.sort(batch)


def _of_fixed_size(sound: Callable[[], np.ndarray], now: dict[str, Any]) -> np.ndarray:
    size = min(now["rows"], now["spec"].batch_size)
    return np.sort(np.random.default_rng().choice(now["rows"], size=size, replace=False))


def _with_replacement(sound: Callable[[], np.ndarray], now: dict[str, Any]) -> np.ndarray:
    return np.sort(np.random.default_rng().integers(0, now["rows"], len(sound()))) if now["rows"] else sound()


def _same_rows_twice(sound: Callable[[], np.ndarray], now: dict[str, Any]) -> np.ndarray:
    """Draws afresh in every other step only."""
    now["kept"] = None if now.get("kept") is not None else sound()
    now["last"] = now["kept"] if now["kept"] is not None else now["last"]
    return np.asarray(now["last"])


FAULTS: dict[str, tuple[Plant, str]] = {
    "half of sigma": (_noise(lambda sound, count, std, _: sound(count, std=std / 2)), "noise variance of each tensor"),
    "a tenth less noise": (_noise(lambda sound, count, std, _: sound(count, std=0.9 * std)), "noise distribution"),
    "no noise": (_noise(lambda sound, count, std, _: torch.zeros(count)), "noise variance of each tensor"),
    "a coordinate without noise": (_noise(_without_the_last), "noise variance of each coordinate"),
    "uniform noise": (
        _noise(lambda _, count, std, __: (torch.rand(count) - 0.5) * std * math.sqrt(12)),
        "noise distribution",
    ),
    "less noise beside rows": (_noise(_only_without_rows), "noise beside rows"),
    "noise repeated in every step": (
        _noise(lambda _, count, std, __: _seeded(count, std, torch.Generator().manual_seed(7))),
        "noise of two steps",
    ),
    "noise repeated in every run": (_noise(_seeded_by_run), "noise of two steps"),
    "noise repeated within a step": (
        _noise(lambda sound, count, std, _: sound((count + 1) // 2, std=std).repeat_interleave(2)[:count]),
        "noise of two coordinates",
    ),
    "shuffled sampling": (_draw(_shuffled), "rows of a group in a run"),
    "batches of a fixed size": (_draw(_of_fixed_size), "rows in a step"),
    "sampling with replacement": (_draw(_with_replacement), "sampling"),
    "a batch used twice": (_draw(_same_rows_twice), "rows in two steps"),
    "a double batch": (_draw(lambda sound, _: np.union1d(sound(), sound())), "sampling rate"),
    "two batches in one": (_draw(lambda sound, _: np.concatenate([sound(), sound()])), "sampling"),
    "a divisor from the number of rows": (_divisor_from_rows, "divisor"),
    "half of the divisor": (_divisor_from_batch, "noise variance of each tensor"),
    "no clip": (_clip(lambda clip: {"clip": 1e30 * clip}), "clip"),
    "twice the clip": (_clip(lambda clip: {"clip": 2 * clip}), "clip"),
    "every tensor clipped for itself": (_clip(lambda clip: {"clip": 2 * clip, "clipping": "per_layer"}), "clip"),
}


CHECKS: dict[str, Callable[[], Report]] = {
    "noise distribution": check_noise,
    "noise variance of each tensor": check_noise,
    "noise variance of each coordinate": check_noise,
    "noise of two steps": check_noise,
    "noise of two coordinates": check_noise,
    "sampling rate": check_sampling,
    "rows of a group in a step": check_sampling,
    "rows in a step": check_sampling,
    "rows of a group in a run": check_sampling,
    "rows in two steps": check_sampling,
    "divisor": check_divisor,
    "noise beside rows": check_divisor,
    "noise of two steps beside rows": check_divisor,
    "clip": check_clip,
}


def _names(findings: tuple[Finding, ...]) -> set[str]:
    return {finding.name for finding in findings}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(
    fault: str, run_now: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, name = FAULTS[fault]
    plant(monkeypatch, run_now)
    report = (CHECKS | {"sampling": check_sampling})[name]()  # that is the name of a run that was refused
    assert name in _names(report.faults), report
    assert name in repr(report)


def test_a_sound_engine_gives_no_alarm_by_any_check() -> None:
    report = check_engine()
    assert report.faults == ()
    assert _names(report.findings) == set(CHECKS)


def test_the_noise_of_any_network_can_be_checked_at_a_releases_own_settings(
    architecture: Architecture, run_now: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_noise(architecture, noise_multiplier=1.1425, clip=0.1).faults == ()
    FAULTS["half of sigma"][0](monkeypatch, run_now)
    assert check_noise(architecture, noise_multiplier=1.1425, clip=0.1).faults


@pytest.mark.long
def test_two_hundred_sound_runs_give_at_most_one_percent_of_false_alarms() -> None:
    alarms = [report for report in (check_engine() for _ in range(CLEAN_RUNS)) if report.faults]
    assert len(alarms) <= CLEAN_RUNS // 100, alarms


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_every_repetition_of_a_fault_is_caught(
    fault: str, run_now: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, name = FAULTS[fault]
    plant(monkeypatch, run_now)
    assert all(name in _names(check_engine().faults) for _ in range(REPETITIONS))


@pytest.mark.parametrize("sampling_rate", [1.0, 0.25])
def test_an_audit_of_a_sound_engine_is_in_keeping_with_its_claim(sampling_rate: float) -> None:
    audit = audit_run(epsilon=3.0, sampling_rate=sampling_rate)
    assert 2.9 < audit.claimed_epsilon <= 3.0
    assert 0 <= audit.epsilon_lower_bound <= 2
    assert not audit.contradicts_claim


def test_an_audit_learns_more_from_less_noise_and_refutes_the_claim_of_an_engine_without_any(
    run_now: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = np.mean([audit_run().epsilon_lower_bound for _ in range(5)])
    with monkeypatch.context() as patched:
        FAULTS["half of sigma"][0](patched, run_now)
        assert np.mean([audit_run().epsilon_lower_bound for _ in range(5)]) > sound + 0.5
    FAULTS["no noise"][0](monkeypatch, run_now)
    audit = audit_run()
    assert audit.correct == audit.guesses
    assert audit.contradicts_claim


def test_an_engine_whose_weights_run_away_is_faulty_and_cannot_be_audited(
    run_now: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _noise(lambda sound, count, std, _: sound(count, std=std) * 1e30 * 1e30)(monkeypatch, run_now)
    report = check_engine()
    assert report.faults == report.findings
    assert all("no longer finite" in finding.figure for finding in report.faults)
    with pytest.raises(TrainingDiverged, match="no longer finite"):
        audit_run(canaries=100)


def test_the_bound_is_the_binomial_one_where_delta_is_zero() -> None:
    # With all of r guesses right, the p-value is chance^r, so the bound is known in closed form.
    chance = 0.05 ** (1 / 800)
    bound = epsilon_lower_bound(canaries=1000, guesses=800, correct=800, delta=0.0, confidence=0.95)
    assert bound == pytest.approx(math.log(chance / (1 - chance)), abs=1e-4)
    assert epsilon_lower_bound(canaries=1000, guesses=800, correct=400, delta=0.0, confidence=0.95) == 0
    assert epsilon_lower_bound(canaries=10, guesses=0, correct=0, delta=0.0, confidence=0.95) == 0


def test_delta_weakens_the_bound_and_more_right_guesses_raise_it() -> None:
    bounds = [
        [
            epsilon_lower_bound(canaries=1000, guesses=100, correct=correct, delta=delta, confidence=0.95)
            for delta in deltas
        ]
        for deltas in [(0.0, 1e-6, 1e-5, 1e-4)]
        for correct in (70, 80, 90, 100)
    ]
    assert all(row == sorted(row, reverse=True) and row[0] > row[-1] for row in bounds)
    assert all(column == sorted(column) for column in map(list, zip(*bounds, strict=True)))


def test_the_bound_on_randomised_response_exceeds_the_truth_no_more_often_than_it_says() -> None:
    random, epsilon = np.random.default_rng(3), 1.5
    truthful = 1 / (1 + math.exp(-epsilon))
    counts = random.binomial(500, truthful, 1000).tolist()
    bound = {
        correct: epsilon_lower_bound(canaries=500, guesses=500, correct=correct, delta=0.0, confidence=0.9)
        for correct in set(counts)
    }
    bounds = [bound[correct] for correct in counts]
    assert np.mean(np.array(bounds) > epsilon) < 0.13
    assert np.mean(bounds) > 1.2


@pytest.mark.parametrize(
    ("noise", "guesses", "least", "most"),
    [(1.0, 100, 0.9, 1.35), (0.5, 100, 2.2, 2.7), (0.25, 300, 4.2, 4.6), (0.0, 800, 5.4, 5.7)],
)
def test_the_bound_has_its_known_power_on_an_ideal_gaussian_mechanism(
    noise: float, guesses: int, least: float, most: float
) -> None:
    # sigma 1.3906 is (3, 1e-5)-DP by the analytic Gaussian mechanism (Balle and Wang, arXiv 1805.06530).
    random, bounds = np.random.default_rng(5), []
    for _ in range(20):
        included = random.random(1000) < 0.5
        ranked = included[np.argsort(included + noise * 1.3906 * random.normal(size=1000))]
        correct = int(np.sum(~ranked[: guesses // 2]) + np.sum(ranked[-guesses // 2 :]))
        bounds.append(epsilon_lower_bound(canaries=1000, guesses=guesses, correct=correct, delta=1e-5, confidence=0.95))
    assert least < np.mean(bounds) < most


def test_impossible_counts_are_refused() -> None:
    for canaries_, guesses, correct in ((10, 11, 5), (10, 5, 6), (10, 5, -1)):
        with pytest.raises(ValueError, match="at most"):
            epsilon_lower_bound(canaries=canaries_, guesses=guesses, correct=correct, delta=0.0, confidence=0.95)


def test_what_an_audit_shows_is_never_called_a_guarantee() -> None:
    report = Report(findings=(Finding(name="clip", p_value=1.0, figure=""),))
    assert "not a privacy guarantee" in repr(report)
    assert "not a privacy guarantee" in repr(audit_run(canaries=100, steps=2))
    assert "never a guarantee" in (canaries.Audit.__doc__ or "")
    assert "not a guarantee" in (Report.__doc__ or "")


def test_a_p_value_that_is_not_a_number_counts_as_a_fault() -> None:
    assert Report(findings=(Finding(name="clip", p_value=math.nan, figure=""),)).faults
