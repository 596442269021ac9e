"""Trained networks as bytes: the weights with their spec in the safetensors header, `cloister.weights/1`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from cloister.wire.architecture import Architecture
from cloister_privacy import tensors
from cloister_privacy.architecture.network import Network
from cloister_privacy.errors import ArchitectureRefused, WeightsRefused
from cloister_privacy.sealing import SealedReader

__all__ = ["FORMAT", "architecture_of", "digest_of", "from_bytes", "from_tensors", "metadata_of", "to_bytes"]

FORMAT = "cloister.weights/1"


def to_bytes(network: Network) -> bytes:
    """The network's weights, its spec and the digest of its initial weights."""
    metadata = metadata_of(network.architecture, initial_digest=network.initial_digest)
    return tensors.write(network.state_dict(), format=FORMAT, metadata=metadata)


def metadata_of(architecture: Architecture, *, initial_digest: str) -> dict[str, str]:
    """What the header of weights tells beside their tensors."""
    return {"architecture": architecture.model_dump_json(), "initial_digest": initial_digest}


def from_bytes(body: bytes | memoryview) -> Network:
    """The network that `to_bytes` wrote, on the CPU and ready to predict; raises WeightsRefused for any other bytes."""
    weights, metadata = tensors.read(body, format=FORMAT, refused=WeightsRefused)
    return from_tensors(weights, metadata=metadata)


def from_tensors(weights: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> Network:
    """As `from_bytes`, of a body that is open already: the network is on these very tensors, and nothing of them is copied."""
    architecture = architecture_of(metadata)
    try:
        with torch.device("meta"):
            network = Network(architecture)
    except ArchitectureRefused:
        raise _invalid() from None
    like = network.state_dict()
    if {name: (each.shape, each.dtype) for name, each in weights.items()} != {
        name: (each.shape, each.dtype) for name, each in like.items()
    }:
        raise WeightsRefused("the tensors are not those of this network; it was made from another spec")
    for name, weight in weights.items():
        if not _is_finite(weight):
            raise WeightsRefused(f"tensor {name!r} has values that are not finite")
    network.load_state_dict(weights, assign=True)
    network.initial_digest = metadata.get("initial_digest", "")
    return network.eval()


def architecture_of(metadata: Mapping[str, str]) -> Architecture:
    """The spec in the header of such a body. Raises WeightsRefused for a header of any other."""
    if metadata.get("format") != FORMAT:
        raise WeightsRefused(f"the format is {metadata.get('format')!r}, not {FORMAT!r}; use the version that wrote it")
    try:
        return Architecture.model_validate_json(metadata.get("architecture", ""))
    except ValidationError:
        raise _invalid() from None


def digest_of(weights: Mapping[str, Tensor], *, reader: SealedReader) -> str:
    """SHA-256 of the whole body that these tensors were opened from, as `hashlib` tells it of the plain bytes.

    They are read where they lie, one behind the other; only the header, which is not kept with them, is opened once more.
    """
    digest = hashlib.sha256(reader.read(0, reader.length - sum(each.nbytes for each in weights.values())))
    for weight in sorted(weights.values(), key=lambda each: each.data_ptr()):
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_finite(weight: Tensor) -> bool:
    """By the extremes, which NaN is among: `isfinite` would copy the weight."""
    if not weight.numel() or not weight.is_floating_point():
        return True
    return all(bool(each.isfinite()) for each in weight.aminmax())


def _invalid() -> WeightsRefused:
    return WeightsRefused("the architecture in these weights is not a valid one")
