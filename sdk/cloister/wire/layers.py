"""The layers of the model language, as data: each field in the terms of PyTorch's module of the same name.

A layer reads the layer before it unless `reads` names others: columns, or named layers further up. So a network is a graph
without cycles, written from its inputs to its output. Shapes are of one example, without the batch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cloister.wire._model import Name, Request

__all__ = [
    "ELU",
    "GELU",
    "GRU",
    "LSTM",
    "RNN",
    "Add",
    "AveragePool",
    "Concatenate",
    "Conv1d",
    "Conv2d",
    "Dropout",
    "Embedding",
    "Encode",
    "Flatten",
    "GroupNorm",
    "HashedText",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogMel",
    "MaxPool",
    "MultiheadAttention",
    "Multiply",
    "Permute",
    "PositionalEmbedding",
    "RMSNorm",
    "ReLU",
    "Rescale",
    "Reshape",
    "Scattering",
    "SequencePool",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "TransformerLayer",
    "has_weights",
    "is_frozen",
]

_Width = Annotated[int, Field(ge=1, le=2**20)]
_Small = Annotated[int, Field(ge=1, le=1024)]
_Padding = Annotated[int, Field(ge=0, le=1024)]
_Finite = Annotated[float, Field(allow_inf_nan=False, ge=-3.4e38, le=3.4e38)]
_Epsilon = Annotated[float, Field(gt=0, le=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Two = tuple[_Small, _Small]
_Shape = Annotated[tuple[_Width, ...], Field(min_length=1, max_length=4, fail_fast=True)]


class _Layer(Request):
    name: Name | None = None
    """By which later layers read this one, and by which it is frozen; not a column's."""
    reads: Annotated[tuple[Name, ...], Field(min_length=1, max_length=64, fail_fast=True)] | None = None
    """Columns or named layers; by default the layer before, and at the start the only column."""


class _Trained(_Layer):
    frozen: bool = False
    """Keeps the weights that it starts from."""


class Encode(_Layer):
    """Join columns into one vector: categories one-hot, tensors mapped from their bounds to [-1, 1] and flattened, numbers mapped so
    too, or told by bins. Reads columns; all of them by default."""

    type: Literal["encode"] = "encode"
    bins: Annotated[int, Field(ge=0, le=256)] = 0
    """Where it is not 0, a number is told by so many soft bins over its declared range and as many over the range in
    logarithms, for long tails; each number lies between two."""
    normalized: bool = False
    """Every column has the same share in a vector of length 1, each example by itself."""


class Rescale(_Layer):
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


class Flatten(_Layer):
    """All dimensions become one."""

    type: Literal["flatten"] = "flatten"


class Reshape(_Layer):
    """The same numbers in another shape, in C order."""

    type: Literal["reshape"] = "reshape"
    shape: _Shape


class Permute(_Layer):
    """The dimensions in another order: output dimension i is input dimension dims[i]."""

    type: Literal["permute"] = "permute"
    dims: Annotated[tuple[Annotated[int, Field(ge=0, le=3)], ...], Field(min_length=1, max_length=4, fail_fast=True)]

    @model_validator(mode="after")
    def _is_a_permutation(self) -> Permute:
        if sorted(self.dims) != list(range(len(self.dims))):
            raise ValueError(f"dims must be 0 to {len(self.dims) - 1} in some order")
        return self


class Linear(_Trained):
    """y = x W^T + b over the last dimension, initialised as torch.nn.Linear is, or with zeros."""

    type: Literal["linear"] = "linear"
    in_features: _Width
    out_features: _Width
    bias: bool = True
    init: Literal["default", "zeros"] = "default"


class Conv1d(_Trained):
    """torch.nn.Conv1d on (channels, length)."""

    type: Literal["conv1d"] = "conv1d"
    in_channels: _Width
    out_channels: _Width
    kernel_size: _Small
    stride: _Small = 1
    padding: _Padding = 0
    dilation: _Small = 1
    groups: _Width = 1
    bias: bool = True


class Conv2d(_Trained):
    """torch.nn.Conv2d on (channels, height, width)."""

    type: Literal["conv2d"] = "conv2d"
    in_channels: _Width
    out_channels: _Width
    kernel_size: _Two
    stride: _Two = (1, 1)
    padding: tuple[_Padding, _Padding] = (0, 0)
    dilation: _Two = (1, 1)
    groups: _Width = 1
    bias: bool = True


class _Pool(_Layer):
    """Over the last dimensions, as many as `kernel_size` has."""

    kernel_size: Annotated[tuple[_Small, ...], Field(min_length=1, max_length=2, fail_fast=True)]
    stride: Annotated[tuple[_Small, ...], Field(min_length=1, max_length=2, fail_fast=True)] | None = None
    """By default the kernel's size."""
    padding: Annotated[tuple[_Padding, ...], Field(min_length=1, max_length=2, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _dimensions_agree(self) -> _Pool:
        for given in (self.stride, self.padding):
            if given is not None and len(given) != len(self.kernel_size):
                raise ValueError("kernel_size, stride and padding must have as many numbers")
        if self.padding is not None and any(2 * p > k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError("padding is at most half of kernel_size")
        return self


class MaxPool(_Pool):
    """torch.nn.MaxPool1d or MaxPool2d."""

    type: Literal["max_pool"] = "max_pool"


class AveragePool(_Pool):
    """torch.nn.AvgPool1d or AvgPool2d; padding counts as zeros. Without a kernel_size: the mean over all positions of each channel."""

    type: Literal["average_pool"] = "average_pool"
    kernel_size: Annotated[tuple[_Small, ...], Field(max_length=2, fail_fast=True)] = ()


class ReLU(_Layer):
    """max(x, 0)."""

    type: Literal["relu"] = "relu"


class LeakyReLU(_Layer):
    """x, or `slope` times x below zero."""

    type: Literal["leaky_relu"] = "leaky_relu"
    slope: Annotated[float, Field(ge=0, le=1)] = 0.01


class ELU(_Layer):
    """x, or alpha (exp(x) - 1) below zero."""

    type: Literal["elu"] = "elu"
    alpha: Annotated[float, Field(gt=0, le=100)] = 1.0


class GELU(_Layer):
    """x Phi(x), or its approximation by tanh."""

    type: Literal["gelu"] = "gelu"
    approximate: Literal["none", "tanh"] = "none"


class SiLU(_Layer):
    """x sigmoid(x)."""

    type: Literal["silu"] = "silu"


class Sigmoid(_Layer):
    """1 / (1 + exp(-x))."""

    type: Literal["sigmoid"] = "sigmoid"


class Tanh(_Layer):
    """Hyperbolic tangent; bounded activations suit DP-SGD (arXiv 2007.14191)."""

    type: Literal["tanh"] = "tanh"


class Softmax(_Layer):
    """Over the last dimension. A network that predicts a category ends with logits, without it."""

    type: Literal["softmax"] = "softmax"


class Dropout(_Layer):
    """Zeros a share `p` of the elements while training."""

    type: Literal["dropout"] = "dropout"
    p: _Share = 0.5


class GroupNorm(_Trained):
    """torch.nn.GroupNorm on (channels, ...); without `affine` it has nothing to train."""

    type: Literal["group_norm"] = "group_norm"
    num_groups: _Width
    num_channels: _Width
    eps: _Epsilon = 1e-5
    affine: bool = True


class LayerNorm(_Trained):
    """torch.nn.LayerNorm over the last dimensions, as many as `normalized_shape` has."""

    type: Literal["layer_norm"] = "layer_norm"
    normalized_shape: _Shape
    eps: _Epsilon = 1e-5
    affine: bool = True


class RMSNorm(_Trained):
    """torch.nn.RMSNorm over the last dimensions, as many as `normalized_shape` has."""

    type: Literal["rms_norm"] = "rms_norm"
    normalized_shape: _Shape
    eps: _Epsilon = 1e-6
    affine: bool = True


class Embedding(_Trained):
    """A trained row for each index: of a text's bytes (1 to 256; 0 past its end) or of a category. torch.nn.Embedding."""

    type: Literal["embedding"] = "embedding"
    num_embeddings: _Width
    embedding_dim: _Width
    padding_idx: Annotated[int, Field(ge=0, le=2**20)] | None = None


class PositionalEmbedding(_Trained):
    """Adds a trained row for each of the first `length` positions to (length, width)."""

    type: Literal["positional_embedding"] = "positional_embedding"
    length: Annotated[int, Field(ge=1, le=2**16)]
    embedding_dim: _Width


class _Recurrent(_Trained):
    """On (length, input_size)."""

    input_size: _Width
    hidden_size: Annotated[int, Field(ge=1, le=2**14)]
    num_layers: Annotated[int, Field(ge=1, le=16)] = 1
    bias: bool = True
    bidirectional: bool = False
    output: Literal["sequence", "last"] = "sequence"
    """(length, width), or what each direction gives at its last step, (width,)."""


class LSTM(_Recurrent):
    """torch.nn.LSTM."""

    type: Literal["lstm"] = "lstm"


class GRU(_Recurrent):
    """torch.nn.GRU."""

    type: Literal["gru"] = "gru"


class RNN(_Recurrent):
    """torch.nn.RNN."""

    type: Literal["rnn"] = "rnn"
    nonlinearity: Literal["tanh", "relu"] = "tanh"


class MultiheadAttention(_Trained):
    """Self-attention on (length, embed_dim), torch.nn.MultiheadAttention; a second layer that it reads, of tokens, tells which
    positions are there (not 0)."""

    type: Literal["multihead_attention"] = "multihead_attention"
    embed_dim: _Width
    num_heads: _Small
    bias: bool = True
    causal: bool = False


class TransformerLayer(_Trained):
    """Attention and two linear layers, each beside its input: torch.nn.TransformerEncoderLayer on (length, d_model). A second layer
    that it reads, of tokens, tells which positions are there (not 0)."""

    type: Literal["transformer_layer"] = "transformer_layer"
    d_model: _Width
    nhead: _Small
    dim_feedforward: _Width
    activation: Literal["relu", "gelu"] = "relu"
    norm_first: bool = False
    causal: bool = False
    dropout: _Share = 0.0
    eps: _Epsilon = 1e-5


class SequencePool(_Layer):
    """(length, width) to (width,): the mean, the largest, or what is at the last position. A second layer that it reads, of tokens,
    tells which positions are there (not 0)."""

    type: Literal["sequence_pool"] = "sequence_pool"
    how: Literal["mean", "max", "last"] = "mean"


class Add(_Layer):
    """The sum of layers of one shape."""

    type: Literal["add"] = "add"


class Multiply(_Layer):
    """The product of layers of one shape, element by element."""

    type: Literal["multiply"] = "multiply"


class Concatenate(_Layer):
    """Layers side by side along dimension `dim`, of which only that may differ."""

    type: Literal["concatenate"] = "concatenate"
    dim: Annotated[int, Field(ge=0, le=3)] = 0


class Scattering(_Layer):
    """Fixed wavelet features of an image in [0, 1], (height, width) or (channels, height, width), at least 8 x 8: a vector of
    length 10. What edges of each scale and direction, and edges among those, leave, and its logarithm (Bruna and Mallat,
    2013), whitened as synthetic pictures tell. 3,969 features of 28 x 28 points."""

    type: Literal["scattering"] = "scattering"


class LogMel(_Layer):
    """Fixed spectrogram of audio: the logarithm of the energy in `bands` mel bands at `frames` times. Gives (bands, frames)."""

    type: Literal["log_mel"] = "log_mel"
    bands: Annotated[int, Field(ge=4, le=256)] = 24
    frames: Annotated[int, Field(ge=1, le=4096)] = 16


class HashedText(_Layer):
    """Fixed features of a text: its words, pairs of words and runs of 3 to 5 letters, hashed into `features` places, scaled to length
    1. Few of them are not 0, and a linear layer is all that reads them."""

    type: Literal["hashed_text"] = "hashed_text"
    features: Annotated[int, Field(ge=16, le=2**20)] = 2**17


Layer = Annotated[
    Encode
    | Rescale
    | Flatten
    | Reshape
    | Permute
    | Linear
    | Conv1d
    | Conv2d
    | MaxPool
    | AveragePool
    | ReLU
    | LeakyReLU
    | ELU
    | GELU
    | SiLU
    | Sigmoid
    | Tanh
    | Softmax
    | Dropout
    | GroupNorm
    | LayerNorm
    | RMSNorm
    | Embedding
    | PositionalEmbedding
    | LSTM
    | GRU
    | RNN
    | MultiheadAttention
    | TransformerLayer
    | SequencePool
    | Add
    | Multiply
    | Concatenate
    | Scattering
    | LogMel
    | HashedText,
    Field(discriminator="type"),
]


def has_weights(layer: Layer) -> bool:
    """Whether it is of a kind that is trained, or frozen; a norm without `affine` is too."""
    return isinstance(layer, _Trained)


def is_frozen(layer: Layer) -> bool:
    """Whether it keeps the weights that it starts from."""
    return isinstance(layer, _Trained) and layer.frozen
