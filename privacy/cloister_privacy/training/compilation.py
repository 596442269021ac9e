"""Compiles a function where it pays, and keeps what the compiler writes in memory and for no longer than it compiles.

Inductor writes source code, shared objects and pickles, which tell an architecture. They go into a directory of this process
alone on a memory file system, which is gone before the compiled function sees its first row; without such a file system, or
without a C++ compiler, the function runs as it is.
"""

from __future__ import annotations

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

__all__ = ["compiled", "pays"]

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)

_IN_MEMORY = Path("/dev/shm")  # noqa: S108 (tmpfs on every Linux; mkdtemp makes the directory private)
_COMPILES_IN_S = 60.0
_SAVES = 0.25
"""Of an eager pass's time, about, where compiling pays at all."""


def pays(network: nn.Module, one_pass: Callable[[], Any], *, passes: int) -> bool:
    """Whether compiling `one_pass`, run so many times, saves more than it takes: tried twice, on synthetic examples."""
    if any(isinstance(module, nn.RNNBase) for module in network.modules()):
        return False  # its steps would be unrolled, and compile for minutes
    one_pass()
    _wait()
    before = time.monotonic()
    one_pass()
    _wait()
    return (time.monotonic() - before) * _SAVES * passes > _COMPILES_IN_S


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compiled(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> Callable[P, R]:
    """`function`, compiled for arguments of exactly these shapes, or itself where that cannot be done.

    A dimension of them that `torch._dynamo.mark_dynamic` marked may be of any size from 2.
    """
    if not os.access(_IN_MEMORY, os.W_OK):
        return function
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # the compiler's imports warn of torch's own code
            tempfile.TemporaryDirectory(dir=_IN_MEMORY) as private,  # mode 0700; it goes, whatever happens
            _cached_in(private),
        ):
            fast(*arguments, **options)
    except Exception as error:  # whatever the compiler cannot do, the function itself can
        log.info("compile.not_possible", extra={"error": type(error).__name__})
        return function

    def run(*given: P.args, **named: P.kwargs) -> R:
        with torch.compiler.set_stance("eager_on_recompile"):  # nothing is compiled, and written, any more
            result: R = fast(*given, **named)
            return result

    return run


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
