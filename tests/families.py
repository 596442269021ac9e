"""One small network of each family in the model language, with the columns that it reads and rows that it can learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister._convert import convert
from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture, Loss
from cloister.wire.columns import (
    AudioColumn,
    CategoryColumn,
    InputColumn,
    NumberColumn,
    OutputColumn,
    TensorColumn,
    TextColumn,
)
from cloister.wire.plans import SGD, TrainingSpec

__all__ = ["FAMILIES", "ROWS", "Family", "converted", "spec_of"]

KIND = CategoryColumn(values=("low", "high"))
LENGTH, RATE = 12, 1000


@dataclass(frozen=True)
class Family:
    """What a family's data and network look like. Rows are given as people have them, for the SDK to convert."""

    inputs: Mapping[str, InputColumn]
    layers: tuple[wire.Layer, ...]
    rows: Callable[[int], dict[str, Any]]
    output: OutputColumn = KIND
    loss: Loss = "cross_entropy"

    @property
    def architecture(self) -> Architecture:
        return Architecture(
            inputs=dict(self.inputs), layers=self.layers, target="kind", output=self.output, loss=self.loss
        )


def _labels(count: int) -> NDArray[np.int64]:
    return np.arange(count) % 2


def _images(count: int, *shape: int) -> NDArray[np.float32]:
    """Bright at the top, or at the bottom."""
    images = np.random.default_rng(1).uniform(0, 0.3, (count, *shape)).astype(np.float32)
    half = shape[-2] // 2
    for row, label in enumerate(_labels(count)):
        images[row, ..., half * label : half * (label + 1), :] += 0.7
    return images


def _texts(count: int) -> list[str]:
    words = (("dull", "bad", "poor"), ("good", "fine", "superb"))
    random = np.random.default_rng(2)
    return [f"{words[label][random.integers(3)]} é"[:LENGTH] for label in _labels(count)]


def _recordings(count: int) -> list[NDArray[np.int16]]:
    """A low tone or a high one, of different lengths."""
    random = np.random.default_rng(3)
    found = []
    for label in _labels(count):
        times = np.arange(random.integers(300, 500)) / RATE
        found.append((8000 * np.sin(2 * np.pi * (80, 300)[label] * times)).astype(np.int16))
    return found


def _of(column: str, make: Callable[[int], Any]) -> Callable[[int], dict[str, Any]]:
    return lambda count: {column: make(count), "kind": _labels(count)}


def _joined(count: int) -> dict[str, Any]:
    colours = np.random.default_rng(4).integers(0, 3, count)
    ages = np.random.default_rng(5).uniform(0, 100, count)
    return {
        "image": _images(count, 8, 8),
        "text": _texts(count),
        "age": ages,
        "colour": colours,
        "kind": _labels(count),
    }


def _values(count: int) -> dict[str, Any]:
    x = np.random.default_rng(6).uniform(-1, 1, count)
    return {"x": x, "kind": 40 + 20 * x}


TEXT: dict[str, InputColumn] = {"text": TextColumn(max_length=LENGTH)}
AUDIO: dict[str, InputColumn] = {"sound": AudioColumn(rate=RATE, max_samples=500)}
IMAGE: dict[str, InputColumn] = {"image": TensorColumn(shape=(8, 8), low=0, high=1)}


def _linear(entering: int, leaving: int) -> wire.Linear:
    return wire.Linear(in_features=entering, out_features=leaving)


FAMILIES: dict[str, Family] = {
    "convolutions": Family(
        IMAGE,
        (
            wire.Reshape(shape=(1, 8, 8)),
            wire.Conv2d(in_channels=1, out_channels=4, kernel_size=(3, 3), padding=(1, 1)),
            wire.GroupNorm(num_groups=2, num_channels=4),
            wire.ReLU(),
            wire.MaxPool(kernel_size=(2, 2)),
            wire.Flatten(),
            _linear(64, 2),
        ),
        _of("image", lambda count: _images(count, 8, 8)),
    ),
    "residual": Family(
        {"image": TensorColumn(shape=(3, 8, 8), low=0, high=1)},
        (
            wire.Conv2d(in_channels=3, out_channels=8, kernel_size=(3, 3), padding=(1, 1), name="first"),
            wire.GroupNorm(num_groups=4, num_channels=8),
            wire.SiLU(),
            wire.Conv2d(in_channels=8, out_channels=8, kernel_size=(3, 3), padding=(1, 1), name="second"),
            wire.Add(reads=("first", "second")),
            wire.AveragePool(),
            _linear(8, 2),
        ),
        _of("image", lambda count: _images(count, 3, 8, 8)),
    ),
    "scattering": Family(
        IMAGE,
        (
            wire.Scattering(),
            wire.Linear(in_features=144, out_features=2, init="zeros"),
        ),
        _of("image", lambda count: _images(count, 8, 8)),
    ),
    "lstm": Family(
        TEXT,
        (
            wire.Embedding(num_embeddings=257, embedding_dim=8, padding_idx=0),
            wire.LSTM(input_size=8, hidden_size=8, bidirectional=True, output="last"),
            _linear(16, 2),
        ),
        _of("text", _texts),
    ),
    "gru": Family(
        TEXT,
        (
            wire.Embedding(num_embeddings=257, embedding_dim=8),
            wire.GRU(input_size=8, hidden_size=8),
            wire.SequencePool(how="max"),
            _linear(8, 2),
        ),
        _of("text", _texts),
    ),
    "rnn": Family(
        TEXT,
        (
            wire.Embedding(num_embeddings=257, embedding_dim=8),
            wire.RNN(input_size=8, hidden_size=8, output="last"),
            _linear(8, 2),
        ),
        _of("text", _texts),
    ),
    "attention": Family(
        TEXT,
        (
            wire.Embedding(num_embeddings=257, embedding_dim=8),
            wire.PositionalEmbedding(length=LENGTH, embedding_dim=8, name="placed"),
            wire.TransformerLayer(
                d_model=8, nhead=2, dim_feedforward=16, norm_first=True, reads=("placed", "text"), name="encoded"
            ),
            wire.SequencePool(reads=("encoded", "text")),
            _linear(8, 2),
        ),
        _of("text", _texts),
    ),
    "causal attention": Family(
        TEXT,
        (
            wire.Embedding(num_embeddings=257, embedding_dim=8, name="embedded"),
            wire.MultiheadAttention(embed_dim=8, num_heads=2, causal=True, reads=("embedded", "text"), name="attended"),
            wire.LayerNorm(normalized_shape=(8,)),
            wire.SequencePool(how="mean"),
            _linear(8, 2),
        ),
        _of("text", _texts),
    ),
    "hashed text": Family(
        TEXT,
        (wire.HashedText(features=256), wire.Linear(in_features=256, out_features=2, init="zeros")),
        _of("text", _texts),
    ),
    "audio": Family(
        AUDIO,
        (
            wire.LogMel(bands=8, frames=6),
            wire.Conv1d(in_channels=8, out_channels=4, kernel_size=3),
            wire.ELU(),
            wire.Flatten(),
            _linear(16, 2),
        ),
        _of("sound", _recordings),
    ),
    "joined": Family(
        {
            **IMAGE,
            **TEXT,
            "age": NumberColumn(low=0, high=100),
            "colour": CategoryColumn(values=("red", "green", "blue")),
        },
        (
            wire.Flatten(reads=("image",)),
            wire.Linear(in_features=64, out_features=8, name="seen"),
            wire.Embedding(num_embeddings=257, embedding_dim=8, reads=("text",)),
            wire.SequencePool(how="mean", name="read"),
            wire.Encode(reads=("age", "colour"), bins=4, name="told"),
            wire.Concatenate(reads=("seen", "read", "told")),
            wire.Tanh(),
            _linear(27, 2),
        ),
        _joined,
    ),
    "two values by one logit": Family(
        IMAGE,
        (wire.Flatten(), wire.RMSNorm(normalized_shape=(64,)), wire.GELU(), _linear(64, 1)),
        _of("image", lambda count: _images(count, 8, 8)),
        loss="binary_cross_entropy",
    ),
    "regression": Family(
        {"x": NumberColumn(low=-1, high=1)},
        (wire.Encode(), _linear(1, 8), wire.LeakyReLU(), _linear(8, 1)),
        _values,
        output=NumberColumn(low=0, high=100),
        loss="huber",
    ),
}

ROWS = 60


def converted(family: Family, count: int) -> dict[str, NDArray[Any]]:
    """Rows of the family as they lie in a dataset."""
    columns = {**family.inputs, "kind": family.output}
    given = family.rows(count)
    return {
        key: array for name, column in columns.items() for key, array in convert(name, column, given[name], 0).items()
    }


def spec_of(family: Family, **fields: Any) -> TrainingSpec:
    """A short run of the family's network; any field may be given."""
    defaults: dict[str, Any] = {
        "dataset": "ds_" + "0" * 32, "architecture": family.architecture, "nominal_size": ROWS, "capacity": 70, "batch_size": 30,
        "steps": 4, "noise_multiplier": 1.0, "clip": 1.0, "delta": 1e-5, "optimizer": SGD(learning_rate=0.1),
    }  # fmt: skip
    return TrainingSpec(**(defaults | fields))
