"""Anchors: how far each tenant's chain had come, kept beside the keys and outside the database and its backups. Knows files alone.

An anchor is moved after the commit that it tells of: a crash in between leaves it behind its chain, never ahead of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cloister_server.errors import LedgerRolledBack, StartRefused, Unavailable

__all__ = ["Anchor", "Anchors", "Draft"]

_FORMAT = "cloister.anchor/1"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DRAFTS_LIVE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Anchor:
    """A link that a tenant's chain had, and that every later state of it must have."""

    tenant_id: str
    count: int
    head: bytes


class Anchors:
    """A directory of anchors, one file a tenant, in the keystore's own."""

    __slots__ = ("directory",)

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def create(self) -> None:
        """Make the directory (0700) where it is absent, and clear away what a crash left. Raises StartRefused."""
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            for draft in self.directory.glob(".*.draft"):
                if draft.stat().st_mtime < time.time() - _DRAFTS_LIVE_S:
                    draft.unlink(missing_ok=True)
        except OSError as error:
            raise StartRefused(
                f"the ledger's anchors cannot be kept in {self.directory} ({error.strerror}); see to the keystore's directory"
            ) from None
        self.check()

    def check(self) -> None:
        """Raise StartRefused unless there is a directory that anchors can be written to."""
        if not self.directory.is_dir():
            raise StartRefused(
                f"there is no directory {self.directory}, where the anchors of the ledgers lie; restore the keystore whole "
                "from its backup, or run `cloister-admin init` where this deployment never had any"
            )
        if not os.access(self.directory, os.R_OK | os.W_OK | os.X_OK):
            raise StartRefused(
                f"{self.directory} cannot be written to, and every charge to a budget is anchored there; mount the keystore "
                "writable, and give it to the user who runs the service"
            )

    def of(self, tenant_id: str) -> Anchor | None:
        """The tenant's anchor; None where there is no file. Raises LedgerRolledBack where it is there and no anchor."""
        path = self.path(tenant_id)
        try:
            read = json.loads(path.read_bytes())
            anchor = Anchor(read["tenant"], read["count"], bytes.fromhex(read["head"]))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unavailable(
                f"the ledger's anchor cannot be read ({error.strerror}); its operator must see to it"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise LedgerRolledBack(tenant_id, f"its anchor {path} is damaged") from None
        if read.get("format") != _FORMAT or anchor.tenant_id != tenant_id or type(anchor.count) is not int:
            raise LedgerRolledBack(tenant_id, f"its anchor {path} is of another format or tenant")
        return anchor

    def tenants(self) -> list[str]:
        """The ids of all tenants that have an anchor."""
        return sorted(path.stem for path in self.directory.glob("*.json") if _ID.fullmatch(path.stem))

    def begin(self, tenant_id: str, *, genesis: bytes) -> None:
        """Anchor a chain at its beginning, before its first link is committed: from then on a lost anchor is missed."""
        if not self.path(tenant_id).exists():
            self.draft(Anchor(tenant_id, 0, genesis)).publish()

    def draft(self, anchor: Anchor, *, is_new_chain: bool = False) -> Draft:
        """Write an anchor to be published once its chain is committed. Raises Unavailable where it cannot be written.

        Of a new chain, the old anchor is kept beside it; without that an anchor only ever moves forward.
        """
        path = self.path(anchor.tenant_id)
        draft = path.with_name(f".{secrets.token_hex(8)}.draft")
        told = {"format": _FORMAT, "tenant": anchor.tenant_id, "count": anchor.count, "head": anchor.head.hex()}
        try:
            with draft.open("x") as file:
                file.write(json.dumps(told) + "\n")
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise _not_written(error) from None
        return Draft(self, anchor, draft, is_new_chain)

    def set_aside(self, tenant_id: str) -> Path:
        """Keep the tenant's anchor under another name, where it is of no effect: of a tenant that is not there any more."""
        with self._locked() as directory:
            kept = self._kept(tenant_id)
            self.path(tenant_id).rename(kept)
            os.fsync(directory)
        return kept

    def path(self, tenant_id: str) -> Path:
        if not _ID.fullmatch(tenant_id):
            raise Unavailable("a tenant's id that no file can be named by cannot be anchored")
        return self.directory / f"{tenant_id}.json"

    def _publish(self, draft: Draft) -> None:
        path = self.path(draft.anchor.tenant_id)
        with draft.path.open("rb") as written:
            os.fsync(written.fileno())
        with self._locked() as directory:
            if draft.is_new_chain:
                if path.exists():
                    os.link(path, self._kept(draft.anchor.tenant_id))
            elif self._is_ahead(draft.anchor):
                return
            draft.path.replace(path)
            os.fsync(directory)

    def _is_ahead(self, anchor: Anchor) -> bool:
        """Whether another process has anchored a later link since this one was committed."""
        present = self.of(anchor.tenant_id)
        return present is not None and present.count >= anchor.count

    def _kept(self, tenant_id: str) -> Path:
        number = 1
        while (path := self.directory / f"{tenant_id}.json.written-off-{number}").exists():
            number += 1
        return path

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The directory's descriptor, under its one lock: who looks at an anchor and then moves it does so alone."""
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Draft:
    """An anchor that is written and not yet in force."""

    anchors: Anchors
    anchor: Anchor
    path: Path
    is_new_chain: bool

    def publish(self) -> None:
        """Put it in force, durably, unless one further on is. Raises Unavailable."""
        try:
            self.anchors._publish(self)
        except OSError as error:
            raise _not_written(error) from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave the anchor that is in force as it is."""
        with suppress(OSError):
            self.path.unlink()


def _not_written(error: OSError) -> Unavailable:
    return Unavailable(
        f"the ledger's anchor cannot be written ({error.strerror}); the server's operator must see to the keystore's directory"
    )
