"""A Keras model as a network of the language: its graph is walked, and nothing of it is run but to compare."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cloister_privacy.architecture.importers.draft import Draft, NotMapped, Place, Shape, Value
from cloister_privacy.architecture.importers.finishing import drafted, finished, named
from cloister_privacy.architecture.importers.imported import Imported, ModelNotSupported
from cloister_privacy.architecture.importers.keras_graph import Handler, Walk, keras
from cloister_privacy.architecture.importers.keras_layers import LAYERS
from cloister_privacy.architecture.importers.keras_operations import OPERATIONS
from cloister_privacy.architecture.importers.keras_sequences import SEQUENCES
from cloister_privacy.architecture.importers.parity import require_same

__all__ = ["from_keras"]

_LAYERS = {**LAYERS, **SEQUENCES}

_OF_NUMBERS = (
    "mean_squared",
    "mean_absolute",
    "mse",
    "mae",
    "huber",
    "log_cosh",
    "poisson",
    "meansquared",
    "meanabsolute",
)
"""Losses, by how their names begin, that predict a number, so that a last sigmoid is a part of the model."""

_NEAREST = {
    "PReLU": "use LeakyReLU",
    "UnitNormalization": "use RMSNormalization",
    "Masking": "use an Embedding with mask_zero",
    "ConvLSTM2D": "use Conv2D or LSTM",
    "Conv3D": "use Conv2D",
    "Attention": "use MultiHeadAttention",
    "AdditiveAttention": "use MultiHeadAttention",
    "Dot": "use Multiply and a Dense layer",
    "Maximum": "use Add or Concatenate",
    "Minimum": "use Add or Concatenate",
    "UpSampling2D": "use images of the size that the network needs",
    "RNN": "use LSTM, GRU or SimpleRNN",
    "TextVectorization": "use a column of text",
}


def from_keras(model: Any, input_shape: Shape | Mapping[str, Shape] | None = None) -> Imported:
    """The layers and weights of a Keras 3 model: Sequential, functional or subclassed.

    A model that is not built yet, or subclassed and never called, needs the `input_shape` of one example, or one for each name where
    it takes a dictionary. Raises ModelNotSupported with every layer that cannot be mapped.
    """
    library = keras()
    if not isinstance(model, library.Model):
        raise ModelNotSupported(
            (f"{type(model).__name__} is no keras.Model; give the model itself, or load it by keras.models",)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of what a model does as often as it is called
        return _imported(model, _graph(model, input_shape))


def _imported(model: Any, graph: Any) -> Imported:
    names = [_input_name(model, tensor) for tensor in graph.inputs]
    columns = list(named(_apart(names)).values())
    wrong = [name for name, tensor in zip(names, graph.inputs, strict=True) if None in tensor.shape[1:]]
    if wrong:
        raise ModelNotSupported(
            tuple(f"{name}: has no fixed size; give it a fixed shape by input_shape" for name in wrong)
        )
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in zip(columns, graph.inputs, strict=True)}
    return drafted(shapes, lambda draft: _written(draft, model, graph, columns))


def _written(draft: Draft, model: Any, graph: Any, columns: list[str]) -> Imported:
    library = keras()
    walk = Walk(draft, model, _handler)
    given = library.tree.flatten(walk.along(graph, [draft.column(name) for name in columns]))
    draft.place = Place(model.name, type(model).__name__)
    if len(given) != 1 or not isinstance(given[0], Value):
        draft.refuse("gives something else than one tensor that depends on its inputs; give one output")
        raise ModelNotSupported(tuple(draft.problems))

    def called(values: Mapping[str, Tensor]) -> Tensor:
        arrays = [values[name].numpy() for name in columns]
        outputs = library.tree.flatten(
            graph(library.tree.pack_sequence_as(graph._inputs_struct, arrays), training=False)
        )
        return torch.from_numpy(library.ops.convert_to_numpy(outputs[0]).copy())

    with torch.no_grad():
        require_same(draft, called, given[0])
    for path in walk.untaken():
        draft.warnings[f"{path}: takes no part in the output, so it is left out"] = None
    draft.place = Place(model.name, type(model).__name__)
    ends_in_probabilities = type(getattr(draft.step(given[0]), "layer", None)).__name__ in ("Softmax", "Sigmoid")
    _judge_loss(draft, model, ends_in_probabilities=ends_in_probabilities)
    return finished(draft, given[0], keeps_activation=_predicts_a_number(model))


def _graph(model: Any, input_shape: Shape | Mapping[str, Shape] | None) -> Any:
    """A functional model that shows every layer; also those that a subclassed model makes in `call`."""
    library = keras()
    functional = getattr(model, "_functional", None) or model
    if input_shape is None and hasattr(functional, "_nodes_by_depth"):
        if all(tensor.shape[0] is None for tensor in functional.inputs):
            return functional
        inputs = [library.Input(tensor.shape[1:], dtype=tensor.dtype) for tensor in functional.inputs]  # for any number
        return _called(model, library.tree.pack_sequence_as(functional._inputs_struct, inputs))
    if input_shape is None:
        built = (model.get_build_config() or {}).get("input_shape") if model.built else None
        if not isinstance(built, list | tuple) or not all(each is None or isinstance(each, int) for each in built):
            raise ModelNotSupported(
                (
                    f"{model.name}: has no inputs yet; give the shape of one example: from_keras(model, input_shape=(28, 28, 1))",
                )
            )
        input_shape = tuple(built[1:])
    if isinstance(input_shape, Mapping):
        return _called(model, {name: library.Input(tuple(shape), name=name) for name, shape in input_shape.items()})
    return _called(model, library.Input(tuple(input_shape)))


def _called(model: Any, inputs: Any) -> Any:
    """The functional model of what a model does to these symbolic inputs."""
    library = keras()
    try:
        return library.Model(inputs, model.call(inputs))
    except Exception as exc:  # whatever the model's own code raises
        shapes = [tuple(each.shape) for each in library.tree.flatten(inputs)]
        told = f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
        raise ModelNotSupported(
            (
                f"{model.name}: cannot be called on symbolic inputs of {shapes} ({told}); write call in layers and keras.ops",
            )
        ) from exc


def _input_name(model: Any, tensor: Any) -> str:
    name = str(tensor._keras_history.operation.name)
    if not re.fullmatch(r"(input_layer|keras_tensor|input)(_\d+)?", name):
        return name
    argument = next(iter(inspect.signature(model.call).parameters), "inputs")
    return argument if type(model).__module__.split(".")[0] != "keras" else "inputs"


def _apart(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{position}" for position, name in enumerate(names)]


def _handler(operation: Any) -> Handler | None:
    """How an operation is mapped; None for a model or a layer of people's own, which is looked into."""
    kind, home = type(operation).__name__, type(operation).__module__
    if home.startswith("keras.src.layers"):
        return None if kind == "Lambda" else _LAYERS.get(kind) or _without_form(kind)
    if home.startswith("keras.src.ops"):
        return OPERATIONS.get(kind) or _without_form(kind)
    return None


def _without_form(kind: str) -> Handler:
    def run(node: Any, *args: Any, **kwargs: Any) -> Value:
        raise NotMapped(f"{kind} has no form in the language; {_NEAREST.get(kind, 'use the layers that it has')}")

    return run


def _loss_name(model: Any) -> str:
    loss = getattr(model, "loss", None) if getattr(model, "compiled", False) else None
    return (
        (loss if isinstance(loss, str) else getattr(loss, "name", type(loss).__name__)).lower()
        if loss is not None
        else ""
    )


def _predicts_a_number(model: Any) -> bool:
    return _loss_name(model).startswith(_OF_NUMBERS)


def _judge_loss(draft: Draft, model: Any, *, ends_in_probabilities: bool) -> None:
    """Warn of losses that take logits for probabilities, or the reverse: here the loss always gets logits."""
    name, loss = _loss_name(model), getattr(model, "loss", None) if getattr(model, "compiled", False) else None
    takes_logits = bool(getattr(loss, "from_logits", False))
    if "crossentropy" not in name.replace("_", ""):
        return
    if takes_logits and ends_in_probabilities:
        draft.warn(
            "is compiled with from_logits=True and ends in probabilities, so Keras trains it on a softmax of a softmax; here the "
            "loss gets logits, once"
        )
    if not takes_logits and not ends_in_probabilities:
        draft.warn(
            "ends in logits and is compiled with a loss that expects probabilities (from_logits=False); here the loss gets logits"
        )
