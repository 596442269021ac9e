"""`cloister-admin key`: what it plans, does, tells and refuses; and copies of the keystore."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select
from typer.testing import CliRunner

from cloister_privacy.sealing import KeyProviderError, LocalKeyProvider
from cloister_server import deployment, keystore_backups, rewrapping
from cloister_server.cli.keys import key_cli
from cloister_server.errors import Invalid
from cloister_server.keyring import KeyRing
from cloister_server.service import Service
from cloister_server.store.anchors import Anchors
from cloister_server.store.key_record import KeyRecord
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import KeystoreBackup, SealedObject
from rotated import AT_ONCE, ON_SQLITE, Sealed, new_service, states


@pytest.fixture(autouse=True)
def _small_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrapping, "_AT_ONCE", AT_ONCE)


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> Service:
    return new_service(engine, tmp_path)


@pytest.fixture
def acme(service: Service) -> Sealed:
    return Sealed(service)


@ON_SQLITE
def test_a_keystore_is_copied_without_its_root_and_is_on_record(acme: Sealed, service: Service, tmp_path: Path) -> None:
    (service.settings.anchor_dir).mkdir(exist_ok=True)
    place = tmp_path / "copies" / "keystore.tar"
    place.parent.mkdir()
    made = keystore_backups.backup(service, place)
    assert made.keys == 2 and place.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in place.parent.iterdir()] == [place.name], "no draft is left"
    with reading(service.engine) as session:
        row = session.get_one(KeystoreBackup, made.id)
        assert row.place == made.place == str(place)
    with tarfile.open(fileobj=io.BytesIO(place.read_bytes())) as tar:
        assert sorted(tar.getnames()) == sorted(
            path.name for path in service.settings.key_dir.iterdir() if path.is_file()
        )
        (tmp_path / "restored").mkdir(mode=0o700)
        tar.extractall(tmp_path / "restored", filter="data")
    assert service.settings.key_file is not None
    assert service.settings.key_file.read_bytes() not in place.read_bytes()
    root = LocalKeyProvider.open(service.settings.key_dir, key_file=service.settings.key_file).root_key
    assert root not in place.read_bytes()
    restored = {"kind": "local", "directory": tmp_path / "restored", "key_file": service.settings.key_file}
    acme.require_all_open(KeyRing("local", {"local": restored}, record=KeyRecord(tmp_path / "record")))
    before = place.read_bytes()
    with pytest.raises(Invalid, match="nothing is overwritten"):
        keystore_backups.backup(service, place)
    assert place.read_bytes() == before


@ON_SQLITE
@pytest.mark.parametrize("place", ["data/copy.tar", "keystore/copy.tar", "nowhere/copy.tar"])
def test_a_copy_of_the_keystore_goes_to_no_place_where_it_must_not(
    place: str, service: Service, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    with pytest.raises(Invalid):
        keystore_backups.backup(service, tmp_path / place)
    with reading(service.engine) as session:
        assert session.scalar(select(func.count()).select_from(KeystoreBackup)) == 0


@ON_SQLITE
def test_a_copy_that_was_not_written_is_not_on_record(
    acme: Sealed, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise KeyProviderError("no space left")

    monkeypatch.setattr(keystore_backups, "write_new", full)
    with pytest.raises(Invalid, match="no space left"):
        keystore_backups.backup(service, tmp_path / "copy.tar")
    with reading(service.engine) as session:
        assert session.scalar(select(func.count()).select_from(KeystoreBackup)) == 0


class CLI:
    """`cloister-admin key`, in this process."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env

    def __call__(self, *arguments: str, exit_code: int = 0) -> Any:
        done = CliRunner().invoke(key_cli, [*arguments, "--json"], env=self.env)
        assert done.exit_code == exit_code, (done.output, done.exception)
        return json.loads(done.stdout or done.stderr)


@pytest.fixture
def cli(service: Service) -> CLI:
    given = service.settings
    return CLI(
        {
            "CLOISTER_DATA_DIR": str(given.data_dir),
            "CLOISTER_KEY_DIR": str(given.key_dir),
            "CLOISTER_KEY_FILE": str(given.key_file),
            "CLOISTER_KEY_PROVIDERS": str(given.key_providers),
            "CLOISTER_DATABASE_URL": given.database_url.get_secret_value(),
        }
    )


@pytest.fixture
def anchored(service: Service) -> Iterator[Service]:
    """The deployment as its commands open it, with what they look for besides."""
    Anchors(service.settings.anchor_dir).create()
    opened = deployment.open_service(service.settings)
    yield opened
    opened.engine.dispose()


@ON_SQLITE
def test_the_operators_commands_plan_do_and_tell(cli: CLI, anchored: Service, tmp_path: Path) -> None:
    service, acme = anchored, Sealed(anchored, count=AT_ONCE + 1)
    plan = cli("rotate", "--tenant", "acme", "--dry-run")
    assert [(each["tenant_name"], each["act"], each["rewraps"]) for each in plan["plan"]] == [("acme", "rotate", 11)]
    plan = cli("migrate", "--to", "second", "--dry-run")
    assert [each["to_provider"] for each in plan["plan"]] == ["second"] * 2 and plan["left"] == []
    assert states(service, acme.id) == [(1, "local", "active", 11)], "a dry run does nothing"
    assert cli("rotate", "--tenant", acme.id)["rotated"][0]["version"] == 2
    assert [each["tenant_name"] for each in cli("rotate", "--all")["rotated"]] == ["system", "acme"]
    assert cli("rotate", "--system")["rotated"][0]["version"] == 3
    assert [each["provider"] for each in cli("migrate", "--to", "second")["rotated"]] == ["second"] * 2
    assert cli("destroy", "--tenant", "acme", "--version", "1", "--dry-run")["state"] == "decrypt-only"
    refused = cli("destroy", "--tenant", "acme", "--version", "1", exit_code=1)
    assert "--confirm acme" in refused["error"] and "Backups of the database" in refused["error"]
    assert cli("destroy", "--tenant", "acme", "--version", "1", "--confirm", "other", exit_code=1)
    assert states(service, acme.id)[0] == (1, "local", "decrypt-only", 0)
    assert cli("destroy", "--tenant", "acme", "--version", "1", "--confirm", "acme")["waiting_days"] == 0
    assert cli("destroy", "--system", "--version", "1", "--confirm", "system")["tenant"] == "system"
    assert "key file" in cli("backup", "--to", str(tmp_path / "copy.tar"))["note"]
    acme.require_all_open()


@ON_SQLITE
@pytest.mark.usefixtures("anchored")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rotate"], "name one of"),
        (["rotate", "--all", "--system"], "name one of"),
        (["rotate", "--tenant", "nobody"], "nobody"),
        (["migrate", "--to", "nowhere"], "no key provider 'nowhere'"),
        (["destroy", "--version", "1"], "name one of"),
        (["destroy", "--system", "--version", "1", "--confirm", "system"], "is the active one"),
        (["destroy", "--system", "--version", "9", "--confirm", "system"], "no version 9"),
    ],
)
def test_the_operators_commands_refuse_by_name(cli: CLI, arguments: list[str], said: str) -> None:
    assert said in cli(*arguments, exit_code=1)["error"]


@ON_SQLITE
def test_a_data_key_that_does_not_open_is_exit_status_1(cli: CLI, anchored: Service) -> None:
    service, acme = anchored, Sealed(anchored, count=2)
    damaged = sorted(acme.contents)[0]
    with writing(service.engine) as session:
        session.get_one(SealedObject, (acme.id, damaged)).wrapped_key = b"cloister.wrapped/1\nnothing"
    assert cli("rotate", "--tenant", "acme", exit_code=1)["rotated"][0]["unopened"] == [damaged]


@ON_SQLITE
def test_the_operator_makes_lists_and_removes_recipients(cli: CLI, anchored: Service) -> None:
    acme = Sealed(anchored, count=0)
    lines = [cli("recipient", "create", "--tenant", "acme")["recipient"] for _ in range(2)]
    assert [each["recipient"] for each in cli("recipient", "list", "--tenant", "acme")] == lines
    assert cli("rotate", "--tenant", "acme")["rotated"][0]["rewrapped"] == 2
    assert [each["recipient"] for each in cli("recipient", "list", "--tenant", "acme")] == lines, "rotated, not changed"
    with reading(anchored.engine) as session:
        first, _ = session.scalars(select(SealedObject.id).order_by(SealedObject.created, SealedObject.id)).all()
    assert first in {each["id"] for each in cli("recipient", "list", "--tenant", "acme")}
    assert cli("recipient", "remove", lines[0], "--tenant", acme.id) == {"removed": first}
    assert [each["recipient"] for each in cli("recipient", "list", "--tenant", "acme")] == lines[1:]
    assert first in cli("recipient", "remove", first, "--tenant", "acme", exit_code=1)["error"]
