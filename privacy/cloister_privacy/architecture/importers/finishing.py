"""From a draft to a network of the language: what the output needs and no more, named, and judged as the server will judge it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from cloister.wire import layers as wire
from cloister.wire.architecture import LAYER_LIMIT, Architecture
from cloister.wire.columns import CategoryColumn, InputColumn, NumberColumn, TensorColumn, TextColumn
from cloister.wire.layers import Layer
from cloister_privacy.architecture.importers.draft import Draft, NotMapped, Place, Shape, Step, TokensFound, Value
from cloister_privacy.architecture.importers.imported import Imported, ModelNotSupported
from cloister_privacy.architecture.shapes import TEXT_INDICES, measure
from cloister_privacy.errors import ArchitectureRefused

__all__ = ["drafted", "finished", "named"]

_NAME_LENGTH = 56


def named(inputs: Iterable[str]) -> dict[str, str]:
    """A name that a column can have for each input of a source."""
    found: dict[str, str] = {}
    for name in inputs:
        found[name] = _unlike(_as_name(name, "input"), found.values())
    return found


def drafted(inputs: Mapping[str, Shape], write: Callable[[Draft], Imported]) -> Imported:
    """What `write` makes of a draft; it is called anew when a column turns out to hold tokens."""
    tokens: set[str] = set()
    while True:
        try:
            return write(Draft(inputs, tokens=tokens))
        except TokensFound as found:
            tokens.add(found.column)


def finished(draft: Draft, output: Value, *, keeps_activation: bool = False) -> Imported:
    """The network that gives `output`, without a last softmax or sigmoid. Raises ModelNotSupported with all that is wrong."""
    draft.raise_problems()
    draft.place = Place("", "the output")
    if not keeps_activation:
        output = _logits(draft, output)
    if len(output.shape) > 1:
        draft.refuse(
            f"has shape {output.shape} of one example; end with a vector: a pool or a flatten, and a linear layer"
        )
    if any(map(sum, output.pad)):
        draft.refuse("is padded with zeros; only a convolution reads such")
    if isinstance(output.key, str):
        draft.refuse("is an input as it came; a network has a linear layer at least")
    draft.raise_problems()
    steps = _needed(draft, output)
    draft.raise_problems()
    inputs = {name: shape for name, shape in draft.inputs.items() if any(name in each.reads for each in steps.values())}
    for name in draft.inputs:
        if name not in inputs:
            draft.warn(f"does not depend on the input {name!r}, which is left out")
    layers, weights = _written(tuple(inputs), steps)
    _warn_of_tokens(draft, inputs, layers)
    wrong = [name for name, array in weights.items() if not np.isfinite(array).all()]
    if wrong:
        raise ModelNotSupported(
            [f"{name}: holds numbers that are not finite; import weights that are" for name in wrong]
        )
    imported = Imported(inputs, layers, weights, tuple(draft.warnings))
    _require_accepted(draft, imported, output)
    return imported


def _logits(draft: Draft, output: Value) -> Value:
    step, read = draft.step(output), draft.first_read(output)
    if step is None or read is None or not isinstance(step.layer, wire.Softmax | wire.Sigmoid):
        return output
    if isinstance(step.layer, wire.Sigmoid):
        draft.warn(
            "the last sigmoid is left out: a network that predicts a category gives logits, and its loss applies it"
        )
    elif not isinstance(step.module, nn.LogSoftmax):
        draft.warn(
            "the last softmax is left out: a network that predicts a category gives logits, and its loss applies it"
        )
    return replace(output, key=read.key)


def _needed(draft: Draft, output: Value) -> dict[int, Step]:
    """The steps that the output depends on, in order; twins are settled."""
    needed: set[int] = set()
    ahead: list[int | str] = [output.key]
    while ahead:
        key = ahead.pop()
        if isinstance(key, int) and key not in needed:
            needed.add(key)
            ahead.extend(draft.steps[key].reads)
    steps = {key: draft.steps[key] for key in sorted(needed)}
    for key, step in steps.items():
        draft.place = step.place
        if key in draft.open_ended:
            draft.warn("has no last projection; here it has one, which starts as the identity")
        if isinstance(step.module, nn.LogSoftmax):
            draft.refuse(
                "is a log_softmax within the network; the language has softmax, and log_softmax at the end only"
            )
        both = [each for each in step.twins if each in needed]
        if not both:
            continue
        if isinstance(step.layer, wire.LSTM | wire.GRU | wire.RNN) and not step.layer.bidirectional:
            last = wire.SequencePool(how="last")
            steps[key] = replace(step, layer=last, reads=(both[0],), weights={}, twins=())
        else:
            draft.refuse("is read both as a whole and in part, which would take its weights twice; read one of the two")
    return steps


def _written(inputs: tuple[str, ...], steps: Mapping[int, Step]) -> tuple[tuple[Layer, ...], dict[str, Any]]:
    """The layers, named where one is read from afar or has weights of the source, and the weights by position."""
    first = inputs[0] if len(inputs) == 1 else None
    before: list[int | str | None] = [first, *steps]
    read_from_afar = {
        key
        for previous, step in zip(before, steps.values(), strict=False)
        for key in step.reads
        if step.reads != (previous,)
    }
    names: dict[int | str, str] = {name: name for name in inputs}
    for key, step in steps.items():
        if key in read_from_afar or (step.weights and not wire.is_frozen(step.layer)):
            names[key] = _unlike(_as_name(step.place.path, step.layer.type), set(names.values()))
    layers: list[Layer] = []
    weights: dict[str, Any] = {}
    for position, (key, step) in enumerate(steps.items()):
        reads = None if step.reads == (before[position],) else tuple(names[each] for each in step.reads)
        fields = step.layer.model_dump(exclude={"name", "reads"})
        layers.append(type(step.layer)(**fields, name=names.get(key), reads=reads))
        weights |= {f"layers.{position}.{name}": array for name, array in step.weights.items()}
    return tuple(layers), weights


def _as_name(path: str, otherwise: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", path).strip("-_")
    name = name if name[:1].isalpha() else f"{otherwise}-{name}".strip("-")
    return name[-_NAME_LENGTH:].lstrip("-_0123456789") or otherwise


def _unlike(name: str, others: Collection[Any]) -> str:
    found, count = name, 1
    while found in others:
        count += 1
        found = f"{name}-{count}"
    return found


def _warn_of_tokens(draft: Draft, inputs: Mapping[str, Shape], layers: tuple[Layer, ...]) -> None:
    for name in sorted(draft.tokens & inputs.keys()):
        draft.place = Place(name, "input")
        rows = min(
            each.num_embeddings for each in layers if isinstance(each, wire.Embedding) and _reads(each, name, inputs)
        )
        if inputs[name] in ((), (1,)):
            draft.warn(f"holds an index from 0 to {rows - 1}; declare it as a category of at most {rows} values")
            continue
        draft.warn(
            "holds tokens; in a column of text they are its bytes, each plus 1, and 0 past its end: no tokenizer is imported"
        )
        if rows < TEXT_INDICES:
            draft.warn(
                f"is read by a table of {rows} rows, and a column of text needs {TEXT_INDICES}; give the table so many"
            )


def _reads(layer: Layer, name: str, inputs: Mapping[str, Shape]) -> bool:
    return name in layer.reads if layer.reads is not None else tuple(inputs) == (name,)


def _require_accepted(draft: Draft, imported: Imported, output: Value) -> None:
    """Raise ModelNotSupported where the language refuses the whole, whatever columns it is given."""
    size = math.prod(output.shape)
    draft.place = Place("", "the network")
    try:
        if len(imported.layers) > LAYER_LIMIT:
            raise NotMapped(f"takes {len(imported.layers)} layers, over {LAYER_LIMIT}; import a smaller one")
        measure(
            Architecture(
                inputs={name: _column(draft, name, shape) for name, shape in imported.inputs.items()},
                layers=tuple(_wide(each) for each in imported.layers),
                target=_unlike("target", {*imported.inputs, *(each.name for each in imported.layers)}),
                output=NumberColumn(low=0, high=1)
                if size == 1
                else CategoryColumn(values=tuple(map(str, range(size)))),
                loss="mean_squared_error" if size == 1 else "cross_entropy",
            )
        )
    except (ArchitectureRefused, ValueError) as exc:
        raise ModelNotSupported((*draft.problems, f"{draft.place}: {exc}")) from None


def _column(draft: Draft, name: str, shape: Shape) -> InputColumn:
    if name not in draft.tokens:
        return TensorColumn(shape=shape, low=-1, high=1) if shape else NumberColumn(low=-1, high=1)
    if len(shape) > 1:
        raise NotMapped(f"reads tokens of shape {shape} from {name!r}; a text is one sequence of them")
    return TextColumn(max_length=shape[0]) if shape else CategoryColumn(values=("0", "1"))


def _wide(layer: Layer) -> Layer:
    """An embedding that any column of text fits."""
    if not isinstance(layer, wire.Embedding):
        return layer
    return layer.model_copy(update={"num_embeddings": max(layer.num_embeddings, TEXT_INDICES)})
