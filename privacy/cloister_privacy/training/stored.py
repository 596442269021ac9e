"""How many bytes a run leaves, from its spec alone. Knows networks without weights; draws, trains and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cloister.wire.plans import TrainingSpec
from cloister_privacy import tensors
from cloister_privacy.architecture import weights
from cloister_privacy.architecture.network import Network
from cloister_privacy.training import checkpoint
from cloister_privacy.training.start import adapted

__all__ = ["Stored", "stored"]

_DIGEST = "0" * 64
"""As long as the digest of initial weights is."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The most bytes, before sealing, of the weights that a run publishes and of one checkpoint of it."""

    weights: int
    checkpoint: int


def stored(spec: TrainingSpec) -> Stored:
    """The most that a run of this spec writes at once. Raises ArchitectureRefused for a spec that cannot start."""
    with torch.device("meta"):  # sizes without memory
        network = Network(spec.architecture)
    trained = network if spec.lora is None else adapted(network, spec.lora)
    return Stored(
        weights=tensors.most_bytes(
            network.state_dict(),
            format=weights.FORMAT,
            metadata=weights.metadata_of(spec.architecture, initial_digest=_DIGEST),
        ),
        checkpoint=tensors.most_bytes(
            checkpoint.like(trained, spec),
            format=checkpoint.FORMAT,
            metadata=checkpoint.metadata_of(spec, step=spec.steps, initial_digest=_DIGEST),
        ),
    )
