"""Secret files on disk: written once and durably, read only where nobody else can. Knows POSIX; nothing of keys."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cloister_privacy.sealing.errors import KeyFileExposed, KeyProviderError

__all__ = ["check_private", "make_directory", "overwrite_and_remove", "read_private", "replace", "write_new"]

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO in a file's place must not block the start


def write_new(path: Path, data: bytes | Iterable[bytes]) -> int:
    """Create a file of mode 0600, whole and durable or not at all, from its bytes or pieces of them; how many bytes there were.

    Raises FileExistsError where there is one, and KeyProviderError where it cannot be written.
    """
    draft = path.with_name(f".new-{secrets.token_hex(8)}")
    with _named_failure(path):
        try:
            with _opened(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC) as file:
                size = sum(_write(file, piece) for piece in ([data] if isinstance(data, bytes) else data))
                os.fsync(file)
            os.link(draft, path)  # unlike rename, refuses to replace
        finally:
            draft.unlink(missing_ok=True)
        _sync_directory(path.parent)
    return size


def replace(path: Path, data: bytes) -> None:
    """Put other content in a secret file's place, whole and durable or not at all, and overwrite what was there with zeros.

    Raises FileNotFoundError where there is none, and KeyProviderError where it cannot be written.
    """
    draft = path.with_name(f".new-{secrets.token_hex(8)}")
    with _named_failure(path), _opened(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC) as before:
        try:
            with _opened(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC) as file:
                _write(file, data)
                os.fsync(file)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        _sync_directory(path.parent)
        _write(before, bytes(os.fstat(before).st_size))
        os.fsync(before)


def read_private(path: Path, *, limit: int) -> bytes:
    """At most `limit` bytes of a regular file that is ours alone.

    Raises FileNotFoundError, or KeyFileExposed where others have any access or another user owns it.
    """
    with _opened(path, _READ) as file:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise KeyProviderError(f"{path} is not a regular file; name the file itself")
        _check_status(path, status)
        return os.read(file, limit)


def make_directory(directory: Path) -> None:
    """Make a directory and its missing parents, mode 0700 and durable; one that is there stays as it is."""
    with _named_failure(directory):
        if directory.is_dir():
            return
        make_directory(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
        _sync_directory(directory.parent)


def check_private(directory: Path) -> None:
    """Raise KeyFileExposed unless the directory is ours alone; FileNotFoundError where there is none."""
    _check_status(directory, directory.stat())


def overwrite_and_remove(path: Path) -> None:
    """Zero a file in place, then unlink it, both durably. Raises FileNotFoundError.

    The zeros come first: a crash in between leaves a file of zeros and never a removed name over readable blocks.
    Flash and copy-on-write file systems may keep the old blocks all the same.
    """
    with _named_failure(path):
        with _opened(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC) as file:
            _write(file, bytes(os.fstat(file).st_size))
            os.fsync(file)
        path.unlink(missing_ok=True)
        _sync_directory(path.parent)


def _check_status(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise KeyFileExposed(f"{path} belongs to another user; give it to the user who runs the service")
    if status.st_mode & 0o077:
        wanted = "0700" if stat.S_ISDIR(status.st_mode) else "0600"
        raise KeyFileExposed(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, so others have access to it; "
            f"treat its secret as seen or run `chmod {wanted}` if nobody else could reach it"
        )


def _write(file: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    return len(data)


def _sync_directory(directory: Path) -> None:
    with _opened(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) as handle:
        os.fsync(handle)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _named_failure(path: Path) -> Iterator[None]:
    """A full disk and a read-only mount are the operator's to mend: say so by name."""
    try:
        yield
    except (FileExistsError, FileNotFoundError):
        raise  # the caller's to name
    except OSError as exc:
        raise KeyProviderError(f"{path} could not be written: {exc.strerror}; see to the disk and try again") from exc
