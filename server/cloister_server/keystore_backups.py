"""Copies of the service's own keystore: made whole, kept on record, so that a receipt of shredding names them. Knows files and SQL."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from cloister_privacy.sealing import KeyProviderError
from cloister_privacy.sealing.files import read_private, write_new
from cloister_server import keys
from cloister_server.errors import Invalid
from cloister_server.keyring import LOCAL
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import writing
from cloister_server.store.tables import KeystoreBackup, new_id

__all__ = ["Backup", "backup"]


@dataclass(frozen=True, slots=True)
class Backup:
    """A copy of the local keystore: whoever has it and the root key can open what was sealed under its keys."""

    id: str
    place: str
    keys: int


def backup(service: Service, place: Path) -> Backup:
    """Copy the local keystore, without its root key and without the ledgers' anchors, into a new tar file of mode 0600.

    The copy is on record before there is one, so that the receipt of a shredding may name one too many and never one too few.
    Raises Invalid where there is no local keystore or the place will not do; nothing is ever overwritten.
    """
    directory, place = service.settings.key_dir, place.absolute()
    if LOCAL not in service.keys:
        raise Invalid("this deployment has no keystore of its own to copy: its keys are with other providers")
    for what, taken in (("the data directory", service.settings.data_dir), ("the keystore", directory)):
        if place.resolve().is_relative_to(taken.resolve()):
            raise Invalid(f"{place} lies inside {what}, so that a copy of one is a copy of both; name another place")
    if place.exists() or not place.parent.is_dir():
        raise Invalid(f"{place} cannot be made: there is a file already, or no directory; nothing is overwritten")
    with keys.alone(service.settings):
        content, count = _tar(directory)
        row = KeystoreBackup(id=new_id("kb"), place=str(place))
        with writing(service.engine, ALL_TENANTS) as session:
            session.add(row)
        try:
            write_new(place, content)
        except (OSError, KeyProviderError) as error:
            if not place.exists():
                with writing(service.engine, ALL_TENANTS) as session:
                    session.delete(row)
            raise Invalid(f"{place} could not be written, and is no whole copy: {error}") from None
    return Backup(row.id, row.place, count)


def _tar(directory: Path) -> tuple[bytes, int]:
    """The record and the keys of a keystore as a tar file, and how many keys: each member read whole, none but these."""
    content, count = io.BytesIO(), 0
    with tarfile.open(fileobj=content, mode="w") as tar:
        for path in [directory / "keystore.json", *sorted(directory.glob("*.kek"))]:
            try:
                data = read_private(path, limit=2**16)
            except FileNotFoundError:
                continue  # destroyed since it was listed
            member = tarfile.TarInfo(path.name)
            member.size, member.mode = len(data), 0o600
            tar.addfile(member, io.BytesIO(data))
            count += path.suffix == ".kek"
    return content.getvalue(), count
