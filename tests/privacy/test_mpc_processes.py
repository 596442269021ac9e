"""Two parties and a dealer, each a process with its own certificate, over TLS on loopback: against the clear model, and killed."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cloister.wire.shares import Shares, encode
from cloister_privacy.architecture import Network
from cloister_privacy.mpc import Limits
from mpc_groups import Group, small_network
from mpc_processes import Dropped, Processes, memory_of

LIMITS = Limits(form_s=60, request_s=60)
NETWORK = small_network()


def _clear(network: Network, x: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.no_grad():
        return network({"x": torch.from_numpy(x)}).numpy().astype(np.float64)


def _images(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(0, 1, (2, 4, 4)).astype(np.float32)


def _answered_again(processes: Processes, seed: int) -> None:
    """Every request gives an error or a right answer, until one gives an answer."""
    x = _images(seed)
    for _ in range(60):
        try:
            found = processes.ask(x)
        except Dropped:
            continue
        assert np.abs(found - _clear(NETWORK, x)).max() < 1e-5
        return
    raise AssertionError("the group did not come back")


def _require_each_index_once(processes: Processes) -> None:
    for role in ("party-0", "party-1"):
        burned = processes.burned(role)
        assert burned
        assert len(set(burned)) == len(burned)


def test_processes_answer_and_come_back_after_each_role_was_killed(tmp_path: Path) -> None:
    with Processes(Group.create(tmp_path, NETWORK), tmp_path / "roles", limits=LIMITS) as processes:
        _answered_again(processes, 0)
        for seed, role in enumerate(("dealer", "party-1", "party-0"), start=1):
            processes.kill(role)
            processes.start(role)
            _answered_again(processes, seed)
        _require_each_index_once(processes)


@pytest.mark.long
@pytest.mark.parametrize("role", ["party-1", "dealer"])
def test_a_role_that_stands_still_is_left_at_the_deadline_and_taken_up_again(role: str, tmp_path: Path) -> None:
    limits = Limits(form_s=10, request_s=2, ahead=1)
    with Processes(Group.create(tmp_path, NETWORK), tmp_path / "roles", limits=limits) as processes:
        _answered_again(processes, 0)
        processes.running[role].send_signal(signal.SIGSTOP)
        with pytest.raises(Dropped, match="try again"):
            for seed in range(10):
                processes.ask(_images(seed))
        processes.running[role].send_signal(signal.SIGCONT)
        _answered_again(processes, 1)
        _require_each_index_once(processes)


@pytest.mark.long
def test_a_role_killed_at_any_instant_leaves_an_error_or_a_right_answer(tmp_path: Path) -> None:
    instants = random.Random(8)
    with Processes(Group.create(tmp_path, NETWORK), tmp_path / "roles", limits=LIMITS) as processes:
        _answered_again(processes, 0)
        for seed in range(6 if os.environ.get("SHORT") else 30):
            role = instants.choice(("dealer", "party-1", "party-0"))
            victim = processes.running[role]
            killer = threading.Timer(instants.uniform(0, 0.05), victim.kill)
            killer.start()
            x = _images(seed)
            try:
                while victim.poll() is None:
                    assert np.abs(processes.ask(x) - _clear(NETWORK, x)).max() < 1e-5
            except Dropped:
                pass
            killer.join()
            processes.kill(role)
            processes.start(role)
            _answered_again(processes, seed)
        _require_each_index_once(processes)


@pytest.mark.long
def test_no_role_has_a_number_in_the_clear_in_memory_or_on_disk(tmp_path: Path) -> None:
    """After a hundred requests: no input, weight or output, as float32, float64 or fixed point; and a party's own share is found."""
    x = np.random.default_rng(99).uniform(0, 1, (2, 4, 4)).astype(np.float32)
    with Processes(Group.create(tmp_path, NETWORK), tmp_path / "roles", limits=LIMITS) as processes:
        _answered_again(processes, 0)
        for _ in range(100):
            found = processes.ask(x)
        planted = [
            kind.tobytes()[:24]
            for array in (x, NETWORK.state_dict()["layers.1.weight"].numpy(), _clear(NETWORK, x), found)
            for kind in (array.astype(np.float32), array.astype(np.float64), encode("x", array), _twice_as_fine(array))
        ]
        share = Shares.from_bytes((tmp_path / "roles" / "party-0" / "weights.shares").read_bytes())
        own = share.tensors["layers.1.weight"].tobytes()[:24]
        for role, process in processes.running.items():
            files = [path.read_bytes() for path in (tmp_path / "roles" / role).rglob("*") if path.is_file()]
            memory = list(memory_of(process.pid))
            assert not any(each in image for each in planted for image in (*memory, *files))
            assert any(own in image for image in memory) is (role == "party-0")


def _twice_as_fine(array: NDArray[Any]) -> NDArray[np.int64]:
    return np.rint(array * 2.0**40).astype(np.int64)
