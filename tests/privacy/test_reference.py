"""Book-keeping against stock Opacus: two independent ways to the same clipped sum, and what Opacus would get wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import Tensor, nn

from cloister.wire.plans import Clipping
from cloister_privacy.errors import UncoveredParameter
from cloister_privacy.training.clipping import ClippedGradients
from cloister_privacy.training.reference import ReferenceGradients
from networks import N, Odd, Recurrent, Text, cases, losses

SUPPORTED = [
    "linear", "linear on sequences", "conv2d", "conv1d", "norms", "instance norm", "vmap", "partly frozen", "embedding",
]  # fmt: skip
REFUSED = [name for name in cases() if name not in SUPPORTED]
TARGETS = torch.arange(N) % 3


def case(name: str) -> tuple[nn.Module, Tensor]:
    if name != "embedding":
        return cases()[name]
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(24, 3)), torch.randint(20, (N, 6))


def flat(clipped: ClippedGradients, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    kept = torch.ones(len(inputs)) if mask is None else mask
    return torch.cat([each.flatten() for each in clipped.sums((inputs, TARGETS[: len(inputs)]), kept)])


def both(module: nn.Module, inputs: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """The sum by book-keeping, and by Opacus."""
    sums = [flat(kind(module, losses, **options), inputs, mask) for kind in (ClippedGradients, ReferenceGradients)]
    return sums[0], sums[1]


def median_norm(module: nn.Module, inputs: Tensor) -> float:
    return float(ReferenceGradients(module, losses, clip=1.0).norms((inputs, TARGETS)).median())


def is_close(ours: Tensor, theirs: Tensor) -> bool:
    return bool(theirs.norm() > 0) and bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


def test_every_shared_network_is_either_compared_or_refused() -> None:
    assert sorted([*SUPPORTED, *REFUSED]) == sorted([*cases(), "embedding"])
    assert len(REFUSED) == 8


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_opacus_finds_the_clipped_sum_that_book_keeping_finds(name: str, clipping: Clipping) -> None:
    module, inputs = case(name)
    clip = median_norm(module, inputs)
    assert is_close(*both(module, inputs, clip=clip, clipping=clipping))
    mask = (torch.arange(N) % 3 != 1).float()
    masked = both(module, inputs, mask, clip=clip, clipping=clipping)
    assert is_close(*masked)
    assert not is_close(masked[1], both(module, inputs, clip=clip, clipping=clipping)[1])


@pytest.mark.parametrize("name", SUPPORTED)
def test_both_find_the_same_norms(name: str) -> None:
    module, inputs = case(name)
    ours, theirs = (
        kind(module, losses, clip=1.0).norms((inputs, TARGETS)) for kind in (ClippedGradients, ReferenceGradients)
    )
    assert theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name != "embedding"])
def test_an_example_that_is_not_finite_counts_as_zero(name: str, poison: float, clipping: Clipping) -> None:
    module, inputs = case(name)
    inputs[2] = poison
    ours, theirs = both(module, inputs, clip=1.0, clipping=clipping)
    assert theirs.isfinite().all()
    without = flat(
        ReferenceGradients(module, losses, clip=1.0, clipping=clipping),
        torch.where(inputs.isfinite(), inputs, 0),
        (torch.arange(N) != 2).float(),
    )
    assert is_close(ours, theirs)
    # A bias whose gradient is finite all the same may contribute where it has a bound of its own.
    assert clipping == "per_layer" or is_close(theirs, without)


@pytest.mark.parametrize("name", ["linear", "conv2d", "vmap", "embedding"])
def test_half_precision_is_for_the_passes_alone(name: str) -> None:
    module, inputs = case(name)
    half = ReferenceGradients(module, losses, clip=0.5, autocast=True).sums((inputs, TARGETS), torch.ones(N))
    assert {each.dtype for each in half} == {torch.float32}
    exact = flat(ReferenceGradients(module, losses, clip=0.5), inputs)
    assert (torch.cat([each.flatten() for each in half]) - exact).norm() <= 0.05 * exact.norm()


def test_images_whose_channels_lie_side_by_side_are_read_right() -> None:
    module, inputs = case("conv2d")
    assert is_close(*both(module, inputs.to(memory_format=torch.channels_last), clip=0.3))


class Attending(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.layer, self.last = DPMultiheadAttention(5, 1, batch_first=batch_first), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        values = inputs if self.layer.batch_first else inputs.transpose(0, 1)
        return self.last(self.layer(values, values, values)[0].mean(1 if self.layer.batch_first else 0))  # type: ignore[no-any-return]


@pytest.mark.parametrize("module", [Recurrent(DPLSTM), Attending(batch_first=True)])
def test_the_layers_that_opacus_has_instead_are_clipped_right(module: nn.Module) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(N, 6, 5)
    clip = median_norm(module, inputs)
    parameters, total = list(module.parameters()), torch.zeros(sum(each.numel() for each in module.parameters()))
    for one, target in zip(inputs, TARGETS, strict=True):
        gradient = torch.autograd.grad(losses(module, (one[None], target[None])).sum(), parameters)
        row = torch.cat([each.flatten() for each in gradient])
        total += row * min(1.0, clip / float(row.norm()))
    assert is_close(flat(ReferenceGradients(module, losses, clip=clip), inputs), total)


def in_eval_mode() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3)).eval()


class Buffered(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))


class Shifted(nn.Module):
    """A layer with a second input, which Opacus' vmap would leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, inputs: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return (inputs + shift).square() * self.scale


class TakesTwo(nn.Module):
    def __init__(self, *, is_named: bool) -> None:
        super().__init__()
        self.first, self.second, self.is_named = nn.Linear(5, 3), Shifted(), is_named

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, shift = self.first(inputs), torch.ones(3)
        return self.second(hidden, shift=shift) if self.is_named else self.second(hidden, shift)  # type: ignore[no-any-return]


class Positions(nn.Module):
    """Looks its positions up once for all examples, so the layer never sees how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(6, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last((inputs + self.table(torch.arange(6))).mean(1))  # type: ignore[no-any-return]


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        self.spare(inputs)
        return self.used(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", REFUSED)
def test_a_shared_network_that_opacus_cannot_take_is_refused_at_once(name: str) -> None:
    module, _ = cases()[name]
    with pytest.raises(UncoveredParameter, match="train with book_keeping"):
        ReferenceGradients(module, losses, clip=1.0)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Recurrent(nn.LSTM), r"layer \(LSTM\) has no hook"),
        (Recurrent(nn.GRU), r"layer \(GRU\)"),
        (Recurrent(nn.RNN), r"layer \(RNN\)"),
        (Text(), r"table \(Embedding\) has padding_idx"),
        (nn.TransformerEncoderLayer(4, 2, 8), r"self_attn \(MultiheadAttention\)"),
        (nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")), "padded by 'circular'"),
        (nn.Embedding(3, 2, max_norm=1.0), r"the network \(Embedding\)"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (Attending(batch_first=False), r"layer \(DPMultiheadAttention\) has not the examples first"),
        (Buffered(), "buffers"),
        (nn.InstanceNorm1d(3, affine=True, track_running_stats=True), "buffers"),
    ],
)
def test_what_opacus_would_get_wrong_is_refused_before_a_pass(module: nn.Module, why: str) -> None:
    with pytest.raises(UncoveredParameter, match=why):
        ReferenceGradients(module, losses, clip=1.0)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (in_eval_mode(), "not in training mode"),
        (TakesTwo(is_named=True), "Shifted takes more than one tensor"),
        (TakesTwo(is_named=False), "Shifted takes more than one tensor"),
        (Positions(), "has not the examples first"),
        (Unused(), "took no part"),
        (nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3, bias=False)), "a hook failed"),
    ],
)
def test_what_shows_only_in_a_pass_is_refused_by_name_and_leaves_nothing(module: nn.Module, why: str) -> None:
    inputs = torch.randn(N, 6, 5) if isinstance(module, Positions) else torch.randn(N, 5)
    clipped = ReferenceGradients(module, losses, clip=1.0)
    with pytest.raises(UncoveredParameter, match=why + ".*train with book_keeping"):
        clipped.sums((inputs, TARGETS), torch.ones(N))
    assert is_untouched(module)


def test_frozen_layers_need_no_hook() -> None:
    module, inputs = case("linear on sequences")
    attention = nn.TransformerEncoderLayer(5, 1, 8, dropout=0.0, batch_first=True).requires_grad_(False)
    assert is_close(*both(nn.Sequential(attention, module), inputs, clip=0.1))


def is_untouched(module: nn.Module) -> bool:
    fresh = set(vars(nn.Linear(1, 1).weight))
    return all(set(vars(each)) == fresh and each.grad is None for each in module.parameters()) and not any(
        each._forward_hooks or each._backward_hooks or each._forward_pre_hooks or hasattr(each, "activations")
        for each in module.modules()
    )


@pytest.mark.parametrize("name", SUPPORTED)
def test_nothing_is_left_on_the_network(name: str) -> None:
    module, inputs = case(name)
    before = {path: set(vars(each)) for path, each in module.named_modules()}
    weights = copy.deepcopy(module.state_dict())
    clipped = ReferenceGradients(module, losses, clip=1.0)
    assert is_untouched(module)
    clipped.sums((inputs, TARGETS), torch.ones(N))
    clipped.norms((inputs, TARGETS))
    assert clipped.bytes_per_example((inputs, TARGETS)) > 4 * sum(each.numel() for each in clipped.parameters)
    assert is_untouched(module)
    assert {path: set(vars(each)) for path, each in module.named_modules()} == before
    torch.testing.assert_close(module.state_dict(), weights, rtol=0, atol=0)


def test_each_pass_sees_the_weights_of_the_hour() -> None:
    module, inputs = case("linear")
    clipped, ours = (kind(module, losses, clip=0.3) for kind in (ReferenceGradients, ClippedGradients))
    first = flat(clipped, inputs)
    with torch.no_grad():
        for each in module.parameters():
            each.mul_(2)
    assert not is_close(flat(clipped, inputs), first)
    assert is_close(flat(ours, inputs), flat(clipped, inputs))


def test_it_trains_the_very_parameters_that_the_engine_does() -> None:
    module, _ = case("partly frozen")
    reference, engine = (kind(module, losses, clip=1.0) for kind in (ReferenceGradients, ClippedGradients))
    assert list(map(id, reference.parameters)) == list(map(id, engine.parameters))
