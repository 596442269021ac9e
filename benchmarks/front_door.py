"""What the front door costs: requests a second of an authorised and audited route over those of a bare hello of the same stack.

make bench NAME=front_door [ARGS="--quick"]

Ours is the whole server as `cloister-server serve` runs it, on SQLite with durable commits: a token, the tenant's quota, a decision by
grants, and a row in the hash-chained audit log before each answer. The peer is a FastAPI application of one route, on granian with the
same settings. Neither logs a line for a request. Both are asked the same number of times over the same connections, in turn.
It fails unless every answer is 200 and the audit log has just as many rows more as there were requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONNECTIONS = 256
ROUTES = {"authorised": "/v2/models/kinds/ready", "model": "/v1/models/kinds"}
"""The hot path's cheapest route, which is what every prediction passes; and a model's description, which FastAPI answers."""


class Asking(asyncio.Protocol):
    """One connection, on which a request follows each answer until all are answered."""

    def __init__(self, request: bytes, left: list[int], done: asyncio.Future[None]) -> None:
        self._request, self._left, self._done = request, left, done
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        if self._left[0] > 0:
            self._left[0] -= 1
            self._transport.write(self._request)
        else:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        if not head.startswith(b"HTTP/1.1 200 "):
            self._fail(f"an answer that is not 200: {self._buffer[:300]!r}")
            return
        self._buffer = b""
        self._left[1] -= 1
        if self._left[1] == 0 and not self._done.done():
            self._done.set_result(None)
        self._ask()

    def connection_lost(self, _: Exception | None) -> None:
        if self._left[0] > 0:
            self._fail("a connection was closed before its time")

    def _fail(self, why: str) -> None:
        if not self._done.done():
            self._done.set_exception(SystemExit(why))


async def ask(port: int, path: str, headers: str, *, requests: int) -> float:
    """Requests a second, over all connections together."""
    loop = asyncio.get_running_loop()
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n".encode()
    left, done, began = [requests, requests], loop.create_future(), time.perf_counter()
    for _ in range(CONNECTIONS):
        await loop.create_connection(lambda: Asking(request, left, done), "127.0.0.1", port)
    await done
    return requests / (time.perf_counter() - began)


def serve_hello(port: int) -> None:
    from fastapi import FastAPI
    from granian.constants import Interfaces
    from granian.server.embed import Server

    app = FastAPI()

    @app.get("/hello")
    async def hello() -> dict[str, str]:
        return {"hello": "world"}

    server = Server(app, address="127.0.0.1", port=port, interface=Interfaces.ASGI, websockets=False, log_enabled=False)
    asyncio.run(server.serve())


def publish(env: dict[str, str], tenant_id: str) -> None:
    """A small model of the tenant's, trained for a step on nothing much."""
    import numpy as np
    import torch

    from cloister.wire.architecture import Architecture
    from cloister.wire.columns import CategoryColumn, NumberColumn
    from cloister.wire.layers import Encode, Linear
    from cloister.wire.plans import SGD, TrainingSpec
    from cloister_privacy.plan import DPPlan
    from cloister_privacy.training import train
    from cloister_server import deployment, vault
    from cloister_server.settings import Settings
    from cloister_server.store.acting import for_tenants
    from cloister_server.store.tables import Model, ModelVersion, new_id

    torch.set_num_threads(1)
    spec = TrainingSpec(
        dataset=new_id("ds"), nominal_size=40, capacity=80, batch_size=10, steps=1, noise_multiplier=1.0, clip=1.0,
        delta=1e-5, optimizer=SGD(learning_rate=0.1),
        architecture=Architecture(
            inputs={"age": NumberColumn(low=0, high=100)}, layers=(Encode(), Linear(in_features=1, out_features=2)),
            target="kind", output=CategoryColumn(values=("a", "b")), loss="cross_entropy",
        ),
    )  # fmt: skip
    rows = {"age": np.full(40, 50, np.float32), "kind": np.zeros(40, np.int32)}
    weights = train(
        spec, rows, plan=DPPlan.of(spec), device="cpu", chunk_steps=1,
        before_chunk=lambda first, end: None, after_chunk=lambda done, snapshot: True,
    )  # fmt: skip
    assert weights is not None
    given = {name.removeprefix("CLOISTER_").lower(): value for name, value in env.items() if "CLOISTER_" in name}
    service = deployment.open_service(Settings.model_validate(given))

    def make(session: Any) -> None:
        sealed = vault.seal_object(session, service.blobs, weights, tenant_id=tenant_id, kind="weights")
        of = {"tenant_id": tenant_id}
        session.add(Model(**of, id=model_id, name="kinds", champion=1))
        session.flush()
        version = {**of, "model_id": model_id, "version": 1, "job_id": new_id("job"), "weights_id": sealed}
        session.add(ModelVersion(**version, certificate={}))

    model_id = new_id("mdl")
    service.write(for_tenants(tenant_id), make)
    service.engine.dispose()


@contextlib.contextmanager
def running(words: list[str], env: dict[str, str], url: str) -> Iterator[None]:
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):  # noqa: S310 (ours)
                break
            assert process.poll() is None and time.monotonic() < deadline, f"{words} did not start"
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(*, rounds: int, requests: int) -> dict[str, list[float]]:
    ours, theirs = free_port(), free_port()
    with tempfile.TemporaryDirectory() as root:
        env = {
            **os.environ, "CLOISTER_DATA_DIR": f"{root}/data", "CLOISTER_KEY_DIR": f"{root}/keystore",
            "CLOISTER_KEY_FILE": f"{root}/root.key", "CLOISTER_PORT": str(ours), "CLOISTER_DEVICE": "cpu",
            "CLOISTER_LOG_LEVEL": "warning",
        }  # fmt: skip
        admin = Path(sys.executable).parent / "cloister-admin"

        def administer(*words: str) -> Any:
            return json.loads(subprocess.check_output([admin, *words, "--json"], env=env))

        administer("init")
        tenant = administer("tenant", "create", "acme")
        app = administer("client", "create", "--tenant", "acme", "--name", "app", "--role", "predictor")
        publish(env, tenant["id"])
        server = [str(admin.with_name("cloister-server")), "serve"]
        hello = [sys.executable, __file__, "--hello", str(theirs)]
        with (
            running(server, env, f"http://127.0.0.1:{ours}/readyz"),
            running(hello, env, f"http://127.0.0.1:{theirs}/hello"),
            contextlib.closing(sqlite3.connect(f"file:{root}/data/cloister.db?mode=ro", uri=True)) as database,
        ):
            form = f"grant_type=client_credentials&client_id={app['client_id']}&client_secret={app['client_secret']}".encode()
            with urllib.request.urlopen(f"http://127.0.0.1:{ours}/oauth/token", form) as answer:
                headers = f"Authorization: Bearer {json.load(answer)['access_token']}\r\n"
            rates: dict[str, list[float]] = {"hello": [], **{name: [] for name in ROUTES}}
            for turn in range(rounds + 1):
                for name in sorted(rates, reverse=turn % 2 == 0):
                    number = requests // 10 if name == "model" else requests  # of which the first turn warms up
                    if name == "hello":
                        rate = asyncio.run(ask(theirs, "/hello", "", requests=number))
                    else:
                        (before,) = database.execute("SELECT count(*) FROM audit").fetchone()
                        rate = asyncio.run(ask(ours, ROUTES[name], headers, requests=number))
                        (after,) = database.execute("SELECT count(*) FROM audit").fetchone()
                        if after - before != number:
                            raise SystemExit(f"{number} requests and {after - before} rows of the audit log")
                    if turn:
                        rates[name].append(rate)
        administer("audit", "verify", "--tenant", "acme")
    return rates


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="three short rounds")
    parser.add_argument("--hello", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.hello:
        serve_hello(asked.hello)
        return
    rounds, requests = (3, 1000) if asked.quick else (7, 2000)
    rates = measure(rounds=rounds, requests=requests)
    ratios = {
        f"{name}_over_hello": round(
            statistics.median(ours / hello for ours, hello in zip(rates[name], rates["hello"], strict=True)), 3
        )
        for name in ROUTES
    }
    conditions = {
        "routes": ROUTES, "rounds": rounds, "requests": requests, "connections": CONNECTIONS, "cores": os.cpu_count(),
        "database": "SQLite, WAL, synchronous=FULL", "rows": "as many as requests, each durable before its answer",
        "python": platform.python_version(), "granian": version("granian"), "fastapi": version("fastapi"),
    }  # fmt: skip
    print({name: round(statistics.median(each)) for name, each in rates.items()}, file=sys.stderr)
    print(json.dumps({"name": "front_door", "ratios": ratios, "conditions": conditions}))


if __name__ == "__main__":
    main()
