"""Parties and a dealer that are killed, or stand still, while clients ask: no wrong answer, no index twice, and back by themselves."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import cloister
from cloister.wire.private_deployments import ROLES
from harness import PATIENCE_S, App, Deployment
from journeys import SQLITE
from private_roles import PrivateRoles, is_answered, right_soon, trained

pytestmark = [pytest.mark.long, pytest.mark.parametrize("deployment", [SQLITE], indirect=True)]

PATIENCE_OF_CLIENTS_S, LATE_S = 2.0, 8.0
"""What a client gives as its deadline, and by how much a busy machine may be late with telling it."""
REQUEST_S = 3.0
"""Of the roles: some stand still for longer, and are left."""
LONGEST_STOP_S = 5.0
BACK_S = 5.0
IS_SHORT = bool(os.environ.get("SHORT"))
"""Nothing is claimed of times then: the machine may be anybody's."""
ROUNDS = 6 if IS_SHORT else 30


@dataclass(frozen=True)
class Asked:
    since: float
    until: float
    is_right: bool


class Client:
    """Asks without an end, and remembers what came of it."""

    def __init__(self, private: cloister.PrivateModel, clear: np.ndarray, rows: np.ndarray) -> None:
        self._given, self._is_over = (private, clear, rows), threading.Event()
        self.asked: list[Asked] = []
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            while not self._is_over.is_set():
                since = time.monotonic()
                is_right = is_answered(*self._given, timeout_s=PATIENCE_OF_CLIENTS_S)
                self.asked.append(Asked(since, time.monotonic(), is_right))
        except BaseException as error:
            self.failed = error

    def first_right(self, since: float) -> float | None:
        """When the first right answer came to what was asked after `since`."""
        if self.failed is not None:
            raise self.failed
        return next((each.until for each in self.asked if each.is_right and each.since >= since), None)

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()


def _until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < deadline, "this did not come about"
        time.sleep(0.02)


def _kill(roles: PrivateRoles, role: str, away_s: float) -> float:
    """When the one that takes its place serves."""
    before = roles.starts(role)
    roles.kill(role)
    time.sleep(away_s)
    roles.start(role)
    _until(lambda: roles.starts(role) > before)
    return time.monotonic()


def _stop(roles: PrivateRoles, role: str, away_s: float) -> float:
    """When it goes on."""
    roles.running[role].send_signal(signal.SIGSTOP)
    time.sleep(away_s)
    roles.running[role].send_signal(signal.SIGCONT)
    return time.monotonic()


def _require_each_index_once(roles: PrivateRoles) -> None:
    """At each party, over all its processes: an index is burned once, just before it is used, and no stream is used again."""
    for role in ("party-0", "party-1"):
        lines = [line.split() for line in roles.indices(role)]
        burned = [tuple(line[1:]) for line in lines if line[0] == "burned"]
        used = [line[1] for line in lines if line[0] == "used"]
        assert len(set(burned)) == len(burned) and len(set(used)) == len(used) > 0
        before = [first[0] for first, second in itertools.pairwise(lines) if second[0] == "used"]
        assert set(before) == {"burned"} and lines[0][0] == "burned"
    dealt = roles.indices("dealer")
    assert len(set(dealt)) == len(dealt) > 0


def test_whichever_role_is_killed_or_stands_still_clients_get_right_answers_or_errors_and_soon_right_ones_again(
    deployment: Deployment,
    app: App,
    client: cloister.Cloister,
    digits: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    """Back: from when the role that was killed serves again, or the one that stood still goes on, until each client has
    a right answer to what it asked after that. The survivors are never started again."""
    seed = int(os.environ.get("KILL_SEED", "8"))
    print(f"KILL_SEED={seed}")  # noqa: T201 (shown when the test fails: it replays the instants)
    instants, rows = random.Random(seed), digits["scan"][:4]
    model = trained(client, digits)
    clear = model.predict_proba(rows)
    faults = list(itertools.product((_kill, _stop), ROLES))
    instants.shuffle(faults)
    with (
        PrivateRoles(deployment, tmp_path / "roles", request_s=REQUEST_S, is_watched=True) as roles,
        deployment.client(app) as another,
        contextlib.ExitStack() as ending,
    ):
        roles.deploy(model, np.random.default_rng(5).uniform(0, 16, (8, 8, 8)).astype(np.float32))
        roles.pin(client)
        roles.start()
        privates = [client.private("m"), another.private("m")]
        for private in privates:
            right_soon(private, clear, rows)
        clients = [Client(private, clear, rows) for private in privates]
        for each in clients:
            ending.callback(each.stop)
        figures = []
        for fault, role in itertools.islice(itertools.cycle(faults), ROUNDS):
            survivors = {each: roles.running[each].pid for each in ROLES if each != role}
            time.sleep(instants.uniform(0, 0.5))
            serves = fault(roles, role, instants.uniform(0, LONGEST_STOP_S))
            _until(lambda since=serves: all(each.first_right(since) for each in clients))
            back_s = max(each.first_right(serves) or 0.0 for each in clients) - serves
            figures.append({"fault": fault.__name__, "role": role, "back_s": round(back_s, 2)})
            print(json.dumps(figures[-1]))  # noqa: T201 (the figures of a long run)
            assert all(roles.running[each].pid == pid for each, pid in survivors.items())
            assert all(roles.running[each].poll() is None for each in survivors)
        for each in clients:
            each.stop()
            took = [asked.until - asked.since for asked in each.asked]
            assert IS_SHORT or max(took) < PATIENCE_OF_CLIENTS_S + LATE_S
            print(f"{sum(asked.is_right for asked in each.asked)} of {len(took)} right, at most {max(took):.2f} s")  # noqa: T201
        assert IS_SHORT or max(figure["back_s"] for figure in figures) < BACK_S
        for role in ROLES:
            assert roles.kill(role, signal.SIGTERM) == 0
        _require_each_index_once(roles)
