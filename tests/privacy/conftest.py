"""Small networks and rows that the privacy tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, NumberColumn
from cloister.wire.layers import Encode, Linear, Tanh
from cloister.wire.plans import SGD, TrainingSpec

DATASET = "ds_" + "0" * 32


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    """Two inputs, a hidden layer, three classes: 6 * 5 + 5 + 5 * 3 + 3 parameters or so."""
    return Architecture(
        inputs={"age": NumberColumn(low=0, high=100), "colour": CategoryColumn(values=("red", "green", "blue"))},
        layers=(Encode(), Linear(in_features=4, out_features=5), Tanh(), Linear(in_features=5, out_features=3)),
        target="kind",
        output=CategoryColumn(values=("a", "b", "c")),
        loss="cross_entropy",
    )


@pytest.fixture(scope="session")
def spec_of(architecture: Architecture) -> Callable[..., TrainingSpec]:
    """A spec of that network; any field may be given."""

    def make(**fields: Any) -> TrainingSpec:
        defaults: dict[str, Any] = {
            "dataset": DATASET,
            "architecture": architecture,
            "nominal_size": 40,
            "capacity": 80,
            "batch_size": 10,
            "steps": 6,
            "noise_multiplier": 1.0,
            "clip": 1.0,
            "delta": 1e-5,
            "optimizer": SGD(learning_rate=0.1, momentum=0.9),
        }
        return TrainingSpec(**(defaults | fields))

    return make


@pytest.fixture(scope="session")
def rows_of() -> Callable[[int], dict[str, np.ndarray]]:
    """That many rows for the network."""

    def make(count: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(7)
        return {
            "age": random.uniform(0, 100, count).astype(np.float32),
            "colour": random.integers(0, 3, count).astype(np.int32),
            "kind": random.integers(0, 3, count).astype(np.int32),
        }

    return make
