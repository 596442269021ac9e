"""An ONNX graph, walked in its order. Knows how its tensors hold their examples; nothing of what its operators compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.wire.layers import is_frozen
from cloister_privacy.architecture.importers.draft import Draft, NotMapped, Place, Shape, Value
from cloister_privacy.architecture.importers.onnx_constants import Constant, computed, constant_of
from cloister_privacy.architecture.importers.onnx_file import File, onnx
from cloister_privacy.architecture.importers.origins import Unread

__all__ = ["Handler", "Held", "Node", "Walk"]


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of the graph: a value of each example, and which of its dimensions is the examples'."""

    value: Value
    batch: int = 0

    @property
    def rank(self) -> int:
        """With the examples."""
        return len(self.value.shape) + 1

    def full(self, examples: int) -> Shape:
        """The shape with the examples."""
        shape = self.value.shape
        return (*shape[: self.batch], examples, *shape[self.batch :])

    def dimension(self, axis: int) -> int:
        """An axis as a dimension of the example. Raises NotMapped for that of the examples."""
        axis %= self.rank
        if axis == self.batch:
            raise NotMapped("works across the examples of a batch; keep them apart")
        return axis - (axis > self.batch)


@dataclass(frozen=True, slots=True)
class Node:
    """One operator at work."""

    draft: Draft
    walk: Walk
    operator: str
    attributes: Mapping[str, Any]
    opset: int
    examples: int
    outputs: int

    def reshaped(self, held: Held, shape: Sequence[int]) -> Held:
        """The tensor in another shape, the examples among it. Raises NotMapped where they would be mixed with something else."""
        full, wanted = held.full(self.examples), tuple(int(size) for size in shape)
        before, after = math.prod(full[: held.batch]), math.prod(full[held.batch + 1 :])
        for axis, size in enumerate(wanted):
            fits = math.prod(wanted[:axis]) == before and math.prod(wanted[axis + 1 :]) == after
            if size == self.examples and fits:
                return Held(self.draft.reshape(held.value, wanted[:axis] + wanted[axis + 1 :]), axis)
        raise NotMapped(f"puts {full} into {wanted}, which mixes the examples with another dimension; keep them apart")


Handler = Callable[..., Any]


class Walk:
    """Maps each node, in order; what follows from constants alone is computed."""

    def __init__(
        self, draft: Draft, file: File, handlers: Mapping[str, Handler], unknown: Callable[[str], str]
    ) -> None:
        self._draft, self._file, self._handlers, self._unknown = draft, file, handlers, unknown
        self._taken: dict[str, str] = {}

    def along(self, inputs: Mapping[str, Held], *, examples: int) -> dict[str, Any]:
        """What each name of the graph comes from."""
        known: dict[str, Any] = {"": None, **inputs}
        for name, array in self._file.initializers.items():
            are_weights = array.dtype.kind == "f" and array.size > 1
            known[name] = Constant(array, frozenset({name} if are_weights else ()))
        for node in self._file.graph.node:
            self._draft.place = Place(node.name or next(filter(None, node.output)), node.op_type)
            given = [known[name] for name in node.input]
            found = self._mapped(node, given, examples)
            known.update((name, each) for name, each in zip(node.output, found, strict=False) if name)
        return known

    def _mapped(self, node: Any, given: list[Any], examples: int) -> list[Any]:
        try:
            attributes = {each.name: onnx().helper.get_attribute_value(each) for each in node.attribute}
            this = Node(
                self._draft,
                self,
                node.op_type,
                attributes,
                self._file.opset,
                examples,
                sum(bool(name) for name in node.output),
            )
            unread = [each for each in given if isinstance(each, Unread)]
            if unread:
                raise NotMapped(f"reads {unread[0].what}, which the language does not give" if unread[0].what else "")
            if node.op_type == "Constant":
                return [constant_of(attributes)]
            if node.op_type == "Shape" and isinstance(given[0], Held):
                whole = given[0].full(examples)
                return [Constant(np.asarray(whole[attributes.get("start", 0) : attributes.get("end")], np.int64))]
            if not any(isinstance(each, Held) or not isinstance(each, Constant | None) for each in given):
                return [computed(node.op_type, given, attributes)]
            handler = self._handlers.get(node.op_type)
            if handler is None:
                raise NotMapped(self._unknown(node.op_type))
            found = handler(this, *given)
        except NotMapped as exc:
            if str(exc):
                self._draft.refuse(str(exc))
            return [self._instead(given) for _ in node.output]
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, StopIteration) as exc:
            told = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            self._draft.refuse(
                f"has other inputs or attributes than {node.op_type} takes ({told}); the file is damaged"
            )
            return [Unread() for _ in node.output]
        return found if isinstance(found, list) else [found]

    def _instead(self, given: list[Any]) -> Any:
        """After what could not be mapped: as if it had changed nothing, if it was like a layer, so that more is looked at."""
        return next((each for each in given[:1] if isinstance(each, Held)), Unread())

    def take(self, constant: Any) -> NDArray[np.float32]:
        """Weights, for the layer that is being mapped. Raises NotMapped where they depend on an input, or another layer has them."""
        if not isinstance(constant, Constant):
            raise NotMapped("takes weights that depend on the input; the language's are its own")
        if constant.array.dtype != np.float32:
            raise NotMapped(f"has weights of {constant.array.dtype}; export the model in float32")
        for name in sorted(constant.names):
            if name in self._taken and constant.array.ndim > 1:
                raise NotMapped(
                    f"shares {name} with {self._taken[name]}; a layer is used once, so give each its own weights"
                )
            if name in self._taken:
                self._draft.warn(f"has the same {name} as {self._taken[name]}; here each has its own")
            self._taken[name] = str(self._draft.place)
        array: NDArray[np.float32] = constant.array
        return array

    def is_raw(self, value: Value) -> bool:
        """Whether no weights had a part in the value yet: what is done to it prepares the input, by fixed numbers."""
        ahead: list[int | str] = [value.key]
        while ahead:
            key = ahead.pop()
            if isinstance(key, int) and key >= 0:
                step = self._draft.steps[key]
                if step.weights and not is_frozen(step.layer):
                    return False
                ahead.extend(step.reads)
        return True
