"""The graph of a Keras model, walked from its inputs to its outputs. Layers of people's own, and models within it, are looked into.

Knows how Keras keeps a graph, which it does not promise (3.15); nothing of what its layers compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_privacy.architecture.importers.draft import Draft, NotMapped, Place, Shape, Value
from cloister_privacy.architecture.importers.imported import ModelNotSupported
from cloister_privacy.architecture.importers.origins import Mask, Unread

__all__ = ["Handler", "Learned", "Node", "Walk", "keras", "without_batch"]


def keras() -> Any:
    """The library. Raises ModelNotSupported where it is not installed."""
    try:
        return import_module("keras")
    except ImportError:
        raise ModelNotSupported(
            ('keras is not installed; pip install "cloister[keras]", and set KERAS_BACKEND=torch',)
        ) from None


def without_batch(shape: Sequence[int | None]) -> Shape:
    """The shape of one example. Raises NotMapped where it is not fixed, or the examples are not its first dimension."""
    if not shape or shape[0] is not None:
        raise NotMapped(f"gives {tuple(shape)}; keep the examples as the first dimension")
    if any(size is None for size in shape[1:]):
        raise NotMapped(f"gives {tuple(shape)}, of no fixed size; give the inputs fixed shapes")
    return tuple(int(size) for size in shape[1:] if size is not None)


@dataclass(frozen=True, slots=True)
class Learned:
    """A variable of the model that an operation takes."""

    variable: Any


@dataclass(frozen=True, slots=True)
class Node:
    """One layer or operation at work."""

    draft: Draft
    walk: Walk
    operation: Any
    shapes: tuple[Any, ...]
    """Of what it gives, the examples first."""
    mask: Mask | None
    """What its first input carries along."""

    @property
    def shape(self) -> Shape:
        """Of its first output, of one example."""
        return without_batch(self.shapes[0])

    def take(self, name: str, *, of: Any = None) -> NDArray[np.float32] | None:
        """A weight of the layer, None where it has none."""
        variable = getattr(self.operation if of is None else of, name, None)
        return None if variable is None else self.walk.take(variable, self.draft)

    @property
    def is_frozen(self) -> bool:
        """Whether the layer is not trained."""
        return not self.operation.trainable


Handler = Callable[..., Any]


class Walk:
    """Maps each node once everything that it reads is mapped."""

    def __init__(self, draft: Draft, model: Any, handlers: Callable[[Any], Handler | None]) -> None:
        self._draft, self._handlers, self._keras = draft, handlers, keras()
        self._own = {id(layer) for layer in model._flatten_layers()}
        self._variables = list(model.variables)
        self._taken: dict[int, str] = {}
        self._masks: dict[Value, Mask] = {}
        """Keras sends a mask with a value through each layer that supports it, and whoever reads it finds it there."""

    def along(self, graph: Any, inputs: Sequence[Any], *, within: str = "") -> Any:
        """What a functional model gives of these origins, in its own structure."""
        known: dict[int, Any] = {id(tensor): origin for tensor, origin in zip(graph.inputs, inputs, strict=True)}

        def origin(given: Any) -> Any:
            if isinstance(given, self._keras.Variable):
                return Learned(given)
            return known.get(id(given), given)

        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                place = Place(f"{within}{node.operation.name}", type(node.operation).__name__)
                args, kwargs = self._keras.tree.map_structure(
                    origin, (list(node.arguments.args), dict(node.arguments.kwargs))
                )
                found = self._mapped(place, node, args, kwargs)
                known.update((id(tensor), each) for tensor, each in zip(node.outputs, found, strict=True))
        return self._keras.tree.map_structure(origin, graph._outputs_struct)

    def _mapped(self, place: Place, node: Any, args: Any, kwargs: Any) -> list[Any]:
        self._draft.place = place
        operation, shapes = node.operation, tuple(each.shape for each in node.outputs)
        try:
            unread = [each for each in self._keras.tree.flatten((args, kwargs)) if isinstance(each, Unread)]
            if unread:
                raise NotMapped(f"reads {unread[0].what}, which the language does not give" if unread[0].what else "")
            self._require_own(operation)
            handler = self._handlers(operation)
            if handler is None:
                found = self._within(place, node, args, kwargs)
            else:
                kwargs = {name: each for name, each in kwargs.items() if name != "training" and each is not None}
                first = next(
                    (each for each in self._keras.tree.flatten((args, kwargs)) if isinstance(each, Value)), None
                )
                mask = None if first is None else self._masks.get(first)
                found = handler(Node(self._draft, self, operation, shapes, mask), *args, **kwargs)
                self._carry(operation, first, mask, found)
            listed = list(found) if isinstance(found, list | tuple) else [found]
            for shape, each in zip(shapes, listed, strict=True):
                if isinstance(each, Value) and each.shape != without_batch(shape):
                    raise NotMapped(f"gives {without_batch(shape)} and not {each.shape}; this is a mistake of ours")
        except NotMapped as exc:
            self._draft.place = place
            if str(exc):
                self._draft.refuse(str(exc))
            return [self._instead(shape) for shape in shapes]
        return listed

    def _carry(self, operation: Any, first: Value | None, mask: Mask | None, found: Any) -> None:
        if not isinstance(operation, self._keras.Layer):
            return
        if getattr(operation, "mask_zero", False) and first is not None:
            mask = Mask(first, is_there=True)
        elif not operation.supports_masking:
            return
        out = found[0] if isinstance(found, list) else found
        if mask is not None and isinstance(out, Value):
            self._masks[out] = mask

    def _require_own(self, operation: Any) -> None:
        if isinstance(operation, self._keras.Layer):
            if operation.weights and id(operation) not in self._own:
                raise NotMapped("has weights and is no part of the model: make it once, in __init__, and not in call")
            if operation.weights and operation.compute_dtype != "float32":
                raise NotMapped(f"computes in {operation.compute_dtype}; make the model with the policy float32")

    def _instead(self, shape: Any) -> Any:
        try:
            return self._draft.placeholder(without_batch(shape))
        except NotMapped:
            return Unread()

    def _within(self, place: Place, node: Any, args: Any, kwargs: Any) -> list[Any]:
        """What is inside a model, or a layer of people's own: called on fresh inputs, it shows its layers."""
        operation = node.operation
        if not isinstance(operation, self._keras.Layer):
            raise NotMapped(f"{type(operation).__name__} has no form in the language; use the layers that it has")
        fresh: dict[int, Any] = {}
        origins: list[Any] = []

        def anew(tensor: Any, origin: Any) -> Any:
            if not isinstance(tensor, self._keras.KerasTensor):
                return tensor
            if id(tensor) not in fresh:
                fresh[id(tensor)] = self._keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype)
                origins.append(origin)
            return fresh[id(tensor)]

        given = (list(node.arguments.args), dict(node.arguments.kwargs))
        symbolic, named = self._keras.tree.map_structure(anew, given, (args, kwargs))
        graph = self._keras.Model(list(fresh.values()), operation.call(*symbolic, **named))
        return list(self._keras.tree.flatten(self.along(graph, origins, within=f"{place.path}/")))

    def take(self, variable: Any, draft: Draft) -> NDArray[np.float32]:
        """A variable's numbers, for the layer that is being mapped. Raises NotMapped where another layer has them already."""
        if id(variable) in self._taken:
            raise NotMapped(
                f"shares {variable.path} with {self._taken[id(variable)]}; a layer is used once, so give each its own weights"
            )
        if variable.dtype != "float32":
            raise NotMapped(f"has {variable.path} of {variable.dtype}, and weights are float32")
        self._taken[id(variable)] = str(draft.place)
        return self.numbers(variable)

    def numbers(self, given: Any) -> NDArray[np.float32]:
        """A variable, a tensor or a number as an array."""
        array: NDArray[np.float32] = np.asarray(self._keras.ops.convert_to_numpy(given), dtype=np.float32)
        return array

    def variable_like(self, table: NDArray[np.float32]) -> Any:
        """The variable, taken by no layer, whose first rows are this table: an embedding that was asked for positions."""
        rows = table.reshape(-1, table.shape[-1])
        for variable in self._variables:
            is_free = id(variable) not in self._taken and tuple(variable.shape[1:]) == rows.shape[1:]
            if is_free and np.array_equal(self.numbers(variable)[: len(rows)], rows):
                return variable
        return None

    def untaken(self) -> Mapping[str, Any]:
        """Trained variables that no layer took."""
        return {each.path: each for each in self._variables if each.trainable and id(each) not in self._taken}
