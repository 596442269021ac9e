"""Ports to listen at later, which no other process of the tests is given meanwhile, nor the kernel gives to a connection."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

__all__ = ["free_port"]

_RANGE = (15_000, 30_000)
"""Below what kernels give to whoever asks for no port of its own (Linux: from 32768 on)."""


def free_port() -> int:
    """This process's until it ends, whoever listens at it."""
    for port in random.SystemRandom().sample(range(*_RANGE), 1000):
        try:
            # A byte for each port, locked (fcntl(2)) as long as this process lives.
            fcntl.lockf(_taken(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EADDRINUSE):
                raise
        else:
            return port
    raise AssertionError("of a thousand ports none is free")


_file: int | None = None


def _taken() -> int:
    global _file
    if _file is None:
        path = Path(tempfile.gettempdir()) / f"cloister-tests-{os.getuid()}.ports"
        _file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return _file
