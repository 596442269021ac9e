"""LSTM, GRU and RNN on shares: the inputs of all steps are weighed at once, then each step is a few exchanges. Knows those three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cloister.wire import layers as wire
from cloister_privacy.mpc import functions
from cloister_privacy.mpc.computation import Computation, Shared
from cloister_privacy.mpc.products import Transposed

__all__ = ["recurrent"]


def recurrent(c: Computation, layer: Any, prefix: str, reads: Sequence[Shared]) -> Shared:
    """[n, T, width], or what each direction gives at its last step. Gates in torch's order."""
    value = reads[0]
    for number in range(layer.num_layers):
        directions = [""] + (["_reverse"] if layer.bidirectional else [])
        found = [_direction(c, layer, f"{prefix}recurrent.", f"_l{number}{way}", value) for way in directions]
        value = Shared(np.concatenate([each.share for each in found], axis=2), found[0].bits)
    if layer.output != "last":
        return value
    size = layer.hidden_size
    return value.with_share(np.concatenate([value.share[:, -1, :size], value.share[:, 0, size:]], axis=1))


def _direction(c: Computation, layer: Any, prefix: str, suffix: str, value: Shared) -> Shared:
    entered = c.weighed(value, f"{prefix}weight_ih{suffix}", Transposed())
    if layer.bias:
        entered = c.sum(entered, c.weight(f"{prefix}bias_ih{suffix}"))
    order = range(value.shape[1])
    kinds: dict[str, Callable[..., dict[int, Shared]]] = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}
    way = order[::-1] if suffix.endswith("reverse") else order
    steps = kinds[layer.type](c, layer, prefix, suffix, entered, way)
    return Shared(np.stack([steps[t].share for t in order], axis=1), c.fraction_bits)


def _carried(c: Computation, layer: Any, prefix: str, suffix: str, hidden: Shared | None) -> Shared | None:
    """What the step before adds to this one: before the first step there is 0 only."""
    bias = c.weight(f"{prefix}bias_hh{suffix}") if layer.bias else None
    if hidden is None:
        return bias
    product = c.weighed(hidden, f"{prefix}weight_hh{suffix}", Transposed())
    return product if bias is None else c.sum(product, bias)


def _lstm(
    c: Computation, layer: wire.LSTM, prefix: str, suffix: str, entered: Shared, order: Sequence[int]
) -> dict[int, Shared]:
    size, steps = layer.hidden_size, {}
    # The input, forget and output gates are sigmoids, 1/2 + 1/2 tanh(x / 2); the cell's is tanh(2x / 2).
    is_cell = np.repeat([False, False, True, False], size)
    gain, offset = np.where(is_cell, 1.0, 0.5), np.where(is_cell, 0.0, 0.5)
    doubling = np.where(is_cell, 2, 1).astype(np.uint64)
    hidden: Shared | None = None
    cell: Shared | None = None
    for t in order:
        x = entered.with_share(entered.share[:, t])
        carried = _carried(c, layer, prefix, suffix, hidden)
        x = x if carried is None else c.sum(x, carried)
        gates = c.truncated(functions.tanh_half(c, x.with_share(x.share * doubling), gain=gain, offset=offset))
        enter, forget, new, out = (gates.with_share(part) for part in np.split(gates.share, 4, axis=1))
        if cell is None:
            summed = c.product(enter, new)
        else:
            both = c.product(_joined(enter, forget), _joined(new, cell))
            summed = both.with_share(both.share[:, :size] + both.share[:, size:])
        shown, cell = functions.tanh_and_truncated(c, summed)
        hidden = steps[t] = c.truncated(c.product(out, c.truncated(shown)))
    return steps


def _joined(left: Shared, right: Shared) -> Shared:
    return left.with_share(np.concatenate([left.share, right.share], axis=1))


def _gru(
    c: Computation, layer: wire.GRU, prefix: str, suffix: str, entered: Shared, order: Sequence[int]
) -> dict[int, Shared]:
    size, steps = layer.hidden_size, {}
    hidden: Shared | None = None
    for t in order:
        x = entered.with_share(entered.share[:, t])
        gates, new = (x.with_share(part) for part in np.split(x.share, [2 * size], axis=1))
        carried = _carried(c, layer, prefix, suffix, hidden)
        if carried is not None:
            of_gates, of_new = (carried.with_share(part) for part in np.split(carried.share, [2 * size], axis=-1))
            gates = c.sum(gates, of_gates)
        gates = c.truncated(functions.tanh_half(c, gates, gain=0.5, offset=0.5))
        reset, update = (gates.with_share(part) for part in np.split(gates.share, 2, axis=1))
        if carried is not None:
            new = c.sum(new, c.product(reset, c.truncated(of_new)))
        new = c.truncated(functions.tanh(c, new))
        towards = c.difference(hidden, new) if hidden is not None else new.with_share(np.uint64(0) - new.share)
        hidden = steps[t] = c.truncated(c.sum(new, c.product(update, towards)))
    return steps


def _rnn(
    c: Computation, layer: wire.RNN, prefix: str, suffix: str, entered: Shared, order: Sequence[int]
) -> dict[int, Shared]:
    steps = {}
    hidden: Shared | None = None
    for t in order:
        x = entered.with_share(entered.share[:, t])
        carried = _carried(c, layer, prefix, suffix, hidden)
        x = x if carried is None else c.sum(x, carried)
        active = functions.tanh(c, x) if layer.nonlinearity == "tanh" else functions.relu(c, x)
        hidden = steps[t] = c.truncated(active)
    return steps
