"""`cloister-admin storage` and `tenant quota`: what is left over and what a tenant may take, at the operator's terminal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cloister_server import deployment
from cloister_server.cli.admin import cli
from cloister_server.settings import load_settings
from cloister_server.store.tables import new_id

BIN = Path(sys.executable).parent


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
    counted = {"blobs": 1, "keys": 0, "bytes": 8, "odd": []}
    assert told(admin("storage", "collect", "--dry-run")) == {**counted, "dry_run": True}
    assert told(admin("storage", "collect")) == {**counted, "dry_run": False}
    assert told(admin("storage", "collect")) == {"blobs": 0, "keys": 0, "bytes": 0, "odd": [], "dry_run": False}
    assert list(service.blobs.pages()) == []
    service.engine.dispose()


def test_a_store_that_is_unmarked_or_anothers_is_refused_by_name_until_it_is_adopted(
    admin: Callable[..., Result], tmp_path: Path
) -> None:
    objects = tmp_path / "data" / "objects"
    (tenant,) = told(admin("tenant", "list"))
    lost = objects / tenant["id"] / new_id("obj")
    lost.parent.mkdir(exist_ok=True)
    lost.write_bytes(b"x")
    for content in (None, b"{", json.dumps({"format": "cloister.store/1", "deployment": "another"}).encode()):
        (objects / "store-id").unlink(missing_ok=True)
        if content is not None:
            (objects / "store-id").write_bytes(content)
        for command in (["storage", "collect"], ["tenant", "shred", "acme", "--confirm", "acme"]):
            refused = admin(*command)
            assert refused.exit_code == 1 and json.loads(refused.stderr)["code"] == "storage_foreign"
        (row,) = [row for row in json.loads(admin("doctor").stdout) if row["check"] == "sealed objects"]
        assert row["state"] == "FAULT" and "storage adopt" in row["detail"]
        served = subprocess.run([BIN / "cloister-server", "serve"], capture_output=True, text=True, timeout=300)
        assert served.returncode == 1 and "storage adopt" in served.stderr
    assert told(admin("tenant", "list"))[0]["status"] == "active" and lost.exists()
    assert json.loads(admin("storage", "adopt", "--confirm", "elsewhere").stderr)["code"] == "not_confirmed"
    assert told(admin("storage", "adopt", "--confirm", str(objects))) == {"adopted": str(objects)}
    assert told(admin("storage", "collect"))["blobs"] == 1 and not lost.exists()
    rows = json.loads(admin("doctor").stdout)
    assert {row["check"]: row["state"] for row in rows if row["check"] in ("sealed objects", "key provider local")} == {
        "sealed objects": "ok",
        "key provider local": "ok",
    }


def test_the_cause_is_told_of_a_store_that_cannot_be_asked(
    admin: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = {"URL": "s3://bucket", "ENDPOINT": "http://127.0.0.1:9", "REGION": "eu-central-1", "TIMEOUT_S": "1"}
    for name, value in {**nowhere, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "not-to-be-told"}.items():
        monkeypatch.setenv(f"CLOISTER_BLOB_{name}", value)
    refused = json.loads(admin("storage", "collect").stderr)
    assert refused["code"] == "storage_unavailable" and "it was told: " in refused["error"]
    assert "not-to-be-told" not in refused["error"]


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
