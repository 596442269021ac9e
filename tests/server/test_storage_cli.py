"""`cloister-admin storage`: what is left over and what a tenant may take, at the operator's terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cloister_server import deployment
from cloister_server.cli.admin import cli
from cloister_server.settings import load_settings
from cloister_server.store.tables import new_id


@pytest.fixture
def admin(sqlite_template: tuple[Path, None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command line on a deployment of this test's own, with the tenant acme."""
    shutil.copytree(sqlite_template[0], tmp_path, dirs_exist_ok=True)
    for name, value in {"DATA_DIR": "data", "KEY_DIR": "keystore", "KEY_FILE": "root.key"}.items():
        monkeypatch.setenv(f"CLOISTER_{name}", str(tmp_path / value))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli, [*arguments, "--json"])

    told(run("tenant", "create", "acme"))
    return run


def told(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_collect_counts_with_dry_run_and_then_deletes(admin: Callable[..., Result]) -> None:
    (tenant,) = told(admin("tenant", "list"))
    service = deployment.open_service(load_settings())
    service.blobs.put(tenant["id"], new_id("obj"), b"nobody's")
    counted = {"blobs": 1, "keys": 0, "bytes": 8}
    assert told(admin("storage", "collect", "--dry-run")) == {**counted, "dry_run": True}
    assert told(admin("storage", "collect")) == {**counted, "dry_run": False}
    assert told(admin("storage", "collect")) == {"blobs": 0, "keys": 0, "bytes": 0, "dry_run": False}
    assert list(service.blobs.pages()) == []
    service.engine.dispose()


def test_quota_shows_and_sets(admin: Callable[..., Result]) -> None:
    def quota(*more: str) -> Any:
        return told(admin("storage", "quota", "--tenant", "acme", *more))

    assert quota() == {"tenant": "acme", "used_bytes": 0, "quota_bytes": None}
    assert quota("--bytes", "5000") == {"tenant": "acme", "used_bytes": 0, "quota_bytes": 5000}
    assert quota()["quota_bytes"] == 5000
    assert quota("--none")["quota_bytes"] is None
    for tenant, *wrong in (("acme", "--none", "--bytes", "1"), ("acme", "--bytes", "-1"), ("nobody",)):
        refused = admin("storage", "quota", "--tenant", tenant, *wrong)
        assert refused.exit_code == 1 and json.loads(refused.stderr)["error"]
