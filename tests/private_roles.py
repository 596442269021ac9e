"""Two parties and a dealer as `cloister-server` runs them, each with its own directory, for tests against a real deployment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import cloister
from cloister.wire.private_deployments import ROLES
from cloister_server.roles import identity
from harness import BIN, Deployment
from journeys import upload
from ports import free_port

__all__ = ["LISTEN", "OPERATORS", "PrivateRoles", "is_answered", "right_soon", "trained"]

OPERATORS = {"party-0": "First Hospital", "party-1": "Second Hospital", "dealer": "The University"}
HOSTS = {"party-0": "127.0.0.1", "party-1": "127.0.0.2", "dealer": "127.0.0.3"}
"""Loopback has many addresses: as far as the roles say, they are apart."""
LISTEN = {"party-0": "127.1.0.1", "party-1": "127.1.0.2", "dealer": "127.1.0.3"}
"""Where they listen when something is put before them."""


class PrivateRoles:
    """Three identities, and processes that a test starts, kills and starts again."""

    def __init__(
        self,
        deployment: Deployment,
        directory: Path,
        *,
        days: int = 1,
        request_s: float = 60,
        is_watched: bool = False,
        is_behind: bool = False,
    ) -> None:
        """Watched, each writes its indices down. Behind something, each listens elsewhere than its record says."""
        self.deployment, self.directory = deployment, directory
        self._request_s, self._is_watched, self._is_behind = request_s, is_watched, is_behind
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
                "CLOISTER_ROLE_REQUEST_S": str(self._request_s),
            }
            if self._is_behind:
                told["CLOISTER_ROLE_LISTEN"] = LISTEN[role]
            command = [BIN / "cloister-server", kind]
            if self._is_watched:
                command = [sys.executable, Path(__file__).with_name("watched_role.py"), self._indices(role), kind]
            with (self.directory / f"{role}.log").open("ab") as log:
                self.running[role] = subprocess.Popen(command, env={**self.env, **told}, stdout=log, stderr=log)

    def _indices(self, role: str) -> Path:
        return self.directory / f"{role}.indices"

    def indices(self, role: str) -> list[str]:
        """What every process of the role burned, used or dealt, one after the other."""
        return self._indices(role).read_text().splitlines()

    def kill(self, role: str, number: int = signal.SIGKILL) -> int:
        process = self.running.pop(role)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        return process.wait(60)

    def log(self, role: str) -> str:
        return (self.directory / f"{role}.log").read_text()

    def starts(self, role: str) -> int:
        """How many processes of the role have said that they serve."""
        return self.log(role).count("role.ready")


def trained(
    client: cloister.Cloister, digits: dict[str, np.ndarray], *between: cloister.layers.Layer, features: int = 64
) -> cloister.Model:
    """A model of real scans: linear, or with what is between, which makes so many features."""
    layers = [cloister.layers.Flatten(), *between, cloister.layers.Linear(in_features=features, out_features=10)]
    plan = client.plan(
        upload(client, digits),
        target="digit",
        layers=layers,
        privacy=cloister.DP(epsilon=5.0),
        batch_size=200,
        epochs=2,
    )
    return client.train(plan, model="m").wait(timeout_s=120)


def is_answered(private: cloister.PrivateModel, clear: np.ndarray, rows: np.ndarray, *, timeout_s: float = 30) -> bool:
    """Whether an answer came; a wrong one fails the test."""
    try:
        assert np.abs(private.predict_proba(rows, timeout_s=timeout_s) - clear).max() < 1e-4
    except cloister.PartyUnavailable:
        return False
    return True


def right_soon(private: cloister.PrivateModel, clear: np.ndarray, rows: np.ndarray) -> None:
    """However long the roles take to start, or to find each other: errors by name, and then a right answer."""
    deadline = time.monotonic() + 300
    while not is_answered(private, clear, rows):
        assert time.monotonic() < deadline, "the roles did not come"
        time.sleep(0.1)
