"""The operators' operations: the same from the command line, from elsewhere and through the API; refused, told and retried alike."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select
from starlette.testclient import TestClient
from typer.main import get_command
from typer.testing import CliRunner, Result

import cloister_server.cli
from cloister import _login
from cloister_privacy.sealing import LocalKeyProvider, ProviderUnavailable
from cloister_server import deployment, operators, tenants
from cloister_server.cli.admin import cli
from cloister_server.operations import OPERATIONS
from cloister_server.service import Service
from cloister_server.settings import load_settings
from cloister_server.store.anchors import Anchors
from cloister_server.store.session import reading
from cloister_server.store.tables import App, AuditRow
from operators import Operating, allowed, first_operator
from ports import free_port
from security.conftest import serving

BY_HAND = {
    "tenant.create": {"name": "acme"},
    "client.create": {"tenant": "acme", "name": "app", "role": "predictor"},
}
BEFORE_ALL, AFTER_ALL = "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"
"""Moments that are of no year in UTC."""
LOCAL = {
    "init", "doctor", "backup", "restore", "login", "logout", "first-admin",
    "tenant.shred", "tenant.receipt", "tenant.export", "storage.collect", "storage.adopt",
    "key.list", "key.rotate", "key.migrate", "key.destroy", "key.backup", "key.recover", "key.recovery-renew", "key.recipient.create",
    "key.recipient.list", "key.recipient.remove", "audit.head", "audit.compare",
    "ledger.export", "ledger.replay", "ledger.write-off",
}  # fmt: skip
"""What is done at the deployment itself, and the two commands that choose another one."""


@dataclass
class Elsewhere:
    """A deployment that `cloister-admin init` has made, served on a port, and a command line that knows nothing of its disk."""

    service: Service
    token: str

    def admin(self, *words: str, **more: Any) -> Result:
        return CliRunner().invoke(cli, list(words), **more)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> Iterator[Elsewhere]:
    here = {"DATA_DIR": "data", "KEY_DIR": "keystore", "KEY_FILE": "root.key"}
    for name, value in here.items():
        monkeypatch.setenv(f"CLOISTER_{name}", str(tmp_path / value))
    monkeypatch.setenv("CLOISTER_PORT", str(free_port()))
    monkeypatch.delenv("CLOISTER_PROFILE", raising=False)
    made = CliRunner().invoke(cli, ["init", "--json"])
    assert made.exit_code == 0, made.stderr
    token = made.stderr.split("hour: ")[1].split()[0]
    assert token.startswith("fat_") and "fat_" not in made.stdout
    service = deployment.open_service(load_settings())
    for name in (*here, "PORT"):
        monkeypatch.delenv(f"CLOISTER_{name}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with serving(service):
        yield Elsewhere(service, token)
    service.engine.dispose()


def done(result: Result) -> Any:
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    return json.loads(result.stdout)


def refused(result: Result) -> str:
    assert result.exit_code == 1 and result.stdout == "", (result.stdout, result.stderr, result.exception)
    return str(json.loads(result.stderr)["code"])


def rows(service: Service) -> list[tuple[str, str, str]]:
    """Who, what and how it ended, of every row of the audit log about the operators' operations."""
    with reading(service.engine) as session:
        found = session.scalars(select(AuditRow).where(AuditRow.verb.startswith("admin.")).order_by(AuditRow.time))
        return [(row.principal_id, row.verb, row.outcome) for row in found]


def test_from_init_to_a_tenant_that_was_made_from_elsewhere(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service, admin, begin = elsewhere.service, elsewhere.admin, _login.begin
    with httpx2.Client(base_url=service.settings.issuer) as browser:
        human = first_operator(service, browser, token=elsewhere.token)

        def allowed_at_once(*given: Any, **more: Any) -> Any:
            device = begin(*given, **more)
            assert "Allowed" in allowed(human, device.user_code).text
            return device

        def denied_at_once(*given: Any, **more: Any) -> Any:
            device = begin(*given, **more)
            assert "Not allowed" in allowed(human, device.user_code, decision="deny").text
            return device

        monkeypatch.setattr(_login, "wait", partial(_login.wait, pause=lambda _: None))
        monkeypatch.setattr(_login, "begin", denied_at_once)
        denied = admin("login", "--url", service.settings.issuer, "--profile", "spare")
        assert f"run `cloister-admin login --profile spare --url {service.settings.issuer}` again" in denied.stderr
        monkeypatch.setattr(_login, "begin", allowed_at_once)
        logged_in = admin("login", "--url", service.settings.issuer)
    assert logged_in.exit_code == 0, logged_in.stderr
    kept = tmp_path / "config" / "cloister" / "operators" / "default.json"
    assert kept.stat().st_mode & 0o777 == 0o600 and human.account not in kept.read_text()
    for tenant in ("acme", "other"):
        assert done(admin("tenant", "create", tenant, "--json"))["name"] == tenant
    assert done(admin("tenant", "create", "third", "--dry-run", "--json"))["dry_run"] is True
    made = done(admin("client", "create", "--tenant", "acme", "--name", "app", "--role", "none", "--json"))
    done(admin("client", "create", "--tenant", "other", "--name", "theirs", "--json"))
    grant = ("grant", "add", "--tenant", "acme", "--to", "app", "--verb", "model.predict", "--until", "2100-01-01")
    assert done(admin(*grant, "--json"))["to"] == made["client_id"]
    listed = admin("grant", "list", "--tenant", "acme").stdout
    assert "2100-01-01 00:00" in listed and "T00:00" not in listed  # as it reads at the deployment itself
    form = {"grant_type": "client_credentials"}
    credentials = (made["client_id"], made["client_secret"])
    assert httpx2.post(f"{service.settings.issuer}/oauth/token", data=form, auth=credentials).status_code == 200
    assert refused(admin("tenant", "create", "acme", "--json")) == "conflict"
    assert refused(admin("client", "list", "--tenant", "nobody", "--json")) == "not_found"
    for confirm in ((), ("--confirm", "theirs"), ("--confirm", "acme")):
        assert refused(admin("client", "remove", "app", "--tenant", "acme", *confirm, "--json")) == "not_confirmed"
    done(admin("client", "remove", "app", "--tenant", "acme", "--confirm", "app", "--json"))
    assert len(done(admin("audit", "verify", "--json"))) == 3
    assert admin("audit", "export").stdout.count("admin.tenant.create") == 4
    told = [row for row in rows(service) if row[1] in ("admin.tenant.create", "admin.client.remove")]
    assert {who for who, _, _ in told} == {human.id}
    assert [(verb, outcome) for _, verb, outcome in told] == [
        ("admin.tenant.create", "allowed"),
        ("admin.tenant.create", "allowed"),
        ("admin.tenant.create", "denied: conflict"),
        *3 * [("admin.client.remove", "denied: not_confirmed")],
        ("admin.client.remove", "allowed"),
    ]
    with reading(service.engine) as session:
        row = session.scalars(select(AuditRow).where(AuditRow.verb == "grant.add")).one()
        assert row.principal_id == human.id and row.tenant_id == tenants.find_tenant(session, "acme").id
    for words in (("key", "list"), ("backup", "--to", "x"), ("doctor",), ("init",), ("tenant", "shred", "acme")):
        assert refused(admin(*words, "--json")) == "local_only"
    secret = kept.read_text()
    assert admin("logout").exit_code == 0 and not kept.exists()
    assert refused(admin("--profile", "default", "tenant", "list", "--json")) == "not_logged_in"
    kept.write_text(secret)
    kept.chmod(0o600)
    assert refused(admin("tenant", "list", "--json")) == "invalid_grant"
    monkeypatch.setenv("CLOISTER_DATA_DIR", str(service.settings.data_dir))
    monkeypatch.setenv("CLOISTER_KEY_DIR", str(service.settings.key_dir))
    monkeypatch.setenv("CLOISTER_KEY_FILE", str(service.settings.key_file))
    assert len(done(admin("tenant", "list", "--json"))) == 3, "the environment goes before a login"
    assert rows(service)[-1][0].startswith("local:")
    monkeypatch.setenv("CLOISTER_PROFILE", "default")
    assert refused(admin("tenant", "list", "--json")) == "invalid_grant"
    assert len(done(admin("--local", "tenant", "list", "--json"))) == 3


def test_no_operation_is_done_without_the_scope(
    http: TestClient, service: Service, bearer: dict[str, str], steward: Any
) -> None:
    """Driven by the registry: a new operation cannot be forgotten."""
    assert len(OPERATIONS) > 40
    for name in OPERATIONS:
        body = {"request": BY_HAND.get(name, {})}
        answer = http.post(f"/v1/admin/{name}", json=body, headers=bearer)
        assert (answer.status_code, answer.json()["code"]) == (403, "admin_scope_needed"), name
        assert http.post(f"/v1/admin/{name}", json=body).status_code == 401, name
    assert http.post("/v1/admin/tenant.create", json=[], headers=bearer).status_code == 403
    with reading(service.engine) as session:
        denied = session.scalars(select(AuditRow).where(AuditRow.verb == "admin.tenant.create")).all()
        assert {(row.tenant_id, row.principal_id) for row in denied} == {(steward.tenant_id, steward.id)}


def test_a_retry_makes_nothing_twice_and_is_told_no_secret(operating: Operating, service: Service) -> None:
    operating.ask("tenant.create", {"name": "acme"})
    request = {"tenant": "acme", "name": "app"}
    first = operating.ask("client.create", request, key="k1")
    assert first.status_code == 200 and first.headers["cache-control"] == "no-store"
    secret = first.json()["answer"]["client_secret"]
    retried = operating.ask("client.create", request, key="k1")
    assert (retried.status_code, retried.json()["code"]) == (409, "secret_already_shown") and secret not in retried.text
    assert operating.ask("client.create", {**request, "name": "b"}, key="k1").json()["code"] == "idempotency_mismatch"
    grant = {"tenant": "acme", "to": "app", "verb": "model.read"}
    one, two = (operating.ask("grant.add", grant, key="k2").json() for _ in range(2))
    assert one == two
    told = [outcome for _, verb, outcome in rows(service) if verb == "admin.grant.add"]
    assert told == ["allowed", "allowed: answered again"], "an answer that is given again has its row, too"
    with reading(service.engine) as session:
        assert len(session.scalars(select(App)).all()) == 1
    stored = service.settings.data_dir / "cloister.db"
    assert secret.encode() not in b"".join(path.read_bytes() for path in stored.parent.glob("cloister.db*"))


def test_a_request_that_does_not_hold_is_refused_by_name(
    operating: Operating, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, body in (
        ("tenant.create", {"request": {"name": "a", "more": 1}}),
        ("tenant.create", {"request": {}}),
        ("tenant.create", {"request": {"name": "a\x00"}}),
        ("tenant.create", {"request": {"name": "a"}, "more": 1}),
        ("tenant.quota", {"request": {"tenant": "a", "jobs": -1}}),
        ("tenant.create", {"request": {"name": "a", "key_provider": "nowhere"}}),
        ("tenant.create", {"request": {"name": "a", "key_provider": "nowhere"}, "dry_run": True}),
        ("audit.export", {"request": {"after": "x"}}),
        ("audit.export", {"request": {"after": f"{BEFORE_ALL} x"}}),
        ("audit.export", {"request": {"since": BEFORE_ALL}}),
        ("audit.export", {"request": {"until": AFTER_ALL}}),
        ("grant.add", {"request": {"tenant": "a", "to": "b", "verb": "model.read", "until": AFTER_ALL}}),
        ("token.inspect", {"request": {"token": "not-a-token"}}),
    ):
        answer = operating.http.post(f"/v1/admin/{name}", json=body, headers=operating.headers(f"/v1/admin/{name}"))
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), (name, body)
        assert "not-a-token" not in answer.text

    def away(*_: Any) -> None:
        raise ProviderUnavailable("at 192.0.2.1")

    monkeypatch.setattr(LocalKeyProvider, "create_key", away)
    answer = operating.ask("tenant.create", {"name": "acme"})
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable") and "192.0.2.1" not in answer.text
    assert rows(service)[-1][1:] == ("admin.tenant.create", "denied: unavailable")


def test_stolen_tokens_are_revoked_one_after_the_other(
    operating: Operating, make_client: Any, bearer_of: Callable[..., dict[str, str]]
) -> None:
    """Each revocation makes the process forget the keys that it verifies by, and the next one has a transaction open."""
    for tenant in ("acme", "other"):
        bearer = bearer_of(make_client(tenant))
        token = {"token": bearer["Authorization"].split()[1]}
        assert [operating.ask(f"token.{verb}", token).status_code for verb in ("inspect", "revoke")] == [200, 200]
        assert operating.http.get("/v1/sources", headers=bearer).status_code == 401


def test_whoever_holds_the_keys_goes_on_where_the_operators_own_chain_has_lost_its_anchor(
    operating: Operating, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert operating.ask("tenant.list").status_code == 200
    with reading(service.engine) as session:
        own = tenants.find_tenant(session, "operators").id
    Anchors(service.settings.anchor_dir).path(own).unlink()
    refused_ = operating.ask("tenant.list")
    assert (refused_.status_code, refused_.json()["code"]) == (503, "ledger_rolled_back")
    for name in ("data_dir", "key_dir", "key_file"):
        monkeypatch.setenv(f"CLOISTER_{name.upper()}", str(getattr(service.settings, name)))
    run = partial(CliRunner().invoke, cli)
    assert [each["name"] for each in done(run(["tenant", "list", "--json"]))] == ["operators"]
    assert "is gone" in run(["audit", "verify"]).stdout
    assert refused(run(["tenant", "create", "acme", "--json"])) == "ledger_rolled_back"
    done(run(["ledger", "write-off", "--tenant", "operators", "--reason", "r", "--confirm", "operators", "--json"]))
    assert done(run(["tenant", "create", "acme", "--json"]))["name"] == "acme"


def test_the_command_takes_the_token_from_standard_input(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data_dir", "key_dir", "key_file"):
        monkeypatch.setenv(f"CLOISTER_{name.upper()}", str(getattr(service.settings, name)))
    token = operators.first_admin_token(service)
    assert token is not None
    command = ["first-admin", "--name", "ada", "--json"]
    assert refused(CliRunner().invoke(cli, command, input="fat_x\n")) == "first_admin_refused"
    made = done(CliRunner().invoke(cli, command, input=f"{token.get_secret_value()}\n"))
    assert made["account"] == "operators/ada" and made["invitation"].startswith("inv_")
    again = CliRunner().invoke(cli, ["init", "--json"])
    assert again.exit_code == 0 and "fat_" not in again.stderr + again.stdout, "there is an operator"
    done(CliRunner().invoke(cli, ["operator", "remove", "ada", "--confirm", "ada", "--json"]))
    assert "fat_" in CliRunner().invoke(cli, ["init", "--json"]).stderr


def test_every_command_is_an_operation_or_is_of_this_machine_alone() -> None:
    def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[str]:
        for name, each in getattr(command, "commands", {}).items():
            yield from leaves(each, (*words, name)) if hasattr(each, "commands") else [".".join((*words, name))]

    found = set(leaves(get_command(cli)))
    assert found - LOCAL == OPERATIONS.keys(), "an operation has a command, and a command an operation"
    assert LOCAL - found == set()


def test_commands_of_this_machine_say_so_where_they_are_for_another() -> None:
    """Each opens the deployment by way of `settings_here`, which refuses that: none reads the settings by itself."""
    place = Path(cloister_server.cli.__path__[0])
    at_start = {"terminal.py", "server.py", "api_process.py", "roles.py"}
    for file in sorted(place.glob("*.py")):
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        assert file.name in at_start or "load_settings" not in names, file.name
