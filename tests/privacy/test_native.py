"""The loops compiled from C++: the same numbers as their twins in torch, on every shape and on numbers that are none."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from cloister_privacy import DPPlan
from cloister_privacy.training import ClippedGradients, PrivateSteps, compilation, native, noise
from cloister_privacy.training.native import Kernels
from cloister_privacy.training.noise import NoiseDraws
from cloister_privacy.training.rules.recurrent import _LSTM, _CompiledLSTM

pytestmark = pytest.mark.xdist_group("native")  # compiled once: it takes ten seconds


@pytest.fixture(scope="module")
def loops() -> Kernels:
    if not compilation._IN_MEMORY.exists():
        pytest.skip("needs a memory file system")
    before = set(compilation._IN_MEMORY.iterdir())
    loops = native.kernels()
    assert loops is not None, "there is a C++ compiler wherever the tests run"
    left = set(compilation._IN_MEMORY.iterdir()) - before
    assert not [path for path in left if path.name.startswith("tmp")]
    return loops


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    steps=st.integers(1, 9),
    size=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_the_lstm_loop_gives_torch_s_numbers_forward_and_back(
    loops: Kernels, n: int, steps: int, size: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight, at_outputs, at_cell = normal(4 * size, size) * size**-0.5, normal(n, steps, size), normal(n, size)
    given = [normal(n, steps, 4 * size) * scale, normal(n, size), normal(n, size)]
    found = []
    for run in (
        lambda came_in, *states: _LSTM.apply(came_in, weight, *states),
        lambda came_in, *states: _CompiledLSTM.apply(came_in, weight, *states, loops),
    ):
        leaves = [each.clone().requires_grad_() for each in given]
        outputs, cell = run(*leaves)
        back = torch.autograd.grad((outputs * at_outputs).sum() + (cell * at_cell).sum(), leaves)
        found.append([outputs, cell, *back])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True), nn.Linear(14, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.layers(inputs)[0][:, -1])


def losses(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(network(batch[0]), batch[1], reduction="none")


def test_an_example_that_is_not_a_number_counts_as_nothing(loops: Kernels) -> None:
    torch.manual_seed(0)
    network, mask = Recurrent(), torch.ones(6)
    inputs, targets = torch.randn(6, 4, 5), torch.arange(6) % 3
    without = mask.clone()
    without[1:4] = 0
    clean = ClippedGradients(network, losses, clip=0.1).sums((inputs, targets), without)
    inputs[1], inputs[2, 2], inputs[3, 0, 0] = torch.nan, torch.inf, -torch.inf
    clipped = ClippedGradients(network, losses, clip=0.1)
    clipped.use_kernels(loops)
    for kept in (mask, without):
        for ours, theirs in zip(clipped.sums((inputs, targets), kept), clean, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def steps_of(network: nn.Module, *, is_compiled: bool) -> PrivateSteps:
    plan = DPPlan(nominal_size=60, capacity=60, batch_size=20, steps=10, noise_multiplier=1.0, clip=0.1, delta=1e-5)
    return PrivateSteps(
        network,
        losses,
        plan=plan,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        synthetic=(torch.randn(8, 4, 5), torch.arange(8) % 3),
        is_compiled=is_compiled,
    )


def test_steps_with_the_loop_move_as_steps_without(loops: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseDraws, "take", lambda draws: torch.zeros(draws._count))
    torch.manual_seed(0)
    network, inputs, targets = Recurrent(), torch.randn(60, 4, 5), torch.arange(60) % 3
    ends = []
    for is_compiled in (False, True):
        trained = copy.deepcopy(network)
        private = steps_of(trained, is_compiled=is_compiled)
        assert (private._clipped._tape.kernels is loops) is is_compiled
        for drawn in (np.arange(20), np.arange(17, 50), np.arange(0)):
            private.step(drawn, lambda indices: (inputs[indices], targets[indices]))
        ends.append(torch.cat([each.detach().flatten() for each in trained.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def test_a_loop_that_gives_other_sums_is_not_used(loops: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kernels.lstm_backward
    monkeypatch.setattr(Kernels, "lstm_backward", lambda *given: tuple(each * 1.5 for each in right(*given)))
    private = steps_of(Recurrent(), is_compiled=True)
    assert private._clipped._tape.kernels is None


@pytest.mark.parametrize("groups", [1, 7, 16, 1000])
def test_gaussians_are_those_of_torch(loops: Kernels, groups: int) -> None:
    words = noise._keystream(1, groups)[0]
    torch.testing.assert_close(loops.gaussians(words, std=2.0), noise._gaussians(words, std=2.0), rtol=0, atol=1e-5)


def test_no_word_makes_an_infinite_or_a_missing_gaussian(loops: Kernels) -> None:
    words = torch.empty((2, 2, 2, 2, 1), dtype=torch.int32)
    for radius_word, largest in ((-1, 13.112), (-(2**31), 1e-3), (2**31 - 1, 13.112), (0, 1e-3)):
        for angle_word in (-(2**31), -(2**30) - 1, -(2**30), -1, 0, 1, 2**30, 2**30 + 1, 2**31 - 1):
            words[0], words[1] = radius_word, angle_word
            made = loops.gaussians(words, std=2.0)
            assert made.isfinite().all()
            assert 0 < float(made.abs().max()) <= 2.0 * largest


def test_draws_by_the_loop_are_gaussian() -> None:
    with NoiseDraws(101_770, std=3.0, device="cpu", is_compiled=True) as draws:
        assert draws._make != noise._gaussians
        taken = torch.cat([draws.take() for _ in range(20)]).double().numpy() / 3.0
    assert stats.kstest(taken, "norm").pvalue > 1e-9
    assert 1e-9 < stats.chi2.cdf((taken**2).sum(), len(taken)) < 1 - 1e-9


def test_a_loop_takes_no_tensor_that_it_would_misread(loops: Kernels) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        loops.gaussians(torch.zeros((2, 2, 2, 4, 2), dtype=torch.int32).mT, std=1.0)


def test_without_a_compiler_the_passes_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_IN_MEMORY", compilation._IN_MEMORY / "missing")
    assert compilation.library("int one() { return 1; }") is None
    network = Recurrent()
    clipped = ClippedGradients(network, losses, clip=0.1)
    clipped.use_kernels(None)
    assert all(
        bool(each.isfinite().all()) for each in clipped.sums((torch.randn(3, 4, 5), torch.arange(3)), torch.ones(3))
    )


def test_a_whole_number_is_a_deviation_too() -> None:
    with NoiseDraws(10_000, std=5, device="cpu", is_compiled=True) as draws:
        assert 4.5 < float(draws.take().std()) < 5.5
