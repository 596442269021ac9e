"""A network of the model language as a computation on shares: what it takes, which weights are masked, and its program.

All of it follows from the architecture, the number of rows and the fraction bits, which are public. Knows the graph; no keys or links.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture
from cloister.wire.columns import AudioColumn, CategoryColumn, NumberColumn, TextColumn
from cloister.wire.private_deployments import LayerBits, network_digest
from cloister.wire.shares import FRACTION_BITS, encode, split
from cloister_privacy.architecture.graph import Node
from cloister_privacy.architecture.network import Network
from cloister_privacy.architecture.shapes import TEXT_INDICES, Value, column_value, measure
from cloister_privacy.mpc.computation import Computation, Shared, Weight
from cloister_privacy.mpc.errors import LayerNotShared, SharesOfAnother
from cloister_privacy.mpc.layers import RUNS, is_added
from cloister_privacy.mpc.material import Recorder, material_bytes
from cloister_privacy.mpc.ring import Ring
from cloister_privacy.mpc.tuples import Tuple

__all__ = ["INSTEAD", "SharedNetwork", "split_weights"]

Shape = tuple[int, ...]

INSTEAD = {
    "scattering": "compute its features on the client, and train on a tensor of them",
    "log_mel": "compute its features on the client, and train on a tensor of them",
    "hashed_text": "read the text by an embedding, or share a tensor of features",
}
"""Of each layer that is not shared: what to take in its place."""


class SharedNetwork:
    """What two parties and a dealer agree on about one network. Raises LayerNotShared, which says what to take instead."""

    def __init__(
        self, architecture: Architecture, *, fraction_bits: int = FRACTION_BITS, layer_bits: Sequence[LayerBits] = ()
    ) -> None:
        if not 8 <= fraction_bits <= FRACTION_BITS:
            raise ValueError(f"fraction_bits is from 8 to {FRACTION_BITS}")
        self.architecture, self.fraction_bits, self.layer_bits = architecture, fraction_bits, tuple(layer_bits)
        nodes = [each.node for each in measure(architecture)]
        if layer_bits and len(layer_bits) != len(nodes):
            raise ValueError("layer_bits has one pair for each layer, or none")
        self.inputs = self._inputs(nodes)
        """What is shared of an example: name -> shape, as `cloister.wire.private_inputs` makes it."""
        with torch.device("meta"):
            shapes = {name: tuple(each.shape) for name, each in Network(architecture).state_dict().items()}
        kinds = {name: nodes[int(name.split(".")[1])].layer for name in shapes}
        self.added = {name: shape for name, shape in shapes.items() if is_added(kinds[name], name)}
        self.masked = {name: shape for name, shape in shapes.items() if name not in self.added}
        """Weights that are multiplied, each with a mask for each generation."""
        self._order = _pooled_first([(f"layers.{k}.", node) for k, node in enumerate(nodes)])
        self.program = lru_cache(maxsize=16)(self._program)
        """The tuples that so many rows take, in order."""

    def material_bytes(self, rows: int) -> int:
        """What the dealer gives party 0 for a request of so many rows."""
        return material_bytes(self.program(rows))

    @property
    def digest(self) -> str:
        """SHA-256 of what both parties and the dealer must agree on."""
        return network_digest(self.architecture, self.fraction_bits, self.layer_bits)

    def _inputs(self, nodes: list[Node]) -> dict[str, Shape]:
        found: dict[str, Shape] = {}
        for node in nodes:
            layer, columns = node.layer, [name for name in node.reads if name in self.architecture.inputs]
            for name in columns:
                if isinstance(self.architecture.inputs[name], AudioColumn) and type(layer) in RUNS:
                    raise LayerNotShared(f"{node.where} reads audio; {INSTEAD['log_mel']}")
            if isinstance(layer, wire.Encode):
                if layer.bins and any(isinstance(self.architecture.inputs[name], NumberColumn) for name in columns):
                    raise LayerNotShared(f"{node.where} has bins, which are not shared; make the network with bins=0")
                widths = [_width(self.architecture.inputs[name]) for name in columns]
                found[node.key] = (sum(widths),)
            elif type(layer) not in RUNS:
                raise LayerNotShared(f"{node.where} cannot be computed on shares; {INSTEAD[layer.type]}")
            else:
                found |= {name: _shape(self.architecture.inputs[name]) for name in columns}
        return found

    def run(self, c: Computation, inputs: Mapping[str, Shared]) -> Shared:
        """This party's share of the network's outputs, [n, k], of its share of the inputs."""
        known = dict(inputs)
        for prefix, node in self._order:
            if node.key not in known:
                reads = [known[name] for name in node.reads]
                if self.layer_bits:
                    reads = self._scaled(c, int(prefix.split(".")[1]), reads)
                known[node.key] = RUNS[type(node.layer)](c, node.layer, prefix, reads)
        return known[self._order[-1][1].key]

    def _scaled(self, c: Computation, position: int, reads: Sequence[Shared]) -> list[Shared]:
        """What a layer reads, at its own scale: with no fewer bits than it counts in, and no more than its numbers leave room for."""
        c.fraction_bits, c.weight_bits = self.layer_bits[position]
        most = c.fraction_bits + c.weight_bits
        return [c.widened(c.truncated(each) if each.bits > most else each, c.fraction_bits) for each in reads]

    def bits_of(self, name: str) -> LayerBits:
        """Of the layer whose weight this is."""
        return self.layer_bits[int(name.split(".")[1])] if self.layer_bits else (self.fraction_bits,) * 2

    def _program(self, rows: int) -> tuple[Tuple, ...]:
        recorder = Recorder()
        weights = {name: Weight(np.zeros(s, np.uint64), np.zeros(s, np.uint64)) for name, s in self.masked.items()}
        added = {name: np.zeros(shape, np.uint64) for name, shape in self.added.items()}
        c = Computation(
            0, recorder, lambda sent: bytes(len(sent)), weights=weights, shares=added, fraction_bits=self.fraction_bits
        )
        self.run(
            c, {name: Shared(np.zeros((rows, *s), np.uint64), self.fraction_bits) for name, s in self.inputs.items()}
        )
        return tuple(recorder.program)

    def check_weights(self, shares: Mapping[str, Ring]) -> None:
        """Raises SharesOfAnother where these are no shares of this network's weights."""
        expected = self.masked | self.added
        if {name: share.shape for name, share in shares.items()} != expected:
            raise SharesOfAnother("the shares of the weights are of another network; deploy this version again")

    def check_inputs(self, shares: Mapping[str, Ring]) -> int:
        """How many rows there are. Raises SharesOfAnother where names or shapes are not those of this network."""
        rows = {len(share) for share in shares.values() if share.ndim}
        if len(rows) != 1 or not (count := rows.pop()):
            raise SharesOfAnother("the shares of the inputs have different numbers of rows, or none; share them again")
        if {name: share.shape for name, share in shares.items()} != {n: (count, *s) for n, s in self.inputs.items()}:
            wanted = ", ".join(f"{name} [rows{''.join(f', {d}' for d in s)}]" for name, s in self.inputs.items())
            raise SharesOfAnother(f"the shares of the inputs are of another shape; this network takes {wanted}")
        return count


def split_weights(network: SharedNetwork, weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, Ring], ...]:
    """Fresh shares of a trained network's weights, by the names of its `state_dict`, for party 0 and party 1.

    Raises SharesOfAnother where they are another network's, and NotFinite or OutOfRange as `encode` does.
    """
    found: tuple[dict[str, Ring], ...] = ({}, {})
    for name, weight in weights.items():
        numbers: NDArray[Any] = weight.detach().to("cpu", torch.float64).numpy()
        layer = network.architecture.layers[int(name.split(".")[1])]
        if ".in_proj." in name:
            numbers = numbers.copy()
            heads = layer.num_heads if isinstance(layer, wire.MultiheadAttention) else getattr(layer, "nhead", 1)
            width = len(numbers) // 3
            # Attention divides its scores by this; done here it costs the parties nothing.
            numbers[:width] /= (width / heads) ** 0.5
        value_bits, weight_bits = network.bits_of(name)
        ring = encode(name, numbers, fraction_bits=weight_bits, product_bits=value_bits + weight_bits)
        for party, share in enumerate(split(ring)):
            found[party][name] = share
    network.check_weights(found[0])
    return found


def _width(column: Any) -> int:
    shape = _shape(column)
    return int(np.prod(shape))


def _shape(column: Any) -> Shape:
    if isinstance(column, CategoryColumn):
        return (len(column.values),)
    if isinstance(column, TextColumn):
        return (column.max_length, TEXT_INDICES)
    value: Value = column_value(column)
    return value.shape


def _pooled_first(order: list[tuple[str, Node]]) -> list[tuple[str, Node]]:
    """A ReLU that max pooling alone reads comes after it: the same numbers, by fewer comparisons and truncations."""
    order = list(order)
    for k in range(len(order) - 1):
        (prefix, active), (other, pool) = order[k], order[k + 1]
        readers = sum(active.key in node.reads for _, node in order)
        if (
            isinstance(active.layer, wire.ReLU)
            and isinstance(pool.layer, wire.MaxPool)
            and readers == 1
            and pool.reads == (active.key,)
        ):
            # Each takes the other's place and name, so that who reads the pool reads what now comes last.
            order[k] = (other, replace(pool, key=active.key, reads=active.reads))
            order[k + 1] = (prefix, replace(active, key=pool.key, reads=(active.key,)))
    return order
