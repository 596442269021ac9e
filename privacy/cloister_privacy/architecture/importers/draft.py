"""An imported network while it is written, layer by layer. Knows the language and its shapes; no framework that it comes from.

Dimensions that a source only puts in another order are not moved until a layer needs them so: an image that is (height, width,
channels) to its source can stay (channels, height, width) from one convolution to the next.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister.wire import layers as wire
from cloister.wire.layers import Layer
from cloister_privacy.architecture.graph import Node
from cloister_privacy.architecture.importers.imported import ModelNotSupported
from cloister_privacy.architecture.modules import module_of
from cloister_privacy.errors import ArchitectureRefused

__all__ = ["Draft", "NotMapped", "Place", "Shape", "Step", "TokensFound", "Value", "Weights"]

Shape = tuple[int, ...]
Weights = Mapping[str, NDArray[np.float32]]

_RESHAPED = (wire.Reshape, wire.Flatten)


class NotMapped(ArchitectureRefused):
    """A part of a source has no form in the language. Never leaves an importer: it becomes a line of ModelNotSupported."""


class TokensFound(Exception):
    """A column that was taken for numbers is read as indices; the draft is begun anew with it among its tokens."""

    def __init__(self, column: str) -> None:
        super().__init__(f"column {column!r} holds indices")
        self.column = column


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the source something stands."""

    path: str = ""
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.path} ({self.kind})" if self.path and self.kind else self.path or self.kind or "the network"


@dataclass(frozen=True, slots=True)
class Value:
    """What the source passes on, of one example: by which step of the draft it is given, and how it lies there."""

    key: int | str
    """A step, or a column's name."""
    held: Shape
    dims: Shape
    """Dimension i of the source is dimension dims[i] of what is held."""
    pad: tuple[tuple[int, int], ...] = ()
    """Zeros that are still to be put before and after each dimension of the source."""

    @property
    def shape(self) -> Shape:
        """As the source has it."""
        sizes = tuple(self.held[dim] for dim in self.dims)
        return tuple(size + sum(more) for size, more in zip(sizes, self.pad, strict=True)) if self.pad else sizes


@dataclass(frozen=True, slots=True)
class Step:
    """A layer of the draft."""

    layer: Layer
    reads: tuple[int | str, ...]
    weights: Weights
    module: nn.Module
    """Runs it."""
    place: Place
    gives: Shape
    twin: int | None = None
    """An earlier step that has the same weights; only one of the two can be in a network."""


class Draft:
    """Begins with the columns; `finished` (finishing.py) makes a network of it. What cannot be mapped is collected, not raised."""

    def __init__(self, inputs: Mapping[str, Shape], *, tokens: Collection[str] = ()) -> None:
        self.inputs, self.tokens = dict(inputs), frozenset(tokens)
        self.steps: list[Step] = []
        self.place = Place()
        """What is being mapped; steps that are added take their names from it."""
        self.problems: dict[str, None] = {}
        self.warnings: dict[str, None] = {}

    def column(self, name: str) -> Value:
        """A column as the source takes it; a single number is held as one of (1,), a single index as it is."""
        shape = self.inputs[name]
        return Value(name, shape if shape or name in self.tokens else (1,), tuple(range(len(shape))))

    def refuse(self, why: str) -> None:
        """Note that what stands in this place cannot be mapped."""
        self.problems[f"{self.place}: {why}"] = None

    def warn(self, what: str) -> None:
        """Note what will not be as it was."""
        self.warnings[f"{self.place}: {what}"] = None

    def raise_problems(self) -> None:
        """Raise ModelNotSupported where anything could not be mapped."""
        if self.problems:
            raise ModelNotSupported(tuple(self.problems))

    def emit(
        self,
        kind: type[Any],
        *values: Value,
        weights: Weights | None = None,
        module: nn.Module | None = None,
        twin: int | None = None,
        **fields: Any,
    ) -> Value:
        """Add a layer that reads these values, laid as their source has them. Raises NotMapped where it takes none such."""
        return self._added(kind, [self.settled(each) for each in values], weights, module, twin, fields)

    def pointwise(self, kind: type[Any], value: Value, *, module: nn.Module | None = None, **fields: Any) -> Value:
        """Add a layer that works element by element, so that the order of the dimensions is nothing to it."""
        value = self.unpadded(value)
        return replace(value, key=self._added(kind, [value], None, module, None, fields).key)

    def _added(
        self,
        kind: type[Any],
        values: list[Value],
        weights: Weights | None,
        module: nn.Module | None,
        twin: int | None,
        fields: dict[str, Any],
    ) -> Value:
        try:
            layer: Layer = kind(**fields)
        except ValueError as exc:
            raise NotMapped(f"{exc}; the language has no such layer") from None
        with torch.device("meta"):
            module = module or module_of(Node(layer, "", (), str(self.place)), [], {})
        weights = _ordered(weights or {}, module)
        gives = _given(module, values, is_of_indices=kind is wire.Embedding)
        self.steps.append(Step(layer, tuple(each.key for each in values), weights, module, self.place, gives, twin))
        return Value(len(self.steps) - 1, gives, tuple(range(len(gives))))

    def unpadded(self, value: Value) -> Value:
        """The value, if no zeros are still to be put around it."""
        if any(sum(each) for each in value.pad):
            raise NotMapped("reads what was padded with zeros, which only a convolution does; give it the padding instead")
        return replace(value, pad=())

    def settled(self, value: Value) -> Value:
        """The value held in the order of its source."""
        value = self.unpadded(value)
        if value.dims == tuple(range(len(value.held))) or value.shape == () and math.prod(value.held) == 1:
            return value
        return self._added(wire.Permute, [value], None, None, None, {"dims": value.dims})

    def permute(self, value: Value, dims: Shape) -> Value:
        """Dimension i is what dimension dims[i] was."""
        pad = tuple(value.pad[dim] for dim in dims) if value.pad else ()
        return replace(value, dims=tuple(value.dims[dim] for dim in dims), pad=pad)

    def reshape(self, value: Value, shape: Shape) -> Value:
        """The same numbers in C order."""
        if value.shape == shape:
            return value
        if shape == ():
            return replace(self.reshape(value, (1,)), dims=())
        if value.shape == () and value.held == (1,):
            value = replace(value, dims=(0,))
            return self.reshape(value, shape)
        value = self.settled(value)
        step = self.step(value)
        if step is not None and isinstance(step.layer, _RESHAPED):
            value = self._read_by(step)
            if value.held == shape:
                return value
        if isinstance(value.key, str) and value.key in self.tokens:
            raise NotMapped("gives indices another shape; let an embedding read the column as it is")
        if len(shape) == 1:
            return self.emit(wire.Flatten, value)
        return self.emit(wire.Reshape, value, shape=shape)

    def step(self, value: Value) -> Step | None:
        """What gives the value, unless it is a column."""
        return self.steps[value.key] if isinstance(value.key, int) and value.key >= 0 else None

    def first_read(self, value: Value) -> Value | None:
        """What the step that gives the value reads, as it is held there."""
        step = self.step(value)
        return None if step is None else self._read_by(step)

    def _read_by(self, step: Step) -> Value:
        key = step.reads[0]
        held = self.steps[key].gives if isinstance(key, int) else self.column(key).held
        return Value(key, held, tuple(range(len(held))))

    def placeholder(self, shape: Shape) -> Value:
        """Stands for what could not be mapped, so that what comes after it is looked at too."""
        return Value(-1, shape or (1,), tuple(range(len(shape))))

    def embedding(
        self, value: Value, table: NDArray[np.float32], *, padding_idx: int | None, is_frozen: bool
    ) -> Value:
        """A row of the table for each index of a column. Raises TokensFound where the column was not known to hold any."""
        if not isinstance(value.key, str):
            raise NotMapped("looks up what other layers gave; an embedding reads a column of tokens, as it is")
        if value.key not in self.tokens:
            raise TokensFound(value.key)
        rows, width = table.shape
        return self.emit(
            wire.Embedding,
            value,
            weights={"weight": table},
            num_embeddings=rows,
            embedding_dim=width,
            padding_idx=padding_idx,
            frozen=is_frozen,
        )

    @torch.no_grad()
    def run(self, values: Mapping[str, Tensor], output: Value) -> Tensor:
        """What the drafted layers give of these columns, laid as the source has it."""
        known: dict[int | str, Tensor] = {
            name: each.reshape(len(each), *self.column(name).held) for name, each in values.items()
        }
        for position in range(output.key + 1 if isinstance(output.key, int) else 0):
            step = self.steps[position]
            weights = {name: torch.from_numpy(each) for name, each in step.weights.items()}
            step.module.load_state_dict(weights, assign=True)
            known[position] = step.module.eval()(*[known[key] for key in step.reads])
        found = known[output.key].permute(0, *(dim + 1 for dim in output.dims)) if output.dims else known[output.key]
        return found.reshape(len(found), *output.shape)


def _ordered(weights: Weights, module: nn.Module) -> Weights:
    """The weights in the module's order, float32 and contiguous. A bias that the source lacks is 0."""
    found: dict[str, NDArray[np.float32]] = {}
    for name, like in module.state_dict().items():
        given = weights.get(name)
        array = np.zeros(like.shape, np.float32) if given is None else np.ascontiguousarray(given, dtype=np.float32)
        if array.shape != tuple(like.shape):
            raise NotMapped(f"has {name} of shape {array.shape}, and the layer takes {tuple(like.shape)}")
        found[name] = array
    return found


def _given(module: nn.Module, values: list[Value], *, is_of_indices: bool) -> Shape:
    """The shape of what the module gives, by running it on tensors that hold nothing."""
    dtype = torch.int64 if is_of_indices else torch.float32
    empty = [torch.empty((2, *each.held), dtype=dtype, device="meta") for each in values]
    try:
        with torch.no_grad():
            return tuple(module(*empty).shape[1:])
    except (RuntimeError, ValueError, IndexError, TypeError) as exc:
        told = str(exc).splitlines()[0]
        raise NotMapped(f"does not fit what it reads, {', '.join(str(each.held) for each in values)} ({told})") from None
