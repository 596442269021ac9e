"""The seed's Keras CNN under TensorFlow itself, imported and compared: a script, for an environment that has tensorflow-cpu.

The last line is {"largest_difference": ...} between the probabilities of TensorFlow and those of the imported network.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
import torch

from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, TensorColumn
from cloister_privacy.architecture import Network, from_keras


class Seed(tf.keras.Model):  # type: ignore[misc, name-defined, unused-ignore]
    """As it stands: two convolutions and two dense layers of its own, pools made in call()."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = tf.keras.layers.Conv2D(32, (3, 3), activation="relu")
        self.conv2 = tf.keras.layers.Conv2D(64, (3, 3), activation="relu")
        self.flatten = tf.keras.layers.Flatten()
        self.dense1 = tf.keras.layers.Dense(128, activation="relu")
        self.dense2 = tf.keras.layers.Dense(10, activation="softmax")

    def call(self, x: Any) -> Any:
        x = tf.keras.layers.MaxPooling2D((2, 2))(self.conv1(x))
        x = tf.keras.layers.MaxPooling2D((2, 2))(self.conv2(x))
        return self.dense2(self.dense1(self.flatten(x)))


def main() -> None:
    model = Seed()
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=tf.keras.optimizers.SGD(0.01), loss=loss)
    images = np.random.default_rng(0).uniform(0, 1, (20, 28, 28, 1)).astype(np.float32)
    model.fit(images, np.arange(20) % 10, epochs=2, verbose=0)
    imported = from_keras(model, input_shape=(28, 28, 1))
    assert any("from_logits" in warning for warning in imported.warnings)
    ((name, shape),) = imported.inputs.items()
    network = Network(
        Architecture(
            inputs={name: TensorColumn(shape=shape, low=0, high=1)},
            layers=imported.layers,
            target="label",
            output=CategoryColumn(values=tuple("abcdefghij")),
            loss="cross_entropy",
        )
    ).eval()
    network.load_state_dict({key: torch.from_numpy(np.array(each)) for key, each in imported.weights.items()})
    ours = network.predict({name: images})["probabilities"]
    print(json.dumps({"largest_difference": float(np.abs(ours - model.predict(images, verbose=0)).max())}))  # noqa: T201 (a script)


if __name__ == "__main__":
    main()
