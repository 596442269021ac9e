"""The model language: a network as data. No code and no pickle ever crosses the wire in a model's name.

The schema only (its layers: wire/layers.py); `cloister_privacy.architecture` checks the shapes and makes a torch module of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister.wire._model import Name, Request
from cloister.wire.columns import InputColumn, OutputColumn
from cloister.wire.layers import Layer

__all__ = ["LAYER_LIMIT", "Architecture", "Loss"]

LAYER_LIMIT = 1024

Loss = Literal["cross_entropy", "binary_cross_entropy", "mean_squared_error", "huber"]
"""Of a category: cross-entropy over its values, or binary cross-entropy of one logit, of the second of two values. Of a number, in
units of its declared range: the squared error, or Huber's with delta 0.1."""


class Architecture(Request):
    """A whole network: what it reads, its layers in order, what it predicts and by which loss it learns."""

    format: Literal["cloister.architecture/1"] = "cloister.architecture/1"
    inputs: Annotated[dict[Name, InputColumn], Field(min_length=1, max_length=1024)]
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=LAYER_LIMIT, fail_fast=True)]
    """The last one gives the output: logits of a category's values, one logit, or one number."""
    target: Name
    output: OutputColumn
    """The target's column."""
    loss: Loss
