"""How a watched job is shown: a bar on a terminal, a line for each tenth of the way anywhere else."""

from __future__ import annotations

import sys
from typing import Protocol

from cloister.wire.jobs import Job

__all__ = ["Progress"]

_WIDTH = 30
_LINES = 10


class _Shown(Protocol):
    def show(self, job: Job) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Shows a job's steps on standard error while it is watched: by rich (extra `cli`) where it is installed."""

    def __init__(self, *, wanted: bool) -> None:
        self._is_shown = wanted
        self._bar: _Shown | None = None

    def __call__(self, job: Job) -> None:
        if not self._is_shown:
            return
        if self._bar is None:
            self._bar = (_rich_bar(job) or _PlainBar()) if sys.stderr.isatty() else _Lines()
        self._bar.show(job)

    def close(self) -> None:
        """Leave the screen as it is; nothing is drawn after this."""
        bar, self._bar, self._is_shown = self._bar, None, False
        if bar is not None:
            bar.close()


class _Lines:
    """For logs: a line where the status changes, and at each tenth of the steps."""

    def __init__(self) -> None:
        self._last: tuple[str, int] | None = None

    def show(self, job: Job) -> None:
        now = job.status, _LINES * job.steps_done // job.steps
        if now != self._last:
            percent = 100 * job.steps_done // job.steps
            sys.stderr.write(f"{job.id} {job.status}: {job.steps_done}/{job.steps} steps ({percent} %)\n")
            sys.stderr.flush()
        self._last = now

    def close(self) -> None:
        pass


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
