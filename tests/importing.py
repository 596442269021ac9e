"""A network of the language from what an importer gave, and whether it computes what its source does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, InputColumn, TensorColumn, TextColumn
from cloister.wire.layers import Embedding
from cloister_privacy.architecture import Network
from cloister_privacy.architecture.importers import Imported

__all__ = ["architecture_of", "examples_of", "network_of", "require_equal"]


def architecture_of(imported: Imported, *, width: int) -> Architecture:
    """Two values told apart by one logit, or as many values as the output is wide."""
    return Architecture(
        inputs={name: _column(imported, name, shape) for name, shape in imported.inputs.items()},
        layers=imported.layers,
        target="goal",
        output=CategoryColumn(values=tuple(f"v{index}" for index in range(max(2, width)))),
        loss="binary_cross_entropy" if width == 1 else "cross_entropy",
    )


def _column(imported: Imported, name: str, shape: tuple[int, ...]) -> InputColumn:
    tables = [each for each in imported.layers if isinstance(each, Embedding)]
    tables = [each for each in tables if (each.reads or tuple(imported.inputs)) == (name,)]
    if not tables:
        return TensorColumn(shape=shape, low=-4, high=4)
    if not shape:
        return CategoryColumn(values=tuple(f"c{index}" for index in range(min(each.num_embeddings for each in tables))))
    return TextColumn(max_length=shape[0])


def network_of(imported: Imported, *, width: int) -> Network:
    """With the weights that were imported; they are the whole of its state."""
    network = Network(architecture_of(imported, width=width))
    assert list(network.state_dict()) == list(imported.weights)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in imported.weights.items()})
    return network.eval()


def examples_of(network: Network, *, count: int = 5) -> dict[str, Tensor]:
    """Columns as `values_of` gives them: texts of several lengths, and at least one byte each."""
    random = np.random.default_rng(3)
    found: dict[str, Tensor] = {}
    for name, column in network.architecture.inputs.items():
        match column:
            case TextColumn(max_length=length):
                tokens = random.integers(1, 257, (count, length))
                ends = random.integers(1, length + 1, (count, 1))
                found[name] = torch.from_numpy(np.where(np.arange(length) < ends, tokens, 0))
            case CategoryColumn(values=values):
                found[name] = torch.from_numpy(random.integers(0, len(values), count))
            case TensorColumn(shape=shape):
                found[name] = torch.from_numpy(random.normal(size=(count, *shape)).astype(np.float32))
            case _:
                raise AssertionError(column)
    return found


@torch.no_grad()
def require_equal(network: Network, values: dict[str, Tensor], expected: Tensor) -> None:
    """Within 1e-4."""
    ours = network(values)
    assert ours.shape == expected.reshape(ours.shape).shape
    torch.testing.assert_close(ours, expected.reshape(ours.shape), atol=1e-4, rtol=1e-4)
