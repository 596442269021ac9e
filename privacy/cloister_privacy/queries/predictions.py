"""What a network predicts of private rows, for an evaluation: silent about what it had to mend, and never returned as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cloister.wire.columns import CategoryColumn
from cloister_privacy.architecture.network import Network
from cloister_privacy.training.examples import values_within

__all__ = ["predictions"]


@torch.no_grad()
def predictions(
    network: Network, rows: Mapping[str, NDArray[Any]], *, count: int, slots: int, device: str
) -> NDArray[np.float32]:
    """Probabilities [count, classes] of a category, or values [count] of a number: each from its own row alone.

    `slots` rows run through the network, however many there are: its time tells nothing of `count`, which is at most that. Inputs are
    put within their declared bounds; what is not finite becomes 0. Every pass is of one size, filled up with rows that
    count for nothing: kernels round otherwise for batches of other sizes. That a row's place in its batch does not round it
    otherwise is an assumption, as floating-point noise is.
    """
    network = network.to(device).eval()
    spec = network.architecture
    is_class = isinstance(spec.output, CategoryColumn)
    shape = (count, len(spec.output.values)) if isinstance(spec.output, CategoryColumn) else (count,)
    predicted = np.zeros((max(slots, count), *shape[1:]), dtype=np.float32)
    size = min(network.rows_at_once, max(slots, 1))
    rows = rows if count else {name: np.zeros((1, *array.shape[1:]), array.dtype) for name, array in rows.items()}
    for start in range(0, len(predicted), size):
        places = np.minimum(np.arange(start, start + size), max(count, 1) - 1)
        some = {name: np.take(array, places, axis=0) for name, array in rows.items()}
        outputs = network(values_within(spec.inputs, some, device=device))
        if spec.loss == "binary_cross_entropy":
            outputs = torch.stack([torch.zeros_like(outputs), outputs], dim=1)
        if is_class:
            outputs = functional.softmax(outputs, dim=1)
        told = outputs.nan_to_num(0.0, 0.0, 0.0).numpy(force=True)
        predicted[start : start + size] = told[: len(predicted) - start]
    return predicted[:count]
