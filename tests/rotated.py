"""Tenants with sealed objects whose keys change, on a deployment with a second keystore in its provider file."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from asked import asked_reading, asked_writing
from cloister_privacy.sealing import LocalKeyProvider
from cloister_server import deployment, keys, tenants, vault
from cloister_server.keyring import KeyRing
from cloister_server.keys import Outcome, Rotation
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.blobs import Blobs
from cloister_server.store.session import reading
from cloister_server.vault import SYSTEM

ON_SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
"""For what is the same on every database."""

PURPOSES: tuple[vault.Purpose, ...] = ("token", "certificate", "pepper")
OBJECTS, AT_ONCE = 25, 10
"""Objects of a tenant here, and how many of them one transaction rewraps: three transactions."""


def new_service(engine: Engine, tmp_path: Path) -> Service:
    """A deployment on either database, with a second keystore, `second`, in its provider file."""
    LocalKeyProvider.create(tmp_path / "keystore", key_file=tmp_path / "root.key")
    LocalKeyProvider.create(tmp_path / "other", key_file=tmp_path / "other.key")
    name(
        tmp_path,
        second={"kind": "local", "directory": str(tmp_path / "other"), "key_file": str(tmp_path / "other.key")},
    )
    settings = Settings(
        data_dir=tmp_path / "data",
        key_dir=tmp_path / "keystore",
        key_file=tmp_path / "root.key",
        key_providers=tmp_path / "providers.json",
        database_url=SecretStr(engine.url.render_as_string(hide_password=False)),
    )
    made = Service(settings, engine, deployment.open_keys(settings), Blobs.open_at(settings))
    with asked_writing(made) as session:
        vault.new_tenant_key(session, provider="local", tenant_id=SYSTEM)
        session.flush()
        for purpose in PURPOSES:
            vault.new_signing_key(session, purpose)
    return made


def name(root: Path, **providers: dict[str, Any]) -> None:
    """Put providers into the provider file, beside those that are there."""
    path = root / "providers.json"
    before = json.loads(path.read_text())["providers"] if path.exists() else {}
    path.touch(0o600)
    path.write_text(
        json.dumps({"format": "cloister.key-providers/1", "default": "local", "providers": {**before, **providers}})
    )


class Sealed:
    """A tenant with objects, and what each holds."""

    def __init__(self, service: Service, tenant: str = "acme", *, count: int = OBJECTS, provider: str | None = None):
        self.service, self.name, self.contents = service, tenant, dict[str, bytes]()
        with asked_writing(service) as session:
            made = tenants.create_tenant(
                session, service.keys, name=tenant, request_id="request-of-a-test", provider=provider
            )
            self.id = made.id
        for _ in range(count):
            self.seal()

    def seal(self) -> None:
        content, service = secrets.token_bytes(40), self.service
        with asked_writing(service) as session:
            made = vault.seal_object(session, service.blobs, content, tenant_id=self.id, kind="part")
        self.contents[made] = content

    def require_all_open(self, keys: KeyRing | None = None) -> None:
        for object_id, content in list(self.contents.items()):
            with asked_reading(self.service, keys) as session:
                opened = vault.open_object(
                    session,
                    self.service.blobs,
                    tenant_id=self.id,
                    object_id=object_id,
                )
            assert opened == content

    def rotate(self, *, to: str | None = None, **more: Any) -> Rotation:
        """Where its key is, or into another provider."""
        if to is None:
            return keys.rotate(self.service, self.id, request_id="request-of-a-test", **more)
        done = self.migrate(to, **more)
        assert not done.refused, done.refused
        return done.rotated[0]

    def migrate(self, to: str = "second", **more: Any) -> Outcome:
        return keys.migrate(self.service, to=to, tenant_id=self.id, request_id="request-of-a-test", **more)

    def destroy(self, version: int) -> keys.Destroyed:
        return keys.destroy(self.service, self.id, version=version, request_id="request-of-a-test")


def states(service: Service, tenant_id: str) -> list[tuple[int, str, str, int]]:
    """Version, provider, state and how many data keys it wraps."""
    with reading(service.engine) as session:
        return [
            (each.version, each.provider, each.state, each.wraps)
            for each in keys.listed(session)
            if each.tenant == tenant_id
        ]


def files(service: Service) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (service.settings.data_dir / "objects").rglob("*") if path.is_file()}


def secrets_of(service: Service, ring: KeyRing | None = None) -> list[vault.SigningSecret]:
    return service.read(
        ALL_TENANTS, lambda session: [vault.signing_key(session, ring or service.keys, purpose) for purpose in PURPOSES]
    )


class Killed(Exception):
    """Stands for a death: whatever it goes through has committed what it has committed."""
