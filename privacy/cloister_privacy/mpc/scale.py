"""How many fraction bits each layer of a network counts in, by the size of its numbers on public rows. Knows sizes; shares nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloister.wire import layers as wire
from cloister.wire.private_deployments import LayerBits
from cloister.wire.private_inputs import private_inputs
from cloister.wire.shares import FRACTION_BITS
from cloister_privacy.architecture.graph import Node
from cloister_privacy.architecture.network import Network
from cloister_privacy.architecture.shapes import measure
from cloister_privacy.mpc.errors import ScaleRefused
from cloister_privacy.mpc.network import SharedNetwork
from cloister_privacy.mpc.rehearsal import outputs_of

__all__ = ["choose_scale"]

_ROOM = 55
"""Bits of a number in fixed point on public rows, 6 less than there are: others may be 64 times as large."""

_WEIGHED = (wire.Linear, wire.Conv1d, wire.Conv2d, wire.AveragePool, wire.LeakyReLU, wire.Rescale)
"""By weights or public numbers once; all that is large inside is what comes out."""

_PLAIN = (
    wire.ReLU, wire.MaxPool, wire.Sigmoid, wire.Tanh, wire.Flatten, wire.Reshape, wire.Permute, wire.Dropout, wire.Add,
    wire.Concatenate,
)  # fmt: skip
"""What they read is multiplied by bits at most."""

_ORDINARY = (FRACTION_BITS, FRACTION_BITS)
_ORDINARY_SIZE = 6
"""Weights get as many bits more as what they multiply is large, where it is larger than 2^6."""

_LEAST_BITS = 12
"""Of the inputs, and of a layer that multiplies what it reads with itself."""

_BEYOND_ALL = 1024


def choose_scale(network: Network, rows: Mapping[str, NDArray[Any]]) -> tuple[int, tuple[LayerBits, ...]]:
    """The fraction bits of the inputs, and of each layer; of none where all have 20, which is so unless numbers are large.

    Raises LayerNotShared, and ScaleRefused for a layer whose numbers fit no scale.
    """
    SharedNetwork(network.architecture)
    inputs = {name: _size(each) for name, each in private_inputs(network.architecture, rows).items()}
    largest = max(inputs.values())
    bits = min(FRACTION_BITS, (_ROOM - largest) // 2)
    if bits < _LEAST_BITS:
        raise ScaleRefused(
            f"the inputs have numbers up to 2^{largest}; scale them, so that the public rows are within 2^31"
        )
    sizes: list[int] = []
    hooks = [module.register_forward_hook(_note(sizes.append)) for module in network.layers]
    try:
        outputs_of(network, rows)
    finally:
        for hook in hooks:
            hook.remove()
    known, found = dict(inputs), list[LayerBits]()
    for each, size in zip(measure(network.architecture), sizes, strict=True):
        node = each.node
        if node.key in inputs:
            found.append(_ORDINARY)
            continue
        found.append(_bits(node, max(known[name] for name in node.reads), size))
        known[node.key] = size
    return bits, () if bits == FRACTION_BITS and set(found) == {_ORDINARY} else tuple(found)


def _bits(node: Node, read: int, told: int) -> LayerBits:
    """For numbers up to 2^read that become numbers up to 2^told."""
    largest = max(read, told)
    if isinstance(node.layer, _PLAIN):
        # Where they are large, what it reads is truncated first: two may have come with different bits.
        value, weight = _ORDINARY if 2 * FRACTION_BITS + largest <= _ROOM else (min(FRACTION_BITS, _ROOM - largest), 0)
        fits = value >= 0
    elif isinstance(node.layer, _WEIGHED):
        value, weight = _balanced(read, told)
        fits = min(value, weight) >= 0
    else:
        value = weight = min(FRACTION_BITS, (_ROOM - largest) // 2)
        fits = value >= _LEAST_BITS
    if not fits:
        raise ScaleRefused(
            f"{node.where} has numbers up to 2^{largest}, which leaves no bits for their fractions; scale its inputs, or put a norm "
            "before it"
        )
    return value, weight


def _balanced(read: int, told: int) -> LayerBits:
    """A product errs by 2^-value times the weights' size, and by 2^-weight times what is read: bits go where they tell least."""
    value, weight = FRACTION_BITS, FRACTION_BITS + (read if read > _ORDINARY_SIZE else 0)
    over = max(0, value + weight + told - _ROOM)
    growth = told - read
    of_weight = min(over, max(0, growth))
    of_value = min(over - of_weight, max(0, -growth))
    rest = over - of_weight - of_value
    return value - of_value - rest // 2, weight - of_weight - (rest - rest // 2)


def _size(numbers: NDArray[Any]) -> int:
    """The least k >= 0 with which all are within 2^k."""
    largest = float(np.abs(numbers).max())
    return int(np.ceil(np.log2(max(largest, 1.0)))) if np.isfinite(largest) else _BEYOND_ALL


def _note(write: Callable[[int], None]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, given: Any, outputs: torch.Tensor) -> None:
        write(_size(outputs.numpy()) if outputs.is_floating_point() else 0)

    return hook
