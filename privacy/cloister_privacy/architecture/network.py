"""The torch module of a spec: forward, loss and prediction. Knows torch; nothing of gradients, noise or where weights are kept."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cloister.wire import architecture as wire
from cloister.wire import layers
from cloister.wire.columns import NumberColumn
from cloister_privacy.architecture.frontends.text import TOKENS
from cloister_privacy.architecture.graph import Node
from cloister_privacy.architecture.inputs import validate_inputs
from cloister_privacy.architecture.modules import module_of
from cloister_privacy.architecture.shapes import Value, column_value, measure
from cloister_privacy.architecture.values import values_of
from cloister_privacy.errors import InputRefused

__all__ = ["Network", "build", "digest"]

_HUBER = 0.1
"""Up to this share of the target's range an error counts by its square."""

_ROWS_AT_ONCE, _NUMBERS_AT_ONCE = 1024, 2**26
"""Rows and numbers that one pass without training makes, about: more would take memory for nothing."""


def build(architecture: wire.Architecture) -> Network:
    """A new network on the CPU, its weights drawn as torch draws them, from fresh entropy of the operating system."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(secrets.randbits(63))
        network = Network(architecture)
    network.initial_digest = digest(network.state_dict())
    return network


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights as safetensors, their names sorted."""
    return hashlib.sha256(safetensors.torch.save(dict(sorted(weights.items())))).hexdigest()


def _is_costly(layer: layers.Layer) -> bool:
    """Whether a fixed layer costs more than to read what it gave."""
    if isinstance(layer, layers.Encode):
        return layer.bins > 0
    return isinstance(layer, layers.Scattering | layers.LogMel | layers.HashedText)


def _numbers(value: Value) -> int:
    """How many numbers of memory it takes for one example."""
    return 2 * TOKENS if value.is_sparse else math.prod(value.shape)


class Network(nn.Module):
    """A network and the spec that it was made from. `build` makes one to train, `from_bytes` one that was trained."""

    initial_digest: str = ""
    """SHA-256 of the weights that training started from, as safetensors."""

    def __init__(self, architecture: wire.Architecture) -> None:
        measured = measure(architecture)
        super().__init__()
        self.architecture = architecture
        self._nodes = [each.node for each in measured]
        total = sum(each.numbers for each in measured)
        self.rows_at_once = max(1, min(_ROWS_AT_ONCE, _NUMBERS_AT_ONCE // max(1, total)))
        """Of a pass without training."""
        known = {name: column_value(column) for name, column in architecture.inputs.items()}
        self._numbers = {name: 2 * math.prod(value.shape) for name, value in known.items()}
        self._numbers |= {each.node.key: _numbers(each.gives) for each in measured}
        known |= {each.node.key: each.gives for each in measured}
        self.layers = nn.ModuleList(
            module_of(node, [known[name] for name in node.reads], architecture.inputs) for node in self._nodes
        )
        self.find_stem()

    def forward(self, values: Mapping[str, Tensor]) -> Tensor:
        """Logits [n, k] or [n] of a category, or values [n] of a number in its own units.

        `values` holds the columns as `values_of` gives them, or what `stem` made of them.
        """
        known = dict(values)
        is_after_stem = any(key in known for key in self._stem)
        for node, module in zip(self._nodes, self.layers, strict=True):
            if not (is_after_stem and node.key in self._stem):
                known[node.key] = module(*[known[name] for name in node.reads])
        outputs = known[self._nodes[-1].key]
        output = self.architecture.output
        if isinstance(output, NumberColumn):
            # An output of 0 is the middle of the declared range and an output of 1 one range above it.
            return output.low / 2 + output.high / 2 + (output.high - output.low) * outputs.squeeze(-1)
        return outputs.squeeze(-1) if self.architecture.loss == "binary_cross_entropy" else outputs

    def find_stem(self) -> None:
        """The stem is what nothing trains and costs much, with what follows from it alone: it is computed once for a run, and not in
        every step. To be found anew after layers were frozen, thawed or replaced."""
        fixed: dict[str, Node] = {}
        stem: set[str] = set()
        for node, module in zip(self._nodes, self.layers, strict=True):
            parameters = list(module.parameters())
            is_random = isinstance(node.layer, layers.Dropout) or bool(getattr(node.layer, "dropout", 0))
            is_fixed = not is_random and not any(each.requires_grad for each in parameters)
            if is_fixed and all(name in fixed or name in self.architecture.inputs for name in node.reads):
                fixed[node.key] = node
                if _is_costly(node.layer) or parameters or any(name in stem for name in node.reads):
                    stem.add(node.key)
        for key in reversed(fixed):
            if key in stem:
                stem.update(name for name in fixed[key].reads if name in fixed)
        self._stem = frozenset(stem)
        after = [name for node in self._nodes if node.key not in stem for name in node.reads]
        self._after_stem = tuple(
            dict.fromkeys(name for name in after if name in stem or name in self.architecture.inputs)
        )

    @property
    def stem_numbers(self) -> int:
        """How many numbers of an example are kept where the stem is run once: what it gives, and columns that are read beside it; 0
        without a stem."""
        return sum(self._numbers[name] for name in self._after_stem) if self._stem else 0

    @torch.no_grad()
    def stem(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the layers after the stem read: columns as they are, and what the stem makes of them."""
        known = dict(values)
        for node, module in zip(self._nodes, self.layers, strict=True):
            if node.key in self._stem:
                known[node.key] = module(*[known[name] for name in node.reads])
        return {name: known[name] for name in self._after_stem}

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The loss of each example, [n]; errors of a number are in units of its declared range."""
        output = self.architecture.output
        if isinstance(output, NumberColumn):
            error = (target - outputs) / (output.high - output.low)
            if self.architecture.loss == "huber":
                return functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=_HUBER)
            return error.square()
        if self.architecture.loss == "binary_cross_entropy":
            return functional.binary_cross_entropy_with_logits(outputs, target.to(outputs.dtype), reduction="none")
        return functional.cross_entropy(outputs, target, reduction="none")

    def predict(self, columns: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """`probabilities` float32 [n, k] and `index` int64 [n] of a category, or `value` float32 [n] of a number.

        Raises InputRefused where an input is not what `validate_inputs` allows, or drives the network out of float32.
        """
        inputs = validate_inputs(self.architecture, columns)
        count = len(next(iter(inputs.values())))
        device = next(self.parameters()).device
        parts = []
        with torch.inference_mode():
            for start in range(0, count, self.rows_at_once):
                rows = {name: array[start : start + self.rows_at_once] for name, array in inputs.items()}
                parts.append(self(values_of(self.architecture.inputs, rows, device=device)))
        outputs = torch.cat(parts)
        if not bool(torch.isfinite(outputs).all()):
            raise InputRefused(
                ", ".join(inputs), "gives an output that is not finite; stay nearer to the declared bounds"
            )
        if isinstance(self.architecture.output, NumberColumn):
            return {"value": outputs.numpy(force=True)}
        if self.architecture.loss == "binary_cross_entropy":
            outputs = torch.stack([torch.zeros_like(outputs), outputs], dim=1)
        probabilities = functional.softmax(outputs, dim=1).numpy(force=True)
        return {"probabilities": probabilities, "index": probabilities.argmax(axis=1).astype(np.int64)}
