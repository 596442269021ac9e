"""CrypTen, which the benchmark measures ours beside: all that makes 0.4.1 run with a newer torch. No part of the product uses it.

Its defaults are not private (ADR 16). It is installed by the Makefile, without its dependencies, one of which is dead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from cloister_privacy.mpc.errors import PrivateInferenceError

__all__ = ["MOVED", "CrypTenIncompatible", "CrypTenMissing", "load_crypten"]

MOVED = {"torch.onnx._internal.registration": "torch.onnx._internal.torchscript_exporter.registration"}
"""Modules of torch that CrypTen imports by the name they had, and where they are now."""


class CrypTenMissing(PrivateInferenceError):
    """CrypTen is not installed."""


class CrypTenIncompatible(PrivateInferenceError):
    """This torch has moved what CrypTen needs; the message names it."""


def load_crypten(*, load: Callable[[str], ModuleType] = import_module) -> ModuleType:
    """The package. Raises CrypTenMissing, and CrypTenIncompatible where a shim has come off."""
    for old, new in MOVED.items():
        try:
            sys.modules.setdefault(old, load(new))
        except ImportError as exc:
            raise CrypTenIncompatible(
                f"torch has {new!r} no more, which CrypTen knows as {old!r}; say in crypten_compat.MOVED where it is"
            ) from exc
    try:
        return load("crypten")
    except ModuleNotFoundError as exc:
        if exc.name == "crypten":
            raise CrypTenMissing(
                "CrypTen is not installed; run `make install`, or `pip install --no-deps crypten==0.4.1`"
            ) from exc
        raise CrypTenIncompatible(
            f"CrypTen needs {exc.name!r}, which is not there; install cloister[mpc], or add a shim to crypten_compat.MOVED"
        ) from exc
