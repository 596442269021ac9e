"""What is left of budgets over time as a picture: a self-contained SVG. Knows names, times and numbers; nothing of ledgers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape

__all__ = ["Line", "Step", "burn_down", "printable"]

_WIDTH, _HEIGHT = 720.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 24.0, 44.0, 34.0
_NOW = 0.04
"""The share of the width that stands for now, behind the last step."""

_COLOURS = ("#3b82f6", "#d97706", "#059669", "#db2777", "#8b5cf6", "#ef4444")
"""Each reads on white and on black; all else is in the colour of the text around the picture."""

_DASHES = ("", "7 3", "2 3")
"""Tell lines of one colour apart."""

_SANS = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_LETTER = 0.58
"""About how wide a letter is, in its own size."""

_MOST_DOTS = 400
_MOST_NAMED = 24


@dataclass(frozen=True, slots=True)
class Step:
    """What is left from this time on, and what happened then."""

    time: datetime
    left: float
    what: str


@dataclass(frozen=True, slots=True)
class Line:
    """What is left of one thing: its steps in their order, and at last now."""

    name: str
    steps: tuple[Step, ...]
    now: float


def burn_down(lines: Sequence[Line], caps: Sequence[Step], *, title: str, told: str) -> str:
    """The lines and, dashed, the cap over time, as an SVG without script, style sheet, reference or id, for light pages and dark ones.

    All names are escaped, and what cannot be printed is replaced. `told` says in a sentence what is seen. `caps` holds at least one
    step, which is the earliest time of all.
    """
    rows = list(_rows([line.name for line in lines]))
    height = _HEIGHT + 18 * len(rows)
    plot = _Plot.of(lines, caps)
    size, frame = f'width="{_WIDTH:g}" height="{height:g}"', f'viewBox="0 0 {_WIDTH:g} {height:g}"'
    look = f'font-family="{_SANS}" font-size="11" fill="currentColor"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {frame} {size} {look}>',
        f"<title>{_safe(title)}</title>",
        f"<desc>{_safe(told)}</desc>",
        f'<text x="{_LEFT:g}" y="24" font-size="14" font-weight="600">{_safe(title)}</text>',
        *plot.axes(),
        plot.path(caps, end=_WIDTH - _RIGHT, paint='stroke="currentColor" stroke-dasharray="4 4"', opacity=0.6),
    ]
    for place, line in enumerate(lines):
        paint = _paint(place)
        if line.steps:
            parts.append(plot.path(line.steps, end=plot.x(plot.last), paint=paint))
            parts += plot.dots(line, _COLOURS[place % len(_COLOURS)])
        parts.append(plot.now(line, paint))
    parts += [each for number, row in enumerate(rows) for each in _legend(row, _HEIGHT + 12 + 18 * number)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def printable(words: str) -> str:
    """No control characters, which a terminal obeys and XML cannot hold, and none that turn the direction of writing."""
    return "".join(each if each.isprintable() else "\ufffd" for each in words)


@dataclass(frozen=True, slots=True)
class _Plot:
    """Where times and numbers lie."""

    first: datetime
    last: datetime
    top: float

    @classmethod
    def of(cls, lines: Sequence[Line], caps: Sequence[Step]) -> _Plot:
        steps = [*caps, *(step for line in lines for step in line.steps)]
        most = max([step.left for step in steps] + [line.now for line in lines])
        last = max(step.time for step in steps)
        tick = _tick(most)
        return cls(caps[0].time, last, tick * max(1, math.ceil(most / tick - 1e-9)))

    def x(self, time: datetime) -> float:
        span = (self.last - self.first).total_seconds()
        share = (time - self.first).total_seconds() / span if span > 0 else 1.0
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (1 - _NOW) * min(1.0, max(0.0, share))

    def y(self, left: float) -> float:
        share = min(1.0, max(0.0, left / self.top)) if math.isfinite(left) else 0.0
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    def axes(self) -> Iterator[str]:
        tick = _tick(self.top)
        for number in range(round(self.top / tick) + 1):
            y = self.y(number * tick)
            yield f'<path d="M{_LEFT:g} {y:.1f} H{_WIDTH - _RIGHT:g}" stroke="currentColor" stroke-opacity="0.15"/>'
            yield f'<text x="{_LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{number * tick:g}</text>'
        yield f'<text x="{_LEFT:g}" y="38" fill-opacity="0.7">epsilon left</text>'
        span = self.last - self.first
        form = "%Y-%m-%d" if span.days >= 3 else "%m-%d %H:%M"
        for share, anchor in ((0.0, "start"), (0.5, "middle")) if span.total_seconds() > 0 else ():
            time = self.first + span * share
            yield f'<text x="{self.x(time):.1f}" y="{_HEIGHT - 14:g}" text-anchor="{anchor}">{time:{form}}</text>'
        end = f"{self.last:{form}}, then now"
        yield f'<text x="{_WIDTH - _RIGHT:g}" y="{_HEIGHT - 14:g}" text-anchor="end">{end}</text>'

    def path(self, steps: Sequence[Step], *, end: float, paint: str, opacity: float = 1.0) -> str:
        """Level until the next step, then straight up or down; level to the end."""
        start, *rest = steps
        way = f"M{self.x(start.time):.1f} {self.y(start.left):.1f}"
        way += "".join(f" H{self.x(step.time):.1f} V{self.y(step.left):.1f}" for step in rest) + f" H{end:.1f}"
        return f'<path d="{way}" fill="none" stroke-width="2" stroke-opacity="{opacity:g}" {paint}/>'

    def dots(self, line: Line, colour: str) -> Iterator[str]:
        """The newest steps, each telling what happened to whoever points at it."""
        for step in line.steps[-_MOST_DOTS:]:
            where = f'cx="{self.x(step.time):.1f}" cy="{self.y(step.left):.1f}"'
            yield f'<circle {where} r="3" fill="{colour}"><title>{_safe(step.what)}</title></circle>'

    def now(self, line: Line, paint: str) -> str:
        end, y = _WIDTH - _RIGHT, self.y(line.now)
        before = self.y(line.steps[-1].left) if line.steps else y
        told = _safe(f"{line.name}: {line.now:.3f} left now")
        way = f"M{self.x(self.last):.1f} {before:.1f} V{y:.1f} H{end:g}"
        return (
            f'<g><title>{told}</title><path d="{way}" fill="none" stroke-width="2" {paint}/>'
            f'<circle cx="{end:g}" cy="{y:.1f}" r="4" fill="none" stroke-width="2" {paint.split(" stroke-dash")[0]}/></g>'
        )


def _paint(place: int) -> str:
    dashes = _DASHES[place // len(_COLOURS) % len(_DASHES)]
    return f'stroke="{_COLOURS[place % len(_COLOURS)]}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def _tick(most: float) -> float:
    """1, 2 or 5 times a power of ten, so that there are at most six of them."""
    power = 10.0 ** math.floor(math.log10(most / 6)) if most > 0 else 1.0
    return next((power * each for each in (1, 2, 5) if most / (power * each) <= 6), power * 10)


def _rows(names: Sequence[str]) -> Iterator[list[tuple[float, str, str]]]:
    """The legend's rows: where each name stands, how its line is drawn, and the name."""
    row: list[tuple[float, str, str]] = []
    x = _LEFT
    told = [*((_paint(place), name) for place, name in enumerate(names[:_MOST_NAMED]))]
    if len(names) > _MOST_NAMED:
        told.append(("", f"and {len(names) - _MOST_NAMED} more"))
    for paint, name in [*told, ('stroke="currentColor" stroke-dasharray="4 4"', "cap")]:
        width = 40 + 11 * _LETTER * len(name)
        if row and x + width > _WIDTH - _RIGHT:
            yield row
            row, x = [], _LEFT
        row.append((x, paint, name))
        x += width
    yield row


def _legend(row: Sequence[tuple[float, str, str]], y: float) -> Iterator[str]:
    for x, paint, name in row:
        if paint:
            yield f'<path d="M{x:.1f} {y - 4:g} h20" stroke-width="2" {paint}/>'
        yield f'<text x="{x + 26:.1f}" y="{y:g}">{_safe(name)}</text>'


def _safe(words: str) -> str:
    return escape(printable(words))
