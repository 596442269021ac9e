"""Two parties and a dealer as processes: started, asked, killed and started again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.wire.shares import Shares, decode, join
from cloister_privacy.mpc import Limits
from mpc_groups import ROLES, Group, shares_of

__all__ = ["Dropped", "Processes", "memory_of"]

_PATIENCE_S = 120.0


class Dropped(Exception):
    """Party 0 told an error, or is gone."""


class Processes:
    """Each role with its own directory; what a role said last is kept for a failing test."""

    def __init__(self, group: Group, directory: Path, *, limits: Limits) -> None:
        self.group, self.directory, self._limits = group, directory, limits
        self.running: dict[str, subprocess.Popen[str]] = {}
        for number, role in enumerate(ROLES[:2]):
            (directory / role / "inbox").mkdir(parents=True)
            shares = Shares(group.deployment.id, bytes(16), number, group.weights[number])
            (directory / role / "weights.shares").write_bytes(shares.to_bytes())
        (directory / "dealer").mkdir()

    def __enter__(self) -> Processes:
        self.start(*ROLES)
        return self

    def __exit__(self, *exc: object) -> None:
        for role in list(self.running):
            self.kill(role)

    def start(self, *roles: str) -> None:
        """All at once, since each takes seconds to load torch."""
        for role in roles:
            self._start(role)
        for role in roles:
            assert self.running[role].stdout.readline() == "ready\n", f"{role} did not start"

    def _start(self, role: str) -> None:
        identity, deployment = self.group.identities[role], self.group.deployment
        told = {
            "role": role,
            "directory": str(self.directory / role),
            "deployment": deployment.id,
            "peers": [dataclasses.asdict(peer) for peer in (*deployment.parties, deployment.dealer)],
            "architecture": self.group.network.architecture.model_dump_json(),
            "certificate": str(identity.certificate),
            "key": str(identity.key),
            "limits": dataclasses.asdict(self._limits),
        }
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("mpc_role.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        self.running[role] = process
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.flush()

    def kill(self, role: str, number: int = signal.SIGKILL) -> None:
        process = self.running.pop(role)
        process.send_signal(number)
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def ask(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """Raises Dropped; waits long, and never for ever."""
        shares = shares_of(self.group, x)
        name = shares[0].request.hex()
        for number, role in enumerate(ROLES[:2]):
            (self.directory / role / "inbox" / name).write_bytes(shares[number].to_bytes())
        said = self._told(name)
        if said != "answered":
            raise Dropped(said)
        found = [Shares.from_bytes(self._written(role, name)) for role in ROLES[:2]]
        return decode(join([each.tensors["outputs"] for each in found]), fraction_bits=found[0].fraction_bits)

    def _told(self, name: str) -> str:
        leader = self.running["party-0"]
        try:
            leader.stdin.write(name + "\n")
            leader.stdin.flush()
        except OSError:
            raise Dropped("party 0 is gone") from None
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(leader.stdout.readline()), daemon=True)
        reader.start()
        reader.join(_PATIENCE_S)
        assert said, "party 0 hangs"
        return said[0].strip()

    def _written(self, role: str, name: str) -> bytes:
        """Party 1 may be writing still; where it was killed first, the request is lost."""
        path, waiting = self.directory / role / f"{name}.out", threading.Event()
        for _ in range(int(_PATIENCE_S / 0.05)):
            if path.exists():
                return path.read_bytes()
            if role not in self.running or self.running[role].poll() is not None:
                break
            waiting.wait(0.05)
        raise Dropped(f"{role} is gone")

    def burned(self, role: str) -> list[str]:
        """Every index that was burned, by all processes of the role one after the other."""
        path = self.directory / role / "burned.log"
        return path.read_text().splitlines() if path.exists() else []


def memory_of(pid: int) -> Iterator[bytes]:
    """All that a process has in memory and may read, region by region."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            region, permissions, *_ = line.split()
            if permissions.startswith("r"):
                start, stop = (int(each, 16) for each in region.split("-"))
                with contextlib.suppress(OSError, OverflowError):  # the kernel's own pages
                    memory.seek(start)
                    yield memory.read(stop - start)
