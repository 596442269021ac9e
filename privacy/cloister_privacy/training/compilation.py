"""Compiles functions and C++ where it pays, and keeps what the compiler writes in memory and for no longer than it compiles.

Inductor writes source code, shared objects and pickles, which tell an architecture. They go into a directory of this process
alone on a memory file system, which is gone before the compiled function sees its first row; without such a file system, or
without a C++ compiler, the function runs as it is.
"""

from __future__ import annotations

import ctypes
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from cloister_privacy.architecture.frontends.text import SparseLinear

__all__ = ["compiled", "is_recurrent", "library", "pays"]

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)

_IN_MEMORY = Path("/dev/shm")  # noqa: S108 (tmpfs on every Linux; mkdtemp makes the directory private)
_COMPILES_IN_S, _SAVES = 60.0, 0.25
"""How long compiling a pass takes, about, and what it saves of an eager pass's time."""

_KERNELS_COMPILE_IN_S, _KERNELS_SAVE = 12.0, 0.5
"""The same of the loops for an LSTM."""


def pays(network: nn.Module, one_pass: Callable[[], Any], *, passes: int) -> bool:
    """Whether compiling `one_pass`, run so many times, saves more than it takes: tried twice, on synthetic examples."""
    takes_s, saves = _COMPILES_IN_S, _SAVES
    if any(isinstance(module, SparseLinear) for module in network.modules()):
        return False  # its sums are SciPy's, which no compiler follows
    if is_recurrent(network):
        if not any(isinstance(module, nn.LSTM) for module in network.modules()):
            return False
        takes_s, saves = _KERNELS_COMPILE_IN_S, _KERNELS_SAVE
    one_pass()
    _wait()
    before = time.monotonic()
    one_pass()
    _wait()
    return (time.monotonic() - before) * saves * passes > takes_s


def is_recurrent(network: nn.Module) -> bool:
    """Whether it has layers that are not compiled with the rest: their steps would be unrolled, and compile for minutes."""
    return any(isinstance(module, nn.RNNBase) for module in network.modules())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compiled(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> Callable[P, R]:
    """`function`, compiled for arguments of exactly these shapes, or itself where that cannot be done.

    A dimension of them that `torch._dynamo.mark_dynamic` marked may be of any size from 2.
    """
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    if not _tried(lambda: fast(*arguments, **options)):
        return function

    def run(*given: P.args, **named: P.kwargs) -> R:
        with torch.compiler.set_stance("eager_on_recompile"):  # nothing is compiled, and written, any more
            result: R = fast(*given, **named)
            return result

    return run


def library(source: str) -> ctypes.CDLL | None:
    """C++ compiled for this processor, as Inductor compiles its own, and loaded; None where that cannot be done."""
    from torch._inductor.codecache import CppCodeCache

    loaded: list[ctypes.CDLL] = []
    _tried(lambda: loaded.append(CppCodeCache.load(source, needs_vec_isa=True)))
    return loaded[0] if loaded else None


def _tried(compile_it: Callable[[], Any]) -> bool:
    """Whether it could be compiled, in a directory that is gone afterwards."""
    if not os.access(_IN_MEMORY, os.W_OK):
        return False
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # the compiler's imports warn of torch's own code
            tempfile.TemporaryDirectory(dir=_IN_MEMORY) as private,  # mode 0700; it goes, whatever happens
            _cached_in(private),
        ):
            compile_it()
    except Exception as error:  # whatever the compiler cannot do, torch itself can
        log.info("compile.not_possible", extra={"error": type(error).__name__})
        return False
    return True


@contextmanager
def _cached_in(directory: str) -> Iterator[None]:
    """Inductor writes there and nowhere else, in this process and no other, and Dynamo follows calls of autograd."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor
    from torch._inductor.utils import fresh_cache

    alone = {
        "compile_threads": 1,
        "fx_graph_cache": False,
        "fx_graph_remote_cache": False,
        # Else what is rounded to bfloat16 and back is not, in some of its uses: norms would be of other numbers than the sums.
        "emulate_precision_casts": True,
    }
    with (
        fresh_cache(dir=directory, delete=False),
        inductor.patch(alone),
        dynamo.patch(trace_autograd_ops=True),
    ):
        yield
