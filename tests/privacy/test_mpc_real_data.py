"""Networks trained on real data, by two parties and a dealer in processes of their own, against the same networks in the clear."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cloister.wire import layers as wire
from cloister_privacy.architecture import Network
from cloister_privacy.mpc import Limits, measure_error
from mpc_groups import Group, network_of
from mpc_processes import Processes

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "fashion_mnist_train.npz"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not DATA.exists(), reason="Fashion-MNIST's training images are not on this machine"),
]

IS_SHORT = bool(os.environ.get("SHORT"))


def _linear(entering: int, leaving: int) -> wire.Linear:
    return wire.Linear(in_features=entering, out_features=leaving)


MLP = ((28, 28), (wire.Flatten(), _linear(784, 128), wire.ReLU(), _linear(128, 10)))
CNN = (
    (1, 28, 28),
    (
        wire.Conv2d(in_channels=1, out_channels=16, kernel_size=(3, 3), padding=(1, 1)),
        wire.ReLU(),
        wire.MaxPool(kernel_size=(2, 2)),
        wire.Conv2d(in_channels=16, out_channels=32, kernel_size=(3, 3), padding=(1, 1)),
        wire.ReLU(),
        wire.MaxPool(kernel_size=(2, 2)),
        wire.Flatten(),
        _linear(1568, 10),
    ),
)
SEQUENCES: dict[str, tuple[wire.Layer, ...]] = {
    "lstm": (wire.LSTM(input_size=28, hidden_size=32, output="last"), _linear(32, 10)),
    "gru": (wire.GRU(input_size=28, hidden_size=32, output="last"), _linear(32, 10)),
    "attention": (
        wire.PositionalEmbedding(length=28, embedding_dim=28),
        wire.TransformerLayer(d_model=28, nhead=4, dim_feedforward=56, activation="gelu", norm_first=True),
        wire.SequencePool(),
        _linear(28, 10),
    ),
}


def _trained(network: Network, images: NDArray[np.float32], labels: NDArray[np.int64], *, steps: int) -> Network:
    """Ordinary training, long enough that logits are as large as those of a network in use."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    network.train()
    for _ in range(steps):
        rows = torch.randint(0, len(images), (128,), generator=generator)
        outputs = network({"x": torch.from_numpy(images)[rows]})
        optimizer.zero_grad()
        functional.cross_entropy(outputs, torch.from_numpy(labels)[rows]).backward()
        optimizer.step()
    return network.eval()


def _data(shape: tuple[int, ...], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    with np.load(DATA) as file:
        images, labels = file["images"][:count], file["labels"][:count]
    return (images.astype(np.float32) / 255).reshape(-1, *shape), labels.astype(np.int64)


def _clear(network: Network, x: NDArray[np.float32]) -> NDArray[Any]:
    with torch.no_grad():
        return network({"x": torch.from_numpy(x)}).numpy()


@pytest.mark.parametrize(("model", "count", "at_once"), [(MLP, 256, 64), (CNN, 16, 4)], ids=["mlp", "cnn"])
def test_private_answers_on_real_images_are_those_in_the_clear(
    model: tuple[tuple[int, ...], tuple[wire.Layer, ...]], count: int, at_once: int, tmp_path: Path
) -> None:
    shape, layers = model
    images, labels = _data(shape, 6000)
    network = _trained(network_of(shape, *layers), images[count:], labels[count:], steps=60 if IS_SHORT else 300)
    clear = _clear(network, images[:count])
    assert (clear.argmax(axis=1) == labels[:count]).mean() > 0.5  # trained, and so with logits of a size in use
    group, limits = Group.create(tmp_path, network), Limits(form_s=120, request_s=120)
    with Processes(group, tmp_path / "roles", limits=limits) as processes:
        found = np.concatenate([processes.ask(images[at : at + at_once]) for at in range(0, count, at_once)])
    assert np.abs(found - clear).max() <= 1e-3
    assert np.array_equal(found.argmax(axis=1), clear.argmax(axis=1))


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_models_trained_on_real_images_keep_their_bounds(name: str) -> None:
    images, labels = _data((28, 28), 4000)
    network = _trained(network_of((28, 28), *SEQUENCES[name]), images[16:], labels[16:], steps=60 if IS_SHORT else 300)
    measured = measure_error(network, {"x": images[:16]})
    assert measured.max_error <= 1e-3
    assert measured.equal_argmax == 1
