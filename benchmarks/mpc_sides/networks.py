"""The networks that all sides compute: their layers, weights from a fixed seed, and one image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cloister.wire import layers as wire
from cloister_privacy.architecture import Network
from mpc_groups import network_of

NETWORKS: dict[str, tuple[tuple[int, ...], tuple[wire.Layer, ...]]] = {
    "mlp": (
        (784,),
        (
            wire.Linear(in_features=784, out_features=128),
            wire.ReLU(),
            wire.Linear(in_features=128, out_features=10),
        ),
    ),
    "cnn": (
        (1, 28, 28),
        (
            wire.Conv2d(in_channels=1, out_channels=16, kernel_size=(3, 3), padding=(1, 1)),
            wire.ReLU(),
            wire.MaxPool(kernel_size=(2, 2)),
            wire.Conv2d(in_channels=16, out_channels=32, kernel_size=(3, 3), padding=(1, 1)),
            wire.ReLU(),
            wire.MaxPool(kernel_size=(2, 2)),
            wire.Flatten(),
            wire.Linear(in_features=1568, out_features=10),
        ),
    ),
}


def network(name: str) -> Network:
    """The same at each process."""
    shape, layers = NETWORKS[name]
    made = network_of(shape, *layers)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made


def image(name: str) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).uniform(0, 1, (1, *NETWORKS[name][0])).astype(np.float32)


def outputs_in_the_clear(name: str) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        return network(name)({"x": torch.from_numpy(image(name))}).numpy()


def write_case(name: str, directory: Path) -> None:
    """What `Seat.case` reads, where there is neither torch nor Cloister."""
    made = network(name)
    (directory / "layers.json").write_text(
        json.dumps([layer.model_dump(mode="json") for layer in made.architecture.layers])
    )
    arrays = {
        f"{number}.{key}": weight.numpy()
        for number, module in enumerate(made.layers)
        for key, weight in module.state_dict().items()
    }
    np.savez(directory / "arrays.npz", x=image(name), **arrays)
