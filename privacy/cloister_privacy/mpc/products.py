"""The products that networks are made of, each linear in both its arrays. Knows the ring and shapes; shares nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cloister_privacy.mpc.ring import Ring, matmul, windows

__all__ = ["MATMUL", "TIMES", "Along", "Convolution", "ElementProduct", "Lookup", "MatrixProduct", "Transposed"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ElementProduct:
    """Element by element, broadcast as numpy does."""

    def __call__(self, left: Ring, right: Ring, /) -> Ring:
        return left * right

    def shape(self, left: Shape, right: Shape, /) -> Shape:
        return np.broadcast_shapes(left, right)


@dataclass(frozen=True, slots=True)
class Along:
    """By a weight along its own last dimensions, `behind` of which come after it in the other array."""

    behind: int

    def __call__(self, left: Ring, right: Ring, /) -> Ring:
        return left * right.reshape(*right.shape, *(1,) * self.behind)

    def shape(self, left: Shape, right: Shape, /) -> Shape:
        return left


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """[..., m, k] and [..., k, n]."""

    def __call__(self, left: Ring, right: Ring, /) -> Ring:
        return matmul(left, right)

    def shape(self, left: Shape, right: Shape, /) -> Shape:
        return (*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])


@dataclass(frozen=True, slots=True)
class Transposed:
    """[..., k] and a weight [n, k], as a linear layer has it."""

    def __call__(self, left: Ring, right: Ring, /) -> Ring:
        found = matmul(left.reshape(-1, left.shape[-1]), right.T)
        return found.reshape(*left.shape[:-1], len(right))

    def shape(self, left: Shape, right: Shape, /) -> Shape:
        return (*left[:-1], right[0])


@dataclass(frozen=True, slots=True)
class Lookup:
    """[..., k] one-hot and a table [k, n]."""

    def __call__(self, left: Ring, right: Ring, /) -> Ring:
        return matmul(left.reshape(-1, left.shape[-1]), right).reshape(*left.shape[:-1], right.shape[1])

    def shape(self, left: Shape, right: Shape, /) -> Shape:
        return (*left[:-1], right[1])


@dataclass(frozen=True, slots=True)
class Convolution:
    """[n, c, h, w] and a weight [leaving, c / groups, kernel rows, kernel columns], as torch.nn.Conv2d; or of one dimension less."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def __call__(self, left: Ring, right: Ring, /) -> Ring:
        if right.ndim == 3:
            return self(left[:, :, None], right[:, :, None])[:, :, 0]
        n, _, rows, columns = self.shape(left.shape, right.shape)
        found = windows(
            left,
            kernel=(right.shape[2], right.shape[3]),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        parts = []
        for image, weight in zip(
            np.split(found, self.groups, axis=1), np.split(right, self.groups, axis=0), strict=True
        ):
            flat = image.transpose(0, 2, 3, 1, 4, 5).reshape(n * rows * columns, -1)
            parts.append(matmul(flat, weight.reshape(len(weight), -1).T))
        return np.ascontiguousarray(np.concatenate(parts, axis=1).reshape(n, rows, columns, -1).transpose(0, 3, 1, 2))

    def shape(self, left: Shape, right: Shape, /) -> Shape:
        if len(right) == 3:
            n, channels, _, columns = self.shape((*left[:2], 1, left[2]), (*right[:2], 1, right[2]))
            return n, channels, columns
        rows, columns = (
            (left[2 + k] + 2 * self.padding[k] - self.dilation[k] * (right[2 + k] - 1) - 1) // self.stride[k] + 1
            for k in range(2)
        )
        return left[0], right[0], rows, columns


TIMES, MATMUL = ElementProduct(), MatrixProduct()
