"""A run between two steps, as bytes: noisy weights, optimizer state, step. Holds no randomness and no sums."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from cloister.wire.plans import SGD, TrainingSpec
from cloister_privacy import tensors
from cloister_privacy.architecture.network import Network
from cloister_privacy.errors import CheckpointRefused
from cloister_privacy.training.optimizer import NoisyOptimizer

__all__ = ["FORMAT", "like", "metadata_of", "resume_from", "snapshot"]

FORMAT = "cloister.checkpoint/1"

_LATER_FIELDS = ("with_datasets", "audit")
"""Of a spec, since the first checkpoints."""


def snapshot(network: Network, optimizer: NoisyOptimizer, *, model: Network, spec: TrainingSpec, step: int) -> bytes:
    """The run after `step` whole steps, each of them noisy; `model` is their average, or the network itself."""
    state = {f"weights.{name}": weight for name, weight in network.state_dict().items()}
    if model is not network:
        state |= {f"average.{name}": weight for name, weight in model.state_dict().items()}
    for index, kept in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{key}": value for key, value in kept.items() if value is not None}
    metadata = metadata_of(spec, step=step, initial_digest=network.initial_digest)
    return tensors.write(state, format=FORMAT, metadata=metadata)


def resume_from(body: bytes, network: Network, optimizer: NoisyOptimizer, *, model: Network, spec: TrainingSpec) -> int:
    """Put a checkpoint of this very spec into network, optimizer and average, and answer its step. Otherwise CheckpointRefused."""
    state, metadata = tensors.read(body, format=FORMAT, refused=CheckpointRefused)
    if metadata.get("training") != _digest(spec):
        raise CheckpointRefused("this checkpoint belongs to another training spec; start the run again")
    step = metadata.get("step", "")
    if not (step.isascii() and step.isdigit() and len(step) <= 18 and 1 <= int(step) <= spec.steps):
        raise CheckpointRefused("this checkpoint's step is not one of the run's; start the run again")
    tensors.require(state, like(network, spec), refused=CheckpointRefused)
    network.load_state_dict({name: state[f"weights.{name}"] for name in network.state_dict()})
    network.initial_digest = metadata.get("initial_digest", "")
    if model is not network:
        model.load_state_dict({name: state[f"average.{name}"] for name in model.state_dict()})
        model.initial_digest = network.initial_digest
    kept: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            kept.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(step)


def metadata_of(spec: TrainingSpec, *, step: int, initial_digest: str) -> dict[str, str]:
    """What the header of a checkpoint tells beside its tensors."""
    return {"training": _digest(spec), "step": str(step), "initial_digest": initial_digest}


def like(network: Network, spec: TrainingSpec) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of this spec holds, by name."""
    held = {f"weights.{name}": weight for name, weight in network.state_dict().items()}
    if spec.optimizer.averaging is not None:
        held |= {f"average.{name}": weight for name, weight in network.state_dict().items()}
    for index, parameter in enumerate(each for each in network.parameters() if each.requires_grad):
        if not isinstance(spec.optimizer, SGD):
            held[f"optimizer.{index}.step"] = torch.zeros(())
            held[f"optimizer.{index}.exp_avg"] = parameter
            held[f"optimizer.{index}.exp_avg_sq"] = parameter
        elif spec.optimizer.momentum:
            held[f"optimizer.{index}.momentum_buffer"] = parameter
    return held


def _digest(spec: TrainingSpec) -> str:
    # Fields that specs did not have once are left out at their defaults: a run goes on over an upgrade.
    later = {name for name in _LATER_FIELDS if getattr(spec, name) == TrainingSpec.model_fields[name].default}
    return hashlib.sha256(spec.model_dump_json(exclude=later).encode()).hexdigest()
