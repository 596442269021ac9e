"""The engine on a GPU: the same sums as on the CPU, noise made on the device, compiled steps. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from cloister_privacy import DPPlan
from cloister_privacy.training import ClippedGradients, PrivateSteps, guard
from cloister_privacy.training.guard import require_exact_clipping
from cloister_privacy.training.noise import NoiseDraws
from cloister_privacy.training.precision import full_float32
from networks import N, cases, losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none here")


def made(name: str) -> tuple[Any, Any]:
    network, inputs = cases()[name]
    return network, (inputs, torch.arange(N) % 3)


def to_cuda(batch: Any) -> Any:
    return batch.cuda() if isinstance(batch, torch.Tensor) else tuple(to_cuda(each) for each in batch)


@pytest.mark.parametrize("name", cases())
def test_clipped_sums_are_those_of_the_cpu(name: str) -> None:
    network, batch = made(name)
    network.eval()  # nothing is dropped at random
    mask = torch.ones(N)
    on_cpu = ClippedGradients(network, losses, clip=0.1).sums(batch, mask)
    with full_float32():
        on_gpu = ClippedGradients(network.cuda(), losses, clip=0.1).sums(to_cuda(batch), mask.cuda())
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", cases())
def test_the_guard_accepts_on_the_gpu_what_it_accepts_on_the_cpu(name: str) -> None:
    network, batch = made(name)
    network.cuda()
    guard(network)
    require_exact_clipping(network, losses, to_cuda(batch))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_noise_is_made_on_the_device_and_is_gaussian(is_compiled: bool) -> None:
    with NoiseDraws(101_770, std=2.0, device="cuda", is_compiled=is_compiled) as draws:
        taken = [draws.take() for _ in range(20)]
    assert all(each.is_cuda for each in taken)
    noise = torch.cat(taken).double().cpu().numpy() / 2
    assert stats.kstest(noise, "norm").pvalue > 1e-9
    assert len({each.cpu().numpy().tobytes() for each in taken}) == 20


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_step_without_its_noise_moves_as_on_the_cpu(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseDraws, "take", lambda draws: torch.zeros(draws._count, device=draws._device))
    plan = DPPlan(nominal_size=N, capacity=N, batch_size=N, steps=10, noise_multiplier=1.0, clip=0.1, delta=1e-5)

    def moved(device: str) -> torch.Tensor:
        network, (inputs, targets) = made("linear")
        network.to(device)
        private = PrivateSteps(
            network,
            losses,
            plan=plan,
            optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
            synthetic=(inputs.to(device), targets.to(device)),
            is_compiled=is_compiled and device == "cuda",
        )
        before = torch.cat([each.detach().flatten() for each in network.parameters()])
        for _ in range(3):
            private.step(np.arange(N), lambda indices: (inputs[indices].to(device), targets[indices].to(device)))
        return (torch.cat([each.detach().flatten() for each in network.parameters()]) - before).cpu()

    on_cpu = moved("cpu")
    assert float(on_cpu.norm()) > 0
    torch.testing.assert_close(moved("cuda"), on_cpu, rtol=1e-3, atol=1e-6)
