"""A progress bar on a terminal, and nothing anywhere else."""

from __future__ import annotations

import sys
from typing import Any

from cloister.wire.jobs import Job

__all__ = ["Progress"]

_WIDTH = 30


class Progress:
    """Shows a job's steps on standard error while it is watched: by rich (extra `cli`) where it is installed."""

    def __init__(self, *, wanted: bool) -> None:
        self._is_shown = wanted and sys.stderr.isatty()
        self._bar: Any = None

    def __call__(self, job: Job) -> None:
        if not self._is_shown:
            return
        if self._bar is None:
            self._bar = _rich_bar(job) or _PlainBar()
        self._bar.show(job)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _PlainBar:
    def show(self, job: Job) -> None:
        full = _WIDTH * job.steps_done // job.steps
        bar = "#" * full + "." * (_WIDTH - full)
        sys.stderr.write(f"\r{job.status:<10} [{bar}] {job.steps_done}/{job.steps} steps")
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write("\n")


class _RichBar:
    def __init__(self, job: Job) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        self._bars = Bars(*columns, console=Console(stderr=True))
        self._task = self._bars.add_task(job.status, total=job.steps)
        self._bars.start()

    def show(self, job: Job) -> None:
        self._bars.update(self._task, completed=job.steps_done, description=job.status)

    def close(self) -> None:
        self._bars.stop()


def _rich_bar(job: Job) -> _RichBar | None:
    try:
        return _RichBar(job)
    except ImportError:
        return None
