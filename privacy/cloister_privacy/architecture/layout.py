"""Where the boxes of a picture lie, and how the lines between them run. Knows sizes and who reads whom; nothing of SVG or of layers.

A box's row is the length of the longest way to it, and each longest path that is left is a column. Lines run between the rows and
between the columns, so that none crosses a box.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

__all__ = ["INSIDE", "LETTER", "MARGIN", "TIMES", "Box", "Edge", "breadth", "chip_rows", "placed", "spread"]

TIMES = "\u00d7"
LETTER = 0.6
"""How wide a letter is, of the font's size: as in the widest of the fonts that are named, so that text stays in its box in all."""

_WIDE, INSIDE = 252.0, 226.0
MARGIN, _HEAD, _FOOT, _NARROWEST = 30.0, 92.0, 44.0, 500.0
_TRACK, _COLUMNS_APART, _ROWS_APART = 10.0, 44.0, 46.0


@dataclass(eq=False, slots=True)
class Box:
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
        rows = [sum(width + 6 for _, width, _ in row) for row in chip_rows(self.chips)]
        return min(_WIDE, max([96.0, breadth(self.title, 12) + breadth(self.name, 10) + 40, *(w + 20 for w in rows)]))

    @property
    def height(self) -> float:
        lines = 14.0 if self.is_small else 19.0 + 16 * len(self.lines) + (19.0 if self.footer else 0.0)
        return 16.0 + lines + 24 * len(chip_rows(self.chips))

    @property
    def bottom(self) -> float:
        return self.top + self.height


@dataclass(eq=False, slots=True)
class Edge:
    source: Box
    target: Box
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


def placed(boxes: Sequence[Box], owners: dict[str, Box]) -> list[Edge]:
    """Gives each box its row and its column, and says how each line runs."""
    sources = {box: list(dict.fromkeys(owners[name] for name in box.reads)) for box in boxes}
    readers: dict[Box, list[Box]] = {box: [] for box in boxes}
    for box in boxes:
        for source in sources[box]:
            readers[source].append(box)
        box.row = max((source.row + 1 for source in sources[box]), default=0)
    left: dict[Box, int] = {}
    for box in reversed(boxes):
        left[box] = max((left[each] + 1 for each in readers[box]), default=0)
    parents = {box: max(sources[box], key=lambda each: each.row) for box in boxes if sources[box]}
    for box in boxes:
        if not sources[box]:
            box.row = min(each.row for each in readers[box]) - 1
    follows: dict[Box, Box] = {}
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
            edges.append(Edge(source, target, bool(number) and not target.is_join, [], kind))
    return edges


def _set_lanes(
    boxes: Sequence[Box],
    *,
    parents: dict[Box, Box],
    follows: dict[Box, Box],
    readers: dict[Box, list[Box]],
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
    lanes: dict[Box, int] = {}
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


def spread(boxes: Sequence[Box], edges: Sequence[Edge]) -> tuple[float, float]:
    """Puts the boxes where rows and columns leave room for the lines between them, and the lines there; answers the size of it all."""
    tracks, levels = _tracks(edges), _levels(edges)
    beside, between = Counter(gutter for gutter, _ in tracks), Counter(gap for gap, *_ in levels)
    for gutter, number in tracks:
        beside[gutter] = max(beside[gutter], tracks[gutter, number] + 1)
    first, last = min(box.lane for box in boxes), max(box.lane for box in boxes)
    wide = {lane: _COLUMNS_APART + _TRACK * max(0, beside[lane] - 1) for lane in range(first - 1, last + 1)}
    wide |= {lane: _TRACK * (beside[lane] + 1) if beside[lane] else 0.0 for lane in (first - 1, last)}
    width = max(_NARROWEST, _WIDE * (last - first + 1) + sum(wide.values()) + 2 * MARGIN)
    x = (width - _WIDE * (last - first + 1) - sum(wide.values())) / 2 + wide[first - 1]
    lefts = {}
    for lane in range(first, last + 1):
        lefts[lane] = x
        x += _WIDE + wide[lane]
    lefts[first - 1] = lefts[first] - wide[first - 1] - _WIDE
    rows: dict[int, list[Box]] = defaultdict(list)
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
    return width, max(floors.values()) + _FOOT + 2 * MARGIN


def _tracks(edges: Sequence[Edge]) -> dict[tuple[int, Box], int]:
    """Which line of its gutter a skip goes down in: what goes less far is nearer, and skips from one box share a line."""
    spans: dict[tuple[int, Box], float] = {}
    for edge in edges:
        if edge.kind == "skip":
            place, end = (edge.gutter, edge.source), edge.target.row - (0.0 if edge.is_beside else 0.5)
            spans[place] = max(spans.get(place, 0.0), end)
    tracks: dict[tuple[int, Box], int] = {}
    taken: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for (gutter, source), end in sorted(spans.items(), key=lambda item: item[1] - item[0][1].row):
        number, begin = 0, source.row + 0.5
        while any(begin <= other and start <= end for start, other in taken[gutter, number]):
            number += 1
        taken[gutter, number].append((begin, end))
        tracks[gutter, source] = number
    return tracks


def _levels(edges: Sequence[Edge]) -> dict[tuple[int, str, Box], int]:
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


def _way(edge: Edge, *, track: float, leave: float, enter: float) -> Iterator[tuple[float, float]]:
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


def chip_rows(chips: Iterable[tuple[str, list[str]]]) -> list[list[tuple[str, float, list[str]]]]:
    rows: list[list[tuple[str, float, list[str]]]] = []
    for words, keys in chips:
        told = words if len(keys) == 1 else f"{words} {TIMES}{len(keys)}"
        width = breadth(told, 10.5) + 16
        if not rows or sum(each + 6 for _, each, _ in rows[-1]) + width > INSIDE:
            rows.append([])
        rows[-1].append((told, width, keys))
    return rows


def breadth(words: str, size: float) -> float:
    return size * LETTER * sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in words)
