"""Weights that people upload to start a training run from."""

from __future__ import annotations

from datetime import datetime

from cloister.wire._model import Identifier, Response

__all__ = ["WEIGHTS_TYPE", "Weights"]

WEIGHTS_TYPE = "application/vnd.cloister.weights"
"""The media type of a body: safetensors, float32 alone, named as the network's own weights are (`layers.0.weight`)."""


class Weights(Response):
    """Uploaded weights, sealed; only their digest is told."""

    id: Identifier
    digest: str
    """SHA-256 of the weights as safetensors, their names sorted: a certificate's `initial_digest`."""
    created: datetime
