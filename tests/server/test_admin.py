"""`cloister-admin` on a real deployment: made once, run again without harm, refused by name where it is not sound."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from starlette.testclient import TestClient
from typer.main import get_command
from typer.testing import CliRunner, Result

from cloister_privacy.sealing import LocalKeyProvider
from cloister_server import budgets, deployment, recovery
from cloister_server.app import create_app
from cloister_server.cli.admin import cli
from cloister_server.errors import StartRefused
from cloister_server.oauth import verifier
from cloister_server.settings import load_settings
from cloister_server.store.session import new_engine, writing
from cloister_server.store.tables import Source


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command line on a place of its own."""
    for name, value in {"DATA_DIR": "data", "KEY_DIR": "keystore", "KEY_FILE": "root.key"}.items():
        monkeypatch.setenv(f"CLOISTER_{name}", str(tmp_path / value))
    return lambda *arguments: CliRunner().invoke(cli, list(arguments))


@pytest.fixture(scope="session")
def template(sqlite_template: tuple[Path, None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `init` makes, with the tenants acme and other."""
    root = tmp_path_factory.mktemp("admin") / "template"
    shutil.copytree(sqlite_template[0], root)
    given = {"DATA_DIR": "data", "KEY_DIR": "keystore", "KEY_FILE": "root.key"}
    env = {f"CLOISTER_{name}": str(root / value) for name, value in given.items()}
    for tenant in ("acme", "other"):
        assert CliRunner().invoke(cli, ["tenant", "create", tenant], env=env).exit_code == 0
    return root


@pytest.fixture
def tenants(template: Path, tmp_path: Path) -> None:
    """A copy of it for this test."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)


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


def test_the_recovery_key_is_shown_once_and_opens_what_lost_its_key_file(
    admin: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recover(typed: str, *more: str) -> Result:
        return CliRunner().invoke(cli, ["key", "recover", *more, "--json"], input=typed)

    shown = done(admin("init", "--json"))["recovery_key"]
    assert "recovery_key" not in done(admin("init", "--json"))
    assert shown.encode() not in b"".join(path.read_bytes() for path in _files(tmp_path))
    renewed = done(admin("key", "recovery-renew", "--json"))
    assert renewed["replaces"] and renewed["recovery_key"] != shown
    (tmp_path / "root.key").unlink()
    assert "no key file" in refusal(admin("tenant", "list", "--json"))
    assert "another was made since" in refusal(recover(shown))
    assert "mistyped" in refusal(recover(shown[:-1]))
    assert done(recover(renewed["recovery_key"].lower(), "--dry-run"))["dry_run"]
    assert not (tmp_path / "root.key").exists()
    assert "inside the data directory" in refusal(recover(shown, "--key-file", str(tmp_path / "data" / "root.key")))
    done(recover(renewed["recovery_key"]))
    assert stat.S_IMODE((tmp_path / "root.key").stat().st_mode) == 0o600
    done(admin("tenant", "create", "acme", "--json"))
    reader, writer = os.pipe()
    os.write(writer, b"correct horse battery staple\n")
    os.close(writer)
    monkeypatch.delenv("CLOISTER_KEY_FILE")
    done(recover(renewed["recovery_key"], "--passphrase-fd", str(reader)))
    service = deployment.initialise(load_settings(), passphrase="correct horse battery staple")
    assert recovery.has_key(service)


def test_keys_with_other_providers_alone_have_no_recovery_key_here(
    admin: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LocalKeyProvider.create(tmp_path / "other", key_file=tmp_path / "other.key")
    file = tmp_path / "providers.json"
    file.touch(0o600)
    given = {"kind": "local", "directory": str(tmp_path / "other"), "key_file": str(tmp_path / "other.key")}
    file.write_text(json.dumps({"format": "cloister.key-providers/1", "default": "it", "providers": {"it": given}}))
    monkeypatch.setenv("CLOISTER_KEY_PROVIDERS", str(file))
    assert "recovery_key" not in done(admin("init", "--json"))
    assert "no keystore of its own" in refusal(admin("key", "recovery-renew"))
    assert "by their own means" in refusal(CliRunner().invoke(cli, ["key", "recover"], input="CR1"))


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


@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize("role", ["steward", "trainer", "predictor"])
def test_a_role_is_grants_that_can_be_listed_and_taken_away(admin: Callable[..., Result], role: str) -> None:
    made = done(admin("client", "create", "--tenant", "acme", "--name", "app", "--role", role, "--json"))
    listed = done(admin("grant", "list", "--tenant", "acme", "--json"))
    verbs = {each["verb"] for each in listed}
    assert {each["to"] for each in listed} == {made["client_id"]} and {each["resource"] for each in listed} == {"*"}
    assert ("source.create" in verbs) == (role == "steward") and ("dataset.train" in verbs) == (role != "predictor")
    done(admin("grant", "remove", listed[0]["id"], "--tenant", "acme", "--json"))
    assert len(done(admin("grant", "list", "--tenant", "acme", "--json"))) == len(listed) - 1


@pytest.mark.usefixtures("tenants")
def test_a_grant_is_added_for_an_app_of_another_tenant(admin: Callable[..., Result]) -> None:
    made = done(admin("client", "create", "--tenant", "other", "--name", "app", "--role", "predictor", "--json"))
    arguments = ("grant", "add", "--tenant", "acme", "--to", made["client_id"], "--verb")
    added = done(admin(*arguments, "model.predict", "--until", "2100-01-01", "--json"))
    assert added["to"] == made["client_id"] and added["expires"].startswith("2100-01-01")
    assert "no verb" in refusal(admin(*arguments, "model.fly"))


@pytest.mark.usefixtures("tenants")
def test_a_source_belongs_to_the_app_that_owns_it_and_its_budget_is_shown(admin: Callable[..., Result]) -> None:
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


@pytest.mark.usefixtures("tenants")
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
    told = json.loads(refusal(admin(*arguments, "--json")))
    assert told.keys() == {"error", "code"} and told["code"] == code


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


@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_expose, "others"),
        (_replace_key, "not the one that this keystore is opened by"),
        (_lose_keystore, "no keystore"),
        (_age, "migration 0000"),
        (_lose_database, "not initialised"),
    ],
)
def test_a_deployment_that_is_not_sound_is_refused_by_name(
    admin: Callable[..., Result], tmp_path: Path, harm: Callable[[Path], None], told: str
) -> None:
    harm(tmp_path)
    assert told in refusal(admin("tenant", "list"))
    with pytest.raises(StartRefused, match=told):
        deployment.open_service(load_settings())


@pytest.mark.parametrize(
    "arguments",
    [
        ("tenant", "list"),
        ("tenant", "create", "acme"),
        ("client", "create", "--tenant", "acme", "--name", "app"),
        ("client", "rotate", "app", "--tenant", "acme"),
        ("grant", "list", "--tenant", "acme"),
        ("source", "list", "--tenant", "acme"),
        ("budget", "show", "people", "--tenant", "acme"),
        ("audit", "verify"),
        ("audit", "head"),
        ("ledger", "export", "--tenant", "acme"),
        ("ledger", "replay", os.devnull, "--tenant", "acme"),
        ("ledger", "write-off", "--tenant", "acme", "--reason", "lost"),
    ],
)
def test_before_init_nothing_is_opened_and_nothing_is_made(
    admin: Callable[..., Result], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    assert "cloister-admin init" in refusal(admin(*arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def acme(admin: Callable[..., Result], tenants: None) -> Callable[..., Any]:
    """Runs a command on a deployment with the tenants `acme` and `other`; answers its JSON document."""
    return lambda *arguments: done(admin(*arguments, "--json"))


def _token(http: TestClient, client_id: str, secret: str) -> str | None:
    answer = http.post("/oauth/token", data={"grant_type": "client_credentials"}, auth=(client_id, secret))
    return answer.json().get("access_token") if answer.status_code == 200 else None


def _audited(root: Path, verb: str) -> list[str]:
    engine = new_engine(f"sqlite:///{root}/data/cloister.db")
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT resource_id, outcome FROM audit WHERE verb = :verb"), {"verb": verb}
        ).all()
    engine.dispose()
    assert {row.outcome for row in rows} <= {"allowed"}
    return [row.resource_id for row in rows]


def test_a_rotated_secret_is_dead_at_once_and_the_new_one_is_shown_once(
    acme: Callable[..., Any], tmp_path: Path
) -> None:
    made = acme("client", "create", "--tenant", "acme", "--name", "app")
    before = acme("client", "list", "--tenant", "acme")[0]
    assert before["secret_since"] == before["created"]
    with TestClient(create_app(deployment.open_service(load_settings()))) as http:
        for named in ("app", made["client_id"]):
            old, made = made, acme("client", "rotate", named, "--tenant", "acme")
            assert made["client_id"] == old["client_id"] and made["client_secret"] != old["client_secret"]
            assert _token(http, old["client_id"], old["client_secret"]) is None
            assert _token(http, made["client_id"], made["client_secret"])
    after = acme("client", "list", "--tenant", "acme")[0]
    assert after["created"] == before["created"] < after["secret_since"]
    assert _audited(tmp_path, "client.rotate") == [made["client_id"]] * 2
    assert made["client_secret"].encode() not in b"".join(path.read_bytes() for path in _files(tmp_path))


def test_a_removed_client_its_token_and_its_grants_are_of_no_use(
    acme: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = acme("client", "create", "--tenant", "acme", "--name", "app", "--role", "steward")
    kept = acme("client", "create", "--tenant", "acme", "--name", "kept", "--role", "predictor")
    acme("grant", "add", "--tenant", "other", "--to", made["client_id"], "--verb", "model.predict")
    declared = ("--name", "people", "--epsilon", "3", "--delta", "1e-6", "--owner", "app")
    assert acme("source", "create", "--tenant", "acme", *declared)["name"] == "people"
    with TestClient(create_app(deployment.open_service(load_settings()))) as http:
        bearer = {"Authorization": f"Bearer {_token(http, made['client_id'], made['client_secret'])}"}
        assert http.get("/v1/sources", headers=bearer).status_code == 200
        removed = acme("client", "remove", "app", "--tenant", "acme", "--confirm", "app")
        assert removed == {"removed": made["client_id"], "name": "app", "sources_without_owner": ["people"]}
        assert _token(http, made["client_id"], made["client_secret"]) is None
        later = time.monotonic() + 1.01  # for a second a process may remember that the app is there
        monkeypatch.setattr(verifier, "monotonic", lambda: later)
        assert http.get("/v1/sources", headers=bearer).status_code == 401
    assert {each["to"] for each in acme("grant", "list", "--tenant", "acme")} == {kept["client_id"]}
    assert acme("grant", "list", "--tenant", "other") == []
    assert _audited(tmp_path, "client.remove") == [made["client_id"]]
    again = acme("client", "create", "--tenant", "acme", "--name", "app")
    assert again["client_id"] != made["client_id"]


def test_a_tenant_is_suspended_and_resumed_by_name(acme: Callable[..., Any], tmp_path: Path) -> None:
    made = acme("client", "create", "--tenant", "acme", "--name", "app")
    suspended = acme("tenant", "suspend", "acme")
    assert suspended["name"] == "acme" and suspended["suspended"] and suspended["jobs_not_over"] == 0
    assert {each["name"]: each["status"] for each in acme("tenant", "list")} == {"acme": "suspended", "other": "active"}
    rotated = acme("client", "rotate", "app", "--tenant", "acme")
    assert rotated["client_id"] == made["client_id"], "a stolen secret is changed before it is resumed"
    with TestClient(create_app(deployment.open_service(load_settings()))) as http:
        assert _token(http, rotated["client_id"], rotated["client_secret"]) is None
        assert acme("tenant", "resume", suspended["tenant"])["suspended"] is None
        assert _token(http, rotated["client_id"], rotated["client_secret"])
    assert _audited(tmp_path, "tenant.suspend") == _audited(tmp_path, "tenant.resume") == [suspended["tenant"]]


def _content(root: Path) -> list[str]:
    """All that the database holds, and the names of all files beside it."""
    database = sqlite3.connect(root / "data" / "cloister.db")
    dumped = list(database.iterdump())
    database.close()
    return dumped + [str(path) for path in _names(root)]


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(acme: Callable[..., Any], tmp_path: Path) -> None:
    made = acme("client", "create", "--tenant", "acme", "--name", "app")
    declared = ("source", "create", "--tenant", "acme", "--epsilon", "3", "--delta", "1e-6", "--owner", "app", "--name")
    acme(*declared, "people")
    granted = acme("grant", "list", "--tenant", "acme")[0]["id"]
    (key,) = (each["kid"] for each in acme("token-key", "list") if each["state"] == "next")
    forced = ("--reason", "r", "--even-if-nothing-is-missing")
    before = _content(tmp_path)
    for words, told in (
        (("tenant", "create", "new"), {"name": "new", "key_provider": "local"}),
        (("tenant", "suspend", "acme"), {"name": "acme", "jobs_not_over": 0}),
        (("tenant", "resume", "acme"), {"suspended": None}),
        (("tenant", "quota", "acme", "--jobs", "3"), {"jobs": {"used": 0, "allowed": 3}}),
        (("client", "create", "--tenant", "acme", "--name", "b"), {"name": "b", "role": "trainer"}),
        (("client", "rotate", "app", "--tenant", "acme"), {"client_id": made["client_id"], "name": "app"}),
        (("client", "remove", "app", "--tenant", "acme"), {"name": "app", "sources_without_owner": ["people"]}),
        (("grant", "add", "--tenant", "acme", "--to", "app", "--verb", "model.predict"), {"to_name": "app"}),
        (("grant", "remove", granted, "--tenant", "acme"), {"removed": granted}),
        (("group", "create", "partners", "--tenant", "acme"), {"name": "partners"}),
        ((*declared, "others"), {"name": "others"}),
        (("ledger", "write-off", "--tenant", "acme", *forced), {"sources": ["people"]}),
        (("token-key", "revoke", key), {"state": "revoked"}),
    ):
        plan = acme(*words, "--dry-run")
        assert plan["dry_run"] is True and plan.items() >= told.items(), (words, plan)
        assert not {"client_secret", "id", "group_id"} & plan.keys(), words
        assert _content(tmp_path) == before, words


def test_a_dry_run_is_refused_what_the_command_would_be(acme: Callable[..., Any], admin: Callable[..., Result]) -> None:
    assert "already there" in refusal(admin("tenant", "create", "acme", "--dry-run"))
    assert "no client" in refusal(admin("client", "remove", "nobody", "--tenant", "acme", "--dry-run"))


def test_what_destroys_wants_its_name_typed(
    acme: Callable[..., Any], admin: Callable[..., Result], tmp_path: Path
) -> None:
    acme("client", "create", "--tenant", "acme", "--name", "app")
    before = _content(tmp_path)
    for words, name in (
        (("client", "remove", "app", "--tenant", "acme"), "app"),
        (("ledger", "write-off", "--tenant", "acme", "--reason", "r", "--even-if-nothing-is-missing"), "acme"),
    ):
        for given in ((), ("--confirm", "other")):
            assert f"confirm it with --confirm {name}" in refusal(admin(*words, *given))
            assert _content(tmp_path) == before


def _commands(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, *path, name)
        else:
            yield (*path, name), command


def test_no_command_takes_a_secret_as_an_argument_and_what_ends_something_can_be_planned() -> None:
    commands = dict(_commands(get_command(cli)))
    options = {path: {each.name for each in command.params} for path, command in commands.items()}
    assert len(options) > 30
    for path, names in options.items():
        assert not {name for name in names if re.search("secret|passphrase$|password|^token$", name)}, path
        if path[-1] in {
            "create",
            "rotate",
            "revoke",
            "remove",
            "shred",
            "destroy",
            "suspend",
            "resume",
            "write-off",
            "quota",
        }:
            assert "dry_run" in names or path[:2] == ("key", "recipient"), path


def test_shell_completion_knows_the_commands() -> None:
    asked = {"_CLOISTER_ADMIN_COMPLETE": "complete_bash", "COMP_WORDS": "cloister-admin tenant su", "COMP_CWORD": "2"}
    offered = CliRunner().invoke(cli, [], env=asked, prog_name="cloister-admin")
    assert offered.stdout.split() == ["suspend"]


def test_a_client_of_another_tenant_is_neither_removed_nor_rotated(
    acme: Callable[..., Any], admin: Callable[..., Result]
) -> None:
    made = acme("client", "create", "--tenant", "other", "--name", "app")
    for verb in ("remove", "rotate"):
        for named in ("app", "other/app", made["client_id"]):
            given = ("--confirm", "app") if verb == "remove" else ()
            assert "no client" in refusal(admin("client", verb, named, "--tenant", "acme", *given))
    assert len(acme("client", "list", "--tenant", "other")) == 1


def test_a_client_without_a_role_starts_with_nothing(acme: Callable[..., Any]) -> None:
    acme("client", "create", "--tenant", "acme", "--name", "app", "--role", "none")
    assert acme("grant", "list", "--tenant", "acme") == []


def test_grants_are_added_listed_and_removed_by_names(acme: Callable[..., Any], admin: Callable[..., Result]) -> None:
    app = acme("client", "create", "--tenant", "acme", "--name", "app", "--role", "none")
    friend = acme("client", "create", "--tenant", "other", "--name", "app", "--role", "none")
    declared = ("--name", "people", "--epsilon", "3", "--delta", "1e-6", "--owner", "app")
    source = acme("source", "create", "--tenant", "acme", *declared)
    words = ("--tenant", "acme", "--verb", "source.read", "--resource", "people")
    for to, client in (("app", app), ("other/app", friend)):
        added = acme("grant", "add", *words, "--to", to)
        assert (added["to"], added["to_name"]) == (client["client_id"], to)
        assert (added["resource"], added["resource_name"]) == (source["id"], "people")
        assert added["id"] in [each["id"] for each in acme("grant", "list", "--tenant", "acme", "--to", to)]
    denied = acme("grant", "add", *words, "--to", "other/app", "--effect", "deny")
    of_friend = acme("grant", "list", "--tenant", "acme", "--to", "other/app")
    allowed = [each["id"] for each in of_friend if each["effect"] == "allow"]
    assert acme("grant", "remove", *words, "--to", "other/app") == {"removed": allowed}
    left = acme("grant", "list", "--tenant", "acme", "--to", friend["client_id"])
    assert [each["id"] for each in left] == [denied["id"]], "a deny is taken away by its own words alone"
    assert "no grant" in refusal(admin("grant", "remove", *words, "--to", "other/app"))
    assert acme("grant", "remove", *words, "--to", "other/app", "--effect", "deny") == {"removed": [denied["id"]]}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("grant", "add", "--to", "nobody", "--verb", "model.read"), "no client, user or group 'nobody'"),
        (("grant", "add", "--to", "app", "--verb", "model.read", "--until", "2020-01-01"), "2020-01-01 00:00"),
        (("policy", "explain", "nobody", "model.read", "*"), "no client or user 'nobody'"),
        (("grant", "add", "--to", "app", "--verb", "model.read", "--resource", "people"), "no model 'people'"),
        (("grant", "add", "--to", "app", "--verb", "job.read", "--resource", "people"), "give one by its id, or"),
        (("grant", "add", "--to", "app", "--verb", "source.fly"), "it is one of source.create"),
        (("grant", "remove", "gr_" + "0" * 32, "--to", "app"), "either a grant's id, or --to and --verb"),
        (("grant", "remove", "--to", "app"), "either a grant's id, or --to and --verb"),
        (("grant", "remove", "gr_" + "0" * 32), "`cloister-admin grant list`"),
        (
            ("grant", "list", "--to", "nobody"),
            "`cloister-admin client list`, `cloister-admin user list` or `cloister-admin group list`",
        ),
        (("client", "remove", "nobody"), "no client 'nobody'"),
        (("client", "list", "--tenant", "nobody"), "`cloister-admin tenant list`"),
        (("budget", "show", "nothing"), "no source 'nothing' here; `cloister-admin source list`"),
        (("budget", "show", "src_" + "0" * 32), "`cloister-admin source list`"),
        (
            ("source", "create", "--name", "s", "--epsilon", "1", "--delta", "1e-6", "--owner", "nobody"),
            "no client 'nobody'",
        ),
    ],
)
def test_a_refusal_is_in_the_operators_words(
    acme: Callable[..., Any], admin: Callable[..., Result], arguments: tuple[str, ...], told: str
) -> None:
    acme("client", "create", "--tenant", "acme", "--name", "app", "--role", "none")
    said = refusal(admin(*arguments, *(() if "--tenant" in arguments else ("--tenant", "acme"))))
    assert told in said
    assert "shared with you" not in said and "ask its owner" not in said and "granted to you" not in said


def test_lists_are_columns_of_names(acme: Callable[..., Any], admin: Callable[..., Result]) -> None:
    made = acme("client", "create", "--tenant", "acme", "--name", "app", "--role", "predictor")
    lines = admin("client", "list", "--tenant", "acme").stdout.splitlines()
    columns = "name client_id created secret_since public_key dpop public redirect_uris"
    assert lines[0].split() == columns.split()
    assert lines[1].split()[:2] == ["app", made["client_id"]]
    lines = admin("grant", "list", "--tenant", "acme").stdout.splitlines()
    assert lines[0].split() == ["id", "to", "effect", "verb", "resource", "expires", "conditions"]
    assert {line.index("allow") for line in lines[1:]} == {lines[0].index("effect")}
    assert {tuple(line.split()[1:]) for line in lines[1:]} == {
        ("app", "allow", verb, "*", "-", "-") for verb in ("model.read", "model.predict")
    }
    assert admin("source", "list", "--tenant", "acme").stdout == "(none)\n"


def test_groups_conditions_and_what_decides_are_the_operators_to_see(
    acme: Callable[..., Any], admin: Callable[..., Result]
) -> None:
    of = ("--tenant", "acme")
    client = acme("client", "create", *of, "--name", "app", "--role", "none")["client_id"]
    group = acme("group", "create", "partners", *of)
    assert acme("group", "add", "partners", "app", *of)["members"] == ["app"]
    bound = ("--from", "10.0.0.0/8", "--per-minute", "60", "--outputs", "labels")
    added = acme("grant", "add", *of, "--to", "partners", "--verb", "model.predict", *bound)
    assert added["to_name"] == "partners"
    assert added["conditions"] == {
        "first_address": "10.0.0.0", "last_address": "10.255.255.255", "requests_per_minute": 60, "outputs": "labels",
    }  # fmt: skip
    asked = ("policy", "explain", "app", "model.predict", "*", *of)
    told = acme(*asked, "--from", "10.1.2.3")
    assert told["allowed"] and told["grant"]["id"] == added["id"] and told["grant"]["to"] == group["group_id"]
    assert not acme(*asked)["allowed"]
    assert acme("policy", "who-can", "model.predict", "*", *of)[0]["principal"] == client
    assert "decision: allow" in admin(*asked, "--from", "10.1.2.3").stdout
    assert acme("group", "list", *of)[0]["members"] == ["app"]
    assert acme("group", "remove", "partners", "app", *of)["members"] == []
    assert acme("policy", "who-can", "model.predict", "*", *of) == []
    assert "confirm it" in refusal(admin("group", "delete", "partners", *of))
    assert acme("group", "delete", "partners", "--confirm", "partners", *of)["deleted"] == group["group_id"]
    assert acme("grant", "list", *of) == []
    assert "no group" in refusal(admin("group", "add", "partners", "app", *of))
    kept_to_by_another = ("--verb", "model.read", "--outputs", "labels")
    assert "kept to by 'model.predict'" in refusal(admin("grant", "add", *of, "--to", "app", *kept_to_by_another))


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


def test_the_doctor_finds_a_sound_deployment_sound_and_says_what_is_not(
    admin: Callable[..., Result], tmp_path: Path
) -> None:
    before = admin("doctor", "--json")
    assert before.exit_code == 1
    assert "cloister-admin init" in next(row["detail"] for row in json.loads(before.stdout) if row["state"] == "FAULT")
    assert not (tmp_path / "data").exists(), "it makes nothing"

    done(admin("init", "--json"))
    rows = done(admin("doctor", "--json"))
    assert {row["check"] for row in rows} >= {"settings", "keys and database", "data directory", "keystore"}
    assert all(row["state"] in ("ok", "note") for row in rows)

    (tmp_path / "data").chmod(0o755)
    open_to_all = admin("doctor")
    assert open_to_all.exit_code == 1
    assert "chmod 700" in open_to_all.stdout
    (tmp_path / "data").chmod(0o700)
    (tmp_path / "root.key").unlink()
    assert admin("doctor").exit_code == 1


def _faults(result: Result) -> str:
    """The faults' details, as the command that failed because of them printed them."""
    assert result.exit_code == 1, (result.stdout, result.stderr, result.exception)
    return "; ".join(row["detail"] for row in json.loads(result.stdout) if row["state"] == "FAULT")


def _names(root: Path) -> list[Path]:
    """Files and directories, without those that SQLite keeps beside a database that is read."""
    return sorted(path for path in root.rglob("*") if path.suffix not in (".db-wal", ".db-shm"))


def _lose_objects(root: Path) -> None:
    shutil.rmtree(root / "data" / "objects")


@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_expose, "others have access"),
        (_replace_key, "not the one that this keystore is opened by"),
        (_lose_keystore, "no keystore"),
        (_age, "migration 0000"),
        (_lose_database, "not initialised"),
        (_lose_objects, "restore it from the database's backup"),
    ],
)
def test_the_doctor_says_what_is_broken_why_and_what_next_and_makes_nothing(
    admin: Callable[..., Result], tmp_path: Path, harm: Callable[[Path], None], told: str
) -> None:
    harm(tmp_path)
    before = _names(tmp_path)
    assert told in _faults(admin("doctor", "--json"))
    assert _names(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("DATA_DIR", "/tmp/" + "x" * 300, "File name too long"),
        ("PORT", "none", "CLOISTER_PORT"),
        ("DEVICE", "cuda", "set it to auto"),
    ],
)
def test_the_doctor_names_a_setting_that_cannot_be_met(
    admin: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    done(admin("init", "--json"))
    monkeypatch.setattr("cloister_server.cli.doctor.version", lambda _: "2.13.0+cpu")
    monkeypatch.setenv(f"CLOISTER_{name}", value)
    assert told in _faults(admin("doctor", "--json"))


def test_the_doctor_prints_no_secret_and_loads_no_torch_unless_it_audits(
    admin: Callable[..., Result], tmp_path: Path
) -> None:
    done(admin("init", "--json"))
    script = (
        "import sys\nfrom cloister_server.cli.admin import cli\n"
        "cli(['doctor'], standalone_mode=False)\nassert not {'torch', 'scipy', 'opacus'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for secret in _files(tmp_path / "keystore") + _files(tmp_path / "root.key"):
        for line in secret.read_bytes().split(b"\n"):
            assert len(line) < 20 or line not in (ended.stdout + ended.stderr).encode()


def _charge() -> None:
    """A row in the ledger of the one source."""
    service = deployment.open_service(load_settings())
    with writing(service.engine) as session:
        source = session.scalars(select(Source)).one()
        budgets.allow(session, source, principal_id="ap_x", to="ap_y", epsilon=1.0, expires=None, reason="of a test")
    service.engine.dispose()


def _backup(root: Path) -> Callable[[], None]:
    """A backup of the database; what it gives puts it back."""
    kept = root / "backup.db"
    gone = sqlite3.connect(root / "data" / "cloister.db")
    there = sqlite3.connect(kept)
    gone.backup(there)
    gone.close()
    there.close()

    def restore() -> None:
        for path in (root / "data").glob("cloister.db*"):
            path.unlink()
        shutil.copy(kept, root / "data" / "cloister.db")

    return restore


def _rows_with_faults(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 1, (result.stdout, result.stderr, result.exception)
    return [row for row in json.loads(result.stdout) if row["problem"] is not None]


def test_a_restored_database_is_found_and_replayed_or_written_off(
    acme: Callable[..., Any], admin: Callable[..., Result], tmp_path: Path
) -> None:
    acme("client", "create", "--tenant", "acme", "--name", "app")
    declared = ("--name", "people", "--epsilon", "3", "--delta", "1e-6", "--owner", "app")
    acme("source", "create", "--tenant", "acme", *declared)
    _charge()
    restore = _backup(tmp_path)
    tenant = next(each for each in acme("tenant", "list") if each["name"] == "acme")["id"]
    (tmp_path / "early.json").write_text(admin("audit", "head").stdout)
    _charge()
    (tmp_path / "late.json").write_text(admin("audit", "head", "--tenant", "acme").stdout)
    (tmp_path / "acme.jsonl").write_text(admin("ledger", "export", "--tenant", "acme").stdout)
    assert {row["problem"] for row in acme("audit", "verify")} == {None}
    assert [row["now"] - row["then"] for row in acme("audit", "compare", str(tmp_path / "early.json"))] == [1, 0]

    restore()
    said = refusal(admin("client", "create", "--tenant", "acme", "--name", "more"))
    assert tenant in said and "its chain ends at link" in said and "ledger replay" in said
    assert len(acme("client", "list", "--tenant", "acme")) == 1, "it can be read"
    acme("client", "create", "--tenant", "other", "--name", "app")
    (found,) = _rows_with_faults(admin("audit", "verify", "--json"))
    assert found["tenant_name"] == "acme" and "ledger write-off" in found["problem"]
    (behind,) = _rows_with_faults(admin("audit", "compare", str(tmp_path / "late.json"), "--json"))
    assert "are missing" in behind["problem"]
    assert tenant in _faults(admin("doctor", "--json"))
    replay = ("ledger", "replay", str(tmp_path / "acme.jsonl"), "--tenant", "acme")
    assert acme(*replay) == {"tenant": "acme", "links": 1, "beyond_anchor": 0}
    assert "no row is missing" in refusal(admin(*replay))
    assert {row["problem"] for row in acme("audit", "compare", str(tmp_path / "late.json"))} == {None}
    assert _audited(tmp_path, "ledger.replay") == [tenant]

    restore()
    assert acme("ledger", "write-off", "--tenant", "acme", "--reason", "lost", "--confirm", "acme")["sources"] == [
        "people"
    ]
    assert _audited(tmp_path, "ledger.write_off") == [tenant]
    assert acme("budget", "show", "people", "--tenant", "acme")["left"] == 0
    assert {row["problem"] for row in acme("audit", "verify", "--tenant", "acme")} == {None}
    (other_past,) = _rows_with_faults(admin("audit", "compare", str(tmp_path / "late.json"), "--json"))
    assert "is another now" in other_past["problem"]
    assert {row["state"] for row in acme("doctor")} <= {"ok", "note"}


def test_the_anchor_of_a_tenant_that_a_restore_lost_is_put_aside(
    acme: Callable[..., Any], admin: Callable[..., Result], tmp_path: Path
) -> None:
    restore = _backup(tmp_path)
    tenant = acme("tenant", "create", "late")["id"]
    acme("client", "create", "--tenant", "late", "--name", "app")
    acme(
        "source",
        "create",
        "--tenant",
        "late",
        "--name",
        "people",
        "--epsilon",
        "3",
        "--delta",
        "1e-6",
        "--owner",
        "app",
    )
    _charge()
    restore()
    (found,) = _rows_with_faults(admin("audit", "verify", "--json"))
    assert found["tenant"] == tenant and "ends at link 0" in found["problem"]
    done = acme("ledger", "write-off", "--tenant", tenant, "--reason", "it is gone", "--confirm", tenant)
    assert Path(done["kept_anchor"]).name == f"{tenant}.json.written-off-1"
    assert {row["problem"] for row in acme("audit", "verify")} == {None}
    assert "no tenant" in refusal(admin("ledger", "write-off", "--tenant", tenant, "--reason", "it is gone"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("audit", "verify", "--tenant", "nobody"), "no tenant 'nobody'"),
        (("audit", "compare", "nowhere.json"), "cannot be read"),
        (("audit", "compare", os.devnull), "no chain heads"),
        (("ledger", "export", "--tenant", "nobody"), "no tenant 'nobody'"),
        (("ledger", "replay", "nowhere.jsonl", "--tenant", "acme"), "cannot be read"),
        (("ledger", "replay", os.devnull, "--tenant", "acme"), "no row is missing"),
        (("ledger", "write-off", "--tenant", "acme", "--reason", " ", "--confirm", "acme"), "needs a reason"),
    ],
)
def test_what_the_ledgers_commands_refuse(
    acme: Callable[..., Any], admin: Callable[..., Result], arguments: tuple[str, ...], told: str
) -> None:
    assert told in refusal(admin(*arguments))
    assert told in json.loads(refusal(admin(*arguments, "--json")))["error"]


def test_an_engine_that_stops_in_the_audit_is_a_fault(
    admin: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloister_privacy.errors import TrainingError
    from cloister_privacy.training.noise import NoiseDraws

    def stop(_: NoiseDraws) -> None:
        raise TrainingError("no noise today")

    done(admin("init", "--json"))
    monkeypatch.setattr(NoiseDraws, "take", stop)
    assert "no noise today" in _faults(admin("doctor", "--audit", "--json"))


def test_the_doctor_audits_the_engine_as_it_runs_here(
    admin: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloister_privacy.training.noise import NoiseDraws

    done(admin("init", "--json"))
    rows = {row["check"]: row["state"] for row in done(admin("doctor", "--audit", "--json"))}
    assert len(rows) > 10
    assert rows["canary audit"] == "ok"
    take = NoiseDraws.take
    monkeypatch.setattr(NoiseDraws, "take", lambda draws: take(draws) / 2)
    broken = admin("doctor", "--audit", "--json")
    assert broken.exit_code == 1
    assert any(row["state"] == "FAULT" and "noise" in row["check"] for row in json.loads(broken.stdout))
