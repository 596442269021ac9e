"""A tenant takes along all that it has: made by the operator, opened by nobody but the tenant."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import cloister
from cloister.wire.certificate import verify
from harness import BIN, App, Deployment
from journeys import SQLITE, upload

pytestmark = pytest.mark.parametrize("deployment", [SQLITE], indirect=True)


def command(*arguments: str | Path, status: int = 0) -> str:
    done = subprocess.run([BIN / "cloister", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout.strip()


def test_a_tenants_bundle_holds_its_rows_its_models_and_its_ledger(
    deployment: Deployment, app: App, client: cloister.Cloister, digits: dict[str, np.ndarray], tmp_path: Path
) -> None:
    rows = {name: array[:600] for name, array in digits.items()}
    dataset = upload(client, rows)
    plan = client.plan(dataset, target="digit", privacy=cloister.DP(epsilon=12))
    model = client.train(plan, model="digits").wait()
    line = command("bundle", "key", "--to", tmp_path / "key")
    bundle = tmp_path / "acme.bundle"
    made = deployment.admin("tenant", "export", app.tenant, "--for", line, "--to", str(bundle))
    assert made["bytes"] == bundle.stat().st_size and bundle.stat().st_mode & 0o777 == 0o600
    sealed = bundle.read_bytes()
    assert b"digits" not in sealed and rows["scan"][0].tobytes() not in sealed

    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({name: raw.hex() for name, raw in client.certificate_keys().items()}))
    other = tmp_path / "other"
    command("bundle", "key", "--to", other)
    command("bundle", "open", bundle, "--key", other, "--keys", keys, "--to", tmp_path / "out", status=1)
    assert not (tmp_path / "out").exists()
    command("bundle", "open", bundle, "--key", tmp_path / "key", "--keys", keys, "--to", tmp_path / "out")

    (of_dataset,) = (tmp_path / "out" / "datasets").iterdir()
    parts = [load_file(part) for part in sorted(of_dataset.iterdir())]
    found = {name: np.concatenate([part[name] for part in parts]) for name in rows}
    assert all(np.array_equal(found[name], rows[name]) for name in rows)
    (certificate,) = (tmp_path / "out" / "models").rglob("*.dsse.json")
    stated = verify(certificate.read_text(), client.certificate_keys())
    weights = certificate.with_name(certificate.name.replace(".certificate.dsse.json", ".safetensors"))
    command("verify", certificate, "--keys", keys, "--weights", weights)
    assert stated.name == model.name == "digits"
    ledger = [json.loads(each) for each in (tmp_path / "out" / "tables" / "ledger.jsonl").read_text().splitlines()]
    assert {"freeze", "reserve", "chunk", "settle"} <= {each["kind"] for each in ledger}
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out" / "tables").iterdir())
    assert app.client_secret.encode() not in everything and b"secret_mac" not in everything


@pytest.mark.parametrize("line", ["", "cloister-bundle-recipient-1:AAAA", "cloister-recipient-1:x"])
def test_a_bundle_for_no_key_is_not_made(deployment: Deployment, app: App, tmp_path: Path, line: str) -> None:
    done = subprocess.run(
        [BIN / "cloister-admin", "tenant", "export", app.tenant, "--for", line, "--to", tmp_path / "b"],
        env=deployment.env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1 and "give it whole" in done.stderr
    assert not list(tmp_path.iterdir())
