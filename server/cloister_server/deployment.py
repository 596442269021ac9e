"""A deployment on its disk and database: made once by `init`, opened by every process, refused by name where it is not sound.

Knows keys, files and migrations; nothing of HTTP.
"""

from __future__ import annotations

import getpass
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from cloister_privacy.sealing import InvalidWrap, KeyMissing, KeyProviderError, LocalKeyProvider
from cloister_server import asking, marking, vault
from cloister_server.errors import LedgerRolledBack, StartRefused, Unavailable
from cloister_server.keyring import LOCAL, KeyRing, read_provider_file
from cloister_server.oauth import signing_keys
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store import chain, migrate
from cloister_server.store.acting import ALL_TENANTS, for_tenants
from cloister_server.store.anchors import Anchors
from cloister_server.store.blobs import Blobs
from cloister_server.store.key_record import KeyRecord
from cloister_server.store.queries import keys_not_destroyed, public_keys
from cloister_server.store.session import check_durability, new_engine, reading, writing

__all__ = [
    "check_apart",
    "check_initialised",
    "check_ready",
    "has_keystore",
    "initialise",
    "new_passphrase",
    "open_keys",
    "open_service",
    "rolled_back",
]

_PURPOSES: tuple[vault.Purpose, ...] = ("token", "certificate", "pepper")


def initialise(settings: Settings, *, passphrase: str | None = None) -> Service:
    """Make what is missing of a deployment, and leave alone what is there: running it again is how it is upgraded.

    The data directory (0700), the keystore under `settings.key_file` (made too) or else a passphrase, the schema, the
    service's own keys, and the chains of rows from before there were any. Raises StartRefused, above all where database and
    keystore do not belong together.
    """
    check_apart(settings)
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    _make_database_directory(settings)
    keys = _open_or_create_keys(settings, passphrase)
    settings.key_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # anchors lie there, keystore or not
    anchors = Anchors(settings.anchor_dir)
    anchors.create()
    try:
        migrate.upgrade(settings)
        engine = new_engine(settings.database_url.get_secret_value(), anchors=anchors)
        check_durability(engine)
        own = for_tenants(vault.SYSTEM)
        asking.run(lambda: writing(engine, own), keys, lambda session: _make_system_key(session, keys))
        asking.run(lambda: writing(engine, own), keys, _make_own_keys)
        _check_keys(engine, keys, settings)
        _record_keys(engine, settings)
        with writing(engine, ALL_TENANTS) as session:
            drafts = chain.link_rows_from_before(session, anchors)
        for draft in drafts:
            draft.publish()
        engine.dispose()
    except SQLAlchemyError as error:
        raise _unreachable(settings, error) from None
    except KeyProviderError as error:
        raise StartRefused(str(error)) from None
    service = open_service(settings, keys=keys)
    try:
        marking.mark_new(service)
    except Unavailable as refusal:
        service.engine.dispose()
        raise StartRefused(f"{refusal.message} ({refusal.cause})") from None
    return service


def check_initialised(settings: Settings) -> None:
    """Raise StartRefused where `init` has not run. Makes nothing: asked before whatever would make the data directory."""
    if not settings.data_dir.is_dir() or not _has_database(settings):
        raise StartRefused(
            f"{settings.data_dir} holds no deployment: not initialised; run `cloister-admin init`, or for one elsewhere "
            "`cloister-admin login --url https://HOST`, or name its profile (CLOISTER_PROFILE)"
        )


def open_keys(settings: Settings) -> KeyRing:
    """The key providers of the deployment; its keystore's passphrase is asked for at the terminal where there is no key file.

    Raises StartRefused.
    """
    default, providers = _providers(settings)
    if default == LOCAL or has_keystore(settings):
        if not settings.key_dir.is_dir():
            raise StartRefused(
                f"there is no keystore in {settings.key_dir}: not initialised; run `cloister-admin init`"
            )
        passphrase = None if settings.key_file else _ask_passphrase("Passphrase of the keystore: ")
        providers[LOCAL] = _local(settings, LocalKeyProvider.open, passphrase)
    return _ring(settings, default, providers)


def open_service(settings: Settings, *, keys: KeyRing | None = None) -> Service:
    """Everything a process needs, every part of it checked. Raises StartRefused and says which is not sound, and why.

    Tenants whose ledger is older than its anchor are logged; of theirs nothing can be charged or changed, and all can be read.
    """
    check_apart(settings)
    check_initialised(settings)
    keys = open_keys(settings) if keys is None else keys
    try:
        engine = new_engine(settings.database_url.get_secret_value(), anchors=Anchors(settings.anchor_dir))
    except (SQLAlchemyError, ImportError) as error:
        raise _unreachable(settings, error) from None
    try:
        _check_database(engine, keys, settings)
    except BaseException:
        engine.dispose()
        raise
    return Service(settings, engine, keys, Blobs.open_at(settings))


def rolled_back(service: Service) -> list[LedgerRolledBack]:
    """The tenants whose ledger does not go on from its anchor, each with the reason. Raises StartRefused where none can be kept."""
    return _rolled_back(service.engine, service.settings)


def check_ready(service: Service) -> None:
    """Raise Unavailable unless the database answers, is at this release's migration, and the service's keys open."""
    try:
        migrate.check_current(service.engine)
        _check_keys(service.engine, service.keys, service.settings)
    except (SQLAlchemyError, StartRefused):
        raise Unavailable(
            "not ready: the database, its migration or the keys; the log of the start says more"
        ) from None


def _check_database(engine: Engine, keys: KeyRing, settings: Settings) -> None:
    try:
        check_durability(engine)
        migrate.check_current(engine)
        _check_keys(engine, keys, settings)
        with reading(engine, ALL_TENANTS) as session:
            chain.require_linked(session)
        _rolled_back(engine, settings)
    except (SQLAlchemyError, ImportError) as error:
        raise _unreachable(settings, error) from None
    except Unavailable as refusal:
        raise StartRefused(refusal.message) from None


def _rolled_back(engine: Engine, settings: Settings) -> list[LedgerRolledBack]:
    anchors = Anchors(settings.anchor_dir)
    anchors.check()
    with reading(engine, ALL_TENANTS) as session:
        return chain.rolled_back(session, anchors)


def check_apart(settings: Settings) -> None:
    """Raise StartRefused where keys lie with the data: a copy of the data must not be a copy of the keys."""
    data_dir = settings.data_dir.resolve()
    for name, place in (
        ("key_dir", settings.key_dir),
        ("key_file", settings.key_file),
        ("key_providers", settings.key_providers),
    ):
        if place is not None and place.resolve().is_relative_to(data_dir):
            what = {"key_dir": "keystore", "key_file": "key file", "key_providers": "key provider file"}[name]
            raise StartRefused(
                f"the {what} {place} lies inside the data directory, so that a copy of one is a copy of both; "
                f"set CLOISTER_{name.upper()} to a place outside {data_dir}"
            )


def _open_or_create_keys(settings: Settings, passphrase: str | None) -> KeyRing:
    """As `open_keys`, but that a keystore is made where new keys go into it and there is none."""
    default, providers = _providers(settings)
    is_new = not has_keystore(settings)
    if default == LOCAL or not is_new:
        if settings.key_file is not None:
            passphrase = None
        elif passphrase is None:
            passphrase = new_passphrase() if is_new else _ask_passphrase("Passphrase of the keystore: ")
        make = LocalKeyProvider.create if is_new else LocalKeyProvider.open
        providers[LOCAL] = _local(settings, make, passphrase)
    return _ring(settings, default, providers)


def _ring(settings: Settings, default: str, providers: dict[str, dict[str, Any]]) -> KeyRing:
    record = KeyRecord(settings.key_record_dir)
    return KeyRing(default, providers, record=record, file=settings.key_providers, remembers_s=settings.key_cache_s)


def _providers(settings: Settings) -> tuple[str, dict[str, dict[str, Any]]]:
    """Raises StartRefused where a keystore that the file names lies with the data, or is the deployment's own by another name."""
    if settings.key_providers is None:
        return LOCAL, {}
    default, providers = read_provider_file(settings.key_providers)
    for name, each in providers.items():
        for place in (each.get("directory"), each.get("key_file")) if each["kind"] == "local" else ():
            if isinstance(place, Path) and place.resolve().is_relative_to(settings.data_dir.resolve()):
                raise StartRefused(
                    f"{place} of key provider {name!r} lies inside the data directory, so that a copy of one is a copy of both; "
                    "move it, and correct the file that CLOISTER_KEY_PROVIDERS names"
                )
            if isinstance(place, Path) and place.resolve() == settings.key_dir.resolve():
                raise StartRefused(
                    f"key provider {name!r} is the deployment's own keystore by another name; call it {LOCAL!r}, and name another "
                    "directory in the file that CLOISTER_KEY_PROVIDERS names"
                )
    return default, providers


def _local(settings: Settings, make: Callable[..., LocalKeyProvider], passphrase: str | None) -> dict[str, Any]:
    try:
        opened = make(settings.key_dir, key_file=settings.key_file, passphrase=passphrase)
    except KeyProviderError as error:
        raise StartRefused(str(error)) from None
    return {"kind": "local", "directory": settings.key_dir, "root_key": opened.root_key}


def has_keystore(settings: Settings) -> bool:
    """Anything but the ledgers' anchors, which lie there too: what is left of a damaged keystore is not built over."""
    return settings.key_dir.is_dir() and any(place != settings.anchor_dir for place in settings.key_dir.iterdir())


def _make_system_key(session: Session, keys: KeyRing) -> None:
    if vault.active_key(session, vault.SYSTEM) is None:
        vault.new_tenant_key(session, provider=keys.default, tenant_id=vault.SYSTEM)


def _make_own_keys(session: Session) -> None:
    for purpose in _PURPOSES:
        if not public_keys(session, purpose):
            vault.new_signing_key(session, purpose)
    session.flush()
    signing_keys.complete(session)


def _record_keys(engine: Engine, settings: Settings) -> None:
    """Put on record the keys from before there was a record."""
    record = KeyRecord(settings.key_record_dir)
    with reading(engine, ALL_TENANTS) as session:
        rows = session.execute(keys_not_destroyed()).all()
    for key_id, provider in rows:
        record.note(key_id, provider=provider)


def _check_keys(engine: Engine, keys: KeyRing, settings: Settings) -> None:
    """The service's own keys open: these providers have the keys that this database was made with."""

    def opened(session: Session) -> None:
        vault.signing_keys(session, keys, *_PURPOSES)
        vault.require_system_key(session)  # what opened just now may have been remembered

    try:
        asking.run(lambda: reading(engine, for_tenants(vault.SYSTEM)), keys, opened)
    except (KeyMissing, InvalidWrap):
        raise StartRefused(
            f"the keystore {settings.key_dir} (or the key provider that CLOISTER_KEY_PROVIDERS names) is not the one that the "
            f"database {_shown(settings)} was made with; restore the one that was, or point at the other"
        ) from None
    except KeyProviderError as error:
        raise StartRefused(str(error)) from None


def _unreachable(settings: Settings, error: Exception) -> StartRefused:
    return StartRefused(
        f"the database {_shown(settings)} cannot be used ({type(error).__name__}); see that it runs, that its URL is "
        "right and that its driver is installed"
    )


def _shown(settings: Settings) -> str:
    try:
        return make_url(settings.database_url.get_secret_value()).render_as_string(hide_password=True)
    except ArgumentError:
        return "of CLOISTER_DATABASE_URL"


def _database_file(settings: Settings) -> Path | None:
    """SQLite's file; None for another database."""
    if not settings.is_sqlite:
        return None
    path = make_url(settings.database_url.get_secret_value()).database
    if not path or path == ":memory:":
        raise StartRefused("the database must be a file or PostgreSQL: a ledger in memory forgets what was spent")
    return Path(path)


def _has_database(settings: Settings) -> bool:
    path = _database_file(settings)
    return path is None or path.is_file()  # SQLite would make an empty one


def _make_database_directory(settings: Settings) -> None:
    path = _database_file(settings)
    if path is not None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def new_passphrase() -> str:
    """Ask at the terminal for a passphrase that the keystore is to have, twice. Raises StartRefused."""
    first = _ask_passphrase("Choose a passphrase for the keystore: ")
    if _ask_passphrase("Once more: ") != first:
        raise StartRefused("the two passphrases differ; run the command again")
    return first


def _ask_passphrase(prompt: str) -> str:
    if not sys.stdin.isatty():
        raise StartRefused("there is no key file and no terminal to ask for a passphrase; set CLOISTER_KEY_FILE")
    return getpass.getpass(prompt)
