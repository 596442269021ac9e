"""What a run starts from: fresh weights or given ones, with adapters beside what is frozen. Knows networks and their weights."""

from __future__ import annotations

import json

import safetensors.torch
import torch
from torch import Tensor

from cloister.wire.architecture import Architecture
from cloister.wire.layers import is_frozen
from cloister.wire.plans import LoRA
from cloister_privacy import tensors
from cloister_privacy.architecture.network import Network, build, digest
from cloister_privacy.architecture.shapes import PARAMETER_LIMIT
from cloister_privacy.errors import ArchitectureRefused, InitialRefused
from cloister_privacy.training.adapters import merged, with_lora

_HEADER_LIMIT = 2**22
_TENSOR_LIMIT = 2**14

__all__ = ["adapted", "digest_of", "network_of", "plain", "require_start"]


def network_of(architecture: Architecture, initial: bytes | None) -> Network:
    """A network to train, with the given weights where there are any. Raises InitialRefused where they are of another."""
    network = build(architecture)
    if initial is None:
        return network
    given = _read(initial)
    tensors.require(given, network.state_dict(), refused=InitialRefused)
    network.load_state_dict(given)
    network.initial_digest = digest(network.state_dict())
    return network


def require_start(architecture: Architecture, initial: bytes | None, lora: LoRA | None) -> None:
    """Refuse weights that are not of this architecture (InitialRefused), and adapters for nothing (ArchitectureRefused)."""
    with torch.device("meta"):
        network = Network(architecture)
    if initial is not None:
        tensors.require(_read(initial), network.state_dict(), refused=InitialRefused)
    elif any(map(is_frozen, architecture.layers)):
        raise ArchitectureRefused(
            "a frozen layer would keep its random weights; give the weights to start from, or train it"
        )
    if lora is not None:
        count = sum(each.numel() for each in adapted(network, lora).parameters())
        if count > PARAMETER_LIMIT:
            raise ArchitectureRefused(
                f"with its adapters the network has {count} parameters, over {PARAMETER_LIMIT}; lower the rank"
            )
    elif not any(each.requires_grad for each in network.parameters()):
        raise ArchitectureRefused("every layer is frozen, so nothing is trained; freeze fewer, or give lora")


def digest_of(initial: bytes) -> str:
    """The digest that a certificate tells of these weights. Raises InitialRefused unless they are finite float32 safetensors."""
    given = _read(initial)
    if any(each.dtype != torch.float32 for each in given.values()):
        raise InitialRefused("weights are float32 here; convert them first")
    if not all(bool(each.isfinite().all()) for each in given.values()):
        raise InitialRefused("the weights have values that are not finite; mend them first")
    return digest(given)


def adapted(network: Network, lora: LoRA) -> Network:
    """The network with an adapter beside each linear layer within a frozen one; what was trained before still is."""
    layers = network.architecture.layers
    trained = [name for name, each in network.named_parameters() if each.requires_grad]

    def chosen(path: str) -> bool:
        return is_frozen(layers[int(path.split(".")[1])])

    if not any(
        isinstance(each, torch.nn.Linear) and chosen(path) for path, each in network.named_modules() if path.count(".")
    ):
        raise ArchitectureRefused(
            "no frozen layer holds a linear layer, so there is nothing to adapt; freeze one, or leave lora out"
        )
    result = with_lora(network, rank=lora.rank, alpha=lora.alpha, layers=chosen)
    assert isinstance(result, Network)  # noqa: S101 (a copy of one)
    for name in trained:
        result.get_parameter(name).requires_grad_()
    result.find_stem()
    return result


def plain(network: Network) -> Network:
    """The network without adapters: folded into the layers that they stand beside."""
    result = merged(network)
    assert isinstance(result, Network)  # noqa: S101 (a copy of one)
    result.find_stem()
    return result


def _read(initial: bytes) -> dict[str, Tensor]:
    try:
        _require_bearable(initial)
        given: dict[str, Tensor] = safetensors.torch.load(initial)
    except InitialRefused:
        raise
    except Exception as exc:  # safetensors raises errors of several families, none of them documented
        raise InitialRefused(
            f"these bytes are not safetensors ({type(exc).__name__}); save the weights as such"
        ) from None
    return given


def _require_bearable(initial: bytes) -> None:
    """Before anything is made of it: torch takes time by the square of a tensor's dimensions."""
    size = int.from_bytes(initial[:8], "little")
    if size > _HEADER_LIMIT:
        raise ValueError("the header is too long")
    header = json.loads(initial[8 : 8 + size])
    named = {name: each for name, each in header.items() if name != "__metadata__"}
    if not 0 < len(named) <= _TENSOR_LIMIT or any(
        len(each["shape"]) > 8 or 0 in each["shape"] for each in named.values()
    ):
        raise InitialRefused(
            f"weights are 1 to {_TENSOR_LIMIT} tensors of at most 8 dimensions, none of them empty; save the network's own"
        )
