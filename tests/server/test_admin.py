"""`cloister-admin` on a real deployment: made once, run again without harm, refused by name where it is not sound."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from cloister_server import deployment
from cloister_server.app import create_app
from cloister_server.cli.admin import cli
from cloister_server.errors import StartRefused
from cloister_server.settings import load_settings
from cloister_server.store.session import new_engine


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command line on a place of its own."""
    for name, value in {"DATA_DIR": "data", "KEY_DIR": "keystore", "KEY_FILE": "root.key"}.items():
        monkeypatch.setenv(f"CLOISTER_{name}", str(tmp_path / value))
    return lambda *arguments: CliRunner().invoke(cli, list(arguments))


def done(result: Result) -> Any:
    """The one JSON document that a command prints."""
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    return json.loads(result.stdout)


def refusal(result: Result) -> str:
    """A refusal's one line on standard error; nothing is on standard output."""
    assert result.exit_code == 1 and result.stdout == "", (result.stdout, result.stderr, result.exception)
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_init_makes_everything_private_and_running_it_again_changes_nothing(
    admin: Callable[..., Result], tmp_path: Path
) -> None:
    done(admin("init", "--json"))
    for place, mode in (("data", 0o700), ("keystore", 0o700), ("root.key", 0o600)):
        assert stat.S_IMODE((tmp_path / place).stat().st_mode) == mode, place
    made = {path: path.read_bytes() for place in ("keystore", "root.key") for path in _files(tmp_path / place)}
    with TestClient(create_app(deployment.open_service(load_settings()))) as http:
        keys = http.get("/.well-known/jwks.json").json()
    done(admin("init", "--json"))
    assert {path: path.read_bytes() for place in ("keystore", "root.key") for path in _files(tmp_path / place)} == made
    with TestClient(create_app(deployment.open_service(load_settings()))) as http:
        assert http.get("/.well-known/jwks.json").json() == keys


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else [path for path in sorted(place.rglob("*")) if path.is_file()]


def test_init_takes_the_key_files_path(
    admin: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLOISTER_KEY_FILE")
    done(admin("init", "--key-file", str(tmp_path / "another.key"), "--json"))
    assert stat.S_IMODE((tmp_path / "another.key").stat().st_mode) == 0o600


def test_init_takes_a_passphrase_by_a_descriptor(
    admin: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CLOISTER_KEY_FILE")
    reader, writer = os.pipe()
    os.write(writer, b"correct horse battery staple\n")
    os.close(writer)
    done(admin("init", "--passphrase-fd", str(reader), "--json"))
    assert "no terminal" in refusal(admin("tenant", "list"))
    assert b"horse" not in b"".join(path.read_bytes() for path in _files(tmp_path))


def test_a_client_that_is_made_here_gets_a_token_and_its_secret_is_nowhere_on_the_disk(
    admin: Callable[..., Result], tmp_path: Path
) -> None:
    admin("init")
    tenant = done(admin("tenant", "create", "acme", "--json"))
    made = done(admin("client", "create", "--tenant", "acme", "--name", "app", "--role", "steward", "--json"))
    assert [each["name"] for each in done(admin("tenant", "list", "--json"))] == ["acme"]
    assert [each["client_id"] for each in done(admin("client", "list", "--tenant", tenant["id"], "--json"))] == [
        made["client_id"]
    ]
    with TestClient(create_app(deployment.open_service(load_settings()))) as http:
        form = {"grant_type": "client_credentials"}
        assert http.post("/oauth/token", data=form, auth=(made["client_id"], made["client_secret"])).status_code == 200
    assert made["client_secret"].encode() not in b"".join(path.read_bytes() for path in _files(tmp_path))
    assert "client_secret" not in admin("client", "list", "--tenant", "acme", "--json").stdout


@pytest.mark.parametrize("role", ["steward", "trainer", "predictor"])
def test_a_role_is_grants_that_can_be_listed_and_taken_away(admin: Callable[..., Result], role: str) -> None:
    admin("init")
    admin("tenant", "create", "acme")
    made = done(admin("client", "create", "--tenant", "acme", "--name", "app", "--role", role, "--json"))
    listed = done(admin("grant", "list", "--tenant", "acme", "--json"))
    verbs = {each["verb"] for each in listed}
    assert {each["to"] for each in listed} == {made["client_id"]} and {each["resource"] for each in listed} == {"*"}
    assert ("source.create" in verbs) == (role == "steward") and ("dataset.train" in verbs) == (role != "predictor")
    done(admin("grant", "remove", listed[0]["id"], "--tenant", "acme", "--json"))
    assert len(done(admin("grant", "list", "--tenant", "acme", "--json"))) == len(listed) - 1


def test_a_grant_is_added_for_an_app_of_another_tenant(admin: Callable[..., Result]) -> None:
    admin("init")
    for tenant in ("acme", "other"):
        admin("tenant", "create", tenant)
    made = done(admin("client", "create", "--tenant", "other", "--name", "app", "--role", "predictor", "--json"))
    arguments = ("grant", "add", "--tenant", "acme", "--to", made["client_id"], "--verb")
    added = done(admin(*arguments, "model.predict", "--until", "2100-01-01", "--json"))
    assert added["to"] == made["client_id"] and added["expires"].startswith("2100-01-01")
    assert "no verb" in refusal(admin(*arguments, "model.fly"))


def test_a_source_belongs_to_the_app_that_owns_it_and_its_budget_is_shown(admin: Callable[..., Result]) -> None:
    admin("init")
    admin("tenant", "create", "acme")
    owner = done(admin("client", "create", "--tenant", "acme", "--name", "app", "--role", "predictor", "--json"))
    source = done(
        admin(
            "source", "create", "--tenant", "acme", "--name", "people", "--epsilon", "3", "--delta", "1e-6",
            "--owner", owner["client_id"], "--json",
        )
    )  # fmt: skip
    shown = done(admin("budget", "show", source["id"], "--tenant", "acme", "--json"))
    assert (shown["epsilon"], shown["spent"], shown["left"]) == (3, 0, 3)
    granted = done(admin("grant", "list", "--tenant", "acme", "--to", owner["client_id"], "--json"))
    assert {each["verb"] for each in granted if each["resource"] == source["id"]} == {
        "source.read",
        "source.own",
        "dataset.create",
    }
    assert [each["id"] for each in done(admin("source", "list", "--tenant", "acme", "--json"))] == [source["id"]]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("tenant", "create", "no name"), "invalid_request"),
        (("tenant", "create", "acme"), "conflict"),
        (("client", "list", "--tenant", "nobody"), "not_found"),
        (("grant", "remove", "gr_" + "0" * 32, "--tenant", "acme"), "not_found"),
        (("budget", "show", "src_" + "0" * 32, "--tenant", "acme"), "not_found"),
    ],
)
def test_a_refusal_is_one_json_document_on_standard_error(
    admin: Callable[..., Result], arguments: tuple[str, ...], code: str
) -> None:
    admin("init")
    admin("tenant", "create", "acme")
    assert json.loads(refusal(admin(*arguments, "--json"))).keys() == {"error", "code"}
    assert json.loads(refusal(admin(*arguments, "--json")))["code"] == code


def _expose(root: Path) -> None:
    (root / "root.key").chmod(0o644)


def _replace_key(root: Path) -> None:
    shutil.move(root / "root.key", root / "kept.key")
    for name in ("data", "keystore"):
        shutil.move(root / name, root / f"kept-{name}")
    CliRunner().invoke(cli, ["init"])
    for name in ("data", "keystore"):
        shutil.rmtree(root / name)
        shutil.move(root / f"kept-{name}", root / name)


def _lose_keystore(root: Path) -> None:
    shutil.rmtree(root / "keystore")


def _age(root: Path) -> None:
    engine = new_engine(f"sqlite:///{root}/data/cloister.db")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    engine.dispose()


def _lose_database(root: Path) -> None:
    (root / "data" / "cloister.db").unlink()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_expose, "others"),
        (_replace_key, "not the one that this keystore was made with"),
        (_lose_keystore, "no keystore"),
        (_age, "migration 0000"),
        (_lose_database, "not initialised"),
    ],
)
def test_a_deployment_that_is_not_sound_is_refused_by_name(
    admin: Callable[..., Result], tmp_path: Path, harm: Callable[[Path], None], told: str
) -> None:
    done(admin("init", "--json"))
    harm(tmp_path)
    assert told in refusal(admin("tenant", "list"))
    with pytest.raises(StartRefused, match=told):
        deployment.open_service(load_settings())


def test_nothing_is_opened_before_init(admin: Callable[..., Result]) -> None:
    assert "cloister-admin init" in refusal(admin("tenant", "list"))


def test_keys_inside_the_data_directory_are_refused(
    admin: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KEY_DIR", "KEY_FILE"):
        with monkeypatch.context() as change:
            change.setenv(f"CLOISTER_{name}", str(tmp_path / "data" / "inside"))
            assert "inside the data directory" in refusal(admin("init"))


def test_a_fresh_keystore_does_not_take_over_a_database_of_another(
    admin: Callable[..., Result], tmp_path: Path
) -> None:
    done(admin("init", "--json"))
    shutil.rmtree(tmp_path / "keystore")
    (tmp_path / "root.key").unlink()
    assert "not the one that the database" in refusal(admin("init"))
    assert not list((tmp_path / "keystore").glob("*.kek")), "nothing was made that could be taken for the lost keys"
