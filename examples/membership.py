"""A small membership attack (after Yeom et al., arXiv 1709.01604): rows that a model fits well were probably trained on.

The threshold is chosen on half of the rows and judged on the other half, so that 50 % means: no better than a coin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

ROUNDS = 25


def plain_twin(digits: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The same network as the recipe's, trained without privacy; images -> probabilities."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10)
    )
    x, y = torch.tensor(digits.train_x / 8 - 1), torch.tensor(digits.train_y)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(100):
        for batch in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return torch.softmax(network(torch.tensor(images / 8 - 1)), dim=1).numpy()

    return predict


def attack(predict: Callable[[np.ndarray], np.ndarray], digits: Any) -> float:
    """The fraction of right guesses 'was in the training set' over equally many members and strangers."""
    members = _losses(predict(digits.train_x), digits.train_y)
    strangers = _losses(predict(digits.test_x), digits.test_y)
    rng = np.random.default_rng(1)
    half = min(len(members), len(strangers)) // 2
    return float(np.mean([_round(rng, members, strangers, half) for _ in range(ROUNDS)]))


def _round(rng: np.random.Generator, members: np.ndarray, strangers: np.ndarray, half: int) -> float:
    inside, outside = rng.permutation(members), rng.permutation(strangers)
    thresholds = np.quantile(np.concatenate([inside[:half], outside[:half]]), np.linspace(0, 1, 201))
    chosen = max(thresholds, key=lambda t: _right(inside[:half], outside[:half], t))
    return _right(inside[half : 2 * half], outside[half : 2 * half], chosen)


def _right(inside: np.ndarray, outside: np.ndarray, threshold: float) -> float:
    return float(np.mean(inside <= threshold) + np.mean(outside > threshold)) / 2


def _losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12))
