"""The process that a worker's children are forked from: it has loaded what each of them would, which takes seconds, and nothing else.

It holds no key, no row and no connection, and starts no thread: what it has is every child's, and what it would draw at random is
drawn anew in each. Its standard input is a socket of the worker's, whose end is its own; a child's is a pipe, as `processes.receive`
reads it. A child is the worker's own, for who forked it has ended and the worker takes up orphans: so it can be waited for, and does
not end with this process.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from cloister_server import processes
from cloister_server.errors import StartRefused
from cloister_server.settings import child_environment

__all__ = ["CHILD", "Template"]

CHILD = "cloister-child"
"""What `top` and `ps -e` show a child as: its command line is this process'."""

_LOAD_S = 600.0
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

    def fork(self, *, lock: int) -> processes.Child:
        """A child that holds the lock and waits for its message. Raises StartRefused where it is not to be had."""
        with self._lock:
            try:
                self._prepare()
                read, write = os.pipe()
            except OSError as error:
                raise StartRefused(f"no process could be started ({error.strerror}); it is tried again") from None
            try:
                pid = self._asked(_FORK_S, [read, lock])
            except StartRefused:
                os.close(write)  # a child that there is nevertheless ends by it
                raise
            finally:
                os.close(read)
        return processes.Child(pid, write)

    def _prepare(self) -> None:
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
        pid = _fork_child()
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


def _fork_child() -> int:
    """Fork twice, so that the child's parent has ended: 0 in the child, and here its pid, which leads a group by then."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        if os.fork():
            os._exit(0)
        os.setsid()
        processes.name_process(CHILD)
        _draw_anew()
        os.write(write, str(os.getpid()).encode())
        os.close(read)
        os.close(write)
        return 0
    os.close(write)
    os.waitpid(between, 0)
    with os.fdopen(read) as told:
        return int(told.read())  # nothing, where it ended at once: this process ends too, and the worker is told


def _draw_anew() -> None:
    """Seed from the operating system what was seeded as it was loaded: dropout draws from it. Keys and noise never do."""
    import numpy as np
    import torch

    torch.seed()
    np.random.seed()


def _become_child(message: int) -> int:
    from cloister_server.work import child

    os.dup2(message, 0)
    os.close(message)
    return child.main()


if __name__ == "__main__":
    sys.exit(main())
