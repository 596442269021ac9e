"""The operator's commands for tokens and clients, on the database that a server uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update
from typer.testing import CliRunner

from cloister_server.cli.admin import cli
from cloister_server.oauth import signing_keys
from cloister_server.service import Service
from cloister_server.store.session import writing
from cloister_server.store.tables import SigningKey, now


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
    assert CliRunner().invoke(cli, ["token-key", "rotate"]).exit_code == 1, "it was published just now"
    with writing(service.engine) as session:
        older = now() - timedelta(seconds=signing_keys.PUBLISHED_S + 1)
        session.execute(update(SigningKey).where(SigningKey.state == "next").values(created=older))
    assert admin("token-key", "rotate")["kid"] == following["kid"]
    assert admin("token-key", "revoke", first["kid"])["state"] == "revoked"
    assert sorted(row["state"] for row in admin("token-key", "list")) == ["active", "next", "revoked"]


def test_an_id_that_begins_with_a_hyphen_is_no_option(admin: Callable[..., Any]) -> None:
    admin("token-key", "list")
    refused = CliRunner().invoke(cli, ["token-key", "revoke", "-Gx_nobodys", "--json"])
    assert refused.exit_code == 1 and json.loads(refused.stderr)["code"] == "not_found"
