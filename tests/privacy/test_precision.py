"""Whatever precision a process has asked for, a clipped sum is made of float32 products, and the asking holds again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cloister_privacy import DPPlan
from cloister_privacy.training import PrivateSteps
from cloister_privacy.training.precision import _BACKENDS, full_float32
from networks import losses


@pytest.fixture
def low_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def precisions() -> list[str]:
    return [backend.fp32_precision for backend in _BACKENDS]


@pytest.mark.usefixtures("low_precision")
def test_what_was_asked_for_holds_again_even_after_an_error() -> None:
    asked = precisions()
    assert "bf16" in asked
    with pytest.raises(ZeroDivisionError), full_float32():
        assert precisions() == ["ieee"] * len(_BACKENDS)
        raise ZeroDivisionError
    assert precisions() == asked


@pytest.mark.usefixtures("low_precision")
def test_every_pass_of_a_step_runs_in_full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def watched(network: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(precisions())
        return losses(network, batch)

    network = nn.Linear(5, 3)
    inputs, targets = torch.rand(40, 5), torch.arange(40) % 3
    plan = DPPlan(nominal_size=40, capacity=50, batch_size=10, steps=3, noise_multiplier=1.0, clip=1.0, delta=1e-5)
    private = PrivateSteps(
        network,
        watched,
        plan=plan,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        synthetic=(inputs[:8], targets[:8]),
    )
    tried = len(seen)
    assert tried > 0
    private.step(np.arange(10), lambda indices: (inputs[indices], targets[indices]))
    assert len(seen) > tried
    assert all(each == ["ieee"] * len(_BACKENDS) for each in seen)
