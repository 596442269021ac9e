"""What the engine refuses before it reads a row, and by which name."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from cloister_privacy.errors import (
    ArchitectureRefused,
    ClippingNotExact,
    CrossExampleLayer,
    InPlaceLayer,
    UncoveredParameter,
)
from cloister_privacy.training import guard
from cloister_privacy.training.guard import require_exact_clipping
from networks import N, cases, losses


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    return module


def reused() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize(
    ("module", "error", "cure"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), CrossExampleLayer, "use GroupNorm"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), CrossExampleLayer, "use GroupNorm"),
        (nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3)), CrossExampleLayer, "use GroupNorm"),
        (
            nn.Sequential(nn.Conv1d(3, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True)),
            CrossExampleLayer,
            "GroupNorm",
        ),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), InPlaceLayer, "inplace=False"),
        (
            nn.Sequential(nn.Embedding(3, 3, max_norm=1.0).requires_grad_(False), nn.Linear(3, 3)),
            InPlaceLayer,
            "max_norm",
        ),
        (tied(), UncoveredParameter, "1.weight is the same parameter as 0.weight"),
        (reused(), UncoveredParameter, "2.weight is the same parameter as 0.weight"),
        (nn.Sequential(nn.Linear(3, 3)).requires_grad_(False), UncoveredParameter, "no parameter to train"),
        (nn.Sequential(nn.Tanh()), UncoveredParameter, "no parameter to train"),
        (nn.Linear(3, 3).to(torch.bfloat16), ClippingNotExact, "network.float()"),
        (nn.Linear(3, 3).double(), ClippingNotExact, "network.float()"),
    ],
)
def test_a_network_that_cannot_be_clipped_by_example_is_refused_with_the_cure(
    module: nn.Module, error: type[ArchitectureRefused], cure: str
) -> None:
    with pytest.raises(error, match=cure):
        guard(module)


class _Uses(nn.Module):
    """Uses one layer so many times, and another never where that is once, which its modules alone do not show."""

    def __init__(self, *, times: int) -> None:
        super().__init__()
        self.one, self.times = nn.Linear(3, 3), times
        if times == 1:
            self.other = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(self.times):
            inputs = self.one(inputs).tanh()
        return inputs


class _Mixing(nn.Module):
    """Centres by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        return outputs - outputs.mean(0)


class _Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.layer(inputs).mul_(2.0))  # type: ignore[no-any-return]


class _SequenceFirst(nn.Module):
    """Its linear layer sees the examples as the second dimension, so its gradients cannot be told apart by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(
            inputs.view(N if len(inputs) == N else 1, 1, 3).expand(-1, len(inputs), -1).transpose(0, 1)
        ).mean(1)  # type: ignore[no-any-return]


class _Remembering(nn.Module):
    """Keeps the largest value that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.largest = torch.maximum(self.largest, inputs.detach().max())
        return self.layer(inputs)  # type: ignore[no-any-return]


class _HiddenAtZero(nn.Module):
    """Mixes its examples by a branch whose weights are zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.branch = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.layer.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs + self.branch(inputs + 10 * inputs.mean(0)))  # type: ignore[no-any-return]


class _MindsOutliers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(torch.where(inputs.abs().max() > 20, inputs / inputs.abs().max(), inputs))  # type: ignore[no-any-return]


class _Placed(nn.Module):
    """Owns a table of its own beside a layer, as many a transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.layer = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs + self.places)  # type: ignore[no-any-return]


class _ReadsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight if inputs.sum().item() > -1e9 else inputs


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (_Uses(times=1), UncoveredParameter, "took no part|takes no part"),
        (_Uses(times=2), UncoveredParameter, "used twice"),
        (_Mixing(), CrossExampleLayer, "others in its batch"),
        (_Overwriting(), ClippingNotExact, "overwrites? its input"),
        (_SequenceFirst(), ArchitectureRefused, "examples"),
        (_ReadsValues(), UncoveredParameter, "one example at a time"),
        (_Remembering(), InPlaceLayer, "writes to largest"),
        (_HiddenAtZero(), CrossExampleLayer, "others in its batch"),
        (_MindsOutliers(), CrossExampleLayer, "others in its batch"),
        (_Placed(), UncoveredParameter, "owns places beside other trained layers.*a module of its own"),
    ],
)
def test_a_network_that_shows_its_fault_only_when_it_runs_is_refused(
    module: nn.Module, error: type[ArchitectureRefused], message: str
) -> None:
    with pytest.raises(error, match=message):
        require_exact_clipping(module, losses, (torch.randn(N, 3), torch.arange(N) % 3))


@pytest.mark.parametrize("name", list(cases()))
def test_every_network_that_has_rules_passes(name: str) -> None:
    module, inputs = cases()[name]
    guard(module)
    require_exact_clipping(module, losses, (inputs, torch.arange(N) % 3))


class _Deep(nn.Module):
    """Many residual blocks, each of which passes the rounding of those before it on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 16, 3, padding=1), nn.Linear(1024, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False))
            for _ in range(24)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden.flatten(1))  # type: ignore[no-any-return]


def test_a_deep_network_is_told_from_a_wrong_rule_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloister_privacy.training.rules.gradients import Dense

    torch.manual_seed(3)
    module, batch = _Deep(), (torch.randn(N, 2, 8, 8), torch.arange(N) % 3)
    # As if it rounded by more than that. The module is behind the function of its name.
    monkeypatch.setattr(import_module("cloister_privacy.training.guard"), "_TOLERANCE", 1e-9)
    require_exact_clipping(module, losses, batch)
    right = Dense.weighted_sum
    monkeypatch.setattr(Dense, "weighted_sum", lambda self, scales: right(self, scales) * (1 + 5e-6))
    with pytest.raises(ClippingNotExact):
        require_exact_clipping(module, losses, batch)


def test_a_rule_that_is_wrong_by_a_hair_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloister_privacy.training.rules.gradients import Outer

    right = Outer.weighted_sum
    monkeypatch.setattr(Outer, "weighted_sum", lambda self, scales: right(self, scales) * (1 + 5e-5))
    module, inputs = cases()["linear"]
    with pytest.raises(ClippingNotExact):
        require_exact_clipping(module, losses, (inputs, torch.arange(N) % 3))


@pytest.mark.parametrize("name", ["linear", "conv2d", "lstm"])
def test_a_loss_that_differentiates_twice_is_refused(name: str) -> None:
    """A gradient penalty uses the weights once more on the way back, where no rule sees them."""

    def penalised(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        found = losses(network, (inputs, batch[1]))
        (slope,) = torch.autograd.grad(found.sum(), inputs, create_graph=True)
        return found + slope.flatten(1).square().sum(1)

    module, inputs = cases()[name]
    with pytest.raises(ClippingNotExact):
        require_exact_clipping(module, penalised, (inputs, torch.arange(N) % 3))


@pytest.mark.parametrize("count", [0, 4, 16])
def test_another_number_of_synthetic_examples_is_refused(count: int) -> None:
    with pytest.raises(ClippingNotExact, match="GUARD_EXAMPLES"):
        require_exact_clipping(nn.Linear(3, 3), losses, (torch.randn(count, 3), torch.arange(count) % 3))


def test_a_loss_that_is_a_mean_is_refused() -> None:
    module, inputs = cases()["linear"]
    with pytest.raises(ArchitectureRefused, match="one number for each example"):
        require_exact_clipping(
            module, lambda network, batch: losses(network, batch).mean(), (inputs, torch.arange(N) % 3)
        )
