"""`make demo`: a server of its own, two tenants, the quick start, and a look at what lies on the disk.

Everything happens on this machine: a free port on loopback, one SQLite file, a fresh data directory (DEMO_DIR, or one
in the temporary folder) that is kept for you to look at. The last line printed is one JSON object.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

import membership
import numpy as np
from local_server import admin, environment, serving

import cloister

quickstart = importlib.import_module("01_quickstart")

PLANTED = 8
"""Byte sequences of real rows that are searched for on the disk."""


def main() -> int:
    home = Path(os.environ.get("DEMO_DIR") or tempfile.mkdtemp(prefix="cloister-demo-")).absolute()
    home.mkdir(parents=True, exist_ok=True)
    env = environment(home)
    print(f"Cloister's demo. Everything is kept in {home}\n")
    print("0. Create keys (outside the data directory), the database, two tenants and an app of each.")
    admin(env, "init")
    apps = {}
    for tenant in ("hospital", "stranger"):
        admin(env, "tenant", "create", tenant)
        apps[tenant] = admin(env, "client", "create", "--tenant", tenant, "--name", "demo", "--role", "steward")
    digits = quickstart.load()
    with serving(env, home / "server.log") as url, _client(url, apps["hospital"]) as client:
        found = quickstart.run(client, digits, tag=secrets.token_hex(3))
        model = client.models.get(found["model"])
        certificate, keys = model.certificate, client.certificate_keys()
        with _client(url, apps["stranger"]) as stranger:
            found["refused_tenant"] = quickstart.stranger_is_refused(stranger, found, digits)
        _show_membership(model, digits)
    print("\n9. The server is stopped. Verify the model's certificate offline, from the file and the public key alone.")
    found["certificate_ok"] = _verify(home, certificate, keys)
    print("10. Look for the uploaded rows, the weights' format and the app's secret in every file on the disk.")
    found["sealed"] = _search(home / "data", digits, apps["hospital"]["client_secret"])
    print()
    kept = ("accuracy", "epsilon_spent", "refused_budget", "refused_tenant", "certificate_ok", "sealed")
    answer = {name: found[name] for name in kept} | {"data_dir": str(home / "data")}
    print(json.dumps(answer))
    return 0 if all(answer[name] for name in kept) else 1


def _client(url: str, app: dict[str, str]) -> cloister.Cloister:
    return cloister.Cloister(url, client_id=app["client_id"], client_secret=app["client_secret"])


def _show_membership(model: Any, digits: Any) -> None:
    print("\n8. Why differential privacy? A plain twin of the same network is trained on the same rows, here in this")
    print("   script (the service has no such path), and an attacker guesses who was in the training set.")
    plain = membership.attack(membership.plain_twin(digits), digits)
    private = membership.attack(model.predict_proba, digits)
    print(f"   right guesses, plain twin:    {plain:.1%}")
    print(f"   right guesses, private model: {private:.1%}     (a coin: 50 %)")


def _verify(home: Path, certificate: dict[str, Any], keys: dict[str, bytes]) -> bool:
    path = home / "certificate.json"
    path.write_text(json.dumps(certificate, indent=1))
    statement = cloister.verify(json.loads(path.read_text()), keys)
    print(f"   {path.name}: epsilon {statement.epsilon:.2f} at delta {statement.delta:g}, signature holds")
    forged = json.loads(path.read_text())
    forged["payload"] = forged["payload"][:-8] + "AAAAAAAA"
    try:
        cloister.verify(forged, keys)
    except cloister.InvalidCertificate:
        print("   a forged copy is refused")
        return True
    return False


def _search(data: Path, digits: Any, secret: str) -> bool:
    rows = digits.train_x[np.argsort(-digits.train_x.std(axis=(1, 2)))[:PLANTED]]
    markers = {"an uploaded row": [row.tobytes() for row in rows], "the weights": [b"cloister.weights/1"]}
    markers |= {"the architecture": [b'"in_features"', b"cloister.architecture/1"], "the secret": [secret.encode()]}
    files = [path for path in data.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    found = [what for what, needles in markers.items() for c in contents.values() if any(n in c for n in needles)]
    print(
        f"   {len(files)} files, {sum(map(len, contents.values())) / 1e6:.1f} MB: {found or 'nothing readable found'}"
    )
    return not found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped; the server is down, and what was written so far is kept.")
        sys.exit(130)
