"""Ours: two parties and the dealer over TLS.

Material for one program alone is dealt ahead, so that none of the work hides in the others' turns. In the directory `joined` each
program answers as many requests as eight clients have that wait at once.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from cloister.wire.shares import Shares, decode, join
from cloister_privacy.mpc import Dealer, Limits, Party
from mpc_groups import ROLES, Group, shares_of
from mpc_sides.networks import image, network

JOINED = 8


def prepare(name: str, directory: Path, addresses: list[tuple[str, int]]) -> None:
    """Identities, and the shares of weights and input, before any process is started."""
    group = Group.create(directory, network(name), addresses=addresses)
    for number, share in enumerate(shares_of(group, image(name))):
        (directory / f"{number}.shares").write_bytes(share.to_bytes())
        weights = Shares("bench", bytes(16), number, group.weights[number])
        (directory / f"{number}.weights").write_bytes(weights.to_bytes())


def main() -> None:
    from mpc_sides.seat import (  # takes standard output for itself, which is the parent's to write to
        Seat,
        answer,
        stand_by,
    )

    torch.set_num_threads(1)
    seat, limits = Seat.taken(), Limits(form_s=120, request_s=120, ahead=1)
    rank, role = seat.rank, ROLES[seat.rank]
    group = Group.read(seat.directory, network(seat.directory.parent.name), seat.addresses)
    if role == "dealer":
        Dealer(group.identities[role], group.deployment, group.network, limits=limits)
        return stand_by()
    identity, weights = group.identities[role], group.weights[rank]
    party = Party(rank, identity, group.deployment, group.network, weights, seat.directory / role, limits=limits)
    party.form()
    share = Shares.from_bytes((seat.directory / f"{rank}.shares").read_bytes())
    count = JOINED if seat.directory.name == "joined" else 1
    dealt = group.network.material_bytes(count) / count
    found, before, blocks = share, party.bytes_sent, 0

    def ask() -> None:
        nonlocal found
        asked = party.lead([share] * count) if rank == 0 else party.follow(lambda request: share, wait_s=120)
        assert len(asked) == count and isinstance(asked[-1], Shares)
        found = asked[-1]

    def told(programs: int) -> dict[str, Any]:
        nonlocal before, blocks
        sent, before, blocks = party.bytes_sent - before, party.bytes_sent, blocks + 1
        other = seat.directory / f"{blocks}.out"
        if rank == 1:
            written = other.with_suffix(".part")
            written.write_bytes(found.to_bytes())
            written.rename(other)
            return {}
        while not other.exists():
            time.sleep(0.01)
        words = [each.tensors["outputs"] for each in (found, Shares.from_bytes(other.read_bytes()))]
        outputs = decode(join(words), fraction_bits=found.fraction_bits)
        return {"bytes": sent / programs / count + dealt, "outputs": outputs.tolist()}

    answer(ask, told=told)


if __name__ == "__main__":
    main()
