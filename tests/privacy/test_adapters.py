"""Low-rank adapters: what trains, what stays, and that the engine takes them like any Linear layer."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cloister_privacy import DPPlan
from cloister_privacy.errors import ArchitectureRefused, UncoveredParameter
from cloister_privacy.training import PrivateSteps, guard
from cloister_privacy.training.adapters import LoRALinear, merged, with_lora
from cloister_privacy.training.clipping import ClippedGradients
from cloister_privacy.training.guard import require_exact_clipping
from cloister_privacy.training.reference import ReferenceGradients
from networks import N, Text, losses

TARGETS = torch.arange(N) % 3


def linears() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)), torch.randn(N, 5)


def transformer() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(1, 20, (N, 9))
    tokens[::2, -2:] = 0
    network = Text()
    for each in network.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
        elif isinstance(each, nn.MultiheadAttention):
            each.dropout = 0.0
    return network, tokens


NETWORKS = {"linears": linears, "transformer": transformer}


def stirred(network: nn.Module) -> nn.Module:
    """The network as after some training: no adapter is zero any more."""
    for each in network.modules():
        if isinstance(each, LoRALinear):
            nn.init.normal_(each.up.weight)
    return network


def trained(network: nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in network.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", [True, False])
def test_at_the_start_the_outputs_are_those_of_the_network(name: str, mode: bool) -> None:
    network, inputs = NETWORKS[name]()
    network.train(mode)
    adapted = with_lora(network, rank=2)
    assert {each.training for each in adapted.modules()} == {mode}
    torch.testing.assert_close(adapted(inputs), network(inputs))


def test_the_network_itself_is_left_alone() -> None:
    network, inputs = linears()
    before, weights = network(inputs), copy.deepcopy(network.state_dict())
    stirred(with_lora(network, rank=2))
    torch.testing.assert_close(network.state_dict(), weights)
    torch.testing.assert_close(network(inputs), before)
    assert all(each.requires_grad for each in network.parameters())
    assert not any(isinstance(each, LoRALinear) for each in network.modules())


def test_only_adapters_train_and_only_plain_linear_layers_have_one() -> None:
    adapted = with_lora(transformer()[0], rank=2)
    chosen = {name for name, each in adapted.named_modules() if isinstance(each, LoRALinear)}
    assert chosen == {"last", *(f"encoder.layers.{layer}.linear{which}" for layer in (0, 1) for which in (1, 2))}
    assert set(trained(adapted)) == {f"{name}.{part}.weight" for name in chosen for part in ("down", "up")}
    assert isinstance(adapted.encoder.layers[0].self_attn.out_proj, nn.Linear)  # type: ignore[union-attr, index]  # torch's own


def test_layers_are_chosen_by_their_path() -> None:
    adapted = with_lora(transformer()[0], rank=2, layers=lambda path: path.endswith("linear1"))
    assert {path.partition(".linear1.")[1] for path in trained(adapted)} == {".linear1."}
    assert len(trained(adapted)) == 4


def test_the_update_has_the_rank_and_the_factor_that_were_asked_for() -> None:
    base = nn.Linear(7, 5)
    adapted = stirred(with_lora(base, rank=2, alpha=6))
    assert isinstance(adapted, LoRALinear)
    change = (adapted.weight - base.weight).detach()
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 2
    torch.testing.assert_close(change, 3 * (adapted.up.weight @ adapted.down.weight).detach())
    assert LoRALinear(nn.Linear(7, 5), rank=2).scale == 1
    inputs = torch.randn(4, 6, 7)
    torch.testing.assert_close(adapted(inputs), nn.functional.linear(inputs, adapted.weight, base.bias))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_merged_network_has_plain_layers_and_the_same_outputs(name: str) -> None:
    network, inputs = NETWORKS[name]()
    adapted = stirred(with_lora(network, rank=2, alpha=0.5))
    plain = merged(adapted)
    assert [type(each) for each in plain.modules()] == [type(each) for each in network.modules()]
    assert plain.state_dict().keys() == network.state_dict().keys()
    assert not trained(plain)
    assert (plain(inputs) - network(inputs)).norm() > 1e-2
    torch.testing.assert_close(plain(inputs), adapted(inputs), rtol=1e-5, atol=1e-5)
    assert trained(adapted)  # merging leaves it as it was
    torch.testing.assert_close(merged(network)(inputs), network(inputs))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("is_nested", [False, True])
def test_the_fast_path_of_a_transformer_in_eval_mode_sees_the_adapters(is_nested: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    network = nn.TransformerEncoder(layer, 2, enable_nested_tensor=is_nested)
    adapted, inputs = stirred(with_lora(network, rank=2)), torch.randn(N, 5, 8)
    padding = torch.zeros(N, 5, dtype=torch.bool)
    padding[::2, -1] = True
    slow = adapted(inputs, src_key_padding_mask=padding)[~padding]
    adapted.eval()
    with torch.no_grad():
        fast = adapted(inputs, src_key_padding_mask=padding)[~padding]
        plain = merged(adapted)(inputs, src_key_padding_mask=padding)[~padding]
    assert (slow - network(inputs, src_key_padding_mask=padding)[~padding]).norm() > 1e-2
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain, slow.detach(), rtol=1e-5, atol=1e-5)


def test_what_shares_a_weight_with_a_merged_layer_keeps_it() -> None:
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    network[1].weight = network[0].weight
    plain = merged(stirred(with_lora(network, rank=1)))
    torch.testing.assert_close(plain.get_parameter("0.weight").data, network.get_parameter("0.weight").data)
    assert (plain.get_parameter("1.weight") - network.get_parameter("1.weight")).norm() > 1e-2


def test_a_layer_that_stands_in_two_places_has_one_adapter_and_is_refused_by_the_guard() -> None:
    layer = nn.Linear(3, 3)
    adapted = with_lora(nn.Sequential(layer, nn.Tanh(), layer), rank=1)
    assert adapted.get_submodule("0") is adapted.get_submodule("2")
    with pytest.raises(UncoveredParameter, match=r"2\.down\.weight is the same parameter as 0\.down\.weight"):
        guard(adapted)


@pytest.mark.parametrize(
    ("network", "options", "error", "why"),
    [
        (nn.Sequential(nn.Conv1d(3, 3, 1)), {"rank": 1}, UncoveredParameter, "no nn.Linear was chosen"),
        (nn.Linear(3, 3), {"rank": 1, "layers": lambda path: False}, UncoveredParameter, "by their full path"),
        (nn.Linear(3, 3), {"rank": 0}, ArchitectureRefused, "rank 0"),
        (with_lora(nn.Linear(3, 3), rank=1), {"rank": 1}, ArchitectureRefused, "merged"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(
    network: nn.Module, options: dict[str, Any], error: type[ArchitectureRefused], why: str
) -> None:
    with pytest.raises(error, match=why):
        with_lora(network, **options)


@pytest.mark.parametrize("is_stirred", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_engine_takes_adapters_and_nothing_but_them(name: str, is_stirred: bool) -> None:
    network, inputs = NETWORKS[name]()
    adapted = with_lora(network, rank=2)
    if is_stirred:
        stirred(adapted)
    guard(adapted)
    require_exact_clipping(adapted, losses, (inputs, TARGETS))
    clipped = ClippedGradients(adapted, losses, clip=0.1)
    assert list(map(id, clipped.parameters)) == list(map(id, trained(adapted).values()))
    sums = clipped.sums((inputs, TARGETS), torch.ones(N))
    reference = ReferenceGradients(adapted, losses, clip=0.1).sums((inputs, TARGETS), torch.ones(N))
    torch.testing.assert_close(sums, reference, rtol=1e-4, atol=1e-6)
    assert math.sqrt(sum(float(each.norm()) ** 2 for each in sums)) <= 0.1 * N * (1 + 1e-5)
    assert all(each.grad is None for each in adapted.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_training_adapters_lowers_the_loss_and_moves_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PrivateSteps, "_noise", lambda self: torch.zeros(sum(each.numel() for each in self._parameters))
    )
    network, inputs = NETWORKS[name]()
    adapted = with_lora(network, rank=2)
    before = {path: each.clone() for path, each in adapted.named_parameters()}
    private = PrivateSteps(
        adapted,
        losses,
        plan=DPPlan(nominal_size=16, capacity=16, batch_size=8, steps=40, noise_multiplier=1.0, clip=1.0, delta=1e-5),
        optimizer=torch.optim.Adam(trained(adapted).values(), lr=0.02),
        synthetic=(inputs, TARGETS),
        is_compiled=False,
    )
    first = losses(adapted, (inputs, TARGETS)).mean().item()
    for _ in range(40):
        private.step(np.arange(N), lambda indices: (inputs[indices], TARGETS[indices]))
    assert losses(adapted, (inputs, TARGETS)).mean().item() < 0.7 * first
    moved = {path for path, each in adapted.named_parameters() if not torch.equal(each, before[path])}
    assert moved == set(trained(adapted))
    assert losses(merged(adapted), (inputs, TARGETS)).mean().item() < 0.7 * first
