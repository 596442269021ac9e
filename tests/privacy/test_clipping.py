"""Clipping against a loop that clips one example at a time, against stock Opacus, and at the edges of float32."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cloister.wire.plans import SGD
from cloister_privacy.errors import ArchitectureRefused, CrossExampleLayer, UncoveredParameter
from cloister_privacy.plan import DPPlan
from cloister_privacy.training import guard
from cloister_privacy.training.clipping import ClippedGradients
from cloister_privacy.training.optimizer import NoisyOptimizer


def network(*, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def examples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-3, 3, max(count, 1))[:count].unsqueeze(1)  # some are clipped, some are not
    return torch.randn(count, 7, generator=generator) * scales, torch.randint(0, 3, (count,), generator=generator)


def clipped_sum(module: nn.Module, inputs: Tensor, targets: Tensor, *, clip: float) -> list[Tensor]:
    """By the code under test, from a fresh copy."""
    module = copy.deepcopy(module)
    gradients = ClippedGradients(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        nn.functional.cross_entropy(gradients(inputs), targets, reduction="sum").backward()
    gradients.write(clip)
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def clipped_one_by_one(module: nn.Module, inputs: Tensor, targets: Tensor, *, clip: float) -> list[Tensor]:
    """By the definition."""
    total = [torch.zeros_like(parameter) for parameter in module.parameters()]
    for one, target in zip(inputs, targets, strict=True):
        module.zero_grad()
        nn.functional.cross_entropy(module(one[None]), target[None], reduction="sum").backward()
        gradient = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norm = torch.cat([each.flatten() for each in gradient]).double().norm()
        factor = min(1.0, clip / norm.item()) if norm > 0 else 1.0
        total = [before + factor * each for before, each in zip(total, gradient, strict=True)]
    return total


def norm(gradient: list[Tensor]) -> float:
    return torch.cat([each.flatten() for each in gradient]).double().norm().item()


@given(count=st.integers(1, 30), clip=st.sampled_from([1e-3, 0.3, 1.0, 50.0]), bias=st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_clipped_sum_is_that_of_a_loop_over_the_examples(count: int, clip: float, bias: bool) -> None:
    module, (inputs, targets) = network(bias=bias), examples(count, seed=count)
    ours = clipped_sum(module, inputs, targets, clip=clip)
    for left, right in zip(ours, clipped_one_by_one(module, inputs, targets, clip=clip), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6 * clip * count)


def test_the_clipped_sum_is_that_of_stock_opacus() -> None:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module, (inputs, targets) = network(), examples(40)
    ours = clipped_sum(module, inputs, targets, clip=0.7)
    stock = GradSampleModule(copy.deepcopy(module), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(stock.parameters(), lr=1),
        noise_multiplier=0.0,
        max_grad_norm=0.7,
        expected_batch_size=1,
        loss_reduction="sum",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        nn.functional.cross_entropy(stock(inputs), targets, reduction="sum").backward()
    optimizer.pre_step()
    for left, right in zip(ours, stock.parameters(), strict=True):
        torch.testing.assert_close(left, right.grad, rtol=1e-4, atol=1e-5)


@given(exponent=st.integers(-30, 30), clip=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_no_example_ever_contributes_more_than_the_clip(exponent: int, clip: float) -> None:
    module = nn.Sequential(nn.Linear(7, 3))
    inputs = torch.randn(1, 7) * 10.0**exponent
    assert norm(clipped_sum(module, inputs, torch.tensor([1]), clip=clip)) <= clip * (1 + 1e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_norm_whose_squares_vanish_in_float32_is_clipped_all_the_same() -> None:
    module = nn.Linear(7, 3, bias=False)
    gradients = ClippedGradients(module)
    (gradients(torch.full((1, 7), 1e-25)) * 1e30).sum().backward()  # a gradient of about 1e5
    gradients.write(1e-3)
    assert module.weight.grad is not None
    assert module.weight.grad.norm().item() == pytest.approx(1e-3, rel=1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3.4e38])
def test_a_contribution_that_is_not_finite_is_zero_and_harms_no_other(poison: float) -> None:
    module, (inputs, targets) = network(), examples(12)
    expected = clipped_sum(module, inputs[1:], targets[1:], clip=1.0)
    poisoned = inputs.clone()
    poisoned[0] = poison
    for left, right in zip(clipped_sum(module, poisoned, targets, clip=1.0), expected, strict=True):
        if poison != 3.4e38:  # finite, so it may contribute; but no more than the clip
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
        assert (left - right).norm() <= 1 + 1e-5


@given(cuts=st.lists(st.integers(0, 20), max_size=4))
@settings(max_examples=20, deadline=None)
def test_any_split_into_micro_batches_gives_the_same_clipped_sum(cuts: list[int]) -> None:
    module, (inputs, targets) = network(), examples(20)
    whole = clipped_sum(module, inputs, targets, clip=1.0)
    edges = [0, *sorted(cuts), 20]
    parts = [clipped_sum(module, inputs[low:high], targets[low:high], clip=1.0) for low, high in pairwise(edges)]
    for index, expected in enumerate(whole):
        torch.testing.assert_close(sum(part[index] for part in parts), expected, rtol=1e-4, atol=1e-5)


def test_no_example_at_all_gives_a_sum_of_zeros() -> None:
    assert norm(clipped_sum(network(), torch.empty(0, 7), torch.empty(0, dtype=torch.long), clip=1.0)) == 0


def test_micro_batches_add_up_in_the_optimizer_and_noise_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, float]] = []

    def no_noise(count: int, *, std: float) -> Tensor:
        drawn.append((count, std))
        return torch.zeros(count)

    monkeypatch.setattr("cloister_privacy.training.optimizer.gaussian_noise", no_noise)
    plan = DPPlan(nominal_size=100, batch_size=10, steps=1, noise_multiplier=2.0, clip=0.5, delta=1e-5)
    layer = nn.Linear(2, 1)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = NoisyOptimizer(layer.parameters(), optimizer=SGD(learning_rate=1.0), plan=plan)
    for part in range(3):
        layer.weight.grad, layer.bias.grad = torch.full((1, 2), part + 1.0), torch.tensor([10.0])
        optimizer.signal_skip_step(part < 2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert drawn == [(2, plan.noise_std), (1, plan.noise_std)]  # one draw for each parameter, in one step
    assert torch.allclose(before[0] - layer.weight, torch.full((1, 2), 6 / 10))  # 1 + 2 + 3, by the declared batch
    assert torch.allclose(before[1] - layer.bias, torch.tensor([30 / 10]))


class _Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    return module


def reused() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))


@pytest.mark.parametrize(
    ("module", "error", "cure"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), CrossExampleLayer, "use GroupNorm"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), CrossExampleLayer, "use GroupNorm"),
        (nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3)), CrossExampleLayer, "use GroupNorm"),
        (nn.Sequential(nn.Linear(3, 3), _Raw()), UncoveredParameter, "1.scale belongs to _Raw"),
        (nn.Sequential(nn.Conv1d(3, 3, 1)), UncoveredParameter, "0.weight belongs to Conv1d"),
        (tied(), UncoveredParameter, "1.weight is the same parameter as 0.weight"),
        (reused(), UncoveredParameter, "2.weight is the same parameter as 0.weight"),
        (frozen(), UncoveredParameter, "1.weight is frozen"),
        (nn.Sequential(nn.Tanh()), UncoveredParameter, "no parameter"),
    ],
)
def test_a_network_that_cannot_be_clipped_by_example_is_refused_with_the_cure(
    module: nn.Module, error: type[ArchitectureRefused], cure: str
) -> None:
    for refuse in (guard, ClippedGradients):
        with pytest.raises(error, match=cure):
            refuse(module)


class _Twice(nn.Module):
    """Uses one layer twice and another never, which its modules alone do not show."""

    def __init__(self, *, uses: int) -> None:
        super().__init__()
        self.one, self.other, self.uses = nn.Linear(3, 3), nn.Linear(3, 3), uses

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(self.uses):
            inputs = self.one(inputs).tanh()
        return inputs


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("uses", "message"), [(1, "took no part"), (2, "used twice")])
def test_a_pass_that_leaves_a_layer_out_or_takes_it_twice_is_refused(uses: int, message: str) -> None:
    gradients = ClippedGradients(_Twice(uses=uses))
    with pytest.raises(UncoveredParameter, match=message):
        gradients(torch.ones(2, 3)).sum().backward()
        gradients.write(1.0)


@pytest.mark.parametrize("scale", [1.0, 1e20, 3e37, 1e38])
def test_no_example_exceeds_the_clip_however_large_its_gradient(scale: float) -> None:
    torch.manual_seed(0)
    for clip in (1e-6, 1.0):
        for _ in range(40):
            network = nn.Sequential(nn.Linear(256, 2, bias=False))
            clipped = ClippedGradients(network)
            inputs = torch.full((1, 256), float(torch.rand(())) * scale, requires_grad=True)
            nn.functional.cross_entropy(clipped(inputs), torch.randint(2, (1,)), reduction="sum").backward()
            clipped.write(clip)
            gradients = [
                parameter.grad.double().norm() for parameter in network.parameters() if parameter.grad is not None
            ]
            assert torch.stack(gradients).norm() <= clip * (1 + 1e-5)
