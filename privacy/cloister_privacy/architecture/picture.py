"""A network as a picture: its graph from top to bottom, in SVG. Knows the spec and its shapes; nothing of torch or weights.

Every longest path of layers is a column; a layer's row is the length of the longest way to it. Lines run between rows and beside
columns, so none crosses a box.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn
from cloister_privacy.architecture.shapes import Measured, column_value, measure
from cloister_privacy.architecture.summary import FRONT_ENDS, column_words, options, parameter_words, state

__all__ = ["picture"]

_ACTIVATIONS = frozenset(
    {wire.ReLU, wire.LeakyReLU, wire.ELU, wire.GELU, wire.SiLU, wire.Sigmoid, wire.Tanh, wire.Softmax, wire.Dropout}
)
_JOINS = (wire.Encode, wire.Add, wire.Multiply, wire.Concatenate)

_SANS = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_LETTER = 0.6  # of the font's size: about the widest of those fonts, so that text stays in its box in all of them

_COLOURS = {
    "input": ("#eef2f7", "#64748b", "#334155"),
    "fixed": ("#fef4dd", "#c98a1b", "#7a4d05"),
    "trained": ("#e8f0fe", "#4c7fe0", "#1c3f94"),
    "frozen": ("#eff6fb", "#8fb0d0", "#3f6485"),
    "plain": ("#ffffff", "#b4bdca", "#475569"),
    "output": ("#e6f6ee", "#35a06b", "#14613c"),
}
"""Of each family: what a box is filled with, its border, its text."""

_LEGEND = {
    "input": "input",
    "fixed": "fixed front end",
    "trained": "trained",
    "frozen": "frozen",
    "plain": "nothing to train",
    "output": "what is predicted",
}
_LINE, _SKIP, _FAINT = "#8492a6", "#8b5cf6", "#64748b"
_WIDTH, _INSIDE = 252.0, 228.0
_MARGIN, _HEAD = 28.0, 96.0
_TRACK = 10.0
_COLUMNS_APART = 44.0
_ROWS_APART = 46.0
_INPUTS_SHOWN = 5
"""More inputs than these, with the same readers, are one box."""


@dataclass(slots=True)
class _Box:
    """A layer with the activations folded into it, an input or the output; and where it is put."""

    keys: list[str]
    family: str
    title: str
    name: str
    reads: list[str]
    lines: list[str] = field(default_factory=list)
    footer: str = ""
    chips: list[tuple[str, list[str]]] = field(default_factory=list)
    gives: str = ""
    tip: str = ""
    is_join: bool = True
    row: int = 0
    lane: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def is_small(self) -> bool:
        return self.family == "plain" and not self.lines

    @property
    def height(self) -> float:
        chips = 24.0 * len(_chip_rows(self.chips))
        if self.is_small:
            return 32.0 + chips
        return 32.0 + 16.0 * len(self.lines) + (18.0 if self.footer else 0.0) + chips + (4.0 if chips else 0.0)

    @property
    def bottom(self) -> float:
        return self.y + self.height


def picture(architecture: Architecture) -> str:
    """The network as a self-contained SVG: no script, no style sheet, no reference, no id; the same text for the same network.

    Whatever the spec names is escaped, and what cannot be printed is replaced. Raises ArchitectureRefused where the parts do not fit.
    """
    measured = measure(architecture)
    boxes = _boxes(architecture, measured)
    edges = [(source, target) for target in boxes.values() for source in _sources(boxes, target)]
    _set_rows(boxes)
    paths = _paths(boxes, edges)
    _set_lanes(paths, edges)
    routes = _Routes(list(boxes.values()), edges, paths)
    return _drawn(architecture, measured, routes)
