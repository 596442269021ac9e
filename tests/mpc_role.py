"""One role as a process of its own, for tests: told what it is by the first line of standard input, and by each line what to do.

Party 1 follows by itself: its shares lie in `inbox` under the request's id. Each burned index is written to `burned.log`, synced.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from cloister.wire.architecture import Architecture
from cloister.wire.shares import Shares
from cloister_privacy.mpc import (
    Dealer,
    Deployment,
    Identity,
    Limits,
    Party,
    Peer,
    PrivateInferenceError,
    RequestDropped,
    SharedNetwork,
)
from cloister_privacy.mpc.keystream import Index
from cloister_privacy.mpc.marks import Marks


def main() -> None:
    torch.set_num_threads(1)
    told = json.loads(sys.stdin.readline())
    directory = Path(told["directory"])
    peers = [Peer(**each) for each in told["peers"]]
    deployment = Deployment(told["deployment"], (peers[0], peers[1]), peers[2])
    network = SharedNetwork(Architecture.model_validate_json(told["architecture"]))
    identity, limits = Identity(Path(told["certificate"]), Path(told["key"])), Limits(**told["limits"])
    if told["role"] == "dealer":
        Dealer(identity, deployment, network, limits=limits)
        _say("ready")
        sys.stdin.readline()
        return
    number = int(told["role"][-1])
    weights = Shares.from_bytes((directory / "weights.shares").read_bytes()).tensors
    _log_burns(directory / "burned.log")
    party = Party(number, identity, deployment, network, weights, directory, limits=limits)
    _say("ready")
    (_lead if number == 0 else _follow)(party, directory)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _log_burns(path: Path) -> None:
    burn = Marks.burn

    def logged(self: Marks, generation: str, index: Index) -> None:
        burn(self, generation, index)
        with path.open("a") as file:
            file.write(f"{generation} {index.rows} {index.count}\n")
            file.flush()
            os.fsync(file.fileno())

    Marks.burn = logged  # type: ignore[method-assign]  # watched, and otherwise as it is


def _lead(party: Party, directory: Path) -> None:
    """`ID`: leads the request whose shares lie in the inbox, and writes its outputs; tells by a line how it went."""
    for line in sys.stdin:
        request = line.strip()
        try:
            if not party.is_formed:
                party.form()
            shares = Shares.from_bytes((directory / "inbox" / request).read_bytes())
            (answer,) = party.lead([shares])
            if not isinstance(answer, Shares):
                raise answer
            (directory / f"{request}.out").write_bytes(answer.to_bytes())
            _say("answered")
        except PrivateInferenceError as exc:
            _say(f"{type(exc).__name__}: {exc}")


def _follow(party: Party, directory: Path) -> None:
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()

    def find(request: bytes) -> Shares | None:
        path = directory / "inbox" / request.hex()
        return Shares.from_bytes(path.read_bytes()) if path.exists() else None

    while True:
        try:
            if not party.is_formed:
                party.form()
            for answered in party.follow(find, wait_s=0.5):
                draft = directory / f"{answered.request.hex()}.new"
                draft.write_bytes(answered.to_bytes())
                draft.replace(draft.with_suffix(".out"))
        except RequestDropped:
            time.sleep(0.05)


if __name__ == "__main__":
    main()
