"""Sealed bytes by id: written once, whole, never changed; in local files or in an S3 bucket. Never sees a plaintext byte."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, InvalidPathError
from obstore.store import LocalStore, S3Store

from cloister_server.errors import StartRefused, Unavailable
from cloister_server.settings import Settings

__all__ = ["Blobs", "OnOdd", "Stored"]

log = logging.getLogger(__name__)

_MARKER = "store-id"

_AT_ONCE = 500
"""Objects in one page of a listing. S3 gives, and deletes, 1000 at most with one request."""

_OURS = re.compile(r"(tn_[0-9a-f]{32})/((?P<object>obj_[0-9a-f]{32})(?:#[0-9]+)?)")
"""What is listed and collected: all else in a bucket or a directory is somebody else's. `#1` ends the name of a file that a
killed process was writing."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR, _STATUS = re.compile(r"\(os error ([0-9]+)\)"), re.compile(r"non-2xx status code: ([0-9]{3})")
_FULL_BY_NAME = re.compile(r"status code: 507|<Code>(?:[A-Za-z]*StorageFull|QuotaExceeded|InsufficientCapacity)</Code>")
"""S3 itself is never full; other stores that speak its protocol say so in these words."""


_TENANT = re.compile(r"tn_[0-9a-f]{32}")
_QUOTED = re.compile(r'Path "([^"]{1,1024})')

OnOdd = Callable[[str], None]
"""Is told the name of what lies in the store and is not of our naming."""


def _ignored(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Stored:
    """What lies in the store under one name: an object, or what a killed process had written of one."""

    tenant_id: str
    object_id: str
    name: str
    size: int


class Blobs:
    """The sealed objects of a deployment, each named by its tenant's id and its own.

    An object is stored for good before `put` returns, so that a row that names it can be committed; until it is whole, nothing
    is seen under its name. Where the store is full every method raises Unavailable `storage_full`, and where it does not
    answer, or refuses, `storage_unavailable`.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def open_at(cls, settings: Settings) -> Blobs:
        """The store that the settings name; it is not asked yet whether it answers. Raises StartRefused."""
        if settings.blob_url:
            return cls(_bucket(settings))
        root = settings.data_dir / "objects"
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StartRefused(
                f"the directory of sealed objects {root} cannot be made ({error.strerror}); see to its disk and its owner"
            ) from None
        return _Files(root)

    def put(self, tenant_id: str, object_id: str, sealed: bytes) -> None:
        """Create the object. An id that is taken raises `storage_conflict`, and never overwrites."""
        with _asking("stored"):
            try:
                obstore.put(self._store, f"{tenant_id}/{object_id}", sealed, mode="create", use_multipart=False)
            except AlreadyExistsError:
                raise Unavailable(
                    "an object of this id is already stored; retry the request", code="storage_conflict"
                ) from None

    def get(self, tenant_id: str, object_id: str) -> bytes:
        """The sealed bytes. Raises Unavailable `storage_missing` where there are none."""
        with _asking("read"), _missing():
            return bytes(obstore.get(self._store, f"{tenant_id}/{object_id}").bytes())

    def marker(self) -> bytes | None:
        """What the store is marked with; None where there is no marker."""
        with _asking("read"):
            try:
                return bytes(obstore.get(self._store, _MARKER).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def mark(self, content: bytes, *, is_new: bool) -> None:
        """Put a marker into the store. A new one replaces none: `storage_conflict`."""
        with _asking("stored"):
            try:
                obstore.put(
                    self._store, _MARKER, content, mode="create" if is_new else "overwrite", use_multipart=False
                )
            except AlreadyExistsError:
                raise Unavailable(
                    "the store is marked already, by another process; try again", code="storage_conflict"
                ) from None

    def sealed(self, tenant_id: str, object_id: str) -> Path | bytes:
        """What the object can be opened from: the file that it is, to be mapped, or else its bytes. Raises as `get`."""
        return self.get(tenant_id, object_id)

    def delete(self, tenant_id: str, *names: str) -> None:
        """Remove objects, or what is left of some, that nothing names any more; not there is fine."""
        with _asking("deleted"):
            obstore.delete(self._store, [f"{tenant_id}/{name}" for name in names])

    def pages(self, tenant_id: str | None = None, *, on_odd: OnOdd = _ignored) -> Iterator[list[Stored]]:
        """All that is stored, or all of one tenant, some of one tenant at a time; what is not of our naming is left out.

        `on_odd` is told that, as far as it is come upon: a bucket may hold names that its library cannot even read.
        """
        for each in self.tenants(on_odd=on_odd) if tenant_id is None else [tenant_id]:
            with _asking("listed"):
                yield from self._pages_of(each, on_odd)

    def tenants(self, *, on_odd: OnOdd = _ignored) -> list[str]:
        """The ids of tenants under which something is stored. `on_odd` is told what else lies beside them."""
        with _asking("listed"):
            try:
                found = obstore.list_with_delimiter(self._store)
            except InvalidPathError as error:
                on_odd(_named_in(error))
                return []
        names = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        return _sorted_out(names, on_odd)

    def _pages_of(self, tenant_id: str, on_odd: OnOdd) -> Iterator[list[Stored]]:
        """Names that cannot be read end a listing, and all that came with them in one answer is lost: it is begun anew behind them.

        All of ours begin with obj_. What cannot be read behind that is stepped over by asking for one level alone.
        """
        last = ""
        for attempt in (self._listed, self._listed_from_ours, self._listed_level):
            try:
                for page in attempt(tenant_id):
                    fresh = [each for each in page if each["path"] > last]  # a bucket is listed in order
                    found = [_stored(each["path"], each["size"]) for each in fresh]
                    for each, ours in zip(fresh, found, strict=True):
                        if ours is None:
                            on_odd(each["path"])
                    last = max([last, *(each["path"] for each in fresh)])
                    if some := [each for each in found if each is not None]:
                        yield some
                return
            except InvalidPathError as error:
                on_odd(_named_in(error))

    def _listed(self, tenant_id: str) -> Iterator[Any]:
        return iter(obstore.list(self._store, prefix=tenant_id, chunk_size=_AT_ONCE))

    def _listed_from_ours(self, tenant_id: str) -> Iterator[Any]:
        return iter(obstore.list(self._store, prefix=tenant_id, offset=f"{tenant_id}/obj", chunk_size=_AT_ONCE))

    def _listed_level(self, tenant_id: str) -> Iterator[Any]:
        objects = iter(obstore.list_with_delimiter(self._store, prefix=tenant_id)["objects"])
        while some := list(islice(objects, _AT_ONCE)):
            yield some


class _Files(Blobs):
    """A directory for each tenant, a file for each object. What is written is synced, its directory too."""

    def __init__(self, root: Path) -> None:
        super().__init__(LocalStore(prefix=root))
        self._root = root

    def put(self, tenant_id: str, object_id: str, sealed: bytes) -> None:
        super().put(tenant_id, object_id, sealed)
        path = self._root / tenant_id / object_id
        with _asking("stored"):
            try:
                for place in (path, path.parent, self._root):
                    _sync(place)
            except OSError:
                path.unlink(missing_ok=True)
                raise

    def marker(self) -> bytes | None:
        with _asking("read"):
            self._root.stat()  # a directory that is gone is no store without a marker
        return super().marker()

    def mark(self, content: bytes, *, is_new: bool) -> None:
        super().mark(content, is_new=is_new)
        with _asking("stored"):
            for place in (self._root / _MARKER, self._root):
                _sync(place)

    def sealed(self, tenant_id: str, object_id: str) -> Path:
        path = self._root / tenant_id / object_id
        with _asking("read"), _missing():
            path.stat()
        return path

    def delete(self, tenant_id: str, *names: str) -> None:
        with _asking("deleted"):
            for name in names:
                (self._root / tenant_id / name).unlink(missing_ok=True)

    def tenants(self, *, on_odd: OnOdd = _ignored) -> list[str]:
        with _asking("listed"):
            return _sorted_out([each.name for each in os.scandir(self._root)], on_odd)

    def _pages_of(self, tenant_id: str, on_odd: OnOdd) -> Iterator[list[Stored]]:
        if not (self._root / tenant_id).is_dir():
            return
        with os.scandir(self._root / tenant_id) as entries:  # obstore lists no files that were being written
            while some := list(islice(entries, _AT_ONCE)):
                found = [(each, _stored(f"{tenant_id}/{each.name}", _size(each))) for each in some]
                for each, ours in found:
                    if ours is None and each.is_file():
                        on_odd(f"{tenant_id}/{each.name}")
                if page := [ours for _, ours in found if ours is not None]:
                    yield page


def _bucket(settings: Settings) -> S3Store:
    secret = settings.blob_secret_access_key
    if bool(settings.blob_access_key_id) != bool(secret):
        raise StartRefused(
            "CLOISTER_BLOB_ACCESS_KEY_ID and CLOISTER_BLOB_SECRET_ACCESS_KEY go together: set both, or neither where the "
            "machine has a role of its own"
        )
    bucket, _, prefix = settings.blob_url.removeprefix("s3://").partition("/")
    given = {
        "endpoint": settings.blob_endpoint,
        "region": settings.blob_region,
        "access_key_id": settings.blob_access_key_id,
        "secret_access_key": secret.get_secret_value() if secret else "",
    }
    config: Any = {name: value for name, value in given.items() if value}
    timeout = timedelta(seconds=settings.blob_timeout_s)
    try:
        return S3Store(
            bucket,
            prefix=prefix.strip("/") or None,
            config=config,
            client_options={
                "allow_http": settings.blob_endpoint.startswith("http://"),
                "connect_timeout": min(timeout, timedelta(seconds=5)),
                "timeout": timeout,
            },
            retry_config={
                "max_retries": 3,
                "retry_timeout": timeout,
                "backoff": {
                    "init_backoff": timedelta(seconds=0.1),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )
    except (BaseError, ValueError):
        raise StartRefused(
            "CLOISTER_BLOB_URL, CLOISTER_BLOB_ENDPOINT and CLOISTER_BLOB_REGION name no S3 bucket that can be asked; "
            "correct them"
        ) from None


@contextmanager
def _missing() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise
        raise Unavailable(
            "a sealed object that the database names is missing from the blob store; restore it from a backup",
            code="storage_missing",
        ) from None


@contextmanager
def _asking(done: Literal["stored", "read", "deleted", "listed"]) -> Iterator[None]:
    """What a store refuses, in words for anybody. Its own may name places and quote what it was sent: the log has the numbers."""
    try:
        yield
    except (BaseError, OSError) as error:
        told = str(error)
        number, status = _OS_ERROR.search(told), _STATUS.search(told)
        code = (error.errno if isinstance(error, OSError) else None) or (int(number[1]) if number else None)
        is_full = code in _FULL or _FULL_BY_NAME.search(told) is not None
        log.error(
            "storage.refused",
            extra={
                "error": type(error).__name__,
                "os_error": errno.errorcode.get(code or 0),
                "status": status[1] if status else None,
                "is_full": is_full,
            },
        )
        refusal = _refusal(done, is_full=is_full)
        refusal.cause = f"{type(error).__name__}: {' '.join(told.split())[:300]}"
        raise refusal from None


def _refusal(done: str, *, is_full: bool) -> Unavailable:
    if is_full:
        return Unavailable(
            f"the store of sealed objects is full, so nothing was {done}, and no part of it is left; retry when its operator "
            "has made room on it",
            code="storage_full",
        )
    return Unavailable(
        f"the store of sealed objects does not answer, or refuses, so nothing was {done}; retry in a moment. If it stays so, "
        "its operator must see to the disk or the bucket, and to the rights on it: the server's log says more",
        code="storage_unavailable",
    )


def _sorted_out(names: Iterable[str], on_odd: OnOdd) -> list[str]:
    """Of what lies at the top the tenants' ids; `on_odd` is told the others."""
    ours = []
    for name in sorted(names):
        if _TENANT.fullmatch(name):
            ours.append(name)
        elif name != _MARKER:
            on_odd(name)
    return ours


def _named_in(error: InvalidPathError) -> str:
    named = _QUOTED.search(str(error))
    return named[1] if named else "(a name that cannot be read)"


def _stored(path: str, size: int | None) -> Stored | None:
    named = _OURS.fullmatch(path)
    return None if named is None or size is None else Stored(named[1], named["object"], named[2], size)


def _size(entry: os.DirEntry[str]) -> int | None:
    """None where it is gone since it was listed."""
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
