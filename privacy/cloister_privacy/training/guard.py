"""Refuses, before any data is read, a network whose gradients cannot be clipped by example. Knows modules, not data.

First by what the network is made of, then by trying it: on synthetic examples the engine's clipped sum must be that of a loop
which clips one example at a time, and no example's loss may depend on the others in its batch. Trying finds mistakes; it does
not prove that code which means to mix examples, at another batch size say, does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from cloister_privacy.errors import (
    ArchitectureRefused,
    ClippingNotExact,
    CrossExampleLayer,
    InPlaceLayer,
    UncoveredParameter,
)
from cloister_privacy.training.clipping import ClippedGradients, Losses
from cloister_privacy.training.precision import full_float32

__all__ = ["GUARD_EXAMPLES", "guard", "require_exact_clipping"]

T = TypeVar("T")

GUARD_EXAMPLES = 8
"""How many synthetic examples a run is tried on."""

_TOLERANCE = 1e-5
"""How far the clipped sum may be from the loop's, relative to it, in float32."""

_ROUNDING = 1e-3
"""How far an example's loss, or a deep network's sum, may move, relatively, when others stand beside it: kernels round by the
size of a batch, and every layer passes that on."""

_EXACT = 1e-6
"""How far the clipped sum may be from the loop's in float64, where rounding hides nothing."""


def guard(network: nn.Module) -> None:
    """Raise CrossExampleLayer for batch statistics, InPlaceLayer for a layer that overwrites its input or its table,
    UncoveredParameter for a shared parameter or for none at all, ClippingNotExact for one that is not float32."""
    owners: dict[int, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, _NormBase) and (not isinstance(module, _InstanceNorm) or module.track_running_stats):
            raise CrossExampleLayer(
                f"{name} ({type(module).__name__}) mixes the examples of a batch; use GroupNorm instead"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise InPlaceLayer(
                f"{name} ({type(module).__name__}) rescales the rows that it looks up, trained or not, so the table would tell which; "
                "make it without max_norm"
            )
        if getattr(module, "inplace", False):
            raise InPlaceLayer(
                f"{name} ({type(module).__name__}) overwrites what the layer before it gave, which clipping needs; make it "
                "with inplace=False"
            )
        for parameter_name, parameter in module.named_parameters(recurse=False):
            path = f"{name}.{parameter_name}"
            if not parameter.requires_grad:
                continue
            if id(parameter) in owners:
                raise UncoveredParameter(
                    f"{path} is the same parameter as {owners[id(parameter)]}; its two gradients cannot be clipped apart, "
                    "so give each layer its own"
                )
            owners[id(parameter)] = path
            if parameter.dtype != torch.float32:
                raise ClippingNotExact(
                    f"{path} is {parameter.dtype}, and weights, norms and sums are float32; call network.float(), and ask for "
                    "bfloat16 arithmetic by precision"
                )
    if not owners:
        raise UncoveredParameter("the network has no parameter to train; add a layer that has one, or thaw one")


@full_float32()
def require_exact_clipping(
    network: nn.Module, losses: Losses, batch: Any, *, gradients: type[ClippedGradients] = ClippedGradients
) -> None:
    """Raise ClippingNotExact where the engine's clipped sum on `batch` is not the loop's, CrossExampleLayer where an example's
    loss depends on its batch-mates. `batch` holds 8 synthetic examples: tensors, or tuples or mappings of them.

    In float32, whatever the run's precision: it is the rules that are tried, on the actual network. Where a deep one rounds by more
    than the tolerance, its copy in float64 decides.
    """
    _require_examples(batch)
    network = _without_chance(network)
    _require_unwritten(network, losses, batch)
    off = _relative_error(network, losses, batch, gradients)
    if not off <= _TOLERANCE and not (off <= _ROUNDING and _is_exact_in_float64(network, losses, batch, gradients)):
        _require_independence(network, losses, batch)
        raise ClippingNotExact(
            "on synthetic examples the clipped sum is not the sum of clipped gradients, so a layer computes otherwise than its "
            "rule; use torch's own layers with the examples as the first dimension, no operation that overwrites its input, and "
            "no gradient within the loss"
        )
    _require_independence(network, losses, batch)


def _is_exact_in_float64(network: nn.Module, losses: Losses, batch: Any, gradients: type[ClippedGradients]) -> bool:
    try:
        return _relative_error(copy.deepcopy(network).double(), losses, _doubled(batch), gradients) <= _EXACT
    except (ArchitectureRefused, RuntimeError):
        return False  # it cannot be told apart from rounding, then


def _relative_error(network: nn.Module, losses: Losses, batch: Any, gradients: type[ClippedGradients]) -> float:
    """How far the engine's clipped sum is from the loop's."""
    clip = _median_norm(network, losses, batch)  # so about half of the examples are clipped
    loop = _one_by_one(network, losses, batch, clip=clip)
    kept = torch.ones(GUARD_EXAMPLES, device=loop.device)
    ours = torch.cat(
        [each.flatten() for each in _tried(lambda: gradients(network, losses, clip=clip).sums(batch, kept))]
    )
    return float((ours - loop).norm()) / max(float(loop.norm()), clip)


def _doubled(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {name: _doubled(each) for name, each in batch.items()}
    return tuple(_doubled(each) for each in batch)


def _median_norm(network: nn.Module, losses: Losses, batch: Any) -> float:
    norms = _tried(lambda: ClippedGradients(network, losses, clip=1.0).norms(batch))
    norms = norms[norms.isfinite() & (norms > 0)]
    return float(norms.median()) if len(norms) else 1.0


def _tried(run: Callable[[], T]) -> T:
    try:
        return run()
    except RuntimeError as error:
        raise ClippingNotExact(
            f"the network cannot be differentiated at its layers ({str(error).splitlines()[0]}); use no operation that "
            "overwrites its input, and the examples as the first dimension"
        ) from None


def _require_examples(batch: Any) -> None:
    if isinstance(batch, Tensor):
        if batch.ndim == 0 or len(batch) != GUARD_EXAMPLES:
            raise ClippingNotExact(
                f"a synthetic tensor of shape {list(batch.shape)} does not hold {GUARD_EXAMPLES} examples; give GUARD_EXAMPLES"
            )
        return
    for each in batch.values() if isinstance(batch, Mapping) else batch:
        _require_examples(each)


def _require_unwritten(network: nn.Module, losses: Losses, batch: Any) -> None:
    """Nothing of the network may change in a pass: it would carry what it saw into the model, without clip or noise."""

    def state() -> dict[str, tuple[int, int]]:
        named = [*network.named_parameters(), *network.named_buffers()]
        return {name: (id(each), each._version) for name, each in named}

    before = state()
    _tried(lambda: losses(network, batch))
    written = [name for name, each in state().items() if before.get(name) != each]
    if written:
        raise InPlaceLayer(
            f"a forward pass writes to {written[0]}, which would carry rows into the model without clip or noise; use layers "
            "that keep nothing of what they see"
        )


def _require_independence(network: nn.Module, losses: Losses, batch: Any) -> None:
    """Tried as the network is, with its weights moved (what starts at zero hides what it does), and beside an outlier."""
    for tried, given, tolerance in (
        (network, batch, _ROUNDING),
        (_moved(network), batch, 10 * _ROUNDING),
        (network, _with_an_outlier(batch), 10 * _ROUNDING),
    ):
        together = losses(tried, given).detach()
        if together.shape != (GUARD_EXAMPLES,):
            raise ClippingNotExact(
                f"the loss must be one number for each example, [n]; it is of shape {list(together.shape)}"
            )
        alone = torch.cat([losses(tried, _one(given, index)).detach() for index in range(GUARD_EXAMPLES)])
        if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise CrossExampleLayer(
                "an example's loss changes with the others in its batch, so clipping one of them bounds nothing; keep the "
                "examples apart (GroupNorm or LayerNorm for BatchNorm, no mean over the first dimension)"
            )


def _moved(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    with torch.no_grad():
        for _, parameter in _trained(network):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def _with_an_outlier(batch: Any) -> Any:
    """The first example's numbers a hundred times as large."""
    if isinstance(batch, Tensor):
        return torch.cat([batch[:1] * 100, batch[1:]]) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {name: _with_an_outlier(each) for name, each in batch.items()}
    return tuple(_with_an_outlier(each) for each in batch)


def _one_by_one(network: nn.Module, losses: Losses, batch: Any, *, clip: float) -> Tensor:
    """The same sum by autograd, one example at a time."""
    parameters = [each for each in network.parameters() if each.requires_grad]
    total = torch.zeros(sum(each.numel() for each in parameters), dtype=torch.float64, device=parameters[0].device)
    for index in range(GUARD_EXAMPLES):
        loss = losses(network, _one(batch, index)).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        unused = [name for (name, _), each in zip(_trained(network), gradients, strict=True) if each is None]
        if unused:
            raise UncoveredParameter(
                f"{unused[0]} takes no part in the loss, so its gradient is unknown; leave it out or freeze it"
            )
        flat = torch.cat([each.flatten() for each in gradients if each is not None]).double()
        norm = float(flat.norm())
        if norm < float("inf"):  # not true of NaN
            total += flat * min(1.0, clip / norm) if norm else 0
    return total.float()


def _trained(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, each) for name, each in network.named_parameters() if each.requires_grad]


def _one(batch: Any, index: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1]
    if isinstance(batch, Mapping):
        return {name: _one(each, index) for name, each in batch.items()}
    return tuple(_one(each, index) for each in batch)


def _without_chance(network: nn.Module) -> nn.Module:
    """A copy in which nothing is dropped at random: both sums must see the same network."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
        elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            module.dropout = 0.0
    return network
