"""Poisson sampling and noise: their distributions, their independence, and that nothing repeats.

Each statistical bound fails by chance less than once in a million runs.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cloister_privacy.training.keystream import BLOCK_WORDS, random_words
from cloister_privacy.training.noise import gaussian_noise
from cloister_privacy.training.sampler import PoissonSampler

CHANCE = 1e-7


def test_words_are_uniform_and_never_repeat() -> None:
    words = np.concatenate([random_words(BLOCK_WORDS) for _ in range(2)])
    assert len(np.unique(words)) == len(words)
    assert stats.kstest(words / 2.0**64, "uniform").pvalue > CHANCE


def test_how_often_a_unit_is_drawn_is_binomial() -> None:
    units, steps, rate = 3000, 400, 30 / 1000
    sampler = PoissonSampler(units, batch_size=30, nominal_size=1000)
    drawn = np.zeros((steps, units), dtype=bool)
    for step in range(steps):
        drawn[step, sampler.draw()] = True
    per_unit, per_step = drawn.sum(axis=0), drawn.sum(axis=1)
    for counts, trials in ((per_unit, steps), (per_step, units)):
        edges = stats.binom.ppf([0.1, 0.3, 0.5, 0.7, 0.9], trials, rate)
        expected = np.diff(stats.binom.cdf(edges, trials, rate), prepend=0, append=1) * len(counts)
        observed = np.bincount(np.searchsorted(edges, counts), minlength=6)
        assert stats.chisquare(observed, expected).pvalue > CHANCE
    # Independent from step to step: being drawn twice in a row is as likely as chance has it.
    both = int((drawn[:-1] & drawn[1:]).sum())
    assert stats.binomtest(both, (steps - 1) * units, rate**2).pvalue > CHANCE
    # And from unit to neighbouring unit.
    both = int((drawn[:, :-1] & drawn[:, 1:]).sum())
    assert stats.binomtest(both, steps * (units - 1), rate**2).pvalue > CHANCE


def test_the_threshold_is_exact_and_never_above_the_rate_that_is_charged() -> None:
    for batch, nominal in ((1, 3), (256, 60000), (999_999, 1_000_000), (1, 2**40)):
        threshold = PoissonSampler(1, batch_size=batch, nominal_size=nominal)._threshold
        assert threshold * nominal <= batch << 64 < (threshold + 1) * nominal


def test_a_rate_of_one_draws_everything_and_no_rows_draw_nothing() -> None:
    assert PoissonSampler(5, batch_size=7, nominal_size=7).draw().tolist() == [0, 1, 2, 3, 4]
    assert PoissonSampler(0, batch_size=1, nominal_size=7).draw().tolist() == []
    assert PoissonSampler(0, batch_size=7, nominal_size=7).draw().tolist() == []


def test_sampling_goes_on_past_one_block_of_randomness() -> None:
    units = 2 * BLOCK_WORDS + 1000
    drawn = PoissonSampler(units, batch_size=1, nominal_size=2).draw()
    assert (np.diff(drawn) > 0).all()
    for start in range(0, units, BLOCK_WORDS):
        within = int(((drawn >= start) & (drawn < start + BLOCK_WORDS)).sum())
        assert stats.binomtest(within, min(BLOCK_WORDS, units - start), 0.5).pvalue > CHANCE


@pytest.mark.parametrize("std", [0.3, 1.00001, 25.0])
def test_noise_is_gaussian_with_the_standard_deviation_asked_for(std: float) -> None:
    noise = gaussian_noise(100_001, std=std).double().numpy()
    assert len(noise) == 100_001
    assert stats.kstest(noise / std, "norm").pvalue > CHANCE
    variance = (noise**2).sum() / std**2
    assert stats.chi2.cdf(variance, len(noise)) > CHANCE
    assert stats.chi2.sf(variance, len(noise)) > CHANCE


def test_noise_is_independent_between_coordinates_and_between_draws() -> None:
    noise, again = gaussian_noise(80_000, std=1.0).numpy(), gaussian_noise(80_000, std=1.0).numpy()
    assert stats.pearsonr(noise, again).pvalue > CHANCE
    # Box-Muller makes pairs; wherever a pair's halves lie, neither they nor their squares may be correlated.
    for lag in (1, 2, 7232, 16384, 32768, 40_000):
        assert stats.pearsonr(noise[:-lag], noise[lag:]).pvalue > CHANCE
        assert stats.pearsonr(noise[:-lag] ** 2, noise[lag:] ** 2).pvalue > CHANCE


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_smallest_layers_get_noise_too(count: int) -> None:
    assert gaussian_noise(count, std=1.0).shape == (count,)
