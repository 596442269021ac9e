"""LSTM, GRU and RNN, run step by step in Python so that the gates of a whole layer are one tap. Exactly these classes.

The gates of every step are a part that came in, x W_ih' + b_ih, plus a recurrent part. The gradient at the first part, taken for
all steps at once, is the gradient at the gates; with inputs and hidden states it gives the gradient of every parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cloister_privacy.errors import UncoveredParameter
from cloister_privacy.training.native import Kernels
from cloister_privacy.training.rules.tape import LinearUse, Tape, constant

__all__ = ["recurrent"]

_Recurrent = nn.LSTM | nn.GRU | nn.RNN


def recurrent(module: _Recurrent, tape: Tape, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """As the module itself: the outputs of the last layer, and the last states of all layers."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 3:
        raise UncoveredParameter(
            f"{type(module).__name__} is clipped on batches of padded sequences only; pad, do not pack"
        )
    if module.proj_size:
        raise UncoveredParameter("an LSTM with proj_size is not clipped by example; use a Linear layer after it")
    values = inputs if module.batch_first else inputs.transpose(0, 1)
    states = _states(module, values, state)
    directions = 2 if module.bidirectional else 1
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(module.num_layers):
        if layer and module.dropout:
            values = functional.dropout(values, module.dropout, module.training)
        outputs = []
        for direction in range(directions):
            cell = _Cell(module, layer, is_reverse=direction == 1)
            output, end = cell.run(tape, values, tuple(each[len(ends)] for each in states))
            outputs.append(output)
            ends.append(end)
        values = torch.cat(outputs, dim=2) if directions == 2 else outputs[0]
    last = tuple(torch.stack(each) for each in zip(*ends, strict=True))
    return values if module.batch_first else values.transpose(0, 1), last if isinstance(module, nn.LSTM) else last[0]


def _states(module: _Recurrent, values: Tensor, state: Any) -> tuple[Tensor, ...]:
    """What the layers start from: hidden states, and the cells of an LSTM, each [layers * directions, n, h]."""
    if state is not None:
        return tuple(state) if isinstance(module, nn.LSTM) else (state,)
    count = module.num_layers * (2 if module.bidirectional else 1)
    zeros = values.new_zeros(count, len(values), module.hidden_size)
    return (zeros, zeros) if isinstance(module, nn.LSTM) else (zeros,)


class _Cell:
    """One layer in one direction."""

    def __init__(self, module: _Recurrent, layer: int, *, is_reverse: bool) -> None:
        suffix = f"_l{layer}" + ("_reverse" if is_reverse else "")
        self._module, self._is_reverse = module, is_reverse
        self._w_ih, self._w_hh = getattr(module, "weight_ih" + suffix), getattr(module, "weight_hh" + suffix)
        self._b_ih = getattr(module, "bias_ih" + suffix) if module.bias else None
        self._b_hh = getattr(module, "bias_hh" + suffix) if module.bias else None

    def run(self, tape: Tape, values: Tensor, start: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs [n, T, h] of inputs [n, T, d], and the states after the last step."""
        if self._is_reverse:
            values = values.flip(1)
        weight = self._w_hh.detach()
        came_in = functional.linear(values, self._w_ih.detach(), constant(self._b_ih)).float()
        if isinstance(self._module, nn.GRU):
            came_in = tape.tap(came_in)
            recurrent = torch.zeros_like(came_in).requires_grad_()
            outputs = _gru(came_in, recurrent, weight, constant(self._b_hh), start[0])
            end: tuple[Tensor, ...] = (outputs[:, -1],)
        else:
            came_in = tape.tap(came_in if self._b_hh is None else came_in + self._b_hh.detach())
            recurrent = came_in
            if isinstance(self._module, nn.LSTM):
                loop = (_LSTM, ()) if tape.kernels is None else (_CompiledLSTM, (tape.kernels,))
                outputs, cell = loop[0].apply(came_in, weight, *start, *loop[1])  # type: ignore[no-untyped-call]  # torch leaves it untyped
                end = (outputs[:, -1], cell)
            else:
                outputs = _rnn(came_in, weight, start[0], self._module.nonlinearity)
                end = (outputs[:, -1],)
        before = torch.cat([start[0].unsqueeze(1), outputs[:, :-1]], dim=1)
        tape.uses.append(LinearUse(came_in, values, self._w_ih, self._b_ih))
        tape.uses.append(LinearUse(recurrent, before, self._w_hh, self._b_hh))
        return outputs.flip(1) if self._is_reverse else outputs, end


def _rnn(came_in: Tensor, weight: Tensor, hidden: Tensor, nonlinearity: str) -> Tensor:
    bounded = torch.tanh if nonlinearity == "tanh" else torch.relu
    outputs = []
    for gates in came_in.unbind(1):
        hidden = bounded(torch.addmm(gates, hidden, weight.T))
        outputs.append(hidden)
    return torch.stack(outputs, dim=1)


def _gru(came_in: Tensor, recurrent: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    outputs = []
    for entering, more in zip(came_in.unbind(1), recurrent.unbind(1), strict=True):
        reset_in, update_in, new_in = entering.chunk(3, dim=1)
        reset_h, update_h, new_h = (functional.linear(hidden, weight, bias) + more).chunk(3, dim=1)
        update = torch.sigmoid(update_in + update_h)
        new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_h) * new_h)
        hidden = torch.lerp(new, hidden, update)
        outputs.append(hidden)
    return torch.stack(outputs, dim=1)


class _LSTM(torch.autograd.Function):
    """The recurrence with its gradient written by hand: the same numbers as autograd's, in a third of the operations.

    The cell's candidate is tanh(x) = 2 sigmoid(2 x) - 1, so that one sigmoid makes all four gates; e is that sigmoid(2 x).
    """

    @staticmethod
    def forward(ctx: Any, came_in: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """came_in [n, T, 4h] -> hidden states [n, T, h] and the last cell [n, h]; gates in torch's order i, f, g, o."""
        n, steps, size = len(came_in), came_in.shape[1], hidden.shape[1]
        doubled = torch.ones(4, size).index_fill_(0, torch.tensor(2), 2).flatten().to(came_in)
        gates = torch.empty(steps, n, 4 * size, device=came_in.device)
        torch.mul(came_in.transpose(0, 1), doubled, out=gates)
        by_gate = gates.view(steps, n, 4, size)
        hiddens, cells, squashed = (gates.new_empty(count, n, size) for count in (steps + 1, steps + 1, steps))
        hiddens[0], cells[0] = hidden, cell
        transposed = (weight * doubled.unsqueeze(1)).T.contiguous()
        before, after = zip(hiddens, cells, strict=True), zip(hiddens[1:], cells[1:], squashed, strict=True)
        each_gate = (by_gate[:, :, gate] for gate in range(4))
        for gate, i, f, e, o, (h, c), (next_h, next_c, squash) in zip(gates, *each_gate, before, after, strict=False):
            gate.addmm_(h, transposed).sigmoid_()
            torch.mul(f, c, out=next_c).sub_(i).addcmul_(i, e, value=2)
            torch.tanh(next_c, out=squash)
            torch.mul(o, squash, out=next_h)
        ctx.save_for_backward(by_gate, cells, squashed, weight)
        return hiddens[1:].transpose(0, 1), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_outputs: Tensor, at_cell: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        by_gate, cells, squashed, weight = ctx.saved_tensors
        steps, n, _, size = by_gate.shape
        i, f, e, o = by_gate.unbind(2)
        g = 2 * e - 1
        # What a step multiplies, for all steps at once: the loop below only carries.
        of_cell = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g)], dim=2)
        of_output, into_cell = squashed * o * (1 - o), o * (1 - squashed * squashed)
        back = torch.empty_like(by_gate)
        flat = back.view(steps, n, 4 * size)
        at_outputs = at_outputs.transpose(0, 1)
        at_hidden, at_cell = at_outputs[-1], at_cell.clone()
        at_three = at_cell.unsqueeze(1)
        views = (of_cell, of_output, into_cell, f, back[:, :, :3], back[:, :, 3], flat)
        for step, (cell, output, into, forget, three, last, whole) in reversed(
            list(enumerate(zip(*views, strict=True)))
        ):
            at_cell.addcmul_(at_hidden, into)
            torch.mul(cell, at_three, out=three)
            torch.mul(output, at_hidden, out=last)
            at_cell.mul_(forget)
            at_hidden = torch.addmm(at_outputs[step - 1], whole, weight) if step else whole @ weight
        return flat.transpose(0, 1), None, at_hidden, at_cell


class _CompiledLSTM(torch.autograd.Function):
    """The same recurrence by compiled loops, on the CPU."""

    @staticmethod
    def forward(
        ctx: Any, came_in: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        gates, hiddens, cells, squashed = kernels.lstm_forward(came_in, weight, hidden, cell)
        ctx.kernels = kernels
        ctx.save_for_backward(weight, gates, cells, squashed)
        return hiddens[:, 1:], cells[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_outputs: Tensor, at_cell: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        back, at_hidden, at_cell = ctx.kernels.lstm_backward(at_outputs, at_cell, *ctx.saved_tensors)
        return back, None, at_hidden, at_cell, None
