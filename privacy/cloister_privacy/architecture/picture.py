"""A network as a picture: its graph from top to bottom, in SVG. Knows the spec and its shapes; nothing of torch or weights.

Where boxes and lines lie: layout.py.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, InputColumn, OutputColumn
from cloister_privacy.architecture.layout import (
    INSIDE,
    LETTER,
    MARGIN,
    TIMES,
    Box,
    Edge,
    breadth,
    chip_rows,
    placed,
    spread,
)
from cloister_privacy.architecture.shapes import Measured, Value, column_value, measure
from cloister_privacy.architecture.summary import column_words, options, parameter_words, state

__all__ = ["picture"]

_ACTIVATIONS = frozenset(
    {wire.ReLU, wire.LeakyReLU, wire.ELU, wire.GELU, wire.SiLU, wire.Sigmoid, wire.Tanh, wire.Softmax, wire.Dropout}
)
_JOINS = (wire.Encode, wire.Add, wire.Multiply, wire.Concatenate)

_COLOURS = {
    "input": ("#eef2f7", "#7c8ba1", "#334155"),
    "fixed": ("#fdf3dc", "#cf9a35", "#7a4d05"),
    "trained": ("#e8f0fe", "#5b8def", "#1c3f94"),
    "frozen": ("#f1f6fa", "#93aec6", "#41627f"),
    "plain": ("#ffffff", "#b8c2cf", "#475569"),
    "output": ("#e5f6ec", "#3fa872", "#14613c"),
}
"""Of each family: a box's inside, its border, its text."""

_FAMILIES = {
    "input": "input",
    "fixed": "fixed front end",
    "trained": "trained",
    "frozen": "frozen",
    "plain": "no weights",
    "output": "predicted",
}
_DOT = "\u00b7"
_LINE, _SKIP, _FAINT = "#8593a8", "#8b5cf6", "#64748b"
_SANS = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_INPUTS_APART = 3
"""More inputs than these with the same readers are one box."""

_TYPES_TOLD = 40


def picture(architecture: Architecture) -> str:
    """The network as a self-contained SVG, without script, style sheet, reference or id; the same for the same network.

    All that the spec names is escaped, and what cannot be printed is replaced. Raises ArchitectureRefused where the parts do not fit.
    """
    measured = measure(architecture)
    owners = _owners(architecture, measured)
    boxes = list(dict.fromkeys(owners.values()))
    edges = placed(boxes, owners)
    width, height = spread(boxes, edges)
    told = (
        f"{len(measured)} layers, {sum(each.parameters for each in measured):,} parameters, {parameter_words(measured)}"
    )
    types = ", ".join(each.node.layer.type for each in measured[:_TYPES_TOLD])
    more = ", and so on" if len(measured) > _TYPES_TOLD else ""
    title = _cut(f"Predicts {architecture.target}", width - 2 * MARGIN, size=19)
    total = _cut(told.replace(", ", f" {_DOT} "), width - 2 * MARGIN, size=12)
    size = f'width="{_at(width)}" height="{_at(height)}"'
    frame = f"0 0 {_at(width)} {_at(height)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="{frame}" {size} font-family="{_SANS}">',
        f"<title>A network that predicts {_safe(architecture.target)}</title>",
        f"<desc>{told}. From its {len(architecture.inputs)} inputs down: {types}{more}.</desc>",
        f'<rect {size} fill="#fcfdfe"/>',
        _text((width / 2, 42), title, size=19, fill="#1e293b", anchor="middle", is_bold=True),
        _text((width / 2, 64), total, size=12, fill=_FAINT, anchor="middle"),
        *_lines(edges),
        *(line for box in boxes for line in _drawn(box)),
        *_legend(boxes, edges, middle=width / 2, y=height - MARGIN - 22),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _owners(architecture: Architecture, measured: Sequence[Measured]) -> dict[str, Box]:
    """The box of each column and layer, in their order, and of the output last."""
    readers: dict[str, list[str]] = defaultdict(list)
    for each in measured:
        for name in each.node.reads:
            readers[name].append(each.node.key)
    owners = _inputs(architecture.inputs, readers)
    before = ""
    for each in measured:
        key, layer = each.node.key, each.node.layer
        is_folded = layer.name is None and type(layer) in _ACTIVATIONS and each.node.reads == (before,)
        if is_folded and len(readers[before]) == 1:
            owners[key] = owners[before]
            _fold(owners[key], " ".join([layer.type, *options(layer)]), key)
        else:
            owners[key] = _layer(each)
        before = key
    column = architecture.output
    owners[""] = Box([], "output", architecture.target, reads=(before,), lines=_column_lines(column), is_join=True)
    owners[""].footer, owners[""].tip = f"by {architecture.loss}", f"{architecture.target}: {column_words(column)}"
    return owners


def _inputs(columns: dict[str, InputColumn], readers: dict[str, list[str]]) -> dict[str, Box]:
    together: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in columns:
        together[tuple(readers[name])].append(name)
    owners: dict[str, Box] = {}
    for names in together.values():
        if len(names) > _INPUTS_APART:
            kinds = Counter(columns[name].type for name in names)
            lines = [
                ", ".join(f"{kind} {TIMES}{count}" for kind, count in kinds.items()),
                *_packed(names[:40], ", ", 3),
            ]
            box = Box(names, "input", f"{len(names)} inputs", lines=lines, tip=", ".join(names))
            owners |= dict.fromkeys(names, box)
            continue
        for name in names:
            box = Box([name], "input", name, lines=_column_lines(columns[name]))
            box.gives, box.tip = _shape(column_value(columns[name])), f"{name}: {column_words(columns[name])}"
            owners[name] = box
    return {name: owners[name] for name in columns}


def _layer(measured: Measured) -> Box:
    node, layer = measured.node, measured.node.layer
    told = [re.sub(r"(?<=\d)x(?=\d)", TIMES, each.replace("->", "→")) for each in options(layer)]
    parameters = f"{measured.parameters:,} parameters" if measured.parameters else ""
    box = Box(
        [node.key], state(measured) or "plain", layer.type, node.key, node.reads, is_join=isinstance(layer, _JOINS)
    )
    line = " ".join([layer.type, *told])
    box.is_small = box.family == "plain" and breadth(line, 12) + breadth(node.key, 10) < INSIDE - 16
    if box.is_small:
        box.title = line
    else:
        box.lines = _packed(told, f" {_DOT} ", 3)
    box.footer, box.gives = parameters, _shape(measured.gives)
    box.tip = "; ".join(each for each in (node.where, ", ".join(told), parameters, f"gives {box.gives}") if each)
    return box


def _fold(box: Box, words: str, key: str) -> None:
    if box.chips and box.chips[-1][0] == words:
        box.chips[-1][1].append(key)
    else:
        box.chips.append((words, [key]))


def _column_lines(column: InputColumn | OutputColumn) -> list[str]:
    if isinstance(column, CategoryColumn):
        return [f"one of {len(column.values):,}", *_packed(column.values[:12], ", ", 2, len(column.values))]
    return _packed([f"{each}" for each in column_words(column).split(", ")], ", ", 2)


def _shape(value: Value) -> str:
    return TIMES.join(map(str, value.shape)) or "1"


def _lines(edges: Sequence[Edge]) -> Iterator[str]:
    heads = {}
    for edge in sorted(edges, key=lambda each: each.kind != "skip"):
        colour = _SKIP if edge.is_skip else _LINE
        *_, (x0, y0), (x1, y1) = edge.points
        right, down = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        dashes = ' stroke-dasharray="4 4"' if edge.is_mask else ""
        way = _rounded([*edge.points[:-1], (x1 - 5 * right, y1 - 5 * down)])
        yield f'<path d="{way}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>'
        corners = ((x1, y1), *((x1 - 8 * right + s * 4.5 * down, y1 - 8 * down + s * 4.5 * right) for s in (1, -1)))
        heads[x1, y1] = f'<path d="M{" L".join(f"{_at(x)} {_at(y)}" for x, y in corners)} Z" fill="{colour}"/>'
    yield from heads.values()


def _rounded(points: Sequence[tuple[float, float]]) -> str:
    """Straight lines whose corners are round."""
    told = [f"M{_at(points[0][0])} {_at(points[0][1])}"]
    for before, (x, y), after in zip(points, points[1:], points[2:], strict=False):
        ends = []
        for other_x, other_y in (before, after):
            long = abs(other_x - x) + abs(other_y - y)
            part = min(9.0, long / 2) / long if long else 0.0
            ends.append((x + (other_x - x) * part, y + (other_y - y) * part))
        (x0, y0), (x1, y1) = ends
        told.append(f"L{_at(x0)} {_at(y0)} Q{_at(x)} {_at(y)} {_at(x1)} {_at(y1)}")
    return " ".join([*told, f"L{_at(points[-1][0])} {_at(points[-1][1])}"])


def _drawn(box: Box) -> Iterator[str]:
    fill, border, ink = _COLOURS[box.family]
    left, right, y = box.middle - box.width / 2, box.middle + box.width / 2, box.top
    dashes = ' stroke-dasharray="5 3"' if box.family == "frozen" else ""
    yield f'<g data-layers="{_safe(" ".join(box.keys))}"><title>{_safe(box.tip)}</title>'
    yield _rectangle(
        (left, y), box.width, box.height, rx=15 if box.is_small else 8, paint=f'fill="{fill}" stroke="{border}"{dashes}'
    )
    if box.is_small:
        yield _text((left + 16, y + 20), box.title, size=12, fill=ink)
        yield _text((right - 16, y + 20), box.name, size=10, fill=_FAINT, anchor="end")
        y += 26
    else:
        title = _cut(box.title, INSIDE, size=13.5)
        name = _cut(box.name, INSIDE - breadth(title, 14.5) - 8, size=11)
        yield _text((left + 13, y + 22), title, size=13.5, fill=ink, is_bold=True)
        yield _text((right - 13, y + 22), name, size=11, fill=_FAINT, anchor="end")
        y += 23
        for line in box.lines:
            y += 16
            yield _text((left + 13, y), line, size=11, fill=ink)
        if box.footer:
            y += 19
            yield _text((left + 13, y), box.footer, size=11, fill=ink, is_bold=True)
            if box.family == "frozen":
                yield _text((right - 13, y), "frozen", size=11, fill=ink, anchor="end", is_bold=True)
        y += 6
    for row in chip_rows(box.chips):
        x = box.middle - sum(width + 6 for _, width, _ in row) / 2 + 3 if box.is_small else left + 12
        for words, width, keys in row:
            yield f'<g data-layers="{_safe(" ".join(keys))}">'
            yield _rectangle((x, y + 2), width, 18, rx=9, paint=f'fill="#ffffff" stroke="{border}"')
            yield _text((x + width / 2, y + 14.5), words, size=10.5, fill=ink, anchor="middle") + "</g>"
            x += width + 6
        y += 24
    yield _text((box.middle + 7, box.bottom + 14), box.gives, size=10, fill=_FAINT) + "</g>"


def _legend(boxes: Sequence[Box], edges: Sequence[Edge], *, middle: float, y: float) -> Iterator[str]:
    families = {box.family for box in boxes}
    names = {name: words for name, words in _FAMILIES.items() if name in families}
    x = middle - sum(breadth(words, 10) + 34 for words in names.values()) / 2 + 6
    for name, words in names.items():
        fill, border, _ = _COLOURS[name]
        yield _rectangle((x, y - 6), 16, 12, rx=4, paint=f'fill="{fill}" stroke="{border}"')
        yield _text((x + 22, y + 4), words, size=10, fill=_FAINT)
        x += breadth(words, 10) + 34
    is_there = {
        "a skip": any(each.is_skip for each in edges),
        "which positions are there": any(each.is_mask for each in edges),
    }
    lines = [words for words, is_told in is_there.items() if is_told]
    x = middle - sum(breadth(words, 10) + 44 for words in lines) / 2 + 6
    for words in lines:
        paint = f'stroke="{_SKIP}"' if words == "a skip" else f'stroke="{_LINE}" stroke-dasharray="4 4"'
        yield f'<path d="M{_at(x)} {_at(y + 22)} h26" stroke-width="1.6" {paint}/>'
        yield _text((x + 32, y + 26), words, size=10, fill=_FAINT)
        x += breadth(words, 10) + 44


def _packed(pieces: Iterable[str], joiner: str, most: int, count: int = 0) -> list[str]:
    """The pieces in as few lines of a box as they take, at most so many; an ellipsis where they, or the `count` there are, go on."""
    lines: list[str] = []
    told = 0
    for piece in pieces:
        words = _cut(piece, INSIDE - 20, size=11)
        if lines and breadth(lines[-1] + joiner + words, 11) <= INSIDE - 20:
            lines[-1] += joiner + words
        elif len(lines) < most:
            lines.append(words)
        else:
            break
        told += 1
    if lines and told < max(count, len(list(pieces))):
        lines[-1] += " …"
    return lines


def _rectangle(corner: tuple[float, float], width: float, height: float, *, rx: float, paint: str) -> str:
    size = f'width="{_at(width)}" height="{_at(height)}"'
    return f'<rect x="{_at(corner[0])}" y="{_at(corner[1])}" {size} rx="{rx}" stroke-width="1.3" {paint}/>'


def _text(
    place: tuple[float, float], words: str, *, size: float, fill: str, anchor: str = "start", is_bold: bool = False
) -> str:
    if not words:
        return ""
    weight = ' font-weight="600"' if is_bold else ""
    where = f'x="{_at(place[0])}" y="{_at(place[1])}" text-anchor="{anchor}"'
    return f'<text {where} font-size="{size:g}" fill="{fill}"{weight}>{_safe(words)}</text>'


def _at(number: float) -> str:
    return f"{number:.10g}" if number == int(number) else f"{number:.1f}"


def _safe(words: str) -> str:
    return escape(_printable(words))


def _printable(words: str) -> str:
    """No control characters, which XML cannot hold, and none that turn the direction of writing."""
    return "".join(each if each.isprintable() else "\ufffd" for each in words)


def _cut(words: str, width: float, *, size: float) -> str:
    if not words or breadth(words, size) <= width:
        return words
    kept = words[: max(0, int(width / (size * LETTER)) - 1)]
    while kept and breadth(kept + "…", size) > width:
        kept = kept[:-1]
    return kept + "…"
