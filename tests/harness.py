"""A real deployment in a temporary folder: initialised, served by real processes, killed and restarted at will."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy.orm import Session

import cloister
from asked import asked_writing
from cloister_server import deployment, tenants
from cloister_server.grants import Role
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.work.template import CHILD
from ports import free_port

BIN = Path(sys.executable).parent
PATIENCE_S = 300.0
"""For what comes in moments where the machine is idle."""


@dataclass(frozen=True)
class App:
    """An OAuth client of a tenant, as `cloister-admin client create` printed it."""

    tenant: str
    tenant_id: str
    client_id: str
    client_secret: str = field(repr=False)


@dataclass
class Deployment:
    """One data directory, one keystore, one database, one port."""

    root: Path
    database_url: str = ""
    owner_database_url: str = ""
    http_server: str = "granian"
    chunk_steps: int = 20
    extra_env: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.port = self.port or free_port()
        self.root.mkdir(parents=True, exist_ok=True)

    @property
    def data_dir(self) -> Path:
        return self.root / "data"

    @property
    def log(self) -> Path:
        return self.root / "server.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        given = {
            "CLOISTER_DATA_DIR": str(self.data_dir),
            "CLOISTER_KEY_DIR": str(self.root / "keystore"),
            "CLOISTER_KEY_FILE": str(self.root / "root.key"),
            "CLOISTER_DATABASE_URL": self.database_url,
            "CLOISTER_OWNER_DATABASE_URL": self.owner_database_url,
            "CLOISTER_PORT": str(self.port),
            "CLOISTER_HTTP_SERVER": self.http_server,
            "CLOISTER_CHUNK_STEPS": str(self.chunk_steps),
            "CLOISTER_DEVICE": "cpu",
            "TMPDIR": str(self.root / "tmp"),
            "HOME": str(self.root / "home"),
            "XDG_CACHE_HOME": str(self.root / "home" / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        for name in ("tmp", "home"):
            (self.root / name).mkdir(exist_ok=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CLOISTER_")}
        return {**clean, **{name: value for name, value in given.items() if value}, **self.extra_env}

    def admin(self, *arguments: str) -> Any:
        """Run `cloister-admin ... --json` and return its document."""
        done = subprocess.run(
            [BIN / "cloister-admin", *arguments, "--json"],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, f"cloister-admin {arguments} exited {done.returncode}: {done.stderr}{done.stdout}"
        return json.loads(done.stdout)

    def init(self) -> Deployment:
        """As `cloister-admin init`, without a process for it."""
        deployment.initialise(self._settings()).engine.dispose()
        return self

    def tenant(self, name: str) -> str:
        """As `cloister-admin tenant create`, without a process for each."""
        with self._operating() as (service, session):
            tenants.create_tenant(session, service.keys, name=name, request_id="harness")
        return name

    def app(self, tenant: str, name: str, role: Role = "steward") -> App:
        """As `cloister-admin client create`."""
        with self._operating() as (service, session):
            operator = tenants.operator_of(tenants.find_tenant(session, tenant), request_id="harness")
            made, secret = tenants.create_client(session, service.keys, operator, name=name, role=role)
        return App(tenant, made.tenant_id, made.id, secret)

    @contextlib.contextmanager
    def _operating(self) -> Iterator[tuple[Service, Session]]:
        service = deployment.open_service(self._settings())
        with asked_writing(service) as session:
            yield service, session
        service.engine.dispose()

    def _settings(self) -> Settings:
        """What a process of this deployment reads from its environment."""
        given = {
            name.removeprefix("CLOISTER_").lower(): value for name, value in self.env.items() if "CLOISTER_" in name
        }
        return Settings.model_validate(given)

    def start(self) -> Deployment:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [BIN / "cloister-server", "serve"], env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"the server exited {self.process.returncode}: {self.tail()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/readyz", timeout=60) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the server was not ready within {PATIENCE_S:g} s: {self.tail()}")

    def client(self, app: App, **options: Any) -> cloister.Cloister:
        return cloister.Cloister(self.url, client_id=app.client_id, client_secret=app.client_secret, **options)

    def token(self, app: App) -> str:
        """An access token, asked for by a plain HTTP client."""
        answer = httpx2.post(
            f"{self.url}/oauth/token",
            data={"grant_type": "client_credentials"},
            auth=(app.client_id, app.client_secret),
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    def stop(self) -> int:
        """SIGTERM; every process must be gone soon."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL whatever is left, for the end of a test."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
            self.process = None
        deadline = time.monotonic() + 60
        while self.pids("cloister") and time.monotonic() < deadline:
            time.sleep(0.05)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else "no log"

    def pids(self, module: str) -> list[int]:
        """The live processes of this deployment that run `python -m <module...>`, and by the name CHILD the forked ones."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and module in _name_of(entry):
                    ours = f"TMPDIR={self.root / 'tmp'}".encode() in (entry / "environ").read_bytes().split(b"\0")
                    if ours and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                        found.append(int(entry.name))
        return found


def _name_of(entry: Path) -> str:
    name = (entry / "comm").read_text().strip()
    return name if name == CHILD else (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
