"""Clipping against a loop that clips one example at a time, against stock Opacus, and at the edges of float32."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cloister_privacy.training.clipping import ClippedGradients, Clipping
from cloister_privacy.training.rules import gradients as forms
from cloister_privacy.training.rules.gradients import _norms
from networks import N, cases, losses

NAMES = list(cases())


def network(*, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def examples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-3, 3, max(count, 1))[:count].unsqueeze(1)  # some are clipped, some are not
    return torch.randn(count, 7, generator=generator) * scales, torch.randint(0, 3, (count,), generator=generator)


def clipped_sum(module: nn.Module, inputs: Tensor, targets: Tensor, *, clip: float, **options: Any) -> Tensor:
    """By the code under test."""
    sums = ClippedGradients(module, losses, clip=clip, **options).sums((inputs, targets), torch.ones(len(inputs)))
    return torch.cat([each.flatten() for each in sums])


def clipped_one_by_one(
    module: nn.Module, inputs: Tensor, targets: Tensor, *, clip: float, clipping: Clipping = "flat"
) -> Tensor:
    """By the definition."""
    parameters = [each for each in module.parameters() if each.requires_grad]
    total = [torch.zeros_like(each) for each in parameters]
    for one, target in zip(inputs, targets, strict=True):
        gradient = torch.autograd.grad(losses(module, (one[None], target[None])).sum(), parameters)
        norms = torch.stack([each.double().norm() for each in gradient])
        if clipping == "per_layer":
            factors = (clip / len(parameters) ** 0.5 / norms).clamp(max=1).tolist()
        else:
            bound = clip / (norms.norm() + 0.01) if clipping == "automatic" else (clip / norms.norm()).clamp(max=1)
            factors = [float(bound)] * len(parameters)
        total = [before + by * each for before, by, each in zip(total, factors, gradient, strict=True)]
    return torch.cat([each.flatten() for each in total])


def without_chance(module: nn.Module) -> nn.Module:
    for each in module.modules():
        if isinstance(each, nn.Dropout | nn.MultiheadAttention):
            each.train(False)
    return module


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("name", NAMES)
def test_every_rule_gives_the_sum_of_a_loop_over_the_examples(name: str, clipping: Clipping) -> None:
    module, inputs = cases()[name]
    module = without_chance(module)
    targets = torch.arange(N) % 3
    clip = ClippedGradients(module, losses, clip=1.0).norms((inputs, targets)).median().item()
    ours = clipped_sum(module, inputs, targets, clip=clip, clipping=clipping)
    loop = clipped_one_by_one(module, inputs, targets, clip=clip, clipping=clipping)
    assert loop.norm() > 0
    assert (ours - loop).norm() <= 1e-5 * loop.norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_example_counts_for_nothing(name: str) -> None:
    module, inputs = cases()[name]
    module = without_chance(module)
    targets, mask = torch.arange(N) % 3, (torch.arange(N) < 5).float()
    whole = ClippedGradients(module, losses, clip=1.0).sums((inputs, targets), mask)
    kept = clipped_sum(module, inputs[:5], targets[:5], clip=1.0)
    assert (torch.cat([each.flatten() for each in whole]) - kept).norm() <= 1e-5 * kept.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_no_example_ever_exceeds_the_clip_in_any_rule(name: str, scale: float) -> None:
    module, inputs = cases()[name]
    for clipping in ("flat", "per_layer", "automatic"):
        for index in range(3):
            one = inputs[index : index + 1]
            one = one * scale if one.is_floating_point() else one
            assert clipped_sum(module, one, torch.tensor([1]), clip=1e-3, clipping=clipping).norm() <= 1e-3 * (1 + 1e-5)


def test_gradients_too_many_to_write_out_are_clipped_by_their_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = cases()["linear on sequences"]
    targets = torch.arange(N) % 3
    expected = clipped_one_by_one(module, inputs, targets, clip=0.1)
    monkeypatch.setattr(forms, "_DENSE_BYTES", 0)
    assert (clipped_sum(module, inputs, targets, clip=0.1) - expected).norm() <= 1e-5 * expected.norm()


def test_a_gram_norm_of_terms_that_cancel_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two positions whose gradients nearly undo each other: in float32 the norm would come out as 0, and nothing be clipped."""
    monkeypatch.setattr(forms, "_DENSE_BYTES", 0)
    back = torch.tensor([[[1e4], [-1e4]]])
    entering = torch.tensor([[[1.0], [1.0 + 2**-20]]])
    gram = forms.of_linear(back, entering)
    truth = (back.double().mT @ entering.double()).norm()
    assert float(truth) * (1 - 1e-9) <= float(gram.norms()) <= float(truth) * 1.01


@given(count=st.integers(1, 30), clip=st.sampled_from([1e-3, 0.3, 1.0, 50.0]), bias=st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_clipped_sum_of_any_batch_is_that_of_a_loop(count: int, clip: float, bias: bool) -> None:
    module, (inputs, targets) = network(bias=bias), examples(count, seed=count)
    ours = clipped_sum(module, inputs, targets, clip=clip)
    loop = clipped_one_by_one(module, inputs, targets, clip=clip)
    torch.testing.assert_close(ours, loop, rtol=1e-4, atol=1e-6 * clip * count)


@pytest.mark.parametrize("name", ["linear", "conv2d", "norms"])
def test_the_clipped_sum_is_that_of_stock_opacus(name: str) -> None:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module, inputs = cases()[name]
    targets = torch.arange(N) % 3
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
        losses(stock, (inputs, targets)).sum().backward()
    optimizer.pre_step()
    theirs = torch.cat([each.grad.flatten() for each in stock.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@given(exponent=st.integers(-30, 30), clip=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_no_example_ever_contributes_more_than_the_clip(exponent: int, clip: float) -> None:
    module = nn.Sequential(nn.Linear(7, 3))
    inputs = torch.randn(1, 7) * 10.0**exponent
    assert clipped_sum(module, inputs, torch.tensor([1]), clip=clip).double().norm() <= clip * (1 + 1e-5)


def test_a_norm_whose_squares_vanish_in_float32_is_clipped_all_the_same() -> None:
    module = nn.Linear(7, 3, bias=False)
    clipped = ClippedGradients(module, lambda network, batch: (network(batch) * 1e30).sum(1), clip=1e-3)
    (gradient,) = clipped.sums(torch.full((1, 7), 1e-25), torch.ones(1))  # a gradient of about 1e5
    assert gradient.norm().item() == pytest.approx(1e-3, rel=1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3.4e38])
@pytest.mark.parametrize("name", [name for name in NAMES if "attention" not in name])
def test_a_contribution_that_is_not_finite_is_zero_and_harms_no_other(name: str, poison: float) -> None:
    module, inputs = cases()[name]
    targets = torch.arange(N) % 3
    expected = clipped_sum(module, inputs[1:], targets[1:], clip=1.0)
    poisoned = inputs.clone()
    poisoned[0] = poison
    difference = (clipped_sum(module, poisoned, targets, clip=1.0) - expected).norm()
    if poison != 3.4e38:  # finite, so it may contribute; but no more than the clip
        assert difference <= 1e-5 * expected.norm()
    assert difference <= 1 + 1e-5


@given(cuts=st.lists(st.integers(0, 20), max_size=4))
@settings(max_examples=20, deadline=None)
def test_any_split_into_micro_batches_gives_the_same_clipped_sum(cuts: list[int]) -> None:
    module, (inputs, targets) = network(), examples(20)
    edges = [0, *sorted(cuts), 20]
    parts = [clipped_sum(module, inputs[low:high], targets[low:high], clip=1.0) for low, high in pairwise(edges)]
    whole = clipped_sum(module, inputs, targets, clip=1.0)
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e20, 3e37, 1e38])
def test_no_example_exceeds_the_clip_however_large_its_gradient(scale: float) -> None:
    torch.manual_seed(0)
    for clip in (1e-6, 1.0):
        for _ in range(40):
            module = nn.Sequential(nn.Linear(256, 2, bias=False))
            inputs = torch.full((1, 256), float(torch.rand(())) * scale)
            assert clipped_sum(module, inputs, torch.randint(2, (1,)), clip=clip).double().norm() <= clip * (1 + 1e-5)


def test_half_precision_is_for_the_passes_alone() -> None:
    module, inputs = cases()["conv2d"]
    targets = torch.arange(N) % 3
    half = ClippedGradients(module, losses, clip=0.5, autocast=True).sums((inputs, targets), torch.ones(N))
    assert {each.dtype for each in half} == {torch.float32}
    exact = clipped_sum(module, inputs, targets, clip=0.5)
    assert (torch.cat([each.flatten() for each in half]) - exact).norm() <= 0.05 * exact.norm()
    for index in range(N):
        one = ClippedGradients(module, losses, clip=1e-3, autocast=True).sums(
            (inputs[index : index + 1], targets[index : index + 1]), torch.ones(1)
        )
        assert torch.cat([each.flatten() for each in one]).double().norm() <= 1e-3 * (1 + 1e-5)


@given(
    exponent=st.integers(-45, 38),
    width=st.sampled_from([1, 7, 1023, 1025, 4096, 9000]),
    spread=st.sampled_from([0.0, 3.0, 12.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_a_norm_is_never_told_smaller_than_it_is(exponent: int, width: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, width, generator=generator, dtype=torch.float64)
    rows = (
        rows * 10.0 ** (exponent + spread * torch.randn(3, width, generator=generator, dtype=torch.float64))
    ).float()
    told, truth = _norms(rows), torch.linalg.vector_norm(rows.double(), dim=1)
    assert bool((told >= truth * (1 - 3e-6)).all())
    # A run told as its largest number in every place adds up to 3e-12, which is nothing beside these.
    is_usual = (truth > 1e-8) & (truth < 1e18)
    torch.testing.assert_close(told[is_usual], truth[is_usual], rtol=3e-6, atol=0)
