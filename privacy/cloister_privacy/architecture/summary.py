"""A network as a plain table for people. Knows the spec and its shapes; nothing of torch, weights or pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, assert_never

from cloister.wire.architecture import Architecture
from cloister.wire.columns import (
    AudioColumn,
    CategoryColumn,
    InputColumn,
    NumberColumn,
    OutputColumn,
    TensorColumn,
    TextColumn,
)
from cloister.wire.layers import Layer, is_frozen
from cloister_privacy.architecture.graph import Node
from cloister_privacy.architecture.shapes import Measured, measure

__all__ = ["column_words", "options", "parameter_words", "state", "summary"]

_FRONT_ENDS = frozenset({"encode", "rescale", "scattering", "log_mel", "hashed_text"})
"""Layers that make features by declared numbers alone."""

_WIDTH = 120
_BETWEEN = 2
_INPUTS_SHOWN = 24
_READS_SHOWN = 6
_VALUES_WIDE = 60
_PLACE = frozenset({"type", "name", "reads", "frozen"})
"""What every layer has, or every one with weights; told apart from the options."""

_PAIRS = {
    "in_features": "out_features",
    "in_channels": "out_channels",
    "input_size": "hidden_size",
    "num_embeddings": "embedding_dim",
}
"""Options that are told as one, `64 -> 10`."""


def summary(architecture: Architecture) -> str:
    """A table of the network: each layer, its options, what it reads and gives, its parameters and whether they are trained.

    ASCII, at most 120 wide; a cell that is too long goes on in the next line. Raises ArchitectureRefused where the parts do not fit.
    """
    measured = measure(architecture)
    inputs = [("input", "what it holds"), *_input_rows(architecture)]
    layers = [
        ("layer", "type and options", "reads", "shape", "parameters", ""),
        *(_row(each, architecture) for each in measured),
    ]
    total = ("total", parameter_words(measured), "", "", f"{sum(each.parameters for each in measured):,}", "")
    head, *body, last = _lines([*layers, total], is_right=(4,))
    rule = "-" * max(map(len, (head, *body, last)))
    goal = f"{architecture.target}: {column_words(architecture.output)}, by {architecture.loss}"
    target = textwrap.wrap(f"target  {goal}", _WIDTH, subsequent_indent=" " * 8)
    told = [*_lines(inputs), "", head, rule, *body, rule, last, "", *target]
    return "\n".join(line.rstrip() for line in told) + "\n"


def options(layer: Layer) -> tuple[str, ...]:
    """What the layer's own fields say, in ASCII; those that may be left out only where they differ from what they are by default."""
    told = []
    fields = type(layer).model_fields
    given = {name: getattr(layer, name) for name in fields if name not in _PLACE}
    for name, value in given.items():
        if name in _PAIRS and _PAIRS[name] in given:
            told.append(f"{value} -> {given[_PAIRS[name]]}")
        elif not any(name == second and first in given for first, second in _PAIRS.items()) and (
            fields[name].is_required() or value != fields[name].get_default(call_default_factory=True)
        ):
            told.append(_option(name, value))
    return tuple(told)


def state(measured: Measured) -> str:
    """`trained`, `frozen`, `fixed`, or nothing of a layer that has nothing to train."""
    if measured.parameters:
        return "frozen" if is_frozen(measured.node.layer) else "trained"
    return "fixed" if measured.node.layer.type in _FRONT_ENDS else ""


def parameter_words(measured: Sequence[Measured]) -> str:
    """How many parameters are trained, and how many are frozen."""
    frozen = sum(each.parameters for each in measured if state(each) == "frozen")
    trained = sum(each.parameters for each in measured) - frozen
    return f"{trained:,} trained, {frozen:,} frozen" if frozen else "all trained"


def column_words(column: InputColumn | OutputColumn) -> str:
    """What a column holds, in ASCII and some words."""
    match column:
        case TensorColumn():
            return f"tensor {tuple(column.shape)} of {column.dtype}, {column.low:g} to {column.high:g}"
        case NumberColumn():
            return f"number, {column.low:g} to {column.high:g}"
        case CategoryColumn():
            return f"one of {len(column.values)}: {_values(column.values)}"
        case TextColumn():
            return f"text of at most {column.max_length:,} bytes"
        case AudioColumn():
            return f"audio of at most {column.max_samples:,} samples, {column.rate:,} a second"
        case _:
            assert_never(column)


def _values(values: Sequence[str]) -> str:
    told: list[str] = []
    for value in values:
        words = ascii(value)
        if sum(map(len, told)) + 2 * len(told) + len(words) > _VALUES_WIDE:
            break
        told.append(words)
    more = len(values) - len(told)
    if more:
        told.append(f"and {more} more" if told else f"{ascii(values[0])[:_VALUES_WIDE]}..., and others")
    return ", ".join(told)


def _option(name: str, value: Any) -> str:
    match value:
        case True:
            return name
        case False:
            return f"no {name}"
        case float():
            return f"{name} {value:g}"
        case tuple():
            return f"{name} {(',' if name == 'dims' else 'x').join(map(str, value))}"
        case _:
            return ascii(f"{name} {value}")[1:-1]


def _input_rows(architecture: Architecture) -> list[tuple[str, str]]:
    rows = [(name, column_words(column)) for name, column in architecture.inputs.items()]
    if len(rows) <= _INPUTS_SHOWN:
        return rows
    return [*rows[: _INPUTS_SHOWN - 1], ("...", f"and {len(rows) - _INPUTS_SHOWN + 1} more inputs")]


def _row(measured: Measured, architecture: Architecture) -> tuple[str, ...]:
    layer = measured.node.layer
    words = ", ".join(options(layer))
    parameters = f"{measured.parameters:,}" if measured.parameters else ""
    reads = _reads(measured.node, architecture)
    return measured.node.key, f"{layer.type} {words}", reads, str(measured.gives.shape), parameters, state(measured)


def _reads(node: Node, architecture: Architecture) -> str:
    if len(node.reads) > 1 and node.reads == tuple(architecture.inputs):
        return "every input"
    if len(node.reads) <= _READS_SHOWN:
        return ", ".join(node.reads)
    shown = node.reads[: _READS_SHOWN - 2]
    return f"{', '.join(shown)} and {len(node.reads) - len(shown)} more"


def _lines(rows: Sequence[tuple[str, ...]], is_right: Sequence[int] = ()) -> list[str]:
    """The rows aligned, in lines of the table's width at most: the widest column gives way first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + _BETWEEN * (len(widths) - 1) > _WIDTH:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in rows:
        cells = [
            textwrap.wrap(cell, width, break_on_hyphens=False) or [""] for cell, width in zip(row, widths, strict=True)
        ]
        for at in range(max(map(len, cells))):
            parts = [cell[at] if at < len(cell) else "" for cell in cells]
            aligned = [
                part.rjust(width) if number in is_right else part.ljust(width)
                for number, (part, width) in enumerate(zip(parts, widths, strict=True))
            ]
            lines.append((" " * _BETWEEN).join(aligned))
    return lines
