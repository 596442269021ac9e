"""Poisson sampling: its distribution, its independence, and that nothing repeats.

Each statistical bound fails by chance less than once in a million runs.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cloister_privacy.training import sampler as sampler_module
from cloister_privacy.training.keystream import BLOCK_BYTES, BLOCK_WORDS, random_below, random_bytes, random_words
from cloister_privacy.training.sampler import PoissonSampler, UserSampler

CHANCE = 1e-7


def chi_squared(observed: NDArray[np.intp], expected: NDArray[np.float64]) -> float:
    return float(stats.chisquare(observed, expected).pvalue)


def test_words_are_uniform_and_never_repeat() -> None:
    words = np.concatenate([random_words(BLOCK_WORDS) for _ in range(2)])
    assert len(np.unique(words)) == len(words)
    assert stats.kstest(words / 2.0**64, "uniform").pvalue > CHANCE


def test_one_call_gives_no_more_than_a_block() -> None:
    assert len(random_bytes(BLOCK_BYTES)) == BLOCK_BYTES and len(random_bytes(0)) == 0
    with pytest.raises(ValueError, match="draw in blocks"):
        random_bytes(BLOCK_BYTES + 1)


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 2**63 + 1])
def test_integers_below_a_bound_are_uniform(bound: int) -> None:
    drawn = random_below(np.full(30_000, bound, dtype=np.uint64))
    if bound > 7:
        # Without rejection the lower half of the range would be twice as likely as the upper.
        assert stats.kstest(drawn / float(bound), "uniform").pvalue > CHANCE
    else:
        observed = np.bincount(drawn.astype(np.intp), minlength=bound)
        assert len(observed) == bound
        assert bound == 1 or chi_squared(observed, np.full(bound, 30_000 / bound)) > CHANCE


@pytest.mark.parametrize(("batch", "nominal"), [(30, 1000), (3, 2**17)])
def test_how_often_a_unit_is_drawn_is_binomial(batch: int, nominal: int) -> None:
    units, steps, rate = 3000, 400, batch / nominal
    if rate * 2**8 < 1:  # nearly every drawn unit is decided by its lower bits
        units, steps = 30_000, 1500
    sampler = PoissonSampler(units, batch_size=batch, nominal_size=nominal)
    drawn = np.zeros((steps, units), dtype=bool)
    for step in range(steps):
        drawn[step, sampler.draw()] = True
    per_unit, per_step = drawn.sum(axis=0), drawn.sum(axis=1)
    for counts, trials in ((per_unit, steps), (per_step, units)):
        edges = np.unique(stats.binom.ppf([0.1, 0.3, 0.5, 0.7, 0.9], trials, rate))
        expected = np.diff(stats.binom.cdf(edges, trials, rate), prepend=0, append=1) * len(counts)
        observed = np.bincount(np.searchsorted(edges, counts), minlength=len(expected))
        assert chi_squared(observed, expected) > CHANCE
    # Independent from step to step: being drawn twice in a row is as likely as chance has it.
    both = int((drawn[:-1] & drawn[1:]).sum())
    assert stats.binomtest(both, (steps - 1) * units, rate**2).pvalue > CHANCE
    # And from unit to neighbouring unit.
    both = int((drawn[:, :-1] & drawn[:, 1:]).sum())
    assert stats.binomtest(both, steps * (units - 1), rate**2).pvalue > CHANCE


@pytest.mark.parametrize(
    ("batch", "nominal"), [(256, 60_000), (1, 3), (1, 2**40), (1, 2**16), (2**16 - 1, 2**16), (10**6 - 1, 10**6)]
)
def test_a_unit_is_drawn_exactly_where_its_64_bits_are_below_the_threshold(
    batch: int, nominal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threshold = (batch << 64) // nominal
    around = [threshold + offset for offset in (-(2**56), -2, -1, 0, 1, 2**56, -(2**57), 2**57)]
    spread = [0, 1, 2**56 - 1, 2**56, 2**63, 2**64 - 1, *(threshold // 7 * n for n in range(1, 9))]
    words = [word for word in around + spread if 0 <= word < 2**64]
    upper = np.array([word >> 56 for word in words], dtype=np.uint8)
    tied = [word for word in words if word >> 56 == threshold >> 56]
    # The lower bits of a word are its upper 56, for the sampler shifts the rest away.
    lower = np.array([(word & (2**56 - 1)) << 8 for word in tied], dtype=np.uint64)

    def bits_of(count: int) -> NDArray[np.uint8]:
        assert count == len(words)
        return upper

    def words_of(count: int) -> NDArray[np.uint64]:
        assert count == len(lower), "the lower bits are drawn only where the upper leave it open"
        return lower

    monkeypatch.setattr(sampler_module, "random_bytes", bits_of)
    monkeypatch.setattr(sampler_module, "random_words", words_of)
    drawn = PoissonSampler(len(words), batch_size=batch, nominal_size=nominal).draw()
    assert drawn.tolist() == [index for index, word in enumerate(words) if word < threshold]


def test_the_threshold_is_exact_and_never_above_the_rate_that_is_charged() -> None:
    for batch, nominal in ((1, 3), (256, 60000), (999_999, 1_000_000), (1, 2**40)):
        threshold = PoissonSampler(1, batch_size=batch, nominal_size=nominal)._threshold
        assert threshold * nominal <= batch << 64 < (threshold + 1) * nominal


def test_a_rate_of_one_draws_everything_and_no_rows_draw_nothing() -> None:
    assert PoissonSampler(5, batch_size=7, nominal_size=7).draw().tolist() == [0, 1, 2, 3, 4]
    assert PoissonSampler(0, batch_size=1, nominal_size=7).draw().tolist() == []
    assert PoissonSampler(0, batch_size=7, nominal_size=7).draw().tolist() == []


def test_sampling_goes_on_past_one_block_of_randomness() -> None:
    block = BLOCK_BYTES // 2
    units = 2 * block + 1000
    drawn = PoissonSampler(units, batch_size=1, nominal_size=2).draw()
    assert (np.diff(drawn) > 0).all()
    for start in range(0, units, block):
        within = int(((drawn >= start) & (drawn < start + block)).sum())
        assert stats.binomtest(within, min(block, units - start), 0.5).pvalue > CHANCE


def test_a_drawn_user_gives_at_most_the_rows_of_one_unit_and_only_own_ones() -> None:
    random = np.random.default_rng(3)
    units = random.permutation(np.repeat([7, -3, 900, 12, 13], [1, 2, 3, 40, 500]))
    sampler = UserSampler(units, batch_size=1, nominal_size=1, rows_per_unit=3)
    for _ in range(50):
        drawn = sampler.draw()
        assert len(set(drawn.tolist())) == len(drawn), "without replacement"
        users, counts = np.unique(units[drawn], return_counts=True)
        assert dict(zip(users.tolist(), counts.tolist(), strict=True)) == {7: 1, -3: 2, 900: 3, 12: 3, 13: 3}


@pytest.mark.parametrize(("rows", "size"), [(5, 1), (5, 2), (6, 3), (4, 4), (3, 5)])
def test_every_subset_of_a_users_rows_is_as_likely(rows: int, size: int) -> None:
    users = 200
    units = np.tile(np.arange(users), rows)
    sampler = UserSampler(units, batch_size=1, nominal_size=1, rows_per_unit=size)
    subsets = {subset: n for n, subset in enumerate(itertools.combinations(range(rows), min(size, rows)))}
    observed = np.zeros(len(subsets), dtype=np.intp)
    for _ in range(60):
        by_user: dict[int, list[int]] = {}
        for row in sampler.draw().tolist():
            by_user.setdefault(row % users, []).append(row // users)
        assert len(by_user) == users
        for given in by_user.values():
            observed[subsets[tuple(sorted(given))]] += 1
    expected = np.full(len(subsets), observed.sum() / len(subsets))
    assert len(subsets) == 1 or chi_squared(observed, expected) > CHANCE


def test_users_are_drawn_at_the_charged_rate_however_many_rows_they_have() -> None:
    sizes = np.array([1, 2, 1000] * 100)
    units = np.repeat(np.arange(len(sizes)), sizes)
    sampler = UserSampler(units, batch_size=30, nominal_size=300, rows_per_unit=2)
    steps, drawn = 300, np.zeros(len(sizes), dtype=np.intp)
    for _ in range(steps):
        drawn[np.unique(units[sampler.draw()])] += 1
    for size in (1, 2, 1000):
        times = int(drawn[sizes == size].sum())
        assert stats.binomtest(times, steps * int((sizes == size).sum()), 0.1).pvalue > CHANCE


def test_the_randomness_of_a_user_does_not_depend_on_how_many_rows_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noting(bounds: NDArray[np.uint64]) -> NDArray[np.uint64]:
        asked.append(len(bounds))
        return random_below(bounds)

    monkeypatch.setattr(sampler_module, "random_below", noting)
    for sizes in ([1, 1, 1], [5, 500, 2]):
        UserSampler(np.repeat(np.arange(3), sizes), batch_size=1, nominal_size=1, rows_per_unit=4).draw()
    assert asked == [3] * 8


def test_no_users_give_no_rows() -> None:
    nobody = np.zeros(0, dtype=np.int64)
    for batch in (1, 7):
        assert UserSampler(nobody, batch_size=batch, nominal_size=7, rows_per_unit=2).draw().tolist() == []
