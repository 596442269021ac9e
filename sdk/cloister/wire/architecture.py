"""The model language: a network as data. No code and no pickle ever crosses the wire in a model's name.

The schema only; `cloister_privacy.architecture` turns a spec into a torch module and checks its shapes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cloister.wire._model import Name, Request
from cloister.wire.columns import InputColumn

__all__ = ["Architecture", "Encode", "Flatten", "Layer", "Linear", "Loss", "ReLU", "Rescale", "Tanh"]

_Width = Annotated[int, Field(ge=1, le=2**20)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]

Loss = Literal["cross_entropy", "mean_squared_error"]


class Encode(Request):
    """Join all inputs into one vector: numbers mapped from their declared bounds to [-1, 1], categories one-hot,
    tensors mapped from their bounds to [-1, 1] and flattened. The first layer wherever there is more than one input."""

    type: Literal["encode"] = "encode"


class Rescale(Request):
    """Map [low, high] linearly to [to_low, to_high], element by element, with fixed public numbers."""

    type: Literal["rescale"] = "rescale"
    low: _Finite
    high: _Finite
    to_low: _Finite = 0.0
    to_high: _Finite = 1.0

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Rescale:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class Flatten(Request):
    """All dimensions but the first become one."""

    type: Literal["flatten"] = "flatten"


class Linear(Request):
    """y = x W^T + b, initialised as torch.nn.Linear is."""

    type: Literal["linear"] = "linear"
    in_features: _Width
    out_features: _Width
    bias: bool = True


class ReLU(Request):
    """max(x, 0)."""

    type: Literal["relu"] = "relu"


class Tanh(Request):
    """Hyperbolic tangent; bounded activations suit DP-SGD (arXiv 2007.14191)."""

    type: Literal["tanh"] = "tanh"


Layer = Annotated[Encode | Rescale | Flatten | Linear | ReLU | Tanh, Field(discriminator="type")]


class Architecture(Request):
    """A whole network: what it reads, its layers in order, what it predicts and by which loss it learns."""

    format: Literal["cloister.architecture/1"] = "cloister.architecture/1"
    inputs: Annotated[dict[Name, InputColumn], Field(min_length=1, max_length=1024)]
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=256)]
    target: Name
    output: InputColumn
    """The target's column: a category (cross-entropy over its values) or a number (mean squared error)."""
    loss: Loss
