"""Trained networks as bytes: the weights with their spec in the safetensors header, `cloister.weights/1`."""

from __future__ import annotations

import torch
from pydantic import ValidationError

from cloister.wire.architecture import Architecture
from cloister_privacy import tensors
from cloister_privacy.architecture.network import Network
from cloister_privacy.errors import ArchitectureRefused, WeightsRefused

__all__ = ["from_bytes", "to_bytes"]

_FORMAT = "cloister.weights/1"


def to_bytes(network: Network) -> bytes:
    """The network's weights, its spec and the digest of its initial weights."""
    metadata = {"architecture": network.architecture.model_dump_json(), "initial_digest": network.initial_digest}
    return tensors.write(network.state_dict(), format=_FORMAT, metadata=metadata)


def from_bytes(body: bytes | memoryview) -> Network:
    """The network that `to_bytes` wrote, on the CPU and ready to predict; raises WeightsRefused for any other bytes."""
    weights, metadata = tensors.read(body, format=_FORMAT, refused=WeightsRefused)
    try:
        architecture = Architecture.model_validate_json(metadata.get("architecture", ""))
        with torch.device("meta"):
            network = Network(architecture)
    except (ValidationError, ArchitectureRefused):
        raise WeightsRefused("the architecture in these weights is not a valid one") from None
    tensors.require(weights, network.state_dict(), refused=WeightsRefused)
    network.load_state_dict(weights, assign=True)
    network.initial_digest = metadata.get("initial_digest", "")
    return network.eval()
