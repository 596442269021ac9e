"""Nothing readable is left anywhere: data, logs, temp files, compiler caches and the workflow's own database are searched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cloister
from harness import App, Deployment

MARKER = 1234.0625
"""A value that stands in every planted row, exact in float32; searched for as bytes and as text."""


def test_no_file_holds_a_row_a_weight_an_architecture_a_secret_or_a_token(
    deployment: Deployment, request: pytest.FixtureRequest
) -> None:
    places = [deployment.root]
    if deployment.database_url:
        places.append(Path(request.getfixturevalue("postgres").partition("?host=")[2]))
    key_file = deployment.root / "root.key"
    app = deployment.app(deployment.tenant("planted"), "steward")
    markers = {
        **_journey(deployment, app),
        "client secret": [app.client_secret.encode()],
        "root key": [word for word in key_file.read_bytes().split() if len(word) > 20],
    }
    files = [path for place in places for path in place.rglob("*") if path.is_file() and path != key_file]
    found = [
        f"{what} in {path}"
        for path in files
        for contents in [_read(path)]
        for what, needles in markers.items()
        if any(needle in contents for needle in needles)
    ]
    assert not found
    sealed = list((deployment.data_dir / "objects" / app.tenant_id).iterdir())
    assert len(sealed) > 3, "the search looked at the real thing"
    assert all(path.read_bytes().startswith(b"cloister.sealed/1\n") for path in sealed)


def _read(path: Path) -> bytes:
    """A live database removes files while they are looked at: what is gone holds nothing."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _journey(deployment: Deployment, app: App) -> dict[str, list[bytes]]:
    """Train on planted rows (checkpoints included), fail an upload, predict; what must not be found afterwards."""
    rows = np.full((300, 4), MARKER, dtype=np.float32)
    rows[:, 0] = np.arange(300)
    columns = {"x": cloister.Tensor(shape=(4,), low=-10, high=2000), "y": cloister.Category(values=("no", "yes"))}
    with deployment.client(app) as client:
        source = client.sources.create("people", epsilon=30, delta=1e-5)
        labels = (np.arange(300) % 2).astype(np.int32)
        data = client.datasets.upload(
            "d", {"x": rows, "y": labels}, source=source, columns=columns, nominal_size=300, capacity=400
        )
        with pytest.raises(cloister.CloisterError):
            client.datasets.upload(
                "bad", {"x": rows * 2, "y": labels}, source=source, columns=columns, nominal_size=300, capacity=400
            )
        layers = [
            cloister.layers.Linear(in_features=4, out_features=517),
            cloister.layers.Tanh(),
            cloister.layers.Linear(in_features=517, out_features=2),
        ]
        plan = client.plan(data, target="y", layers=layers, privacy=cloister.DP(epsilon=10), epochs=10, batch_size=50)
        model = client.train(plan, model="m").wait()
        model.predict(rows[:2])
    token = deployment.token(app)
    four = np.float32(MARKER).tobytes()
    return {
        "row": [four * 3, b"1234.0625"],
        "architecture": [b'"out_features"', b"cloister.architecture/1"],
        "weights": [b"cloister.weights/1", b"cloister.checkpoint/1"],
        "token": [token.encode(), token.split(".")[2].encode()],
    }
