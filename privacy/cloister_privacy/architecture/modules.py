"""The torch module of each layer of the language. Knows layers one by one; nothing of the graph that they stand in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloister.wire import layers as wire
from cloister.wire.columns import CategoryColumn, InputColumn, NumberColumn, TensorColumn
from cloister_privacy.architecture.frontends.audio import LogMel
from cloister_privacy.architecture.frontends.scattering import Scattering
from cloister_privacy.architecture.frontends.tables import hats
from cloister_privacy.architecture.frontends.text import HashedText, SparseLinear
from cloister_privacy.architecture.graph import Node
from cloister_privacy.architecture.shapes import Value

__all__ = ["module_of"]


def module_of(node: Node, reads: list[Value], columns: Mapping[str, InputColumn]) -> nn.Module:
    """The module that runs a layer: called with the tensors that the node reads, each with the examples first."""
    layer = node.layer
    match layer:
        case wire.Encode():
            return _Encode({name: columns[name] for name in node.reads}, layer)
        case wire.Scattering():
            return Scattering(reads[0].shape)
        case wire.LogMel():
            return LogMel(rate=reads[0].audio_rate, samples=reads[0].shape[0], bands=layer.bands, frames=layer.frames)
        case wire.HashedText():
            return HashedText(layer.features)
        case wire.Linear():
            module = _linear(layer, is_sparse=reads[0].is_sparse)
        case _:
            module = _MODULES[type(layer)](layer)
    if wire.is_frozen(layer):
        module.requires_grad_(False)
    return module


def _linear(layer: wire.Linear, *, is_sparse: bool) -> nn.Module:
    kind = SparseLinear if is_sparse else nn.Linear
    module = kind(layer.in_features, layer.out_features, bias=layer.bias)
    if layer.init == "zeros":
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    return module


def _max_pool(layer: wire.MaxPool) -> nn.Module:
    kind = nn.MaxPool1d if len(layer.kernel_size) == 1 else nn.MaxPool2d
    return kind(*_window(layer))


def _average_pool(layer: wire.AveragePool) -> nn.Module:
    if not layer.kernel_size:
        return _MeanOfPositions()
    kind = nn.AvgPool1d if len(layer.kernel_size) == 1 else nn.AvgPool2d
    return kind(*_window(layer))


def _window(layer: wire.MaxPool | wire.AveragePool) -> tuple[Any, Any, Any]:
    return layer.kernel_size, layer.stride or layer.kernel_size, layer.padding or (0,) * len(layer.kernel_size)


def _convolution(layer: wire.Conv1d | wire.Conv2d) -> nn.Module:
    kind = nn.Conv1d if isinstance(layer, wire.Conv1d) else nn.Conv2d
    return kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]  # a number or two, as the kind takes it
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        groups=layer.groups,
        bias=layer.bias,
    )


_MODULES: Mapping[type[Any], Callable[[Any], nn.Module]] = {
    wire.Rescale: lambda layer: _Rescale(layer),  # noqa: PLW0108 (the class comes below)
    wire.Flatten: lambda layer: nn.Flatten(),
    wire.Reshape: lambda layer: _Reshape(layer.shape),
    wire.Permute: lambda layer: _Permute(layer.dims),
    wire.Conv1d: _convolution,
    wire.Conv2d: _convolution,
    wire.MaxPool: _max_pool,
    wire.AveragePool: _average_pool,
    wire.ReLU: lambda layer: nn.ReLU(),
    wire.LeakyReLU: lambda layer: nn.LeakyReLU(layer.slope),
    wire.ELU: lambda layer: nn.ELU(layer.alpha),
    wire.GELU: lambda layer: nn.GELU(layer.approximate),
    wire.SiLU: lambda layer: nn.SiLU(),
    wire.Sigmoid: lambda layer: nn.Sigmoid(),
    wire.Tanh: lambda layer: nn.Tanh(),
    wire.Softmax: lambda layer: nn.Softmax(dim=-1),
    wire.Dropout: lambda layer: nn.Dropout(layer.p),
    wire.GroupNorm: lambda layer: nn.GroupNorm(layer.num_groups, layer.num_channels, layer.eps, layer.affine),
    wire.LayerNorm: lambda layer: nn.LayerNorm(layer.normalized_shape, layer.eps, layer.affine),
    wire.RMSNorm: lambda layer: nn.RMSNorm(list(layer.normalized_shape), layer.eps, layer.affine),
    wire.Embedding: lambda layer: nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx),
    wire.PositionalEmbedding: lambda layer: _PositionalEmbedding(layer.length, layer.embedding_dim),
    wire.LSTM: lambda layer: _Recurrent(layer, nn.LSTM),
    wire.GRU: lambda layer: _Recurrent(layer, nn.GRU),
    wire.RNN: lambda layer: _Recurrent(layer, nn.RNN, nonlinearity=layer.nonlinearity),
    wire.MultiheadAttention: lambda layer: _Attention(layer.embed_dim, layer.num_heads, layer.bias, layer.causal),
    wire.TransformerLayer: lambda layer: _TransformerLayer(layer),  # noqa: PLW0108
    wire.SequencePool: lambda layer: _SequencePool(layer.how),
    wire.Add: lambda layer: _Add(),
    wire.Multiply: lambda layer: _Multiply(),
    wire.Concatenate: lambda layer: _Concatenate(layer.dim),
}


class _Encode(nn.Module):
    """Fixed public numbers only, and no buffers: Opacus refuses a trainable module that holds any."""

    def __init__(self, columns: Mapping[str, InputColumn], layer: wire.Encode) -> None:
        super().__init__()
        self._columns, self._bins, self._normalized = list(columns.values()), layer.bins, layer.normalized

    def forward(self, *values: Tensor) -> Tensor:
        parts = [self._encoded(each, column) for each, column in zip(values, self._columns, strict=True)]
        if self._normalized:
            parts = [functional.normalize(part, dim=1) / len(parts) ** 0.5 for part in parts]
        return torch.cat(parts, dim=1)

    def _encoded(self, values: Tensor, column: InputColumn) -> Tensor:
        if isinstance(column, CategoryColumn):
            return functional.one_hot(values, len(column.values)).to(torch.float32)
        assert isinstance(column, NumberColumn | TensorColumn)  # noqa: S101 (the shapes were checked)
        if isinstance(column, NumberColumn) and self._bins:
            return hats(values.squeeze(1), column.low, column.high, self._bins)
        return _to_unit(values.flatten(1), column.low, column.high)


def _to_unit(values: Tensor, low: float, high: float) -> Tensor:
    """[low, high] mapped to [-1, 1]; halved before they are joined, because high - low may lie outside float32."""
    return (values - (low / 2 + high / 2)) / (high / 2 - low / 2)


class _Rescale(nn.Module):
    def __init__(self, layer: wire.Rescale) -> None:
        super().__init__()
        self._low, self._to_low = layer.low, layer.to_low
        self._slope = (layer.to_high - layer.to_low) / (layer.high - layer.low)

    def forward(self, values: Tensor) -> Tensor:
        return (values - self._low) * self._slope + self._to_low


class _Reshape(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), *self._shape)


class _Permute(nn.Module):
    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self._dims = [0, *(dim + 1 for dim in dims)]

    def forward(self, values: Tensor) -> Tensor:
        return values.permute(self._dims)


class _MeanOfPositions(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.flatten(2).mean(2)


class _PositionalEmbedding(nn.Module):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(length, width)

    def forward(self, values: Tensor) -> Tensor:
        positions = torch.arange(values.shape[1], device=values.device).expand(len(values), -1)
        summed: Tensor = values + self.table(positions)
        return summed


class _Recurrent(nn.Module):
    def __init__(self, layer: Any, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.recurrent = kind(
            layer.input_size,
            layer.hidden_size,
            layer.num_layers,
            bias=layer.bias,
            batch_first=True,
            bidirectional=layer.bidirectional,
            **options,
        )
        self._size, self._is_last = layer.hidden_size, layer.output == "last"

    def forward(self, values: Tensor) -> Tensor:
        outputs: Tensor = self.recurrent(values)[0]
        if not self._is_last:
            return outputs
        return torch.cat([outputs[:, -1, : self._size], outputs[:, 0, self._size :]], dim=1)


def _absent(tokens: Tensor) -> Tensor:
    """[n, T]: which positions are not there. The first always is: attention over nothing has no value."""
    absent = tokens == 0
    return torch.cat([torch.zeros_like(absent[:, :1]), absent[:, 1:]], dim=1)


class _Attention(nn.Module):
    """As nn.MultiheadAttention, of plain linear layers: `in_proj` gives queries, keys and values side by side."""

    def __init__(self, width: int, heads: int, bias: bool, is_causal: bool) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        nn.init.xavier_uniform_(self.in_proj.weight)
        for each in (self.in_proj, self.out_proj):
            if each.bias is not None:
                nn.init.zeros_(each.bias)
        self._heads, self._is_causal = heads, is_causal

    def forward(self, values: Tensor, tokens: Tensor | None = None) -> Tensor:
        n, length, width = values.shape
        projected = self.in_proj(values).view(n, length, 3, self._heads, width // self._heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self._allowed(length, tokens, values)
        )
        out: Tensor = self.out_proj(attended.transpose(1, 2).reshape(n, length, width))
        return out

    def _allowed(self, length: int, tokens: Tensor | None, values: Tensor) -> Tensor | None:
        """Which position may look at which, [n or 1, 1, T, T]; None where each may at each."""
        allowed = None
        if self._is_causal:
            allowed = torch.ones(length, length, dtype=torch.bool, device=values.device).tril()[None, None]
        if tokens is not None:
            there = ~_absent(tokens)[:, None, None, :]
            allowed = there if allowed is None else allowed & there
        return allowed


class _TransformerLayer(nn.Module):
    """nn.TransformerEncoderLayer, without the other arithmetic that it switches to when it does not train."""

    def __init__(self, layer: wire.TransformerLayer) -> None:
        super().__init__()
        self.attention = _Attention(layer.d_model, layer.nhead, True, layer.causal)
        self.linear1 = nn.Linear(layer.d_model, layer.dim_feedforward)
        self.linear2 = nn.Linear(layer.dim_feedforward, layer.d_model)
        self.norm1, self.norm2 = (nn.LayerNorm(layer.d_model, layer.eps) for _ in range(2))
        self.activation = nn.ReLU() if layer.activation == "relu" else nn.GELU()
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(layer.dropout) for _ in range(3))
        self._is_norm_first = layer.norm_first

    def forward(self, values: Tensor, tokens: Tensor | None = None) -> Tensor:
        if self._is_norm_first:
            values = values + self._attended(self.norm1(values), tokens)
            return values + self._fed(self.norm2(values))
        values = self.norm1(values + self._attended(values, tokens))
        out: Tensor = self.norm2(values + self._fed(values))
        return out

    def _attended(self, values: Tensor, tokens: Tensor | None) -> Tensor:
        out: Tensor = self.dropout1(self.attention(values, tokens))
        return out

    def _fed(self, values: Tensor) -> Tensor:
        out: Tensor = self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(values)))))
        return out


class _SequencePool(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how

    def forward(self, values: Tensor, tokens: Tensor | None = None) -> Tensor:
        if tokens is None:
            return {"mean": values.mean(1), "max": values.amax(1), "last": values[:, -1]}[self._how]
        there = ~_absent(tokens).unsqueeze(2)
        count = there.sum(1)
        if self._how == "mean":
            return (values * there).sum(1) / count
        if self._how == "max":
            return values.masked_fill(~there, -torch.inf).amax(1)
        last = (count - 1).unsqueeze(2).expand(-1, 1, values.shape[2])
        return values.gather(1, last).squeeze(1)


class _Add(nn.Module):
    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = first + other
        return first


class _Multiply(nn.Module):
    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = first * other
        return first


class _Concatenate(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self._dim = dim + 1

    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, dim=self._dim)
