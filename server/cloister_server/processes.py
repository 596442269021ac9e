"""Processes that die with their parent: how they start, get their secrets, hold locks and end. Knows no SQL and no HTTP.

A child's standard input is a pipe that carries one line of JSON (its settings and secrets: never argv, never the
environment) and then stays open for as long as the parent lives: its end is the parent's death.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any

from cloister_server.errors import StartRefused
from cloister_server.settings import child_environment

__all__ = ["Child", "end_group", "locked", "name_process", "receive", "refuse_core_dumps", "start", "take_up_orphans"]

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36  # prctl(2)

_LOOK_S = 0.02


def start(module: str, message: Mapping[str, Any], *, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Run `python -m module` as the leader of a process group of its own, and hand it the message."""
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        pass_fds=pass_fds,
        start_new_session=True,
        env=child_environment(),
    )
    assert process.stdin is not None  # noqa: S101 (it was asked for above)
    _tell(process.stdin, message)
    return process


class Child:
    """A child of this process that it did not start itself: it was forked by another, or taken up as an orphan."""

    def __init__(self, pid: int, lifeline: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdin: IO[bytes] = os.fdopen(lifeline, "wb")

    def tell(self, message: Mapping[str, Any]) -> None:
        """Hand it the message that `receive` waits for."""
        _tell(self.stdin, message)

    def poll(self) -> int | None:
        """How it ended, as `Popen.returncode`; None while it lives."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        until = None if timeout is None else monotonic() + timeout
        while (ended := self.poll()) is None:
            if until is not None and monotonic() >= until:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0)
            sleep(_LOOK_S)
        return ended

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def take_up_orphans() -> None:
    """From now on this process is the parent of any of its descendants whose own parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def name_process(name: str) -> None:
    """What `ps` shows this process as: 15 bytes at most."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def _tell(pipe: IO[bytes], message: Mapping[str, Any]) -> None:
    try:
        pipe.write(json.dumps(message).encode() + b"\n")
        pipe.flush()
    except BrokenPipeError:
        pass  # it is dead already; who waits for it will see


def receive(*, follows_thread: bool = False) -> dict[str, Any]:
    """In a child: read the message, refuse core dumps, and from now on die (the whole group) when the parent dies.

    `follows_thread` asks the kernel for the same, for children whose parent thread lives as long as the parent.
    """
    refuse_core_dumps()
    if follows_thread:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pipe = os.fdopen(os.dup(0), "rb", buffering=0)
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = pipe.read(65_536)
        if not piece:
            os._exit(1)  # the parent died before it had told us anything
        line += piece
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_die_with, args=(pipe,), name="parent-watch", daemon=True).start()
    message: dict[str, Any] = json.loads(line)
    return message


def refuse_core_dumps() -> None:
    """A dump of any process of the service could hold keys, rows or weights."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _die_with(pipe: Any) -> None:
    while pipe.read(1):
        pass
    os.killpg(0, signal.SIGKILL)


def end_group(process: subprocess.Popen[bytes] | Child, *, grace_s: float) -> None:
    """SIGTERM the child, SIGKILL its whole group after `grace_s`, and see it dead, with those of the group that were taken up."""
    if process.poll() is None and grace_s > 0:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-process.pid, 0)
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # of a message that it did not live to read
            process.stdin.close()


@contextmanager
def locked(path: Path, *, wait_s: float, what: str) -> Iterator[int]:
    """Hold an exclusive flock on `path`; children that are passed the yielded descriptor hold it too.

    Raises StartRefused where another process still holds it after `wait_s`, or there is no file to be opened there.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartRefused(f"the lock of {what}, {path}, cannot be opened ({error.strerror})") from None
    try:
        deadline = monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if monotonic() >= deadline:
                    raise StartRefused(
                        f"{what} is in use by another process, which holds {path.name}; stop that one first"
                    ) from None
                sleep(0.05)
        yield descriptor
    finally:
        os.close(descriptor)
