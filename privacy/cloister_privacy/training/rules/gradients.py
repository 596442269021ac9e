"""The gradients of single examples in the cheapest form that tells their norms and their weighted sum. Knows no modules.

Each form belongs to one parameter and n examples. Book-keeping, Bu et al., ICML 2023, with one difference: a norm is taken from
the very numbers that are summed, or in float64, so that no cancellation makes it smaller than what it bounds.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Dense", "Gram", "Outer", "PerExample", "SparseOuter", "of_linear"]

_LARGEST_INPUT = 1e15
"""A factor beyond this counts as not finite: scaled down, its partner would round to subnormal numbers above the clip."""

_DENSE_BYTES = 2**27
"""Up to this size the gradients of all examples are written out; beyond it their norms come from a Gram matrix."""


_RUN, _LEAST_NORM = 1024, 1e-13
"""Numbers whose squares are added in float32, and the least norm that they tell: below it too many squares would vanish."""

_LONGEST_ROW = 4096
"""So many squares may be added in float32: its roundings stay well within the slack of the sensitivity."""


class PerExample(Protocol):
    """n gradients of one parameter."""

    @property
    def numbers(self) -> int:
        """How many numbers it keeps."""

    def norms(self) -> Tensor:
        """Their L2 norms, float64 [n]; not finite where the example cannot be summed."""

    def weighted_sum(self, scales: Tensor) -> Tensor:
        """Sum of scales[i] times the i-th gradient, float32, in the parameter's shape; exactly nothing where a scale is 0."""


class Outer:
    """One outer product an example: a linear layer on vectors."""

    def __init__(self, back: Tensor, entering: Tensor) -> None:
        """back [n, p] and entering [n, d] of a weight [p, d]."""
        self._back, self._entering = back, entering

    @property
    def numbers(self) -> int:
        return self._back.numel() + self._entering.numel()

    def norms(self) -> Tensor:
        entering = _norms(self._entering)
        return torch.where(entering <= _LARGEST_INPUT, entering * _norms(self._back), torch.inf)

    def weighted_sum(self, scales: Tensor) -> Tensor:
        return _scaled(self._back, scales).T @ _kept(self._entering, scales)


class SparseOuter:
    """As Outer, of vectors told by the places and values of what is not 0; no place twice, but for values of 0."""

    def __init__(self, back: Tensor, places: Tensor, values: Tensor, features: int) -> None:
        """back [n, p], places and values [n, tokens] of a weight [p, features]."""
        self._back, self._places, self._values, self._features = back, places, values, features

    @property
    def numbers(self) -> int:
        return self._values.numel() * (2 + self._back.shape[1])

    def norms(self) -> Tensor:
        return Outer(self._back, self._values).norms()

    def weighted_sum(self, scales: Tensor) -> Tensor:
        back, values = _scaled(self._back, scales), _kept(self._values, scales)
        if back.device.type == "cpu":
            return _of_columns(self._places, values, self._features, back).T.contiguous()
        rows = values.unsqueeze(2) * back.unsqueeze(1)  # [n, tokens, p]
        total = torch.zeros(self._features, back.shape[1], device=rows.device, dtype=rows.dtype)
        return total.index_add_(0, self._places.flatten(), rows.flatten(0, 1)).T.contiguous()


class Dense:
    """Gradients written out, [n, *shape of the parameter], whose axes may be in another order."""

    def __init__(self, gradients: Tensor, axes: tuple[int, ...] = ()) -> None:
        """`axes` permutes those of one gradient into the parameter's, where they differ."""
        self._gradients, self._axes = gradients, axes

    @property
    def numbers(self) -> int:
        return self._gradients.numel()

    def norms(self) -> Tensor:
        if self._gradients.ndim < 3 or self._gradients[0, 0].numel() > _LONGEST_ROW:
            return _norms(self._gradients.flatten(1))
        # In float32 within a row of the parameter, where few enough are added; in float64 over the rows.
        return _norms64(torch.linalg.vector_norm(self._gradients.flatten(2), dim=2))

    def weighted_sum(self, scales: Tensor) -> Tensor:
        rows = _kept(self._gradients.flatten(1), scales)
        total = (scales @ rows).view(self._gradients.shape[1:])
        return total.permute(self._axes).contiguous() if self._axes else total


class Gram:
    """A linear layer on long sequences: too many gradients to write out, so their norms come from T x T products."""

    def __init__(self, back: Tensor, entering: Tensor) -> None:
        """back [n, T, p] and entering [n, T, d] of a weight [p, d]."""
        self._back, self._entering = back, entering

    @property
    def numbers(self) -> int:
        return 2 * (self._back.numel() + self._entering.numel() + 2 * self._back.shape[1] * self._back[..., 0].numel())

    def norms(self) -> Tensor:
        # In float64: the terms may cancel, and float32 would then lose the norm.
        back, entering = self._back.double(), self._entering.double()
        squares = ((back @ back.mT) * (entering @ entering.mT)).sum(dim=(1, 2))
        # Even so up to T roundings of the sum of the terms' sizes may be lost; they are added, so that the norm is never too small.
        sizes = (torch.linalg.vector_norm(back, dim=2) * torch.linalg.vector_norm(entering, dim=2)).sum(dim=1)
        squares = squares.clamp(min=0) + back.shape[1] * torch.finfo(torch.float64).eps * sizes.square()
        largest = self._entering.abs().amax(dim=(1, 2))
        return torch.where(largest <= _LARGEST_INPUT, squares.sqrt(), torch.inf)

    def weighted_sum(self, scales: Tensor) -> Tensor:
        back = _scaled(self._back.flatten(1), scales).view_as(self._back)
        entering = _kept(self._entering.flatten(1), scales).view_as(self._entering)
        return back.flatten(0, 1).T @ entering.flatten(0, 1)


def of_linear(back: Tensor, entering: Tensor) -> PerExample:
    """The gradients of a weight [p, d] between entering [n, ..., d] and back [n, ..., p]."""
    if back.ndim == 2:
        return Outer(back, entering)
    back, entering = back.flatten(1, -2), entering.flatten(1, -2)
    if back.shape[0] * back.shape[2] * entering.shape[2] * 4 <= _DENSE_BYTES:
        return Dense(back.mT @ entering)
    return Gram(back, entering)


def _of_columns(places: Tensor, values: Tensor, size: int, back: Tensor) -> Tensor:
    """The matrix [size, n] whose column i holds values[i] at places[i], times back [n, p]: SciPy's loop takes a tenth of
    index_add_'s time."""
    from scipy.sparse import csc_array

    ends = np.arange(0, places.numel() + 1, places.shape[1], dtype=np.int32)
    columns = csc_array((values.numpy().ravel(), places.numpy().ravel(), ends), shape=(size, len(places)))
    return torch.from_numpy(columns @ back.numpy())


def _norms(rows: Tensor) -> Tensor:
    """The norm of each row [n, d], float64: in float32 over runs of so few numbers that rounding stays a fifth of the sensitivity's
    slack, in float64 over the runs."""
    n, count = len(rows), rows.shape[1] // _RUN
    runs = [rows[:, : count * _RUN].reshape(n, count, _RUN), rows[:, count * _RUN :].unsqueeze(1)]
    return _norms64(torch.cat([_norms_of_runs(each) for each in runs if each.shape[1] and each.shape[2]], dim=1))


def _norms64(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms


def _norms_of_runs(runs: Tensor) -> Tensor:
    """The norms [n, k] of runs [n, k, d], float64. Where float32 cannot hold the squares, as much as the norm could be and never
    less: the largest number in every place."""
    norms = torch.linalg.vector_norm(runs, dim=2)
    largest = torch.maximum(runs.amax(dim=2), -runs.amin(dim=2))
    most = largest.double() * math.sqrt(runs.shape[2])
    return torch.where((norms >= _LEAST_NORM) & norms.isfinite(), norms.double(), most)


def _kept(rows: Tensor, scales: Tensor) -> Tensor:
    """The rows, zero where their scale is 0: what is not finite must not get into a sum."""
    return torch.where(scales.unsqueeze(1) > 0, rows, 0)


def _scaled(rows: Tensor, scales: Tensor) -> Tensor:
    return _kept(rows, scales) * scales.unsqueeze(1)
