"""A server of an example's own: a free port on loopback, one SQLite file, keys beside its data; stopped again whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloister

__all__ = ["BIN", "admin", "environment", "running_server", "serving"]

BIN = Path(sys.executable).parent


@contextlib.contextmanager
def running_server(home: Path) -> Iterator[cloister.Cloister]:
    """A client of a fresh deployment under `home`, as a steward of its one tenant."""
    env = environment(home)
    admin(env, "init")
    admin(env, "tenant", "create", "example")
    app = admin(env, "client", "create", "--tenant", "example", "--name", "example", "--role", "steward")
    with (
        serving(env, home / "server.log") as url,
        cloister.Cloister(url, client_id=app["client_id"], client_secret=app["client_secret"]) as client,
    ):
        yield client


def environment(home: Path) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CLOISTER_")}
    return {
        **clean,
        "CLOISTER_DATA_DIR": str(home / "data"),
        "CLOISTER_KEY_DIR": str(home / "keystore"),
        "CLOISTER_KEY_FILE": str(home / "root.key"),
        "CLOISTER_PORT": str(port),
    }


def admin(env: dict[str, str], *arguments: str) -> Any:
    done = subprocess.run([BIN / "cloister-admin", *arguments, "--json"], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"cloister-admin {' '.join(arguments)} failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


@contextlib.contextmanager
def serving(env: dict[str, str], log: Path) -> Iterator[str]:
    """The server, stopped again whatever happens, Ctrl-C included."""
    url = f"http://127.0.0.1:{env['CLOISTER_PORT']}"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [BIN / "cloister-server", "serve"], env=env, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        _wait_ready(server, url, log)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()  # whatever it started dies with it
            server.wait()


def _wait_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/readyz", timeout=2):
            return
        time.sleep(0.2)
    raise SystemExit(f"the server did not start; its log is {log}")
