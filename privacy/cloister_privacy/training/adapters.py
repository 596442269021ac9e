"""LoRA (Hu et al., ICLR 2022): low-rank adapters beside a frozen network. Knows layers; nothing of clipping or noise."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from cloister_privacy.errors import ArchitectureRefused, UncoveredParameter

__all__ = ["LoRALinear", "merged", "with_lora"]


class LoRALinear(nn.Module):
    """base(x) + alpha / rank * up(down(x)): [..., d] -> [..., p], with `base` frozen and `up` zero at the start (section 4.1).

    `down` and `up` are plain Linear layers, so they are clipped by the rule of those. Without alpha the factor is 1. Raises
    ArchitectureRefused for a rank below 1.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise ArchitectureRefused(f"rank {rank} leaves nothing to train; give at least 1")
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.zeros_(self.up.weight)
        self.scale = 1.0 if alpha is None else alpha / rank
        self.train(base.training)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.base(inputs) + self.scale * self.up(self.down(inputs))
        return outputs

    @property
    def weight(self) -> Tensor:
        """The one matrix that does the same, [p, d]: torch's transformer layers read it when they do not train."""
        return self.base.weight + self.scale * self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def with_lora(
    network: nn.Module, *, rank: int, alpha: float | None = None, layers: Callable[[str], bool] | None = None
) -> nn.Module:
    """A frozen deep copy of the network in which each nn.Linear whose path `layers` chooses, or each, has an adapter to train.

    Exactly that class: the projections of nn.MultiheadAttention stay as they are, since it reads their weights itself. At the start
    the outputs are the network's. Raises UncoveredParameter where nothing was chosen, ArchitectureRefused where there are adapters
    already or the rank is below 1.
    """
    if any(isinstance(each, LoRALinear) for each in network.modules()):
        raise ArchitectureRefused("the network has adapters already; fold them in with merged() first")

    def adapted(path: str, module: nn.Module) -> nn.Module | None:
        is_chosen = type(module) is nn.Linear and (layers is None or layers(path))
        return LoRALinear(module, rank=rank, alpha=alpha) if is_chosen and isinstance(module, nn.Linear) else None

    frozen = copy.deepcopy(network).requires_grad_(False)
    result = _replaced(frozen, adapted)
    if not any(each.requires_grad for each in result.parameters()):
        raise UncoveredParameter(
            "no nn.Linear was chosen, so there is nothing to train; choose layers by their full path"
        )
    return result


def merged(network: nn.Module) -> nn.Module:
    """A deep copy with every adapter folded into its base, a plain nn.Linear again, frozen; outputs are equal up to rounding."""

    def folded(_path: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, LoRALinear):
            return None
        module.base.weight = nn.Parameter(module.weight.detach(), requires_grad=False)  # anew: the old may be shared
        return module.base

    return _replaced(copy.deepcopy(network), folded)


def _replaced(network: nn.Module, change: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """The network with what `change` gives in the place of a module, the same wherever the module stands."""
    made: dict[int, nn.Module | None] = {}
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if id(module) not in made:
            made[id(module)] = change(path, module)
        new = made[id(module)]
        if new is not None and not path:
            return new
        if new is not None:
            network.set_submodule(path, new)
    return network
