"""Two parties and a dealer on this one machine, to see private inference work: python examples/private_inference.py MODEL

The server and the client are those of CLOISTER_URL, CLOISTER_CLIENT_ID and CLOISTER_CLIENT_SECRET; the app needs the verbs
model.predict and model.deploy_private, which a steward has. On one machine nothing is private, and everybody says so: in earnest
each role runs under another administrator, by the same commands (docs/private-inference.md). The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import cloister

SERVER = Path(sys.executable).with_name("cloister-server")
ROLES = ("party-0", "party-1", "dealer")


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    home = Path(tempfile.mkdtemp(prefix="cloister-roles-"))
    with cloister.Cloister() as client:
        model = client.models.get(sys.argv[1])
        records = {role: identity(home / role, role) for role in ROLES}
        print(f"1. Three identities are in {home}; what others see of one:\n   {records['dealer'].digest}")
        rows = noise(model.schema())
        files = model.deploy_privately(
            rows, parties=(records["party-0"], records["party-1"]), dealer=records["dealer"], development=True
        )
        keys = {name: key.hex() for name, key in client.certificate_keys().items()}
        (home / "keys.json").write_text(json.dumps(keys))
        processes = [start(home, role, body) for role, body in files.items()]
        try:
            private = client.private(model.id, version=model.version, keys=keys, development=True)
            stated = private.statement
            print(
                f"2. Stated and signed: {private!r}, largest error {stated.max_error:.1e} on {stated.rows_measured} rows"
            )
            found, clear = private.predict(rows), model.predict(rows)
            print("3. On shares, and in the clear:", found.tolist(), clear.tolist())
        finally:
            for process in processes:
                process.terminate()
                process.wait()
            model.end_private()
    is_equal = bool(np.allclose(found, clear, atol=1e-3))
    print(json.dumps({"equal": is_equal, "max_error": stated.max_error}))
    return 0 if is_equal else 1


def identity(directory: Path, role: str) -> cloister.Role:
    kind = "dealer" if role == "dealer" else "party"
    declared = [
        "--operator",
        "this machine",
        "--host",
        "127.0.0.1",
        "--port",
        free_port(),
        "--client-port",
        free_port(),
    ]
    command = [SERVER, "identity", "--init", "--role", kind, *declared, "--directory", directory]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return cloister.Role(**json.loads(done.stdout))


def start(home: Path, role: str, body: bytes) -> subprocess.Popen[bytes]:
    (home / f"{role}.role").write_bytes(body)
    kind = "dealer" if role == "dealer" else "party"
    given = ["--file", home / f"{role}.role", "--certificate-keys", home / "keys.json", "--directory", home / role]
    with (home / f"{role}.log").open("wb") as log:
        return subprocess.Popen([SERVER, kind, *given], stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def noise(schema: cloister.ModelSchema) -> dict[str, Any]:
    """Rows that are nobody's, within the declared bounds."""
    random, rows = np.random.default_rng(), {}
    for name, column in schema.inputs.items():
        match column:
            case cloister.Tensor() | cloister.Number():
                shape = (8, *column.shape) if isinstance(column, cloister.Tensor) else 8
                drawn = random.uniform(column.low, column.high, shape).astype(np.float32)
                rows[name] = np.rint(drawn) if getattr(column, "dtype", "") == "uint8" else drawn
            case cloister.Category():
                rows[name] = random.integers(0, len(column.values), 8)
            case _:
                raise SystemExit(f"{name!r} is {column.type}; this example draws numbers, categories and tensors alone")
    return rows


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return str(sock.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
