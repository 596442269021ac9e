"""What was used of a source's budget, by whom and on what, and what is left: as text, a picture, CSV and JSON. Sends nothing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from typing import Any

from cloister._burn_down import Line, Step, burn_down, printable
from cloister.wire.ledger import BudgetEntry, Charge
from cloister.wire.sources import Budget, Source

__all__ = ["BudgetReport"]

_MOST_ROWS = 200
"""Of a table in a notebook; the newest are shown."""

_LONGEST = 100
"""Of what a line says in a terminal."""

_COLUMNS = [name for name in BudgetEntry.model_fields if name != "charge"]
_CHARGE_COLUMNS = {name: f"charge_{name}" for name in Charge.model_fields}


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A source's budget and the entries of its ledger, oldest first. `print` shows a table, a notebook a plot as well."""

    source: Source
    entries: tuple[BudgetEntry, ...]
    is_of_all: bool
    """Whether you own the source, and so see what all have used; everyone else sees its own use."""

    @property
    def budget(self) -> Budget:
        """The cap, what is used and what is left, in each block."""
        return self.source.budget

    def to_csv(self) -> str:
        """The entries, a line each under a line of names. Text that a spreadsheet would compute begins with an apostrophe."""
        lines = io.StringIO()
        table = csv.writer(lines, lineterminator="\n")
        table.writerow([*_COLUMNS, *_CHARGE_COLUMNS.values()])
        for entry in self.entries:
            told = [getattr(entry, name) for name in _COLUMNS]
            table.writerow(
                _cell(each) for each in [*told, *(getattr(entry.charge, name, None) for name in _CHARGE_COLUMNS)]
            )
        return lines.getvalue()

    def to_json(self) -> str:
        """The source with its budget and the entries, as the server told them."""
        told = {
            "is_of_all": self.is_of_all,
            "source": self.source.model_dump(mode="json"),
            "entries": [entry.model_dump(mode="json") for entry in self.entries],
        }
        return json.dumps(told, indent=2)

    def __str__(self) -> str:
        names, rows = self._table()
        parts = [self._heading(), _aligned(["block", "spent", "left"], self._blocks(), texts={0})]
        if rows:
            parts.append(_aligned(names, [[*row[:-1], _cut(row[-1])] for row in rows], texts=_texts(names)))
        return "\n\n".join([*parts, self._note()])

    def __repr__(self) -> str:
        whose = "all" if self.is_of_all else "you"
        return (
            f"<BudgetReport of {self.source.name}: {self.budget.spent:.3f} of {self.budget.epsilon:g} spent by {whose}, "
            f"{len(self.entries)} entries>"
        )

    def _repr_html_(self) -> str:
        names, rows = self._table()
        older = len(rows) - _MOST_ROWS
        note = [f"{older} older entries are not shown; to_csv() has them."] if older > 0 else []
        notes = "".join(f"<p>{escape(each)}</p>" for each in [*note, self._note()])
        blocks = _html(["block", "spent", "left"], self._blocks(), caption=self._heading(), texts={0})
        entries = _html(names, rows[-_MOST_ROWS:], caption="Entries", texts=_texts(names)) if rows else ""
        return f"<div>{self._picture()}{blocks}{entries}{notes}</div>"

    def _picture(self) -> str:
        """For an owner, what is left of each block; for everyone else, of the cap or allowance, but for what others used."""
        caps = self._caps()
        lines = [
            Line(each.name, tuple(self._steps(each.number, each.name, caps)), each.left) for each in self.budget.blocks
        ]
        title = (
            f"Budget of {self.source.name}: what is left"
            if self.is_of_all
            else f"Your use of the budget of {self.source.name}"
        )
        spent = [f"block {each.name}: {each.spent:.3f} spent, {each.left:.3f} left" for each in self.budget.blocks[:20]]
        more = "" if len(self.budget.blocks) <= 20 else ", and so on"
        return burn_down(lines, caps, title=title, told=f"{self._heading()}. {'; '.join(spent)}{more}.")

    def _caps(self) -> list[Step]:
        """The cap over time, as far as one sees it; whoever is no owner is bounded by an allowance, if there is one."""
        acts = [each for each in self.entries if each.kind == "budget" and each.epsilon is not None]
        first = acts[0].was if acts and acts[0].was is not None else self.budget.epsilon
        if not self.is_of_all and self.budget.allowance is not None:
            first = min(first, self.budget.allowance)
        steps = [Step(self.source.created, first, "declared")]
        for act in acts:
            steps.append(Step(max(act.time, steps[-1].time), act.epsilon or 0.0, _what(act)))
        return steps

    def _steps(self, number: int, name: str, caps: Sequence[Step]) -> Iterator[Step]:
        """What is left of a block, job by job, and as the owner changes the cap; later blocks begin with their first job."""
        cap, spent, is_over = caps[0].left, 0.0, False
        has_begun = number == 0
        if has_begun:
            yield Step(caps[0].time, cap, f"block {name}")
        for entry in self.entries:
            if entry.kind == "budget" and entry.epsilon is not None:
                cap = entry.epsilon
            elif entry.kind == "write_off":
                is_over = True
            elif entry.block == name and entry.spent is not None:
                if not has_begun:
                    yield Step(entry.time, cap, f"block {name}")
                has_begun, spent = True, entry.spent
            else:
                continue
            if has_begun:
                yield Step(entry.time, 0.0 if is_over else max(0.0, cap - spent), _told(entry))

    def _heading(self) -> str:
        budget = self.budget
        whose = f"Budget of {self.source.name}" if self.is_of_all else f"Your use of the budget of {self.source.name}"
        told = f"{whose}: epsilon {budget.epsilon:g} at delta {budget.delta:g} in each block, unit {self.source.unit}"
        if budget.allowance is not None:
            told += f"; your allowance is {budget.allowance:g}"
        if budget.allowance_expires is not None:
            told += f"; it ends {_minute(budget.allowance_expires)}"
        return printable(told)

    def _note(self) -> str:
        if self.entries:
            return (
                "Times are UTC; spent is of the block, as the job was started. Steps that a job does not run are free again "
                "when it is settled."
            )
        return "Nothing was used yet." if self.is_of_all else "You have used nothing yet."

    def _blocks(self) -> list[list[str]]:
        return [[printable(each.name), f"{each.spent:.3f}", f"{each.left:.3f}"] for each in self.budget.blocks]

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """The columns' names, and the entries' words; whose they are is told to owners alone. What was done comes last."""
        names = [
            "revision",
            "time",
            "kind",
            "block",
            "steps",
            "state",
            "epsilon",
            "spent",
            *["by"] * self.is_of_all,
            "what",
        ]
        return names, [[told[name] for name in names] for told in map(_words, self.entries)]


def _words(entry: BudgetEntry) -> dict[str, str]:
    """An entry as people read it, by column."""
    has_steps = entry.steps_charged is not None and entry.steps_reserved is not None
    states = {True: "settled", False: "open", None: ""}
    told = {
        "revision": str(entry.revision),
        "time": _minute(entry.time),
        "kind": entry.kind.replace("_", " "),
        "block": entry.block or "",
        "steps": f"{entry.steps_charged} of {entry.steps_reserved}" if has_steps else "",
        "state": states[entry.is_settled],
        "epsilon": "" if entry.epsilon is None else f"{entry.epsilon:.3f}",
        "spent": "" if entry.spent is None else f"{entry.spent:.3f}",
        "by": entry.principal_name or entry.principal or "",
        "what": _what(entry),
    }
    return {name: printable(each) for name, each in told.items()}


def _what(entry: BudgetEntry) -> str:
    """What a job was on, or what an act did and why."""
    match entry.kind:
        case "budget":
            told = (
                f"from {entry.was:g} to {entry.epsilon:g}"
                if entry.was is not None and entry.epsilon is not None
                else ""
            )
        case "allowance":
            bound = "no bound" if entry.epsilon is None else f"at most {entry.epsilon:g} in each block"
            until = "" if entry.expires is None else f" until {_minute(entry.expires)}"
            told = f"{entry.client_name or entry.client or 'you'}: {bound}{until}"
        case "write_off":
            told = "nothing more is admitted"
        case _:
            parts = [f"model {entry.model}" if entry.model else "", f"on {entry.dataset}" if entry.dataset else ""]
            told = " ".join(filter(None, parts))
    return f"{told}: {entry.reason}" if entry.reason else told


def _told(entry: BudgetEntry) -> str:
    """An entry in a line."""
    by = entry.principal_name or entry.principal
    told = f"{_minute(entry.time)} {entry.kind.replace('_', ' ')}" + (f" by {by}" if by else "") + f": {_what(entry)}"
    return told if entry.epsilon is None or entry.job is None else f"{told}; epsilon {entry.epsilon:.3f} on its own"


def _cut(words: str) -> str:
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}\u2026"


def _minute(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M}"


def _texts(names: Sequence[str]) -> set[int]:
    """The columns that are aligned to the left."""
    return {place for place, name in enumerate(names) if name not in ("revision", "steps", "epsilon", "spent")}


def _aligned(names: Sequence[str], rows: Sequence[Sequence[str]], *, texts: set[int]) -> str:
    lines = [names, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    return "\n".join(
        "  ".join(
            each.ljust(width) if place in texts else each.rjust(width)
            for place, (each, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _html(names: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, texts: set[int]) -> str:
    def cells(line: Sequence[str], tag: str) -> str:
        sides = ["left" if place in texts else "right" for place in range(len(line))]
        return "".join(
            f'<{tag} align="{side}">{escape(each)}</{tag.split()[0]}>' for side, each in zip(sides, line, strict=True)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = cells(names, 'th scope="col"')
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime):
        return value.isoformat()
    text = printable(str(value))
    # A spreadsheet computes such text, and owners do not trust each other's reasons that far.
    return f"'{text}" if isinstance(value, str) and text.startswith(("=", "+", "-", "@")) else text
