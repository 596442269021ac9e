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
from cloister.wire.architecture import LAYER_LIMIT
from cloister.wire.layers import Layer
from cloister_privacy.architecture import shapes
from cloister_privacy.architecture.graph import Node
from cloister_privacy.architecture.importers.imported import ModelNotSupported
from cloister_privacy.architecture.modules import module_of
from cloister_privacy.errors import ArchitectureRefused

__all__ = ["Draft", "NotMapped", "Place", "Shape", "Step", "TokensFound", "Value", "Weights", "dimension", "value_of"]

Shape = tuple[int, ...]
Weights = Mapping[str, NDArray[np.float32]]

_STEP_LIMIT = 8 * LAYER_LIMIT
"""Many steps are left out of the network in the end."""

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


def value_of(given: Any) -> Value:
    """Raises NotMapped for what is no value of the network."""
    if not isinstance(given, Value):
        raise NotMapped("reads what is no value of the network, a mask or a constant")
    return given


def dimension(value: Value, dim: int | None) -> int:
    """A dimension of the batch as one of the example. Raises NotMapped for that of the examples."""
    rank = len(value.shape) + 1
    if dim is None or dim % rank == 0:
        raise NotMapped("works across the examples of a batch; keep them apart: name a dimension from 1 on")
    return dim % rank - 1


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
    twins: tuple[int, ...] = ()
    """Earlier steps that have the same weights; a network can hold this one or those."""


class Draft:
    """Begins with the columns; `finished` (finishing.py) makes a network of it. What cannot be mapped is collected, not raised."""

    def __init__(self, inputs: Mapping[str, Shape], *, tokens: Collection[str] = ()) -> None:
        self.inputs, self.tokens = dict(inputs), frozenset(tokens)
        self.steps: list[Step] = []
        self.place = Place()
        """What is being mapped; steps that are added take their names from it."""
        self.open_ended: set[int] = set()
        """Attention that still has no last projection of its source's."""
        self._numbers = 0
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
        twins: tuple[int, ...] = (),
        **fields: Any,
    ) -> Value:
        """Add a layer that reads these values, laid as their source has them. Raises NotMapped where it takes none such."""
        return self._added(kind, [self.settled(each) for each in values], weights, module, twins, fields)

    def pointwise(self, kind: type[Any], value: Value, *, module: nn.Module | None = None, **fields: Any) -> Value:
        """Add a layer that works element by element, so that the order of the dimensions is nothing to it."""
        value = self.unpadded(value)
        return replace(value, key=self._added(kind, [value], None, module, (), fields).key)

    def _added(
        self,
        kind: type[Any],
        values: list[Value],
        weights: Weights | None,
        module: nn.Module | None,
        twins: tuple[int, ...],
        fields: dict[str, Any],
    ) -> Value:
        try:
            layer: Layer = kind(**fields)
        except ValueError as exc:
            raise NotMapped(f"{exc}; the language has no such layer") from None
        node, reads = Node(layer, "", (), "it"), [self._measured(each) for each in values]
        try:
            gives = shapes.through(node, reads, {})[0].shape
        except ArchitectureRefused as exc:
            raise NotMapped(str(exc)) from None
        with torch.device("meta"):
            module = module or module_of(node, reads, {})
        weights = _ordered(weights or {}, module)
        self._numbers += sum(array.size for array in weights.values())
        if self._numbers > shapes.PARAMETER_LIMIT or len(self.steps) > _STEP_LIMIT:
            raise ModelNotSupported(
                (
                    f"{self.place}: is one of over {_STEP_LIMIT} steps or {shapes.PARAMETER_LIMIT} weights; import a smaller network",
                )
            )
        place = self.steps[twins[0]].place if twins else self.place
        self.steps.append(Step(layer, tuple(each.key for each in values), weights, module, place, gives, twins))
        return Value(len(self.steps) - 1, gives, tuple(range(len(gives))))

    def _measured(self, value: Value) -> shapes.Value:
        """Of indices any table is large enough here: what they must be is the columns' to say."""
        return shapes.Value(value.held, indices=1 if value.key in self.tokens else 0)

    def unpadded(self, value: Value) -> Value:
        """The value, if no zeros are still to be put around it."""
        if any(sum(each) for each in value.pad):
            raise NotMapped(
                "reads what was padded with zeros, which only a convolution does; give it the padding instead"
            )
        return replace(value, pad=())

    def settled(self, value: Value) -> Value:
        """The value held in the order of its source."""
        value = self.unpadded(value)
        if value.dims == tuple(range(len(value.held))) or (value.shape == () and math.prod(value.held) == 1):
            return value
        wide = [dim for dim in value.dims if value.held[dim] > 1]
        if wide == sorted(wide) and isinstance(value.key, int):
            return self.reshape(replace(value, dims=tuple(range(len(value.held)))), value.shape)
        return self._added(wire.Permute, [value], None, None, (), {"dims": value.dims})

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
            value = self.reads(step)[0]
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
        return None if step is None else self.reads(step)[0]

    def reads(self, step: Step) -> list[Value]:
        """What a step reads, as it is held there."""
        held = [self.steps[key].gives if isinstance(key, int) else self.column(key).held for key in step.reads]
        return [Value(key, each, tuple(range(len(each)))) for key, each in zip(step.reads, held, strict=True)]

    def placeholder(self, shape: Shape) -> Value:
        """Stands for what could not be mapped, so that what comes after it is looked at too."""
        return Value(-1, shape or (1,), tuple(range(len(shape))))

    def embedding(self, value: Value, table: NDArray[np.float32], *, padding_idx: int | None, is_frozen: bool) -> Value:
        """A row of the table for each index of a column. Raises TokensFound where the column was not known to hold any."""
        if not isinstance(value.key, str):
            raise NotMapped("looks up what other layers gave; an embedding reads a column of tokens, as it is")
        if value.key not in self.tokens:
            raise TokensFound(value.key)
        rows, width = table.shape
        found = self.emit(
            wire.Embedding,
            value,
            weights={"weight": table},
            num_embeddings=rows,
            embedding_dim=width,
            padding_idx=padding_idx,
            frozen=is_frozen,
        )
        # A sequence of one index may be a text of one byte or a category, which an embedding gives in different shapes.
        return self.emit(wire.Reshape, found, shape=(1, width)) if value.shape == (1,) else found

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
    """The weights in the module's order, float32, contiguous and our own. A bias that the source lacks is 0."""
    found: dict[str, NDArray[np.float32]] = {}
    state = module.state_dict()
    strange = [*(weights.keys() - state.keys()), *(n for n in state.keys() - weights.keys() if not n.endswith("bias"))]
    if strange:
        raise NotMapped(
            f"has weights by other names than the layer's ({', '.join(sorted(strange))}); this is a mistake of ours"
        )
    for name, like in state.items():
        given = weights.get(name)
        array = np.zeros(like.shape, np.float32) if given is None else np.array(given, np.float32, order="C")
        if array.shape != tuple(like.shape):
            raise NotMapped(f"has {name} of shape {array.shape}, and the layer takes {tuple(like.shape)}")
        found[name] = array
    return found
