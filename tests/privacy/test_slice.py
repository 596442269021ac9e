"""The library on its own, as in a notebook: plan, train, predict, on real data, with what it costs and what it reaches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits

from cloister.wire.columns import CategoryColumn, Column, NumberColumn, TensorColumn
from cloister.wire.layers import Flatten, Linear, ReLU
from cloister.wire.plans import SGD, PlanRequest, Privacy, TrainingSpec
from cloister_privacy import DPPlan
from cloister_privacy.architecture import from_bytes
from cloister_privacy.recipes import resolve
from cloister_privacy.training import train

FASHION_MNIST = Path(__file__).parents[2].parent / "shared" / "data" / "fashion_mnist_train.npz"
TEN = CategoryColumn(values=tuple("0123456789"))


def planned(columns: dict[str, Column], *, nominal_size: int, delta: float = 1e-5, **fields: Any) -> TrainingSpec:
    request = PlanRequest(**({"dataset": "ds_" + "0" * 32, "target": "label"} | fields))
    return resolve(request, columns=columns, nominal_size=nominal_size, capacity=nominal_size, delta=delta)


def trained(spec: TrainingSpec, rows: Mapping[str, np.ndarray]) -> bytes:
    weights = train(
        spec,
        rows,
        plan=DPPlan.of(spec),
        device="cpu",
        chunk_steps=50,
        before_chunk=lambda first, end: None,
        after_chunk=lambda done, snapshot: True,
    )
    assert weights is not None
    return weights


def test_handwritten_digits_are_read_at_epsilon_eight() -> None:
    images, labels = load_digits(return_X_y=True)
    images, labels = images.reshape(-1, 8, 8).astype(np.float32), labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    kept, back = order[:1500], order[1500:]
    columns: dict[str, Column] = {"image": TensorColumn(shape=(8, 8), low=0, high=16), "label": TEN}
    spec = planned(columns, nominal_size=1500, privacy=Privacy(epsilon=8.0))
    assert DPPlan.of(spec).epsilon() <= 8
    network = from_bytes(trained(spec, {"image": images[kept], "label": labels[kept]}))
    assert (network.predict({"image": images[back]})["index"] == labels[back]).mean() >= 0.85  # about 0.96


def test_a_number_is_learnt_better_than_by_its_mean() -> None:
    table, progress = load_diabetes(return_X_y=True)
    names = [f"x{index}" for index in range(table.shape[1])]
    columns: dict[str, Column] = {name: NumberColumn(low=-0.2, high=0.2) for name in names}
    columns["label"] = NumberColumn(low=0, high=400)
    rows = {name: table[:, index].astype(np.float32) for index, name in enumerate(names)}
    rows["label"] = progress.astype(np.float32)
    spec = planned(columns, nominal_size=440, privacy=Privacy(epsilon=20.0))
    network = from_bytes(trained(spec, {name: column[:340] for name, column in rows.items()}))
    predicted = network.predict({name: rows[name][340:] for name in names})["value"]
    truth = rows["label"][340:]
    assert ((predicted - truth) ** 2).mean() < 0.75 * truth.var()  # about 0.5


@pytest.mark.long
def test_fashion_mnist_reaches_its_bars_with_the_seed_settings_and_with_the_recipe() -> None:
    if not FASHION_MNIST.exists():
        pytest.skip(f"needs {FASHION_MNIST.name} in ../shared/data")
    with np.load(FASHION_MNIST) as data:
        images, labels = (data["images"] / 255).astype(np.float32), data["labels"].astype(np.int32)
    columns: dict[str, Column] = {"image": TensorColumn(shape=(28, 28), low=0, high=1), "label": TEN}
    rows = {"image": images[:55000], "label": labels[:55000]}

    def accuracy(spec: TrainingSpec) -> float:
        predicted = from_bytes(trained(spec, rows)).predict({"image": images[55000:]})["index"]
        return float((predicted == labels[55000:]).mean())

    seed = planned(
        columns,
        nominal_size=55000,
        layers=(Flatten(), Linear(in_features=784, out_features=128), ReLU(), Linear(in_features=128, out_features=10)),
        privacy=Privacy(noise_multiplier=1.0, clip=1.0),
        batch_size=256,
        epochs=10,
        optimizer=SGD(learning_rate=0.01),
    )
    assert [reached for reached in (accuracy(seed) for _ in range(3)) if reached < 0.55] == []
    recipe = planned(columns, nominal_size=55000)
    assert DPPlan.of(recipe).epsilon() <= 3
    assert accuracy(recipe) >= 0.84
