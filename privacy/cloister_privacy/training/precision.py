"""Float32 means float32: no tensor-float or bfloat16 products behind its name, whatever the process has set. Knows torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_float32"]

_BACKENDS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]  # made at run time
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it products of float32 are rounded as float32: a clipped sum of TF32 products could pass the clip by a thousandth.

    What the process had asked for (`torch.set_float32_matmul_precision`, `torch.autocast`) holds again afterwards.
    """
    asked = [backend.fp32_precision for backend in _BACKENDS]
    for backend in _BACKENDS:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(_BACKENDS, asked, strict=True):
            backend.fp32_precision = precision
