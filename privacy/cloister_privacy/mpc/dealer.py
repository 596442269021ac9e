"""The dealer: gives each party of a generation its key, and party 0 the corrections, and sees no share, no mask's use and no number.

A generation begins when both parties ask for one and ends with either's link; then its keys and masks are forgotten. An index is
dealt once. Knows keys, tuples and links; never what is opened between the parties.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from typing import Any

from cloister_privacy.mpc.deployment import Deployment, Limits
from cloister_privacy.mpc.errors import RequestDropped
from cloister_privacy.mpc.keystream import KEY_BYTES, Index
from cloister_privacy.mpc.links import Deadline, Identity, Link, Listener
from cloister_privacy.mpc.material import deal, masks_of, material_bytes
from cloister_privacy.mpc.network import SharedNetwork
from cloister_privacy.mpc.ring import Ring

__all__ = ["CONTROL_BYTES", "DEALT", "REFUSED", "VERSION", "Dealer"]

VERSION = "cloister.mpc/2"
"""Of what roles say to each other. Version 1 announced one request at a time."""
CONTROL_BYTES = 4096
"""The most that a frame takes which is not material or shares."""

DEALT, REFUSED = b"\x00", b"\x01"
"""The first byte of an answer: material follows, or a sentence."""

_LOOK_S = 0.5


@dataclass(slots=True)
class _Generation:
    """Keys and masks while both links hold."""

    id: str
    keys: tuple[bytes, bytes] = field(repr=False)
    masks: dict[str, Ring] = field(repr=False)
    links: list[Link]
    dealt: dict[int, int] = field(default_factory=dict)
    is_over: bool = False

    def end(self) -> None:
        self.is_over = True
        self.keys, self.masks = (b"", b""), {}
        for link in self.links:
            link.close()


@dataclass(slots=True)
class _Waiting:
    link: Link
    is_paired: threading.Event = field(default_factory=threading.Event)
    generation: _Generation | None = None


class Dealer:
    """Serves from its construction until `close`, each party in a thread of its own."""

    def __init__(
        self, identity: Identity, deployment: Deployment, network: SharedNetwork, *, limits: Limits | None = None
    ) -> None:
        self._deployment, self._network, self._limits = deployment, network, limits or Limits()
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._current: _Generation | None = None
        self._listener = Listener(
            identity, deployment.parties, deployment.dealer.host, deployment.dealer.port, on_link=self._serve
        )

    def close(self) -> None:
        self._listener.close()
        with self._lock:
            for waiting in self._waiting.values():
                waiting.link.close()
                waiting.is_paired.set()
            if self._current is not None:
                self._current.end()

    def _serve(self, link: Link) -> None:
        generation: _Generation | None = None
        try:
            deadline = Deadline.after(self._limits.form_s)
            party = [peer.name for peer in self._deployment.parties].index(link.peer)
            hello = _read(link.receive(CONTROL_BYTES, deadline))
            if why := self._refusal(hello, party):
                link.send(REFUSED + why.encode(), deadline)
                return
            generation = self._paired(party, link, deadline)
            if generation is None:
                return
            told = {"generation": generation.id, "key": generation.keys[party].hex()}
            link.send(DEALT + json.dumps(told).encode(), deadline)
            while not generation.is_over:
                if link.wait(Deadline.after(_LOOK_S)):
                    asked = _read(link.receive(CONTROL_BYTES, Deadline.after(self._limits.request_s)))
                    link.send(self._answer(generation, party, asked), Deadline.after(self._limits.request_s))
        except RequestDropped:
            return  # the party forms anew
        finally:
            if generation is not None:
                generation.end()
            link.close()

    def _refusal(self, hello: dict[str, Any], party: int) -> str:
        expected = {
            "version": VERSION, "deployment": self._deployment.id, "network": self._network.digest, "party": party,
        }  # fmt: skip
        wrong = [name for name, value in expected.items() if hello.get(name) != value]
        if not wrong:
            return ""
        cure = (
            "use one version of Cloister at all roles"
            if "version" in wrong
            else "start both with one deployment's record"
        )
        return f"the dealer has another {wrong[0]}; {cure}"

    def _paired(self, party: int, link: Link, deadline: Deadline) -> _Generation | None:
        """The generation that begins when the other party waits too."""
        mine = _Waiting(link)
        with self._lock:
            if (older := self._waiting.pop(party, None)) is not None:
                older.is_paired.set()
            self._waiting[party] = mine
            if len(self._waiting) == 2:
                both = [self._waiting.pop(number) for number in (0, 1)]
                self._begin(both)
        mine.is_paired.wait(deadline.left_s)
        with self._lock:
            if self._waiting.get(party) is mine:
                del self._waiting[party]
        return mine.generation

    def _begin(self, both: list[_Waiting]) -> None:
        if self._current is not None:
            self._current.end()
        keys = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
        masks = masks_of(keys, self._network.masked)
        self._current = _Generation(os.urandom(16).hex(), keys, masks, [each.link for each in both])
        for each in both:
            each.generation = self._current
            each.is_paired.set()

    def _answer(self, generation: _Generation, party: int, asked: dict[str, Any]) -> bytes:
        rows, count = asked.get("rows"), asked.get("count")
        if party != 0 or not isinstance(rows, int) or not isinstance(count, int):
            return REFUSED + b"this was not understood; use one version of Cloister at all roles"
        if not 1 <= rows <= self._limits.rows:
            return REFUSED + f"the dealer gives material for 1 to {self._limits.rows} rows; send fewer".encode()
        if count > self._limits.requests:
            raise RequestDropped("this generation's material is at its end")  # which ends it: the parties form another
        if count <= generation.dealt.get(rows, 0):
            return REFUSED + b"this index was dealt before; form anew"
        program, most = self._network.program(rows), asked.get("most")
        if isinstance(most, int) and material_bytes(program) > most:
            told = f"material of {material_bytes(program)} bytes does not fit in party 0's budget of {most}"
            return REFUSED + f"{told}; raise disk_bytes, or send fewer rows".encode()
        generation.dealt[rows] = count
        keys, masks = generation.keys, generation.masks
        if generation.is_over:
            return REFUSED + b"the generation is over; form anew"
        return DEALT + deal(program, generation=generation.id, index=Index(rows, count), keys=keys, masks=masks)


def _read(frame: bytes) -> dict[str, Any]:
    """A control frame. Raises RequestDropped for anything else."""
    try:
        told = json.loads(frame)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise RequestDropped("a peer sent what is no message; form anew and try again")
    return told
