"""What an import gives, and its one refusal. Knows the language; no framework.

`ModelNotSupported` hangs under `cloister_privacy.errors.ArchitectureRefused`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from cloister.wire.layers import Layer
from cloister_privacy.errors import ArchitectureRefused

__all__ = ["Imported", "ModelNotSupported"]


class ModelNotSupported(ArchitectureRefused):
    """The source holds something that the language cannot say, or that it would say otherwise."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("the network cannot be imported:\n" + "\n".join(f"  {each}" for each in problems))
        self.problems = tuple(problems)
        """One line for each layer that cannot be mapped: its path, what is wrong, the nearest form that can."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A network as data. It computes what its source computes, up to a last softmax or sigmoid, which the language leaves out."""

    inputs: Mapping[str, tuple[int, ...]]
    """Name of the column -> shape of one example, as the source takes it."""
    layers: tuple[Layer, ...]
    weights: Mapping[str, NDArray[np.float32]] = field(repr=False)
    """By the names and in the order of `Network(architecture).state_dict()`."""
    warnings: tuple[str, ...] = ()
    """What is not as it was in the source, a sentence each."""

    @property
    def digest(self) -> str:
        """SHA-256 of the weights as safetensors, in hexadecimal: what training from them will state as its start."""
        return hashlib.sha256(safetensors.numpy.save(dict(self.weights))).hexdigest()
