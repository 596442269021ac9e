"""Operators: the first by a token of `init`, all by a login with a second factor and a bound token, and nobody else by any."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient
from typer.main import get_command
from typer.testing import CliRunner, Result

import cloister_server.cli
from asked import asked_writing
from cloister import _login
from cloister_server import deployment, operators, shredding, tenants
from cloister_server.cli.admin import cli
from cloister_server.errors import Conflict
from cloister_server.oauth import authorizations, device_endpoint, passphrases
from cloister_server.oauth.foreign import ForeignToken
from cloister_server.oauth.verifier import _principal
from cloister_server.operations import OPERATIONS
from cloister_server.service import Service
from cloister_server.settings import load_settings
from cloister_server.store.anchors import Anchors
from cloister_server.store.operators import FirstAdminToken
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import App, AuditRow, now
from harness import free_port
from keys_of_clients import Signer
from operators import ADMIN_CLIENT, DEVICE_GRANT, Operating, allowed, begun, first_operator, page_of
from people import Human, forms, invited
from security.conftest import serving

NOTHING: dict[str, Any] = {"request": {}}
BY_HAND = {
    "tenant.create": {"name": "acme"},
    "client.create": {"tenant": "acme", "name": "app", "role": "predictor"},
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passphrases, "MEMORY_KIB", 64)
    for module in (authorizations, device_endpoint):
        monkeypatch.setattr(module, "INTERVAL_S", 1)


@pytest.fixture
def operator(http: TestClient, service: Service) -> Human:
    """The first operator, in the browser of the test."""
    token = operators.first_admin_token(service)
    assert token is not None
    return first_operator(service, http, token=token.get_secret_value())


@pytest.fixture
def operating(http: TestClient, service: Service, operator: Human) -> Operating:
    return Operating(http, service.settings.issuer).log_in(operator)


@dataclass
class Elsewhere:
    """A deployment that `cloister-admin init` has made, served on a port, and a command line that knows nothing of its disk."""

    service: Service
    token: str

    def admin(self, *words: str, **more: Any) -> Result:
        return CliRunner().invoke(cli, list(words), **more)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
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

        monkeypatch.setattr(_login, "begin", allowed_at_once)
        monkeypatch.setattr(_login, "wait", partial(_login.wait, pause=lambda _: None))
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
    assert "2100-01-01" in admin("grant", "list", "--tenant", "acme").stdout
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
        assert row.principal_id == human.id and row.tenant_id == made_in(service, "acme")
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


def made_in(service: Service, tenant: str) -> str:
    listed = OPERATIONS["tenant.list"]
    with reading(service.engine) as session:
        found = listed.work(session, service, None, listed.request())  # type: ignore[arg-type]  # it asks nobody
        return str(next(each["id"] for each in found if each["name"] == tenant))


def test_no_operation_is_done_without_the_scope(
    http: TestClient, service: Service, bearer: dict[str, str], steward: Any
) -> None:
    """Driven by the registry: a new operation cannot be forgotten."""
    assert len(OPERATIONS) > 40
    for name in OPERATIONS:
        for body in (NOTHING, {"request": BY_HAND.get(name, {})}, []):
            answer = http.post(f"/v1/admin/{name}", json=body, headers=bearer)
            assert (answer.status_code, answer.json()["code"]) == (403, "admin_scope_needed"), name
        assert http.post(f"/v1/admin/{name}", json=NOTHING).status_code == 401, name
    with reading(service.engine) as session:
        denied = session.scalars(select(AuditRow).where(AuditRow.verb == "admin.tenant.create")).all()
        assert {(row.tenant_id, row.principal_id) for row in denied} == {(steward.tenant_id, steward.id)}


def test_only_an_operators_bound_token_with_its_key_opens(
    http: TestClient, service: Service, operator: Human, operating: Operating, make_client: Any
) -> None:
    path = "/v1/admin/tenant.list"

    def status(headers: dict[str, str]) -> tuple[int, str]:
        answer = http.post(path, json=NOTHING, headers=headers)
        return answer.status_code, answer.json().get("code", "")

    assert status(operating.headers(path))[0] == 200
    elsewhere_bound = operating.headers(path, signer=Signer())
    another_path = operating.headers("/v1/admin/tenant.create")
    without = {"Authorization": f"DPoP {operating.token}"}
    downgraded = {"Authorization": f"Bearer {operating.token}"}
    for headers in (elsewhere_bound, another_path, without, downgraded, operating.headers(path, scheme="Bearer")):
        assert status(headers)[0] == 401
    app = make_client("acme", dpop=True)
    signer = Signer()
    proof = {"DPoP": signer.proof("POST", f"{service.settings.issuer}/oauth/token")}
    given = http.post(
        "/oauth/token", data={"grant_type": "client_credentials"}, auth=(app.id, app.secret), headers=proof
    )
    bound = Operating(http, service.settings.issuer, signer, given.json()["access_token"])
    assert status(bound.headers(path)) == (403, "admin_scope_needed")
    person = invited(service, http, "bob").enrol()
    http.cookies.clear()
    for each in (person, operator):  # an operator, too, by the login that everybody has
        ordinary = begun(http, "cloister-cli", scope="").json()
        page = page_of(each, ordinary["user_code"])
        each.send("device", forms(page.text)["device"] | {"decision": "allow"})
        form = {"grant_type": DEVICE_GRANT, "client_id": "cloister-cli", "device_code": ordinary["device_code"]}
        token = http.post("/oauth/token", data=form).json()["access_token"]
        assert status({"Authorization": f"Bearer {token}"}) == (403, "admin_scope_needed")
        http.cookies.clear()
    foreign = ForeignToken("is_1", operator.id, 2**40, operating.signer.thumbprint)
    assert not _principal(("tn_1", operator.id), "r", foreign).may_administer


def test_the_scope_comes_by_one_client_and_one_flow(
    http: TestClient, service: Service, operator: Human, operating: Operating, make_client: Any
) -> None:
    app = make_client("acme")
    for client_id, scope in (("cloister-cli", "admin"), (ADMIN_CLIENT, ""), (ADMIN_CLIENT, "admin more")):
        assert begun(http, client_id, scope).json()["error"] == "invalid_scope"
    credentials = {"auth": (app.id, app.secret)}
    asked = {"grant_type": "client_credentials", "scope": "admin"}
    assert http.post("/oauth/token", data=asked, **credentials).json()["error"] == "invalid_scope"
    assert operating.redeem(grant_type="client_credentials").json()["error"] == "unauthorized_client"
    query = {"response_type": "code", "client_id": ADMIN_CLIENT, "redirect_uri": "http://127.0.0.1/", "state": "s"}
    assert http.get("/oauth/authorize", params=query, follow_redirects=False).status_code == 400
    device = begun(http).json()
    redeemed = partial(operating.redeem, grant_type=DEVICE_GRANT, device_code=device["device_code"])
    for code in ("", "00000x"):
        answer = allowed(operator, device["user_code"], code=code)
        assert answer.status_code == 403 and "administer" in answer.text, "the second factor is shown once more"
        assert redeemed().json()["error"] == "authorization_pending"
    with asked_writing(service) as session:
        authorizations_ = session.scalars(select(authorizations.Authorization)).all()
        for each in authorizations_:
            each.polled = None
    assert "Allowed" in allowed(operator, device["user_code"]).text
    assert redeemed(is_bound=False).json()["error"] == "invalid_dpop_proof"
    assert redeemed(client_id="cloister-cli").json()["error"] == "invalid_grant"
    assert redeemed().status_code == 200
    refresh = {"grant_type": "refresh_token", "refresh_token": operating.refresh_token}
    assert operating.redeem(**refresh, is_bound=False).json()["error"] == "invalid_dpop_proof"
    assert operating.redeem(**refresh, signer=Signer()).json()["error"] == "invalid_grant"
    assert operating.redeem(**refresh).json()["scope"] == "admin"


def test_nobody_but_an_operator_is_asked(http: TestClient, service: Service, operating: Operating) -> None:
    http.cookies.clear()
    person = invited(service, http, "bob").enrol()
    device = begun(http).json()
    shown = page_of(person, device["user_code"])
    assert shown.status_code == 400 and "No device waits" in shown.text
    guessed = forms(shown.text)["device"] | {
        "user_code": device["user_code"],
        "decision": "allow",
        "code": person.code(),
    }
    assert person.send("device", guessed).status_code == 400
    pending = operating.redeem(grant_type=DEVICE_GRANT, device_code=device["device_code"])
    assert pending.json()["error"] == "authorization_pending"


def test_an_operator_who_is_removed_is_refused_on_the_next_request(
    http: TestClient, operator: Human, operating: Operating, service: Service, second_process: Service
) -> None:
    assert operating.ask("operator.remove", {"name": "ada"}, confirm="ada").json()["code"] == "last_operator"
    assert operating.ask("operator.add", {"name": "eve"}).status_code == 200
    assert [each["name"] for each in operating.ask("operator.list").json()["answer"]] == ["ada", "eve"]
    with writing(second_process.engine) as session:  # another process, of whose deeds this one hears within a second
        session.execute(
            update(authorizations.logins.User)
            .where(authorizations.logins.User.id == operator.id)
            .values(status="disabled")
        )
    answer = operating.ask("tenant.create", {"name": "acme"})
    assert (answer.status_code, answer.json().get("code")) in ((403, "no_operator"), (401, "unauthenticated"))
    refresh = {"grant_type": "refresh_token", "refresh_token": operating.refresh_token}
    assert operating.redeem(**refresh).json()["error"] == "invalid_grant"
    with writing(service.engine) as session:
        session.execute(
            update(authorizations.logins.User)
            .where(authorizations.logins.User.id == operator.id)
            .values(status="active")
        )
    assert operating.ask("operator.remove", {"name": "ada"}, confirm="eve").json()["code"] == "not_confirmed"
    assert operating.ask("operator.remove", {"name": "ada"}, confirm="ada").status_code == 200
    assert operating.ask("tenant.list").status_code == 401
    assert operating.redeem(**refresh).json()["error"] == "invalid_grant"


def test_a_first_admin_token_is_good_once_and_for_an_hour(http: TestClient, service: Service) -> None:
    def redeemed(token: str) -> Any:
        asked = forms(http.get("/oauth/first-admin").text)["first-admin"]
        return http.post("/oauth/first-admin", data=asked | {"first_admin_token": token, "name": "ada"})

    def printed() -> str:
        token = operators.first_admin_token(service)
        assert token is not None
        return token.get_secret_value()

    first = printed()
    second = printed()
    for wrong in (first, "fat_" + "0" * 64, "x", second.upper(), f"{second} "):
        assert redeemed(wrong).status_code == 403 and "fat_" not in redeemed(wrong).text
    with writing(service.engine) as session:
        stored = session.scalars(select(FirstAdminToken)).one()
        assert second.encode() not in stored.mac
        session.execute(update(FirstAdminToken).values(until=now() - timedelta(seconds=1)))
    assert redeemed(second).status_code == 403, "an hour later"
    third = printed()
    human = first_operator(service, http, token=third)
    assert redeemed(third).status_code == 403 and operators.first_admin_token(service) is None
    with asked_writing(service) as session:
        assert [each.name for each in operators.listed(session)] == [human.account.partition("/")[2]]


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


def test_the_operators_tenant_is_nobodys(operating: Operating, service: Service) -> None:
    for name, request in (
        ("tenant.create", {"name": "operators"}),
        ("tenant.suspend", {"tenant": "operators"}),
    ):
        for dry_run in (False, True):
            answer = operating.ask(name, request, dry_run=dry_run)
            assert (answer.status_code, answer.json()["code"]) == (409, "operators_tenant")
    with reading(service.engine) as session:
        own = tenants.operator_of(tenants.find_tenant(session, "operators"), request_id="request-of-a-test")
        with pytest.raises(Conflict, match="neither suspended nor shredded"):
            shredding.plan(session, own)
    with pytest.raises(Conflict, match="neither suspended nor shredded"):
        shredding.shred(service, own)


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
    with reading(service.engine) as session:
        assert len(session.scalars(select(App)).all()) == 1
    stored = service.settings.data_dir / "cloister.db"
    assert secret.encode() not in b"".join(path.read_bytes() for path in stored.parent.glob("cloister.db*"))


def test_a_request_that_does_not_hold_is_refused_by_name(operating: Operating) -> None:
    for name, body in (
        ("tenant.create", {"request": {"name": "a", "more": 1}}),
        ("tenant.create", {"request": {}}),
        ("tenant.create", {"request": {"name": "a\x00"}}),
        ("tenant.create", {"request": {"name": "a"}, "more": 1}),
        ("tenant.quota", {"request": {"tenant": "a", "jobs": -1}}),
        ("audit.export", {"request": {"after": "x"}}),
        ("token.inspect", {"request": {"token": "not-a-token"}}),
    ):
        answer = operating.http.post(f"/v1/admin/{name}", json=body, headers=operating.headers(f"/v1/admin/{name}"))
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), (name, body)
        assert "not-a-token" not in answer.text


LOCAL = {
    "init", "doctor", "backup", "restore", "login", "logout", "first-admin",
    "tenant.shred", "tenant.receipt", "tenant.export", "storage.collect", "storage.adopt",
    "key.list", "key.rotate", "key.migrate", "key.destroy", "key.backup", "key.recipient.create",
    "key.recipient.list", "key.recipient.remove", "audit.head", "audit.compare",
    "ledger.export", "ledger.replay", "ledger.write-off",
}  # fmt: skip
"""What is done at the deployment itself, and the two commands that choose another one."""


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
