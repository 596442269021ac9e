"""The process that a worker's children are forked from: it has loaded what each of them would, which takes seconds, and nothing else.

It holds no key, no row and no connection, draws nothing at random, and has one thread: what it has is every child's. Its standard
input is a socket of the worker's, whose end is its own; a child's is a pipe, as `processes.receive` reads it. A child is the worker's
own, for who forked it has ended and the worker takes up orphans: so it can be waited for, and does not end with this process.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from cloister_server import processes
from cloister_server.errors import StartRefused
from cloister_server.settings import child_environment

__all__ = ["CHILD", "Template"]

CHILD = "cloister-child"
"""What `ps` shows a child as: its command line is this process'."""

_LOAD_S = 120.0
_FORK_S = 30.0

_ALLOCATOR = {  # Half of a DP step was page faults of glibc's allocator with its default thresholds.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


class Template:
    """A worker's side of it. Starts the process when it is first wanted, and another where that one ended."""

    def __init__(self) -> None:
        processes.take_up_orphans()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._asking: socket.socket | None = None

    def prepare(self) -> None:
        """Return when a child could be forked at once. Raises StartRefused where that is not to be had."""
        with self._lock:
            if self._asking is not None and self._process is not None and self._process.poll() is None:
                return
            self._end()
            self._asking, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "cloister_server.work.template"],
                    stdin=theirs.fileno(),
                    env=child_environment(**_ALLOCATOR),
                )
            self._asked(_LOAD_S)

    def fork(self, message: Mapping[str, Any], *, lock: int) -> processes.Child:
        """A child that is handed the message and holds the lock. Raises StartRefused where it was not prepared, or that ended."""
        read, write = os.pipe()
        try:
            with self._lock:
                pid = self._asked(_FORK_S, [read, lock])
        except StartRefused:
            os.close(write)  # a child that there is nevertheless ends by it
            raise
        finally:
            os.close(read)
        return processes.Child(pid, write, message)

    def _asked(self, wait_s: float, descriptors: Sequence[int] = ()) -> int:
        answer = b""
        if self._asking is not None:
            with suppress(OSError):
                self._asking.settimeout(wait_s)
                if descriptors:
                    socket.send_fds(self._asking, [b"fork"], descriptors)
                answer = self._asking.recv(32)
        if not answer:
            self._end()
            raise StartRefused(
                "the process that jobs are forked from ended or does not answer; the next attempt starts another"
            )
        return int(answer)

    def close(self) -> None:
        """End the process; its children go on."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._asking is not None:
            self._asking.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._asking = self._process = None


def main() -> int:
    processes.refuse_core_dumps()
    asked = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _load()
    try:
        message = _serve(asked)
    except ConnectionError:
        message = None
    if message is None:
        os._exit(0)  # the worker is gone
    return _become_child(message)


def _serve(asked: socket.socket) -> int | None:
    """Fork a child whenever the worker asks: in the child what its message comes by, here None once the worker is gone."""
    asked.send(b"0")
    while True:
        what, descriptors, _, _ = socket.recv_fds(asked, 32, 2)
        if not what:
            return None
        pid = _fork_orphan()
        if pid == 0:
            asked.close()
            return descriptors[0]
        for each in descriptors:
            os.close(each)
        asked.send(str(pid).encode())


def _load() -> None:
    """What a child imports, its first step's included."""
    for each in (
        "cloister_server.work.child",
        "cloister_privacy.queries",
        "cloister_privacy.training",
        "torch._dynamo",
    ):
        importlib.import_module(each)
    gc.collect()
    gc.freeze()  # a child that looked through these pages for garbage would get its own copies of them


def _fork_orphan() -> int:
    """Fork twice, so that the child's parent has ended: 0 in the child, and its pid here."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        pid = os.fork()
        if pid:
            os.write(write, str(pid).encode())
            os._exit(0)
    else:
        os.waitpid(between, 0)
        pid = int(os.read(read, 32))
    os.close(read)
    os.close(write)
    return pid


def _become_child(message: int) -> int:
    from cloister_server.work import child

    os.setsid()
    os.dup2(message, 0)
    os.close(message)
    processes.name_process(CHILD)
    return child.main()


if __name__ == "__main__":
    sys.exit(main())
