"""A tenant is shredded beside one that works: killed at random instants and run again, with a job of it under way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from sqlalchemy import text

import cloister
from cloister.cli import main
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import new_engine, reading
from cloister_server.work.template import CHILD
from harness import BIN, App, Deployment
from journeys import upload

LIFE_S = 1.0
"""About how long the shredding takes here once it has closed the tenant: instants are drawn from around it."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("deployment", "kills"),
    [
        pytest.param("sqlite", 20, marks=pytest.mark.xdist_group("sqlite")),
        pytest.param("postgres", 20, marks=pytest.mark.xdist_group("postgres")),
    ],
    indirect=["deployment"],
)
def test_a_tenant_ends_for_good_while_another_predicts(
    client: cloister.Cloister,
    deployment: Deployment,
    app: App,
    digits: dict[str, np.ndarray],
    kills: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {name: column[:400] for name, column in digits.items()}
    victim = deployment.app(deployment.tenant(f"victim{app.tenant[1:]}"), "steward")
    token = {"Authorization": f"Bearer {deployment.token(victim)}"}
    predictor = _Predictor(client, rows)
    with deployment.client(victim) as theirs:
        data = upload(theirs, rows)
        slow = theirs.train(
            theirs.plan(data, target="digit", privacy=cloister.DP(epsilon=10), epochs=4000), model="slow"
        )
        with predictor:
            while slow.refresh().steps_done == 0:
                time.sleep(0.2)
            before = _objects(deployment, victim)
            begun = _begun(deployment, victim)
            begun_at = sent_at = time.monotonic()
            while httpx2.get(f"{deployment.url}/v1/models", headers=token, timeout=60).status_code != 401:
                assert sent_at - begun_at < 1.0, "what is sent a second later is refused, whatever its answer takes"
                time.sleep(0.05)
                sent_at = time.monotonic()
            receipt = _shredded_in_spite_of_kills(deployment, victim, kills, start_s=begun)
            many = predictor.count
            while predictor.count < many + 3:
                assert predictor.is_alive(), predictor.failure
                time.sleep(0.05)
        assert predictor.failure is None
    assert before and not _objects(deployment, victim), "no sealed byte of it is left"
    assert not deployment.pids(CHILD)
    assert _asked(deployment, "SELECT status FROM jobs WHERE tenant_id = :of", victim) == ["cancelled"]
    assert _asked(deployment, "SELECT state FROM tenant_keys WHERE tenant_id = :of", victim) == ["destroyed"]
    assert _asked(deployment, "SELECT count(*) FROM sealed_objects WHERE tenant_id = :of", victim) == [0]
    charged = "SELECT count(*) FROM ledger WHERE tenant_id = :of AND kind = 'settle' AND steps > 0"
    assert _asked(deployment, charged, victim) == [1], "what its job had opened stays charged"
    shreddings = "SELECT count(*) FROM audit WHERE tenant_id = :of AND verb LIKE 'tenant.shred%'"
    assert _asked(deployment, shreddings, victim) == [2]

    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    (tmp_path / "keys.json").write_text(json.dumps({k: v.hex() for k, v in client.certificate_keys().items()}))
    capsys.readouterr()
    verify = ["verify", str(tmp_path / "receipt.json"), "--keys", str(tmp_path / "keys.json"), "--json"]
    assert main(verify) == 0
    told = json.loads(capsys.readouterr().out)["receipt"]
    assert [key["outcome"] for key in told["keys"]] == ["destroyed"] and told["deleted"]["clients"] == 1
    assert told["deleted"]["wrapped_keys"] > 0 and "users" not in told["deleted"]
    flipped = receipt["payload"][:200] + ("B" if receipt["payload"][200] == "A" else "A") + receipt["payload"][201:]
    (tmp_path / "receipt.json").write_text(json.dumps({**receipt, "payload": flipped}))
    assert main(verify) == 1


def _begun(deployment: Deployment, victim: App) -> float:
    """Kill the command as soon as it has closed the tenant; how many seconds it took to come so far."""
    at, first = time.monotonic(), _start(deployment, victim)
    while _asked(deployment, "SELECT status FROM tenants WHERE id = :of", victim) == ["active"]:
        assert first.poll() is None, "the command ended and closed nothing"
        time.sleep(0.02)
    first.kill()
    first.wait()
    return time.monotonic() - at


def _shredded_in_spite_of_kills(deployment: Deployment, victim: App, kills: int, *, start_s: float) -> dict[str, str]:
    """The receipt that the command prints after it was killed some times more."""
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 2**32)
    print(f"KILL_SEED={seed}")  # noqa: T201 (shown when the test fails: it replays the instants)
    rng = random.Random(seed)
    for _ in range(kills):
        killed = _start(deployment, victim)
        time.sleep(start_s + rng.uniform(-LIFE_S / 2, LIFE_S))
        killed.kill()
        killed.wait()
    receipt: dict[str, str] = deployment.admin("tenant", "shred", victim.tenant, "--confirm", victim.tenant)
    return receipt


def _start(deployment: Deployment, victim: App) -> subprocess.Popen[bytes]:
    command = [str(BIN / "cloister-admin"), "tenant", "shred", victim.tenant, "--confirm", victim.tenant, "--json"]
    return subprocess.Popen(command, env=deployment.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class _Predictor(threading.Thread):
    """Trains a model, and predicts with it over and over for as long as the block takes."""

    def __init__(self, client: cloister.Cloister, rows: dict[str, np.ndarray]) -> None:
        super().__init__(daemon=True)
        self.scans, self.count = rows["scan"][:8], 0
        self.failure: BaseException | None = None
        self._stopping = threading.Event()
        plan = client.plan(upload(client, rows), target="digit", privacy=cloister.DP(epsilon=10), epochs=1)
        self._model = client.train(plan, model="quick").wait(timeout_s=120)
        self._first = self._model.predict(self.scans)

    def run(self) -> None:
        try:
            while not self._stopping.wait(0.02):
                assert np.array_equal(self._model.predict(self.scans), self._first)
                self.count += 1
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> _Predictor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.join(120)


def _objects(deployment: Deployment, app: App) -> list[Path]:
    return [path for path in (deployment.data_dir / "objects" / app.tenant_id).rglob("*") if path.is_file()]


def _asked(deployment: Deployment, query: str, app: App) -> list[object]:
    url = deployment.database_url or f"sqlite:///{deployment.data_dir}/cloister.db"
    engine = new_engine(url)
    try:
        with reading(engine, ALL_TENANTS) as session:
            return list(session.execute(text(query), {"of": app.tenant_id}).scalars())
    finally:
        engine.dispose()
