"""The loops that are compiled from C++ (kernels.cpp beside this): loads them, and hands tensors over. Knows shapes, no meaning."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor
from torch.nn import functional

from cloister_privacy.training.compilation import library

__all__ = ["Kernels", "kernels"]


@cache
def kernels() -> Kernels | None:
    """The compiled loops, or None where there is no C++ compiler or no memory file system. The first call takes seconds."""
    compiled = library(files(__package__).joinpath("kernels.cpp").read_text())
    return None if compiled is None else Kernels(compiled)


class Kernels:
    """Loops on float32 tensors of the CPU."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._compiled = compiled
        self._columns = compiled.product_columns()

    def lstm_forward(
        self, came_in: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The recurrence over came_in [n, T, 4h], all but the recurrent part of the gates (i, f, g, o), with weight [4h, h].

        Gives the gates [n, T, 4h], the hidden states and cells [n, T + 1, h] with those before the first step, and tanh of the
        cells after each [n, T, h].
        """
        came_in = came_in.contiguous()
        n, steps, size = len(came_in), came_in.shape[1], hidden.shape[1]
        padded = self._padded(weight.T.reshape(size, 4, size))
        gates, squashed = torch.empty_like(came_in), came_in.new_empty(n, steps, size)
        hiddens, cells = (came_in.new_empty(n, steps + 1, size) for _ in range(2))
        hiddens[:, 0], cells[:, 0] = hidden, cell
        self._run("lstm_forward", came_in, padded, gates, hiddens, cells, squashed, n, steps, size, padded.shape[-1])
        return gates, hiddens, cells, squashed

    def lstm_backward(
        self, at_outputs: Tensor, at_cell: Tensor, weight: Tensor, gates: Tensor, cells: Tensor, squashed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From what came back to the outputs [n, T, h] and the last cell [n, h]: what came back to the gates [n, T, 4h], and to the
        states before the first step."""
        n, steps, size = squashed.shape
        padded, back, at_hidden = self._padded(weight), torch.empty_like(gates), gates.new_empty(n, size)
        at_cell = at_cell.clone(memory_format=torch.contiguous_format)
        tensors = (at_outputs.contiguous(), padded, gates, cells, squashed, back, at_hidden, at_cell)
        self._run("lstm_backward", *tensors, n, steps, size, padded.shape[-1])
        return back, at_hidden, at_cell

    def gaussians(self, words: Tensor, *, std: float) -> Tensor:
        """As `noise._gaussians`: int32 words [2, 2, 2, 2, groups] to 8 * groups draws."""
        groups = words.shape[-1]
        drawn = torch.empty(8 * groups)
        self._run("gaussians", words, drawn, groups, float(std))
        return drawn

    def _padded(self, weight: Tensor) -> Tensor:
        """Its last dimension filled up with zeros, as wide as a product takes it."""
        return functional.pad(weight, (0, -weight.shape[-1] % self._columns)).contiguous()

    def _run(self, name: str, *arguments: Tensor | float) -> None:
        getattr(self._compiled, name)(*(_passed(each) for each in arguments))


def _passed(argument: Tensor | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, Tensor):
        if argument.device.type != "cpu" or not argument.is_contiguous():
            raise ValueError("a kernel takes contiguous tensors of the CPU")
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
