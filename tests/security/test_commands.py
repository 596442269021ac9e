"""The operator's commands for tokens and clients, on the database that a server uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient
from typer.testing import CliRunner

from cloister_server.cli.admin import cli
from cloister_server.oauth import signing_keys
from cloister_server.service import Service
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, SigningKey, now
from keys_of_clients import Signer, with_assertion


@pytest.fixture
def admin(service: Service, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command and returns its JSON document."""
    for name in ("data_dir", "key_dir", "key_file"):
        monkeypatch.setenv(f"CLOISTER_{name.upper()}", str(getattr(service.settings, name)))

    def run(*words: str) -> Any:
        done = CliRunner().invoke(cli, [*words, "--json"])
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_keys_are_listed_rotated_and_revoked(service: Service, admin: Callable[..., Any]) -> None:
    first, following = sorted(admin("token-key", "list"), key=lambda row: row["state"])
    assert (first["state"], following["state"]) == ("active", "next")
    _published(service, ago_s=1)
    assert CliRunner().invoke(cli, ["token-key", "rotate"]).exit_code == 1
    _published(service, ago_s=signing_keys.PUBLISHED_S + 1)
    assert admin("token-key", "rotate")["kid"] == following["kid"]
    assert admin("token-key", "revoke", first["kid"])["state"] == "revoked"
    assert sorted(row["state"] for row in admin("token-key", "list")) == ["active", "next", "revoked"]


def _published(service: Service, *, ago_s: float) -> None:
    with writing(service.engine) as session:
        created = now() - timedelta(seconds=ago_s)
        session.execute(update(SigningKey).where(SigningKey.state == "next").values(created=created))


def test_an_id_that_begins_with_a_hyphen_is_no_option(admin: Callable[..., Any]) -> None:
    admin("token-key", "list")
    refused = CliRunner().invoke(cli, ["token-key", "revoke", "-Gx_nobodys", "--json"])
    assert refused.exit_code == 1 and json.loads(refused.stderr)["code"] == "not_found"


def test_a_client_is_made_with_a_public_key_and_changes_to_a_secret_and_back(
    http: TestClient, service: Service, admin: Callable[..., Any], tmp_path: Path
) -> None:
    first, second = Signer(), Signer.ed25519()
    for name, signer in (("first", first), ("second", second)):
        (tmp_path / name).write_bytes(signer.pem)
    admin("tenant", "create", "acme")
    made = admin("client", "create", "--tenant", "acme", "--name", "app", "--public-key", str(tmp_path / "first"))
    assert made["public_key"] == first.thumbprint and "client_secret" not in made

    def status_of(signer: Signer) -> int:
        assertion = signer.assertion(made["client_id"], service.settings.issuer)
        return int(http.post("/oauth/token", data=with_assertion(assertion)).status_code)

    assert (status_of(first), status_of(second)) == (200, 401)
    changed = admin("client", "rotate", "app", "--tenant", "acme", "--public-key", str(tmp_path / "second"))
    assert changed["public_key"] == second.thumbprint
    assert (status_of(first), status_of(second)) == (401, 200)
    secret = admin("client", "rotate", "app", "--tenant", "acme")["client_secret"]
    assert status_of(second) == 401
    grant = {"grant_type": "client_credentials"}
    assert http.post("/oauth/token", data=grant, auth=(made["client_id"], secret)).status_code == 200
    assert admin("client", "list", "--tenant", "acme")[0]["public_key"] is None
    (tmp_path / "private").write_bytes(first.private_pem)
    create = ("client", "create", "--tenant", "acme", "--name", "b", "--public-key")
    for file, why in (("private", "private key"), ("absent", "No such file")):
        refused = CliRunner().invoke(cli, [*create, str(tmp_path / file)])
        assert refused.exit_code == 1 and why in refused.stderr


def test_an_operator_inspects_and_revokes_a_token_that_comes_by_standard_input(
    http: TestClient, service: Service, admin: Callable[..., Any], steward: Any, bearer: dict[str, str]
) -> None:
    token = bearer["Authorization"].split(" ")[1]

    def asked(verb: str) -> Any:
        return CliRunner().invoke(cli, ["token", verb, "--json"], input=f"{token}\n")

    told = json.loads(asked("inspect").stdout)
    assert told["client_id"] == steward.id and told["tenant"] == steward.tenant_id and told["bound_to"] is None
    done = asked("revoke")
    assert json.loads(done.stdout)["client_id"] == steward.id and token not in done.output
    assert http.get("/v1/sources", headers=bearer).status_code == 401
    for verb in ("inspect", "revoke"):
        again = asked(verb)
        assert again.exit_code == 1 and json.loads(again.stderr)["code"] == "invalid_request"
    with reading(service.engine) as session:
        (row,) = session.scalars(select(AuditRow).where(AuditRow.verb == "token.revoke"))
    assert (row.resource_id, row.outcome, row.tenant_id) == (steward.id, "allowed", steward.tenant_id)
