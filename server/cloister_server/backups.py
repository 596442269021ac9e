"""A backup of a deployment on SQLite: the database at one moment, and the sealed objects that it names; and its way back.

Knows files and SQL. A key-encryption key is never in it: those are copied apart (`keystore_backups`). The manifest, with the digest
of everything, is written last: what a killed process leaves has none, and is taken for no backup.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from cloister_privacy.sealing import KeyProviderError
from cloister_privacy.sealing.files import make_directory, write_new
from cloister_server import deployment
from cloister_server.errors import Conflict, Invalid, StartRefused, Unavailable
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store import migrate
from cloister_server.store.anchors import Anchors
from cloister_server.store.session import new_engine
from cloister_server.store.tables import now

__all__ = ["Backup", "Restored", "backup", "require_sqlite", "restore"]

_FORMAT = "cloister.backup/1"
_DATABASE, _OBJECTS, _MANIFEST = "cloister.db", "objects.jsonl", "manifest.json"
_TENANT, _OBJECT = re.compile(r"tn_[0-9a-f]{32}"), re.compile(r"obj_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Backup:
    """What was copied; of objects in a bucket only their names were listed."""

    place: str
    objects: int
    are_copied: bool


@dataclass(frozen=True, slots=True)
class Restored:
    """What was put back: the tenants whose ledger is behind its anchor, so that nothing more is charged, and what to do next."""

    objects: int
    frozen: list[str]
    next: str


def require_sqlite(settings: Settings) -> None:
    """Raise Invalid on PostgreSQL, which is copied by its own means."""
    if not settings.is_sqlite:
        raise Invalid(
            "the database is PostgreSQL, which is copied and restored by its own means: pg_dump and pg_restore, as docs/operating.md "
            "has it, and the sealed objects beside it",
            code="backup_elsewhere",
        )


def backup(service: Service, place: Path) -> Backup:
    """Copy the database, at one moment while the service goes on, and then the objects, into a new directory of mode 0700.

    Raises Invalid where the place will not do, or cannot be written; nothing is ever overwritten.
    """
    settings, place = service.settings, place.absolute()
    require_sqlite(settings)
    for what, taken in (("the data directory", settings.data_dir), ("the keystore", settings.key_dir)):
        if place.resolve().is_relative_to(taken.resolve()):
            raise Invalid(f"{place} lies inside {what}; name another place")
    if place.exists() or not place.parent.is_dir():
        raise Invalid(f"{place} cannot be made: it is there already, or in no directory; nothing is overwritten")
    try:
        make_directory(place)
        migration = _copy_database(_file(settings), place / _DATABASE)
        listed = _copy_objects(service, place)
        write_new(place / _OBJECTS, (f"{json.dumps(each)}\n".encode() for each in listed))
        manifest = {
            "format": _FORMAT,
            "created": now().isoformat(),
            "migration": migration,
            "objects": len(listed),
            "are_copied": not settings.blob_url,
            "sha256": {name: _digest(place / name) for name in (_DATABASE, _OBJECTS)},
        }
        write_new(place / _MANIFEST, json.dumps(manifest).encode())
    except (OSError, sqlite3.Error, KeyProviderError) as error:
        raise Invalid(
            f"{place} could not be written, and is no backup ({error}); delete it, and see to the disk"
        ) from None
    return Backup(str(place), len(listed), not settings.blob_url)


def restore(settings: Settings, place: Path) -> Restored:
    """Put a backup where there is no deployment, next to the keystore that it was made with; cut short, it is done again.

    All of it is checked before anything is written, and the database comes last. Raises Invalid where it is no whole backup, and
    Conflict where there is a deployment.
    """
    require_sqlite(settings)
    file, place = _file(settings), place.absolute()
    for data in (file, settings.data_dir / "workflows.db"):
        if left := sorted(data.parent.glob(f"{data.name}*")):
            raise Conflict(
                f"{left[0]} is there: a live deployment is never overwritten; stop its server, and move its databases away first"
            )
    manifest, objects = _checked(place)
    keys = deployment.open_keys(settings)
    Anchors(settings.anchor_dir).check()
    try:
        make_directory(settings.data_dir)
        make_directory(file.parent)
        for each in objects if manifest["are_copied"] else ():
            _put_back(place, settings.data_dir, each)
        draft = file.with_name(f"restoring-{file.name}")
        draft.unlink(missing_ok=True)
        write_new(draft, _pieces(place / _DATABASE))
        draft.rename(file)
        _sync(file.parent)
    except (OSError, KeyProviderError) as error:
        raise Invalid(f"the backup could not be put back ({error}); see to the disk, and run it again") from None
    engine = new_engine(settings.database_url.get_secret_value())
    try:
        migrate.check_current(engine)
    except StartRefused as older:
        return Restored(len(objects), [], older.message)
    finally:
        engine.dispose()
    try:
        service = deployment.open_service(settings, keys=keys)
    except StartRefused:
        for path in file.parent.glob(f"{file.name}*"):
            path.unlink()
        raise
    frozen = [each.tenant_id for each in deployment.rolled_back(service)]
    service.engine.dispose()
    told = (
        "`cloister-admin ledger replay`, or `ledger write-off`, for each that is frozen"
        if frozen
        else "start the server"
    )
    return Restored(len(objects), frozen, told)


def _file(settings: Settings) -> Path:
    return Path(str(make_url(settings.database_url.get_secret_value()).database))


def _copy_database(file: Path, to: Path) -> str:
    """By SQLite's online backup, in one step: of one moment, whoever writes meanwhile. Its migration; durable, mode 0600."""
    os.close(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with closing(sqlite3.connect(file)) as live, closing(sqlite3.connect(to)) as copy:
        live.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, with nothing beside it
        (found,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"the copy is damaged: {found}")
        (migration,) = copy.execute("SELECT version_num FROM alembic_version").fetchone()
    _sync(to)
    return str(migration)


def _copy_objects(service: Service, place: Path) -> list[dict[str, Any]]:
    """The objects that the copied database names and that are there. Each is created once and never changed."""
    with closing(sqlite3.connect(place / _DATABASE)) as copy:
        named = copy.execute("SELECT tenant_id, id FROM sealed_objects ORDER BY tenant_id, id").fetchall()
    if service.settings.blob_url:
        stored = {(each.tenant_id, each.name): each.size for page in service.blobs.pages() for each in page}
        return [{"tenant": t, "object": o, "bytes": stored[t, o], "sha256": None} for t, o in named if (t, o) in stored]
    listed = []
    for tenant_id, object_id in named:
        try:
            sealed = service.blobs.get(tenant_id, object_id)
        except Unavailable as refusal:
            if refusal.code != "storage_missing":
                raise
            continue  # a key that was made ahead of what it is to seal, or an object that was deleted since
        make_directory(place / "objects" / tenant_id)
        write_new(place / "objects" / tenant_id / object_id, sealed)
        digest = hashlib.sha256(sealed).hexdigest()
        listed.append({"tenant": tenant_id, "object": object_id, "bytes": len(sealed), "sha256": digest})
    return listed


def _checked(place: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The manifest and the list of a backup whose every byte is what was written."""
    try:
        manifest = json.loads((place / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            raise Invalid(f"{place} is of the format {manifest['format']!r}, which this release does not know")
        for name in (_DATABASE, _OBJECTS):
            if _digest(place / name) != manifest["sha256"][name]:
                raise Invalid(f"{place / name} is not what was backed up; take another backup")
        objects = [json.loads(line) for line in (place / _OBJECTS).read_text().splitlines()]
        for each in objects:
            if not _TENANT.fullmatch(each["tenant"]) or not _OBJECT.fullmatch(each["object"]):
                raise Invalid(f"{place / _OBJECTS} names what is no object")
            path = place / "objects" / each["tenant"] / each["object"]
            if manifest["are_copied"] and _digest(path) != each["sha256"]:
                raise Invalid(f"{path} is not what was backed up; take another backup")
    except FileNotFoundError as error:
        raise Invalid(f"{place} is no whole backup: {error.filename} is not there; take another one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Invalid(f"{place} is no backup that can be read ({type(error).__name__}); take another one") from None
    return manifest, objects


def _put_back(place: Path, data_dir: Path, each: dict[str, Any]) -> None:
    to = data_dir / "objects" / each["tenant"] / each["object"]
    make_directory(to.parent)
    try:
        write_new(to, _pieces(place / "objects" / each["tenant"] / each["object"]))
    except FileExistsError:
        if _digest(to) != each["sha256"]:
            raise Conflict(f"{to} is there and is another object; move the objects directory away first") from None


def _pieces(path: Path) -> Any:
    with path.open("rb") as file:
        while piece := file.read(2**20):
            yield piece


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
