"""The torch module of a spec: forward, loss and prediction. Knows torch; nothing of gradients, noise or where weights are kept."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from typing import Any, assert_never

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cloister.wire import architecture as wire
from cloister.wire.columns import CategoryColumn, InputColumn, NumberColumn, TensorColumn
from cloister_privacy.architecture.inputs import validate_inputs
from cloister_privacy.architecture.shapes import check
from cloister_privacy.errors import InputRefused

__all__ = ["Network", "build"]


def build(architecture: wire.Architecture) -> Network:
    """A new network on the CPU, its weights drawn as torch draws them, from fresh entropy of the operating system."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(secrets.randbits(63))
        network = Network(architecture)
    network.initial_digest = hashlib.sha256(safetensors.torch.save(network.state_dict())).hexdigest()
    return network


class Network(nn.Module):
    """A network and the spec that it was made from. `build` makes one to train, `from_bytes` one that was trained."""

    initial_digest: str = ""
    """SHA-256 of the weights that training started from, as safetensors."""

    def __init__(self, architecture: wire.Architecture) -> None:
        check(architecture)
        super().__init__()
        self.architecture = architecture
        self.layers = nn.Sequential(*(_module(layer, architecture.inputs) for layer in architecture.layers))

    def forward(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Logits [n, k] of a category, or values [n] of a number in its own units."""
        outputs: Tensor = self.layers(columns if self._encodes() else self._only(columns))
        output = self.architecture.output
        if isinstance(output, NumberColumn):
            # An output of 0 is the middle of the declared range and an output of 1 one range above it.
            return output.low / 2 + output.high / 2 + (output.high - output.low) * outputs.squeeze(-1)
        return outputs

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The loss of each example, [n]; squared errors are in units of the target's declared range."""
        output = self.architecture.output
        if isinstance(output, NumberColumn):
            return ((target - outputs) / (output.high - output.low)).square()
        return functional.cross_entropy(outputs, target, reduction="none")

    def predict(self, columns: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """`probabilities` float32 [n, k] and `index` int64 [n] of a category, or `value` float32 [n] of a number.

        Raises InputRefused where an input is not what `validate_inputs` allows, or drives the network out of float32.
        """
        inputs = validate_inputs(self.architecture, columns)
        device = next(self.parameters()).device
        with torch.inference_mode():
            outputs = self({name: torch.as_tensor(array, device=device) for name, array in inputs.items()})
        if not bool(torch.isfinite(outputs).all()):
            raise InputRefused(
                ", ".join(inputs), "gives an output that is not finite; stay nearer to the declared bounds"
            )
        if isinstance(self.architecture.output, NumberColumn):
            return {"value": outputs.numpy(force=True)}
        probabilities = functional.softmax(outputs, dim=1).numpy(force=True)
        return {"probabilities": probabilities, "index": probabilities.argmax(axis=1).astype(np.int64)}

    def _encodes(self) -> bool:
        return isinstance(self.architecture.layers[0], wire.Encode)

    def _only(self, columns: Mapping[str, Tensor]) -> Tensor:
        ((name, column),) = self.architecture.inputs.items()
        return columns[name].unsqueeze(1) if isinstance(column, NumberColumn) else columns[name]


def _module(layer: wire.Layer, inputs: dict[str, InputColumn]) -> nn.Module:
    match layer:
        case wire.Encode():
            return _Encode(inputs)
        case wire.Rescale():
            return _Rescale(layer)
        case wire.Flatten():
            return nn.Flatten()
        case wire.Linear():
            return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias)
        case wire.ReLU():
            return nn.ReLU()
        case wire.Tanh():
            return nn.Tanh()
        case _:
            assert_never(layer)


class _Encode(nn.Module):
    """Fixed public numbers only, and no buffers: Opacus refuses a trainable module that holds any."""

    def __init__(self, inputs: dict[str, InputColumn]) -> None:
        super().__init__()
        self._inputs = inputs

    def forward(self, columns: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([self._encoded(columns[name], column) for name, column in self._inputs.items()], dim=1)

    def _encoded(self, values: Tensor, column: InputColumn) -> Tensor:
        match column:
            case CategoryColumn():
                return functional.one_hot(values, len(column.values)).to(torch.float32)
            case NumberColumn():
                return _to_unit(values, column.low, column.high).unsqueeze(1)
            case TensorColumn():
                return _to_unit(values, column.low, column.high).flatten(1)
            case _:
                assert_never(column)


def _to_unit(values: Tensor, low: float, high: float) -> Tensor:
    """[low, high] mapped to [-1, 1]; halved before they are joined, because high - low may lie outside float32."""
    return (values - (low / 2 + high / 2)) / (high / 2 - low / 2)


class _Rescale(nn.Module):
    def __init__(self, layer: wire.Rescale) -> None:
        super().__init__()
        self._low, self._to_low = layer.low, layer.to_low
        self._slope = (layer.to_high - layer.to_low) / (layer.high - layer.low)

    def forward(self, values: Tensor) -> Tensor:
        return (values - self._low) * self._slope + self._to_low
