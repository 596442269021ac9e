"""Whether the engine's noise, sampling, divisor and clip are what the plan says. Knows released sums, never how they came about.

Each check runs the production path on synthetic rows whose clipped gradients are known, and tests what is left of the noisy sums
against its exact distribution under the plan. A small p-value is a fault; a large one is not a proof.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cloister.wire.architecture import Architecture
from cloister_privacy.canaries.planted import contribution, deep_network, dirac_network, dirac_rows, extreme_rows
from cloister_privacy.canaries.report import FALSE_ALARM, Finding, Report
from cloister_privacy.canaries.trajectory import SENSITIVITY_SLACK, Trajectory, observe
from cloister_privacy.errors import TrainingError

__all__ = ["check_clip", "check_divisor", "check_engine", "check_noise", "check_sampling"]

_Pair = tuple[NDArray[np.float64], NDArray[np.float64]]

_LEAST_NOISE = 0.3  # the least that a plan allows: what is not noise shows best


def check_engine(*, device: str = "cpu", false_alarm: float = FALSE_ALARM) -> Report:
    """All checks in one report. Takes a second or two; `false_alarm` is for all of them together."""
    reports = [check(device=device) for check in (check_noise, check_sampling, check_divisor, check_clip)]
    return Report(findings=tuple(each for report in reports for each in report.findings), false_alarm=false_alarm)


def check_noise(
    architecture: Architecture | None = None,
    *,
    noise_multiplier: float = 1.0,
    clip: float = 1.0,
    steps: int = 16,
    device: str = "cpu",
) -> Report:
    """Two runs without rows, of any network: their sums must be pure noise, N(0, (sigma C (1 + 1e-5))^2) on every coordinate,
    fresh in every step, tensor and run."""
    architecture = architecture or deep_network()
    runs = [
        observe(
            architecture,
            extreme_rows(architecture, 0),
            nominal_size=1024,
            batch_size=64,
            steps=steps,
            noise_multiplier=noise_multiplier,
            clip=clip,
            device=device,
        )
        for _ in range(2)
    ]
    for run in runs:
        if run.broken:
            return _broken("noise", run.broken)
    noise = np.concatenate([run.sums / run.noise_std for run in runs])
    tensors = [noise[:, place] for place in runs[0].tensors.values()]
    return Report(
        findings=(
            _is_normal(noise),
            _varies_as_it_should("noise variance of each tensor", tensors),
            _varies_as_it_should("noise variance of each coordinate", list(noise.T)),
            _is_fresh("noise of two steps", _pairs(noise)),
            _is_fresh("noise of two coordinates", _side_by_side(tensors)),
        )
    )


def check_sampling(*, device: str = "cpu") -> Report:
    """A run on groups of identical rows, so large beside the noise that one reads how many of a group took part in each step:
    binomially many, independently of other groups and of other steps."""
    groups, members, steps = 64, 16, 39  # with the step that is not seen, ten epochs of a shuffled loader
    size, batch = groups * members, groups * members // 4
    run = _dirac_run(groups, members, batch_size=batch, steps=steps, device=device)
    if run.broken:
        return _broken("sampling", run.broken)
    rate = batch / size
    spread = rate * (1 - rate)
    peak = (1 / spread - 6) / members  # excess kurtosis of a binomial count
    surplus = run.sums / contribution(run.before, clip=1.0) - members * rate
    variance = members * spread + _LEAST_NOISE**2
    return Report(
        findings=(
            _is_standard(
                "sampling rate",
                surplus.sum() / np.sqrt(surplus.size * variance),
                f"{rate + surplus.mean() / members:.4f} for {rate:.4f}",
            ),
            _disperses("rows of a group in a step", surplus / np.sqrt(variance), peak=peak),
            _disperses("rows in a step", surplus.sum(axis=1) / np.sqrt(groups * variance), peak=peak / groups),
            _disperses("rows of a group in a run", surplus.sum(axis=0) / np.sqrt(steps * variance), peak=peak / steps),
            _is_fresh("rows in two steps", [(surplus[lag:], surplus[:-lag]) for lag in range(1, 9)]),
        )
    )


def check_divisor(*, device: str = "cpu") -> Report:
    """Two runs at a sampling rate of 1, one with all of the nominal rows and one with half: a step of the second must be half as
    long, because the divisor is public and not the number of rows."""
    groups, members, steps = 16, 64, 8
    full = _dirac_run(groups, members, batch_size=groups * members, steps=steps, device=device)
    half = _dirac_run(groups, members // 2, batch_size=groups * members, steps=steps, device=device)
    if broken := full.broken or half.broken:
        return _broken("divisor", broken)
    of_full, of_half = (run.sums / contribution(run.before, clip=1.0) for run in (full, half))
    noise = np.concatenate([of_full - members, of_half - members // 2]) / full.noise_std
    score = (of_half.sum() - of_full.sum() / 2) / (full.noise_std * np.sqrt(1.25 * full.sums.size))
    figure = f"half of the rows moved the weights {of_half.sum() / of_full.sum():.4f} times as far"
    return Report(
        findings=(
            _is_standard("divisor", score, figure),
            _varies_as_it_should("noise beside rows", [noise]),
            _is_fresh("noise of two steps beside rows", _pairs(noise)),
        )
    )


def check_clip(
    architecture: Architecture | None = None, *, rows: int = 256, steps: int = 4, device: str = "cpu"
) -> Report:
    """A run of any network at a sampling rate of 1 on one extreme row, `rows` times: no sum may be longer than `rows` clips and
    its noise. `rows` must well exceed 0.3 times the root of the number of parameters for the noise not to hide a fault.

    A row whose gradient is small proves nothing here; the network that is taken by default is steep.
    """
    architecture = architecture or deep_network()
    run = observe(
        architecture,
        extreme_rows(architecture, rows),
        nominal_size=rows,
        batch_size=rows,
        steps=steps,
        noise_multiplier=_LEAST_NOISE,
        clip=1.0,
        device=device,
    )
    if run.broken:
        return _broken("clip", run.broken)
    lengths = np.linalg.norm(run.sums, axis=1)
    # By the triangle inequality what exceeds the clips is at most the noise's length.
    excess = np.maximum(lengths - rows * (1 + SENSITIVITY_SLACK), 0) / run.noise_std
    p_value = min(1.0, float(stats.chi2.sf(excess.max() ** 2, df=run.sums.shape[1])) * steps)
    return Report(
        findings=(
            Finding(
                name="clip", p_value=p_value, figure=f"a row added {lengths.max() / rows:.4f} clips, noise included"
            ),
        )
    )


def _dirac_run(groups: int, members: int, *, batch_size: int, steps: int, device: str) -> Trajectory:
    """Groups of identical rows, one on each coordinate, at clip 1 and the least noise; half-full where batch_size says so."""
    return observe(
        dirac_network(groups),
        dirac_rows(groups, np.repeat(np.arange(groups), members)),
        nominal_size=max(batch_size, groups * members),
        batch_size=batch_size,
        steps=steps,
        noise_multiplier=_LEAST_NOISE,
        clip=1.0,
        device=device,
    )


def _broken(name: str, why: TrainingError) -> Report:
    return Report(findings=(Finding(name=name, p_value=0.0, figure=f"no whole run: {why}"),))


def _is_normal(values: NDArray[np.float64]) -> Finding:
    """Kolmogorov and Smirnov, against N(0, 1)."""
    p_value = float(stats.kstest(values.ravel(), "norm", method="asymp").pvalue)
    return Finding(
        name="noise distribution", p_value=p_value, figure=f"{values.size} draws of deviation {values.std():.4f}"
    )


def _is_standard(name: str, score: float, figure: str) -> Finding:
    return Finding(name=name, p_value=float(2 * stats.norm.sf(abs(score))), figure=figure)


def _varies_as_it_should(name: str, samples: list[NDArray[np.float64]]) -> Finding:
    """Each sample, of standard normals, has the sum of squares that its size asks for."""
    ratios = np.array([np.mean(sample**2) for sample in samples])
    sizes = np.array([sample.size for sample in samples])
    p_values = _two_sided_chi2(ratios * sizes, sizes)
    worst = int(p_values.argmin())
    return Finding(
        name=name,
        p_value=min(1.0, float(p_values[worst]) * len(samples)),
        figure=f"{ratios[worst]:.4f} of the plan's at worst",
    )


def _disperses(name: str, scores: NDArray[np.float64], *, peak: float) -> Finding:
    """Independent scores of variance 1 and excess kurtosis `peak` have the sum of squares of nearly as many normal ones."""
    freedom = scores.size / (1 + peak / 2)
    ratio = float(np.mean(scores**2))
    return Finding(
        name=name,
        p_value=float(_two_sided_chi2(np.array(ratio * freedom), np.array(freedom))),
        figure=f"{ratio:.3f} of the variance that independent sampling has",
    )


def _two_sided_chi2(sums: NDArray[np.float64], freedom: NDArray[np.float64]) -> NDArray[np.float64]:
    both: NDArray[np.float64] = 2 * np.minimum(stats.chi2.sf(sums, df=freedom), stats.chi2.cdf(sums, df=freedom))
    return both


def _is_fresh(name: str, pairs: list[_Pair]) -> Finding:
    """The vectors of each pair are independent and, for all that shows, normal: their cosine squared is Beta(1/2, (n - 1) / 2)."""
    pairs = [pair for pair in pairs if pair[0].size > 1]
    if not pairs:
        return Finding(name=name, p_value=1.0, figure="too small a network to compare anything")
    cosines = np.array([_cosine(one, two) for one, two in pairs])
    sizes = np.array([one.size for one, _ in pairs])
    p_values = stats.beta.sf(cosines**2, 0.5, (sizes - 1) / 2)
    worst = int(p_values.argmin())
    return Finding(
        name=name,
        p_value=min(1.0, float(p_values[worst]) * len(pairs)),
        figure=f"a correlation of {cosines[worst]:.3f} at worst",
    )


def _cosine(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """1 where either is all zero: vectors that ought to be noise are then as dependent as can be."""
    lengths = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(np.vdot(one, two)) / lengths if lengths else 1.0


def _pairs(noise: NDArray[np.float64]) -> list[_Pair]:
    return [(one, two) for position, one in enumerate(noise) for two in noise[:position]]


def _side_by_side(tensors: list[NDArray[np.float64]]) -> list[_Pair]:
    """Neighbours within tensors, and the same coordinates of two tensors: equal where a generator started twice."""
    neighbours = [(each[:, 1:], each[:, :-1]) for each in tensors if each.shape[1] > 1]
    widths = [(one, two, min(one.shape[1], two.shape[1])) for i, one in enumerate(tensors) for two in tensors[:i]]
    return neighbours + [(one[:, :width], two[:, :width]) for one, two, width in widths]
