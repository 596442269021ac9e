"""Two parties and a dealer as `cloister-server` runs them, each with its own directory, for tests against a real deployment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import cloister
from cloister.wire.private_deployments import ROLES
from cloister_server.roles import identity
from harness import BIN, Deployment
from ports import free_port

__all__ = ["PrivateRoles"]

OPERATORS = {"party-0": "First Hospital", "party-1": "Second Hospital", "dealer": "The University"}
HOSTS = {"party-0": "127.0.0.1", "party-1": "127.0.0.2", "dealer": "127.0.0.3"}
"""Loopback has many addresses: as far as the roles say, they are apart."""


class PrivateRoles:
    """Three identities, and processes that a test starts, kills and starts again."""

    def __init__(self, deployment: Deployment, directory: Path, *, days: int = 1) -> None:
        self.deployment, self.directory = deployment, directory
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.records = {role: self._identity(role, days) for role in ROLES}

    def __enter__(self) -> PrivateRoles:
        return self

    def __exit__(self, *exc: object) -> None:
        for role in list(self.running):
            self.kill(role)

    @property
    def env(self) -> dict[str, str]:
        return {name: value for name, value in self.deployment.env.items() if not name.startswith("CLOISTER_")}

    def _identity(self, role: str, days: int) -> cloister.Role:
        """As `cloister-server identity --init`, without a process for each."""
        given = {"operator": OPERATORS[role], "host": HOSTS[role], "port": free_port(), "days": days}
        clients = None if role == "dealer" else free_port()
        return identity.create(self.directory / role, client_port=clients, **given).record

    def deploy(self, model: cloister.Model, public_rows: Any, **more: Any) -> None:
        """As the model's owner; each role's operator gets its file, and the platform's keys."""
        parties = (self.records["party-0"], self.records["party-1"])
        files = model.deploy_privately(public_rows, parties=parties, dealer=self.records["dealer"], **more)
        for role, body in files.items():
            (self.directory / f"{role}.role").write_bytes(body)

    def pin(self, client: cloister.Cloister) -> None:
        keys = {name: key.hex() for name, key in client.certificate_keys().items()}
        (self.directory / "keys.json").write_text(json.dumps(keys))

    def start(self, *roles: str) -> None:
        for role in roles or ROLES:
            kind = "dealer" if role == "dealer" else "party"
            told = {
                "CLOISTER_ROLE_DIRECTORY": str(self.directory / role),
                "CLOISTER_ROLE_FILE": str(self.directory / f"{role}.role"),
                "CLOISTER_ROLE_CERTIFICATE_KEYS": str(self.directory / "keys.json"),
                "CLOISTER_ROLE_FORM_S": "60",
                "CLOISTER_ROLE_REQUEST_S": "60",
            }
            with (self.directory / f"{role}.log").open("ab") as log:
                self.running[role] = subprocess.Popen(
                    [BIN / "cloister-server", kind], env={**self.env, **told}, stdout=log, stderr=log
                )

    def kill(self, role: str, number: int = signal.SIGKILL) -> int:
        process = self.running.pop(role)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        return process.wait(60)

    def log(self, role: str) -> str:
        return (self.directory / f"{role}.log").read_text()
