"""A network as a picture: its graph from top to bottom, in SVG. Knows the spec and its shapes; nothing of torch or weights.

A layer's row is the length of the longest way to it, and each longest path that is left is a column. Lines run between the rows and
between the columns, so that none crosses a box.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, InputColumn, OutputColumn
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
_TIMES, _DOT = "\u00d7", "\u00b7"
_LINE, _SKIP, _FAINT = "#8593a8", "#8b5cf6", "#64748b"
_SANS = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_LETTER = 0.6
"""How wide a letter is, of the font's size: as wide as in the widest of these fonts, so that text stays in its box in all of them."""

_WIDE, _INSIDE = 252.0, 226.0
_MARGIN, _HEAD, _FOOT, _NARROWEST = 30.0, 92.0, 44.0, 500.0
_TRACK, _COLUMNS_APART, _ROWS_APART = 10.0, 44.0, 46.0
_INPUTS_APART = 3
"""More inputs than these with the same readers are one box."""

_TYPES_TOLD = 40


@dataclass(eq=False, slots=True)
class _Box:
    """An input, a layer with the activations folded into it, or the output; and its place."""

    keys: list[str]
    family: str
    title: str
    name: str = ""
    reads: tuple[str, ...] = ()
    lines: list[str] = field(default_factory=list)
    footer: str = ""
    chips: list[tuple[str, list[str]]] = field(default_factory=list)
    gives: str = ""
    tip: str = ""
    is_join: bool = True
    is_small: bool = False
    """Of one line: its title and its name."""
    row: int = 0
    lane: int = 0
    middle: float = 0.0
    top: float = 0.0

    @property
    def width(self) -> float:
        if not self.is_small:
            return _WIDE
        rows = [sum(width + 6 for _, width, _ in row) for row in _chip_rows(self.chips)]
        return min(_WIDE, max([96.0, _breadth(self.title, 12) + _breadth(self.name, 10) + 40, *(w + 20 for w in rows)]))

    @property
    def height(self) -> float:
        lines = 14.0 if self.is_small else 19.0 + 16 * len(self.lines) + (19.0 if self.footer else 0.0)
        return 16.0 + lines + 24 * len(_chip_rows(self.chips))

    @property
    def bottom(self) -> float:
        return self.top + self.height


@dataclass(eq=False, slots=True)
class _Edge:
    source: _Box
    target: _Box
    is_mask: bool
    points: list[tuple[float, float]]
    kind: str
    """`down` its column, `in` to another column at its end, `out` to another at its start, or a `skip` between columns."""

    @property
    def is_skip(self) -> bool:
        return self.kind == "skip" and not self.is_mask

    @property
    def gutter(self) -> int:
        """Right of the column of that number a skip goes down."""
        return self.source.lane if self.target.lane >= self.source.lane else self.source.lane - 1

    @property
    def is_beside(self) -> bool:
        """A skip that ends at the side of its box, since that is next to the gutter."""
        return self.target.lane in (self.gutter, self.gutter + 1)


def picture(architecture: Architecture) -> str:
    """The network as a self-contained SVG, without script, style sheet, reference or id; the same for the same network.

    All that the spec names is escaped, and what cannot be printed is replaced. Raises ArchitectureRefused where the parts do not fit.
    """
    measured = measure(architecture)
    owners = _owners(architecture, measured)
    boxes = list(dict.fromkeys(owners.values()))
    edges = _placed(boxes, owners)
    width, height = _spread(boxes, edges)
    told = (
        f"{len(measured)} layers, {sum(each.parameters for each in measured):,} parameters, {parameter_words(measured)}"
    )
    types = ", ".join(each.node.layer.type for each in measured[:_TYPES_TOLD])
    more = ", and so on" if len(measured) > _TYPES_TOLD else ""
    title = _cut(f"Predicts {architecture.target}", width - 2 * _MARGIN, size=19)
    total = _cut(told.replace(", ", f" {_DOT} "), width - 2 * _MARGIN, size=12)
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
        *_legend(boxes, edges, middle=width / 2, y=height - _MARGIN - 22),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _owners(architecture: Architecture, measured: Sequence[Measured]) -> dict[str, _Box]:
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
    owners[""] = _Box([], "output", architecture.target, reads=(before,), lines=_column_lines(column), is_join=True)
    owners[""].footer, owners[""].tip = f"by {architecture.loss}", f"{architecture.target}: {column_words(column)}"
    return owners


def _inputs(columns: dict[str, InputColumn], readers: dict[str, list[str]]) -> dict[str, _Box]:
    together: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in columns:
        together[tuple(readers[name])].append(name)
    owners: dict[str, _Box] = {}
    for names in together.values():
        if len(names) > _INPUTS_APART:
            kinds = Counter(columns[name].type for name in names)
            lines = [
                ", ".join(f"{kind} {_TIMES}{count}" for kind, count in kinds.items()),
                *_packed(names[:40], ", ", 3),
            ]
            box = _Box(names, "input", f"{len(names)} inputs", lines=lines, tip=", ".join(names))
            owners |= dict.fromkeys(names, box)
            continue
        for name in names:
            box = _Box([name], "input", name, lines=_column_lines(columns[name]))
            box.gives, box.tip = _shape(column_value(columns[name])), f"{name}: {column_words(columns[name])}"
            owners[name] = box
    return {name: owners[name] for name in columns}


def _layer(measured: Measured) -> _Box:
    node, layer = measured.node, measured.node.layer
    told = [re.sub(r"(?<=\d)x(?=\d)", _TIMES, each.replace("->", "→")) for each in options(layer)]
    parameters = f"{measured.parameters:,} parameters" if measured.parameters else ""
    box = _Box(
        [node.key], state(measured) or "plain", layer.type, node.key, node.reads, is_join=isinstance(layer, _JOINS)
    )
    line = " ".join([layer.type, *told])
    box.is_small = box.family == "plain" and _breadth(line, 12) + _breadth(node.key, 10) < _INSIDE - 16
    if box.is_small:
        box.title = line
    else:
        box.lines = _packed(told, f" {_DOT} ", 3)
    box.footer, box.gives = parameters, _shape(measured.gives)
    box.tip = "; ".join(each for each in (node.where, ", ".join(told), parameters, f"gives {box.gives}") if each)
    return box


def _fold(box: _Box, words: str, key: str) -> None:
    if box.chips and box.chips[-1][0] == words:
        box.chips[-1][1].append(key)
    else:
        box.chips.append((words, [key]))


def _column_lines(column: InputColumn | OutputColumn) -> list[str]:
    if isinstance(column, CategoryColumn):
        return [f"one of {len(column.values):,}", *_packed(column.values[:12], ", ", 2, len(column.values))]
    return _packed([f"{each}" for each in column_words(column).split(", ")], ", ", 2)


def _shape(value: Value) -> str:
    return _TIMES.join(map(str, value.shape)) or "1"


def _placed(boxes: Sequence[_Box], owners: dict[str, _Box]) -> list[_Edge]:
    """Gives each box its row and its column, and says how each line runs."""
    sources = {box: list(dict.fromkeys(owners[name] for name in box.reads)) for box in boxes}
    readers: dict[_Box, list[_Box]] = {box: [] for box in boxes}
    for box in boxes:
        for source in sources[box]:
            readers[source].append(box)
        box.row = max((source.row + 1 for source in sources[box]), default=0)
    left: dict[_Box, int] = {}
    for box in reversed(boxes):
        left[box] = max((left[each] + 1 for each in readers[box]), default=0)
    parents = {box: max(sources[box], key=lambda each: each.row) for box in boxes if sources[box]}
    for box in boxes:
        if not sources[box]:
            box.row = min(each.row for each in readers[box]) - 1
    follows: dict[_Box, _Box] = {}
    for box in boxes:
        children = [each for each in readers[box] if parents[each] is box]
        if children:
            follows[box] = max(children, key=lambda each: left[each])
    _set_lanes(boxes, parents=parents, follows=follows, readers=readers)
    is_followed = set(follows.values())
    edges = []
    for target in boxes:
        for number, source in enumerate(sources[target]):
            if follows.get(source) is target or (source not in follows and source.lane == target.lane):
                kind = "down"
            elif source not in follows:
                kind = "in"
            else:
                kind = "out" if target not in is_followed and parents[target] is source else "skip"
            edges.append(_Edge(source, target, bool(number) and not target.is_join, [], kind))
    return edges


def _set_lanes(
    boxes: Sequence[_Box],
    *,
    parents: dict[_Box, _Box],
    follows: dict[_Box, _Box],
    readers: dict[_Box, list[_Box]],
) -> None:
    """The path to the output is column 0; every other one gets the nearest column that is free where it and its lines are."""
    starts = set(boxes) - set(follows.values())
    paths = []
    for start in (box for box in boxes if box in starts):
        path = [start]
        while path[-1] in follows:
            path.append(follows[path[-1]])
        paths.append(path)
    paths.sort(key=lambda path: (path[-1] is not boxes[-1], -len(path)))
    taken: dict[int, list[tuple[int, int]]] = defaultdict(list)
    lanes: dict[_Box, int] = {}
    for path in paths:
        parent, ends = parents.get(path[0]), readers[path[-1]]
        first = path[0].row if parent is None else parent.row + 1
        last = max((each.row for each in ends), default=path[-1].row)
        near = next((lanes[each] for each in (parent, *ends) if each in lanes), 0)
        free = (
            lane
            for away in range(len(boxes) + 1)
            for lane in (near + away, near - away)
            if all(last < begin or end < first for begin, end in taken[lane])
        )
        lane = next(free)
        taken[lane].append((first, last))
        for box in path:
            box.lane = lanes[box] = lane


def _spread(boxes: Sequence[_Box], edges: Sequence[_Edge]) -> tuple[float, float]:
    """Puts the boxes where rows and columns leave room for the lines between them, and the lines there; answers the size of it all."""
    tracks, levels = _tracks(edges), _levels(edges)
    beside, between = Counter(gutter for gutter, _ in tracks), Counter(gap for gap, *_ in levels)
    for gutter, number in tracks:
        beside[gutter] = max(beside[gutter], tracks[gutter, number] + 1)
    first, last = min(box.lane for box in boxes), max(box.lane for box in boxes)
    wide = {lane: _COLUMNS_APART + _TRACK * max(0, beside[lane] - 1) for lane in range(first - 1, last + 1)}
    wide |= {lane: _TRACK * (beside[lane] + 1) if beside[lane] else 0.0 for lane in (first - 1, last)}
    width = max(_NARROWEST, _WIDE * (last - first + 1) + sum(wide.values()) + 2 * _MARGIN)
    x = (width - _WIDE * (last - first + 1) - sum(wide.values())) / 2 + wide[first - 1]
    lefts = {}
    for lane in range(first, last + 1):
        lefts[lane] = x
        x += _WIDE + wide[lane]
    lefts[first - 1] = lefts[first] - wide[first - 1] - _WIDE
    rows: dict[int, list[_Box]] = defaultdict(list)
    for box in boxes:
        rows[box.row].append(box)
    y, floors = _HEAD, {}
    for row in sorted(rows):
        high = max(box.height for box in rows[row])
        for box in rows[row]:
            box.middle, box.top = lefts[box.lane] + _WIDE / 2, y + (high - box.height) / 2
        floors[row] = y + high
        y += high + _ROWS_APART + _TRACK * max(0, between[row] - 1)
    for edge in edges:
        source, target = edge.source, edge.target
        track = lefts[edge.gutter] + _WIDE + 18 + _TRACK * tracks.get((edge.gutter, source), 0)
        leave = floors[source.row] + 24 + _TRACK * levels.get((source.row, "out", source), 0)
        enter = floors[target.row - 1] + 24 + _TRACK * levels.get((target.row - 1, "in", target), 0)
        edge.points.extend(_way(edge, track=track, leave=leave, enter=enter))
    return width, max(floors.values()) + _FOOT + 2 * _MARGIN


def _tracks(edges: Sequence[_Edge]) -> dict[tuple[int, _Box], int]:
    """Which line of its gutter a skip goes down in: what goes less far is nearer, and skips from one box share a line."""
    spans: dict[tuple[int, _Box], float] = {}
    for edge in edges:
        if edge.kind == "skip":
            place, end = (edge.gutter, edge.source), edge.target.row - (0.0 if edge.is_beside else 0.5)
            spans[place] = max(spans.get(place, 0.0), end)
    tracks: dict[tuple[int, _Box], int] = {}
    taken: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for (gutter, source), end in sorted(spans.items(), key=lambda item: item[1] - item[0][1].row):
        number, begin = 0, source.row + 0.5
        while any(begin <= other and start <= end for start, other in taken[gutter, number]):
            number += 1
        taken[gutter, number].append((begin, end))
        tracks[gutter, source] = number
    return tracks


def _levels(edges: Sequence[_Edge]) -> dict[tuple[int, str, _Box], int]:
    """At which level below a row lines go sideways: first the ones that leave a box of it, then those to a box of the next."""
    leaving = [(each.source.row, "out", each.source) for each in edges if each.kind in ("out", "skip")]
    entering = [
        (each.target.row - 1, "in", each.target)
        for each in edges
        if each.kind == "in" or (each.kind == "skip" and not each.is_beside)
    ]
    count: Counter[int] = Counter()
    levels = {}
    for place in dict.fromkeys((*leaving, *entering)):
        levels[place] = count[place[0]]
        count[place[0]] += 1
    return levels


def _way(edge: _Edge, *, track: float, leave: float, enter: float) -> Iterator[tuple[float, float]]:
    source, target = edge.source, edge.target
    yield source.middle, source.bottom
    if edge.kind == "skip":
        yield source.middle, leave
        yield track, leave
        if edge.is_beside:
            side = target.width / 2 if target.lane == edge.gutter else -target.width / 2
            yield track, target.top + target.height / 2
            yield target.middle + side, target.top + target.height / 2
            return
        yield track, enter
        yield target.middle, enter
    elif edge.kind != "down":
        yield source.middle, leave if edge.kind == "out" else enter
        yield target.middle, leave if edge.kind == "out" else enter
    yield target.middle, target.top


def _lines(edges: Sequence[_Edge]) -> Iterator[str]:
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


def _drawn(box: _Box) -> Iterator[str]:
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
        title = _cut(box.title, _INSIDE, size=13.5)
        name = _cut(box.name, _INSIDE - _breadth(title, 14.5) - 8, size=11)
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
    for row in _chip_rows(box.chips):
        x = box.middle - sum(width + 6 for _, width, _ in row) / 2 + 3 if box.is_small else left + 12
        for words, width, keys in row:
            yield f'<g data-layers="{_safe(" ".join(keys))}">'
            yield _rectangle((x, y + 2), width, 18, rx=9, paint=f'fill="#ffffff" stroke="{border}"')
            yield _text((x + width / 2, y + 14.5), words, size=10.5, fill=ink, anchor="middle") + "</g>"
            x += width + 6
        y += 24
    yield _text((box.middle + 7, box.bottom + 14), box.gives, size=10, fill=_FAINT) + "</g>"


def _legend(boxes: Sequence[_Box], edges: Sequence[_Edge], *, middle: float, y: float) -> Iterator[str]:
    families = {box.family for box in boxes}
    names = {name: words for name, words in _FAMILIES.items() if name in families}
    x = middle - sum(_breadth(words, 10) + 34 for words in names.values()) / 2 + 6
    for name, words in names.items():
        fill, border, _ = _COLOURS[name]
        yield _rectangle((x, y - 6), 16, 12, rx=4, paint=f'fill="{fill}" stroke="{border}"')
        yield _text((x + 22, y + 4), words, size=10, fill=_FAINT)
        x += _breadth(words, 10) + 34
    is_there = {
        "a skip": any(each.is_skip for each in edges),
        "which positions are there": any(each.is_mask for each in edges),
    }
    lines = [words for words, is_told in is_there.items() if is_told]
    x = middle - sum(_breadth(words, 10) + 44 for words in lines) / 2 + 6
    for words in lines:
        paint = f'stroke="{_SKIP}"' if words == "a skip" else f'stroke="{_LINE}" stroke-dasharray="4 4"'
        yield f'<path d="M{_at(x)} {_at(y + 22)} h26" stroke-width="1.6" {paint}/>'
        yield _text((x + 32, y + 26), words, size=10, fill=_FAINT)
        x += _breadth(words, 10) + 44


def _chip_rows(chips: Iterable[tuple[str, list[str]]]) -> list[list[tuple[str, float, list[str]]]]:
    rows: list[list[tuple[str, float, list[str]]]] = []
    for words, keys in chips:
        told = words if len(keys) == 1 else f"{words} {_TIMES}{len(keys)}"
        width = _breadth(told, 10.5) + 16
        if not rows or sum(each + 6 for _, each, _ in rows[-1]) + width > _INSIDE:
            rows.append([])
        rows[-1].append((told, width, keys))
    return rows


def _packed(pieces: Iterable[str], joiner: str, most: int, count: int = 0) -> list[str]:
    """The pieces in as few lines of a box as they take, at most so many; an ellipsis where they, or the `count` there are, go on."""
    lines: list[str] = []
    told = 0
    for piece in pieces:
        words = _cut(piece, _INSIDE - 20, size=11)
        if lines and _breadth(lines[-1] + joiner + words, 11) <= _INSIDE - 20:
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


def _breadth(words: str, size: float) -> float:
    return size * _LETTER * sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in words)


def _cut(words: str, width: float, *, size: float) -> str:
    if not words or _breadth(words, size) <= width:
        return words
    kept = words[: max(0, int(width / (size * _LETTER)) - 1)]
    while kept and _breadth(kept + "…", size) > width:
        kept = kept[:-1]
    return kept + "…"
