"""`cloister-admin storage` and `tenant quota`: what is left over and what a tenant may take, at the operator's terminal."""

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


def test_quotas_are_shown_set_planned_and_lifted(admin: Callable[..., Result]) -> None:
    def quota(*more: str) -> Any:
        return told(admin("tenant", "quota", "acme", *more))

    def shown(storage: int | None = None, jobs: int | None = None, requests: int | None = None) -> dict[str, Any]:
        allowed = {"storage": storage, "jobs": jobs, "requests_per_minute": requests}
        return {"tenant": "acme", **{kind: {"used": 0, "allowed": each} for kind, each in allowed.items()}}

    assert quota() == shown()
    assert quota("--storage", "5000", "--jobs", "3", "--dry-run") == {"dry_run": True, **shown(5000, 3)}
    assert quota() == shown()
    assert quota("--storage", "5000", "--requests-per-minute", "600") == shown(5000, None, 600)
    assert quota("--jobs", "3", "--storage", "none") == shown(None, 3, 600)
    assert quota() == shown(None, 3, 600)
    for tenant, *wrong in (("acme", "--jobs", "many"), ("acme", "--storage", "-1"), ("nobody",)):
        refused = admin("tenant", "quota", tenant, *wrong)
        assert refused.exit_code == 1 and json.loads(refused.stderr)["error"]
