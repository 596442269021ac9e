"""Functions of shared numbers against the same in the clear, and what an observer of the exchanges learns of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_privacy.mpc import functions
from cloister_privacy.mpc.functions import SERIES
from cloister_privacy.mpc.keystream import Index, Keystream
from cloister_privacy.mpc.products import MATMUL, Along, Convolution, Lookup, Transposed
from cloister_privacy.mpc.ring import matmul
from two_parties import compute
from uniformity import require_uniform

_UNIT = 2.0**-20
_RANDOM = np.random.default_rng(0)
_EDGES = [0.0, _UNIT, -_UNIT, 1.0, -1.0, 2.0**20, -(2.0**20), 5.999999, 6.0, -6.0, 16.0, -16.0]


def _softmax(x: Any) -> Any:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


_gelu = np.vectorize(lambda x: x * (1 + math.erf(x / 2**0.5)) / 2)

FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any], float]] = {
    "truncated": (lambda c, v: c.truncated(v), lambda x: x, _UNIT),
    "relu": (functions.relu, lambda x: np.maximum(x, 0), _UNIT),
    "leaky relu": (lambda c, v: functions.leaky_relu(c, v, 0.25), lambda x: np.where(x > 0, x, x / 4), 2 * _UNIT),
    "tanh": (functions.tanh, np.tanh, 5e-5),
    "sigmoid": (lambda c, v: functions.tanh_half(c, v, gain=0.5, offset=0.5), lambda x: 1 / (1 + np.exp(-x)), 5e-5),
    "gelu": (functions.gelu, _gelu, 5e-5),
    "silu": (functions.silu, lambda x: x / (1 + np.exp(-x)), 5e-5),
    "elu": (lambda c, v: functions.elu(c, v, 1.0), lambda x: np.where(x > 0, x, np.expm1(x)), 5e-5),
    "maximum": (lambda c, v: functions.maximum(c, v, -1), lambda x: x.max(axis=-1), _UNIT),
    "softmax": (functions.softmax, _softmax, 1e-4),
}


@pytest.mark.parametrize("bits", [20, 40])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_on_shares_is_within_its_bound(name: str, bits: int) -> None:
    function, reference, bound = FUNCTIONS[name]
    x = _RANDOM.normal(0, 5, (9, 7))
    with np.errstate(over="ignore"):
        assert np.abs(compute(function, x, bits=bits) - reference(x)).max() <= bound


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("maximum", "softmax")])
def test_a_function_holds_at_the_edges_of_its_intervals_and_far_outside(name: str) -> None:
    function, reference, bound = FUNCTIONS[name]
    x = np.array(_EDGES)
    with np.errstate(over="ignore"):
        assert np.abs(compute(function, x, bits=40) - reference(x)).max() <= bound


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-(2**61), 2**61), min_size=1, max_size=30), st.integers(1, 40))
def test_a_truncation_is_off_by_less_than_one_unit_and_never_by_more(words: list[int], shift: int) -> None:
    """The stock truncation is wrong by 2^(64 - shift) with a probability that grows with the number; this never is."""
    exact = np.array([word / 2.0**shift for word in words])
    # As numbers of `shift` fraction bits truncated to none.
    numbers = np.array(words, dtype=np.float64) / 2.0**shift
    found = compute(lambda c, v: c.truncated(v, bits=0), numbers, bits=shift)
    assert np.abs(found - exact).max() <= 1 + np.abs(exact).max() * 2.0**-52


def test_ten_thousand_truncations_of_large_numbers_are_all_right() -> None:
    x = _RANDOM.uniform(-(2.0**20), 2.0**20, 10_000)
    assert np.abs(compute(lambda c, v: c.truncated(v), x, bits=40) - x).max() < _UNIT


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-(2**62) + 1, 2**62 - 1), min_size=1, max_size=20), st.integers(-(2**61), 2**61))
def test_a_comparison_is_exact(words: list[int], threshold: int) -> None:
    def below(c: Any, value: Any) -> Any:
        return value.__class__(c.below(value, (float(threshold),)).is_below[0], 0)

    limit = float(threshold)  # as `below` rounds it
    numbers = [float(word) for word in words]
    found = compute(below, np.array(numbers), bits=0)
    assert found.tolist() == [float(number < limit) for number in numbers]


@pytest.mark.parametrize("power", [-0.5, -1.0])
def test_inverses_are_right_to_five_digits_over_their_whole_range(power: float) -> None:
    x = np.exp2(_RANDOM.uniform(-8, 8, 200))
    function = functions.inverse_root if power == -0.5 else functions.inverse
    found = compute(lambda c, v: function(c, v, least=-9, most=9), x, bits=40)
    assert np.abs(found * x**-power - 1).max() < (1e-4 if power == -0.5 else 5e-4)


@pytest.mark.parametrize("name", SERIES)
def test_a_series_is_as_near_to_its_function_as_it_says(name: str) -> None:
    series = SERIES[name]
    x = np.linspace(series.low, series.high, 3001)
    assert np.abs(series(x) - series.function(x)).max() <= series.error


def test_products_on_shares_are_those_of_the_numbers() -> None:
    left, right = _RANDOM.normal(size=(2, 6, 5)), _RANDOM.normal(size=(2, 5, 3))
    assert np.abs(compute(lambda c, a, b: c.matmul(a, b), left, right) - left @ right).max() < 1e-4
    a, b = _RANDOM.normal(size=(4, 3)), _RANDOM.normal(size=(4, 1))
    assert np.abs(compute(lambda c, x, y: c.product(x, y), a, b) - a * b).max() < 1e-5


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32))
def test_a_product_of_matrices_wraps_as_the_ring_does(m: int, k: int, n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = (random.integers(0, 2**64, shape, dtype=np.uint64) for shape in ((m, k), (k, n)))
    exact = [[sum(int(x) * int(y) for x, y in zip(row, column, strict=True)) % 2**64 for column in b.T] for row in a]
    assert matmul(a, b).tolist() == exact


@pytest.mark.parametrize(
    "op",
    [
        MATMUL,
        Along(2),
        Convolution((2, 1), (1, 0), (1, 2), 2),
        Convolution((1, 2), (0, 1), (1, 1), 1),
        Lookup(),
        Transposed(),
    ],
)
def test_a_product_has_the_shape_it_says_and_is_linear(op: Any) -> None:
    shapes = {
        "MatrixProduct": ((2, 3), (3, 4)), "Along": ((2, 3, 4, 5), (3,)), "Lookup": ((2, 5, 3), (3, 4)),
        "Transposed": ((2, 5, 3), (4, 3)),
    }  # fmt: skip
    one_dimensional = type(op) is Convolution and op.groups == 1
    convolved = ((2, 3, 9), (5, 3, 3)) if one_dimensional else ((2, 4, 9, 9), (6, 2, 3, 2))
    left_shape, right_shape = shapes.get(type(op).__name__, convolved)
    a, b = (_RANDOM.integers(0, 2**64, left_shape, dtype=np.uint64) for _ in range(2))
    w = _RANDOM.integers(0, 2**64, right_shape, dtype=np.uint64)
    assert op(a, w).shape == op.shape(left_shape, right_shape)
    assert np.array_equal(op(a, w) + op(b, w), op(a + b, w))


def test_what_a_party_sends_is_uniform_whatever_the_numbers() -> None:
    """All exchanges of a function that compares, multiplies and truncates, of a constant: chi-square of their bytes."""
    sent: list[bytes] = []
    compute(functions.silu, np.full(2048, 0.75), bits=40, record=sent)
    require_uniform(b"".join(sent))


def test_no_two_indices_or_tuples_share_a_stream() -> None:
    key, dtype = bytes(32), np.dtype(np.uint64)
    drawn = [
        Keystream.of(key, Index(rows, count)).tuple_stream(number).draw((2,), dtype).tobytes()
        for rows in range(3)
        for count in range(3)
        for number in range(3)
    ]
    assert len(set(drawn)) == 27
    again = Keystream.of(key, Index(1, 2)).tuple_stream(2).draw((2,), dtype).tobytes()
    assert again in drawn
