"""The noise of DP-SGD: its distribution to the tails, its independence, and that no draw is ever handed out twice.

Each statistical test fails by chance less than once in a million runs.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from cloister_privacy.errors import TrainingError
from cloister_privacy.training import noise as module
from cloister_privacy.training.compilation import compiled
from cloister_privacy.training.noise import NoiseDraws

CHANCE = 1e-9
"""Of one comparison; no test makes more than a few hundred."""

GROUPS = 2**14
DRAW = 8 * GROUPS
"""Coordinates of one draw, as eight rows of GROUPS."""


def gaussian_noise(count: int, *, std: float = 1.0) -> torch.Tensor:
    with NoiseDraws(count, std=std, device="cpu") as draws:
        return draws.take()


def draw(count: int, std: float = 1.0) -> NDArray[np.float64]:
    return gaussian_noise(count, std=std).double().numpy()


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float64]:
    """[8, many]: which row of its draw a coordinate lies in."""
    with NoiseDraws(DRAW, std=1.0, device="cpu") as draws:
        drawn = [draws.take().double().numpy().reshape(8, GROUPS) for _ in range(24)]
    return np.concatenate(drawn, axis=1)


@pytest.mark.parametrize("std", [0.3, 1.00001, 25.0])
def test_noise_is_gaussian_with_the_standard_deviation_asked_for(std: float) -> None:
    noise = draw(1_000_001, std) / std
    assert stats.kstest(noise, "norm").pvalue > CHANCE
    assert CHANCE < stats.chi2.cdf((noise**2).sum(), len(noise)) < 1 - CHANCE
    assert 2 * stats.norm.sf(abs(noise.mean()) * math.sqrt(len(noise))) > CHANCE


def test_the_variance_and_the_tails_of_many_draws_are_a_gaussian_s() -> None:
    noise = draw(8_000_000)
    assert CHANCE < stats.chi2.cdf((noise**2).sum(), len(noise)) < 1 - CHANCE
    for deviations in (3, 4, 5):
        for beyond in (noise > deviations, noise < -deviations):
            assert stats.binomtest(int(beyond.sum()), len(noise), stats.norm.sf(deviations)).pvalue > CHANCE


def test_every_row_of_a_draw_is_gaussian(rows: NDArray[np.float64]) -> None:
    for row in rows:
        assert stats.kstest(row, "norm").pvalue > CHANCE


def test_coordinates_that_share_gaussians_are_independent(rows: NDArray[np.float64]) -> None:
    for first, second in itertools.combinations(rows, 2):
        assert stats.pearsonr(first, second).pvalue > CHANCE
        assert stats.pearsonr(first**2, second**2).pvalue > CHANCE
        assert stats.pearsonr(abs(first), abs(second)).pvalue > CHANCE
        for rotated in ((first + second) / math.sqrt(2), (first - second) / math.sqrt(2)):
            assert stats.kstest(rotated[:100_000], "norm").pvalue > CHANCE
    # Pairwise independence is not joint: no three and no four of them may be tied either.
    for several in (*itertools.combinations(rows, 3), *itertools.combinations(rows, 4)):
        product = np.prod(several, axis=0)
        assert 2 * stats.norm.sf(abs(product.sum()) / math.sqrt(product.size)) > CHANCE
    # All eight together: the squared length is chi-square with eight degrees of freedom.
    assert stats.kstest((rows**2).sum(axis=0), stats.chi2(8).cdf).pvalue > CHANCE


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 8, GROUPS - 1, GROUPS + 1, *(GROUPS * k for k in range(1, 9)), 2 * DRAW])
def test_no_lag_shows_the_structure_of_the_draws(lag: int) -> None:
    with NoiseDraws(DRAW, std=1.0, device="cpu") as draws:
        noise = torch.cat([draws.take() for _ in range(6)]).double().numpy()
    assert stats.pearsonr(noise[:-lag], noise[lag:]).pvalue > CHANCE
    assert stats.pearsonr(noise[:-lag] ** 2, noise[lag:] ** 2).pvalue > CHANCE


def test_draws_are_independent_of_each_other() -> None:
    noise, again = draw(400_000), draw(400_000)
    assert stats.pearsonr(noise, again).pvalue > CHANCE
    assert stats.pearsonr(noise**2, again**2).pvalue > CHANCE


def test_no_two_draws_are_equal() -> None:
    with NoiseDraws(17, std=1.0, device="cpu") as draws:
        taken = {draws.take().numpy().tobytes() for _ in range(500)}
    assert len(taken) == 500


@pytest.mark.parametrize(
    "count", [*range(18), 65, DRAW - 1, DRAW, DRAW + 1, module._BLOCK - 1, module._BLOCK, module._BLOCK + 1, 2_100_001]
)
def test_every_count_is_filled_to_its_last_coordinate(count: int) -> None:
    noise = gaussian_noise(count, std=3.0)
    assert noise.shape == (count,)
    assert noise.dtype.is_floating_point
    assert noise.element_size() == 4
    assert (
        len(noise.unique()) >= 0.98 * count - 1
    )  # no part is left at one value or repeats another; float32 meets itself rarely
    assert bool(noise.isfinite().all())


def _many(count: int, times: int) -> NDArray[np.float64]:
    with NoiseDraws(count, std=1.0, device="cpu") as draws:
        return torch.cat([draws.take() for _ in range(times)]).double().numpy()


def test_small_draws_have_the_same_distribution() -> None:
    assert stats.kstest(_many(11, 4000), "norm").pvalue > CHANCE


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_no_word_makes_an_infinite_or_a_missing_gaussian(is_compiled: bool) -> None:
    make = module._gaussians
    words = torch.empty((2, 2, 2, 2, 1), dtype=torch.int32)
    if is_compiled:
        make = compiled(make, words, std=2.0)
        assert make is not module._gaussians
    for radius_word, largest in ((-1, 13.112), (-(2**31), 1e-3), (2**31 - 1, 13.112), (0, 1e-3)):
        for angle_word in (-(2**31), -1, 0, 1, 2**30, 2**31 - 1):
            words[0], words[1] = radius_word, angle_word
            made = make(words, std=2.0)
            assert made.isfinite().all()
            assert 0 < float(made.abs().max()) <= 2.0 * largest


@pytest.mark.long
def test_compiled_draws_are_the_same_gaussians() -> None:
    words = module._keystream(1, 4096)[0]
    torch.testing.assert_close(
        compiled(module._gaussians, words, std=2.0)(words, std=2.0),
        module._gaussians(words, std=2.0),
        rtol=0,
        atol=1e-5,
    )
    with NoiseDraws(101_770, std=3.0, device="cpu", is_compiled=True) as draws:
        taken = torch.cat([draws.take() for _ in range(20)]).double().numpy() / 3.0
    assert stats.kstest(taken, "norm").pvalue > CHANCE


def test_no_words_are_used_twice() -> None:
    with NoiseDraws(5000, std=1.0, device="cpu") as draws:
        words = torch.stack([draws._next().flatten() for _ in range(40)])  # of more than one keystream
    assert len(words.unique()) > 0.999 * words.numel()


def test_the_rows_are_orthogonal_and_no_combination_of_them_holds_fewer_than_four_gaussians() -> None:
    signs = module._mixed(torch.eye(8).view(2, 2, 2, 8)).numpy()
    assert (abs(signs).sum(axis=1) == 4).all()
    assert (signs @ signs.T == 4 * np.eye(4)).all()
    # A combination that misses five columns exists if and only if they do not have full rank.
    for columns in itertools.combinations(range(8), 5):
        assert np.linalg.matrix_rank(signs[:, columns]) == 4


@pytest.fixture(params=[False, True], ids=["when_asked", "ahead"])
def draws(request: pytest.FixtureRequest) -> Iterator[NoiseDraws]:
    with NoiseDraws(1001, std=2.0, device="cpu", is_ahead=request.param) as draws:
        yield draws


def test_draws_are_gaussian_and_each_is_handed_out_once(draws: NoiseDraws) -> None:
    with ThreadPoolExecutor(8) as pool:
        taken = [draw.numpy() for draw in pool.map(lambda _: draws.take(), range(400))]
    assert len({draw.tobytes() for draw in taken}) == 400
    together = np.concatenate(taken).astype(np.float64) / 2.0
    assert together.shape == (400 * 1001,)
    assert stats.kstest(together, "norm").pvalue > CHANCE
    assert stats.pearsonr(together[:-1001], together[1001:]).pvalue > CHANCE


def test_a_taken_draw_is_its_taker_s(draws: NoiseDraws) -> None:
    first = draws.take()
    kept = first.clone()
    second = draws.take()
    second.zero_()
    for _ in range(5):
        draws.take()
    assert bool((first == kept).all())


def test_no_more_than_one_keystream_waits() -> None:
    with NoiseDraws(1001, std=2.0, device="cpu", is_ahead=True) as ahead:
        ahead.take()
        deadline = time.monotonic() + 120
        while not ahead._ready and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(ahead._ready) == 1


def test_without_a_thread_none_is_started() -> None:
    before = threading.active_count()
    with NoiseDraws(10, std=1.0, device="cpu") as draws:
        draws.take()
        assert threading.active_count() == before


def test_closing_stops_the_thread_and_drops_what_is_left() -> None:
    with NoiseDraws(10, std=1.0, device="cpu", is_ahead=True) as draws:
        draws.take()
        thread = draws._thread
        assert thread is not None
        assert thread.is_alive()
    assert not thread.is_alive()
    assert not draws._ready
    with pytest.raises(TrainingError, match="outside"):
        draws.take()
    draws.close()
    with pytest.raises(TrainingError, match="opened before"):
        draws.__enter__()


def test_a_finalizer_may_close_in_the_thread_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = NoiseDraws(10, std=1.0, device="cpu", is_ahead=True)

    keystream = module._keystream

    def closing(*sizes: int, is_pinned: bool) -> torch.Tensor:
        draws.close()
        return keystream(*sizes, is_pinned=is_pinned)

    monkeypatch.setattr(module, "_keystream", closing)
    with draws:
        thread = draws._thread
        assert thread is not None
        thread.join(120)
        assert not thread.is_alive()
        assert draws._failure is None
        assert not draws._ready


def test_the_thread_stops_when_the_block_fails() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), NoiseDraws(10, std=1.0, device="cpu", is_ahead=True):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_nothing_is_handed_out_before_the_draws_are_opened() -> None:
    with pytest.raises(TrainingError, match="outside"):
        NoiseDraws(10, std=1.0, device="cpu").take()


def test_a_failure_of_the_thread_reaches_whoever_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no entropy")

    monkeypatch.setattr(module, "_keystream", broken)
    with NoiseDraws(10, std=1.0, device="cpu", is_ahead=True) as draws:
        for _ in range(2):
            with pytest.raises(TrainingError, match="could not be drawn") as caught:
                draws.take()
            assert isinstance(caught.value.__cause__, OSError)


def test_a_forked_process_is_refused_its_parent_s_draws(draws: NoiseDraws, monkeypatch: pytest.MonkeyPatch) -> None:
    draws.take()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        with pytest.raises(TrainingError, match="fork"):
            draws.take()
    draws.take()


def test_a_draw_of_nothing_is_a_draw() -> None:
    with NoiseDraws(0, std=1.0, device="cpu") as draws:
        assert draws.take().shape == (0,)
