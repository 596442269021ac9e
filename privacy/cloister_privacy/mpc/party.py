"""A party: holds its shares of the weights, forms a group with the other and the dealer, and answers requests in step with the other.

Party 0 leads: it says which requests come, to be computed as one, and takes the material. Whatever goes wrong once both have begun
ends these requests, their material and the group; `form` makes a new one, without a restart. Nothing waits without an end.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from cloister.wire.shares import Shares
from cloister_privacy.mpc.computation import Computation, Shared, Weight
from cloister_privacy.mpc.dealer import CONTROL_BYTES, REFUSED, VERSION
from cloister_privacy.mpc.deployment import Deployment, Limits
from cloister_privacy.mpc.errors import IndexBurned, PeerRefused, PrivateInferenceError, RequestDropped, SharesOfAnother
from cloister_privacy.mpc.joined import (
    DIFFERENT,
    MISSING,
    TAKEN,
    USED,
    Announcement,
    Asked,
    inputs_of,
    most_joined,
    refusals_of,
)
from cloister_privacy.mpc.keystream import Keystream
from cloister_privacy.mpc.links import Deadline, Identity, Link, Listener, connect
from cloister_privacy.mpc.marks import Marks
from cloister_privacy.mpc.material import Generation, Material, masks_of, open_material
from cloister_privacy.mpc.network import SharedNetwork
from cloister_privacy.mpc.ring import Ring
from cloister_privacy.mpc.spool import Spool
from cloister_privacy.mpc.stock import Stock
from cloister_privacy.sealing.files import make_directory

__all__ = ["Party"]

_STEP_S = 5.0
"""For one step of forming, which is tried again as long as there is time."""
_LOOK_S = 0.05
_SHARE_OF_TIME = 0.25
"""Of what a request may take, that joined requests are expected to take, by how long a row took last."""


@dataclass(slots=True)
class _Group:
    """A generation while it lasts."""

    generation: Generation
    other: Link
    dealer: Link
    weights: dict[str, Weight] = field(repr=False)
    stock: Stock | None = None

    @property
    def is_over(self) -> bool:
        """Whether the dealer ended it, which the other's end makes it do."""
        return self.stock.is_over if self.stock is not None else self.dealer.wait(Deadline.after(0))

    def close(self) -> None:
        self.other.close()
        if self.stock is not None:
            self.stock.close()
        self.dealer.close()


class Party:
    """Party 0 or 1 of a deployment. Its directory holds which indices are burned and, sealed, material: never a snapshot's copy.

    Raises SharesOfAnother where the weights' shares are not this network's.
    """

    def __init__(
        self,
        number: int,
        identity: Identity,
        deployment: Deployment,
        network: SharedNetwork,
        weights: Mapping[str, Ring],
        directory: Path,
        *,
        limits: Limits | None = None,
    ) -> None:
        network.check_weights(weights)
        make_directory(directory)
        self.number, self._identity, self._deployment = number, identity, deployment
        self._network, self._weights, self._directory = network, weights, directory
        self._limits = limits or Limits()
        self._marks = Marks(directory / "burned.json")
        self._turn = threading.Lock()
        self._row_s = math.inf
        self._group: _Group | None = None
        self._arrived: queue.Queue[Link] = queue.Queue()
        self._listener: Listener | None = None
        if number == 0:
            mine = deployment.parties[0]
            self._listener = Listener(identity, deployment.parties[1:], mine.host, mine.port, on_link=self._arrived.put)

    def close(self) -> None:
        """Ends the group and stops listening."""
        if self._listener is not None:
            self._listener.close()
        with self._turn:
            self._end()

    @property
    def is_formed(self) -> bool:
        """Whether there is a generation that nobody has ended."""
        group = self._group
        return group is not None and not group.is_over

    @property
    def most_rows(self) -> int:
        """Of one request."""
        return self._limits.rows

    @property
    def most_joined(self) -> int:
        """Of requests that are computed as one."""
        in_time = _SHARE_OF_TIME * self._limits.request_s / self._row_s
        return most_joined(self._row_bytes, self._limits, in_time=in_time)

    @cached_property
    def _row_bytes(self) -> int:
        return self._network.material_bytes(1)

    @property
    def bytes_sent(self) -> int:
        """To the other party in this generation."""
        return self._group.other.bytes_sent if self._group is not None else 0

    # The group.

    def form(self) -> str:
        """A new generation with the other party and the dealer; its id. Tries until `form_s` is over.

        Raises PeerRefused for a wrong or expired certificate, and RequestDropped where somebody is missing.
        """
        deadline = Deadline.after(self._limits.form_s)
        with self._turn:
            self._end()
            while True:
                try:
                    self._group = self._formed(deadline)
                    return self._group.generation.id
                except PeerRefused:
                    raise
                except RequestDropped:
                    if deadline.is_past:
                        raise

    def _formed(self, deadline: Deadline) -> _Group:
        dealer = connect(self._identity, self._deployment.dealer, deadline)
        other: Link | None = None
        try:
            generation = self._begun(dealer, deadline)
            other = self._met(generation, dealer, deadline)
            weights = self._opened(generation, other, deadline)
            stock = None
            if self.number == 0:
                spool = Spool(self._directory / "material", limit_bytes=self._limits.disk_bytes)
                stock = Stock(dealer, spool, limits=self._limits)
            return _Group(generation, other, dealer, weights, stock)
        except BaseException:
            dealer.close()
            if other is not None:
                other.close()
            raise

    def _begun(self, dealer: Link, deadline: Deadline) -> Generation:
        hello = {
            "version": VERSION, "deployment": self._deployment.id, "network": self._network.digest, "party": self.number,
        }  # fmt: skip
        dealer.send(json.dumps(hello).encode(), deadline)
        answer = dealer.receive(CONTROL_BYTES, deadline)
        if answer[:1] == REFUSED:
            raise PeerRefused(answer[1:].decode("utf-8", errors="replace"))
        told = json.loads(answer[1:])
        return Generation(str(told["generation"]), bytes.fromhex(told["key"]))

    def _met(self, generation: Generation, dealer: Link, deadline: Deadline) -> Link:
        """The link to the other party, who is in the same generation, deployment and network."""
        told = f"{VERSION} {generation.id} {self._deployment.id} {self._network.digest}"
        proof = hashlib.sha256(told.encode()).digest()
        step = Deadline.after(min(_STEP_S, deadline.left_s))
        while True:
            other = self._next_link(dealer, step)
            try:
                theirs = other.exchange(proof, step)
            except PeerRefused:
                other.close()
                raise
            except RequestDropped:
                other.close()
                if self.number == 1 or step.is_past:
                    raise
                continue  # a link that the other gave up before
            if theirs == proof:
                return other
            other.close()
            if self.number == 1 or step.is_past:
                raise RequestDropped("the other party is in another generation; form anew and try again")

    def _next_link(self, dealer: Link, step: Deadline) -> Link:
        if self.number == 1:
            return connect(self._identity, self._deployment.parties[0], step)
        while not step.is_past:
            with suppress(queue.Empty):
                return self._arrived.get(timeout=_LOOK_S)
            if dealer.wait(Deadline.after(0)):
                break
        raise RequestDropped("the other party did not come; start it and try again")

    def _opened(self, generation: Generation, other: Link, deadline: Deadline) -> dict[str, Weight]:
        """Each weight's difference to its mask, opened once in this generation."""
        masks = masks_of([generation.key], self._network.masked)
        names = sorted(masks)
        if not names:
            return {}
        mine = np.concatenate([(self._weights[name] - masks[name]).reshape(-1) for name in names])
        theirs = np.frombuffer(other.exchange(mine.tobytes(), deadline), np.uint64)
        weights, at, opened = {}, 0, mine + theirs
        for name in names:
            size = masks[name].size
            found = opened[at : at + size].reshape(masks[name].shape)
            weights[name] = Weight(found, masks[name] + found if self.number == 0 else masks[name])
            at += size
        return weights

    def _end(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _current(self) -> _Group:
        if self._group is not None and self._group.is_over:
            self._end()
        if self._group is None:
            raise RequestDropped("the group is not formed; form it and try again")
        return self._group

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """Whatever fails inside ends the group, and is told without its cause: that may hold numbers."""
        try:
            yield
        except BaseException as exc:
            self._end()
            if isinstance(exc, PrivateInferenceError) or not isinstance(exc, Exception):
                raise
            raise RequestDropped("the request failed at this party; form anew and try again") from None

    # Requests.

    def lead(self, requests: Sequence[Shares]) -> list[Shares | SharesOfAnother]:
        """Party 0's shares of the outputs, `outputs` [n, k], of its shares of the inputs; or why party 1 does not take that request.

        Raises SharesOfAnother and MaterialError before anything is opened, with the group as it was; else RequestDropped.
        """
        if self.number != 0:
            raise ValueError("party 0 leads, and party 1 follows")
        asked = tuple(Asked(each.request, self.check(each)) for each in requests)
        with self._turn:
            group, deadline = self._current(), Deadline.after(self._limits.request_s)
            row_s, self._row_s = self._row_s, math.inf  # until it is known: after a fault one request goes alone
            assert group.stock is not None  # noqa: S101 (party 0 has one)
            index, sealed = group.stock.take(sum(each.rows for each in asked), deadline)
            self._marks.burn(group.generation.id, index)
            program = self._network.program(index.rows)
            material = open_material(sealed, program, generation=group.generation, index=index)
            with self._dropping():
                group.other.send(Announcement(index.count, asked).to_bytes(), deadline)
                refusals = refusals_of(group.other.receive(CONTROL_BYTES, deadline), len(asked))
                taken = [None if why else shares for why, shares in zip(refusals, requests, strict=True)]
                answers = self._answers(group, material, asked, taken, deadline)
            self._row_s = (self._limits.request_s - deadline.left_s) / index.rows if any(taken) else row_s
        return [answer or cast("SharesOfAnother", why) for answer, why in zip(answers, refusals, strict=True)]

    def follow(self, find: Callable[[bytes], Shares | None], *, wait_s: float) -> list[Shares]:
        """Party 1's shares of the outputs of the requests that party 0 announces next, within `wait_s`; none where there are none.

        `find` gives this party's share of the inputs of a request. What cannot be answered is refused to party 0, and has no answer.
        Raises RequestDropped.
        """
        if self.number != 1:
            raise ValueError("party 1 follows, and party 0 leads")
        with self._turn:
            group, waiting = self._current(), Deadline.after(wait_s)
            while not group.other.wait(Deadline.after(min(waiting.left_s, 10 * _LOOK_S))):
                self._current()
                if waiting.is_past:
                    return []
            with self._dropping():
                deadline = Deadline.after(self._limits.request_s)
                frame = group.other.receive(CONTROL_BYTES, deadline)
                announced = Announcement.from_bytes(frame, most_rows=self._limits.rows)
                try:
                    # Burned whatever becomes of the requests.
                    self._marks.burn(group.generation.id, announced.index)
                except IndexBurned:
                    group.other.send(bytes([USED]) * len(announced.asked), deadline)
                    return []
                found = [find(each.request) for each in announced.asked]
                codes = [self._code_of(each, shares) for each, shares in zip(announced.asked, found, strict=True)]
                group.other.send(bytes(codes), deadline)
                taken = [shares if code == TAKEN else None for shares, code in zip(found, codes, strict=True)]
                material = Material(Keystream.of(group.generation.key, announced.index), corrections=None)
                answers = self._answers(group, material, announced.asked, taken, deadline)
                return [each for each in answers if each is not None]

    def _code_of(self, asked: Asked, shares: Shares | None) -> int:
        try:
            if shares is None or shares.request != asked.request:
                return MISSING
            return TAKEN if self.check(shares) == asked.rows else DIFFERENT
        except SharesOfAnother:
            return MISSING

    def check(self, shares: Shares) -> int:
        """How many rows these shares of a request have. Raises SharesOfAnother where this party would not take them."""
        expected: dict[str, Any] = {
            "deployment": self._deployment.id, "party": self.number, "fraction_bits": self._network.fraction_bits,
        }  # fmt: skip
        for name, value in expected.items():
            if getattr(shares, name) != value:
                raise SharesOfAnother(
                    f"the shares are of another {name.replace('_', ' ')}; ask for the deployment again"
                )
        rows = self._network.check_inputs(shares.tensors)
        if rows > self._limits.rows:
            raise SharesOfAnother(
                f"the request has {rows} rows, and {self._limits.rows} are the most; send fewer at once"
            )
        return rows

    def _answers(
        self,
        group: _Group,
        material: Material,
        asked: Sequence[Asked],
        taken: Sequence[Shares | None],
        deadline: Deadline,
    ) -> list[Shares | None]:
        """To each request that is taken its own rows of what is computed of all; where none is, nothing is opened."""
        if not any(taken):
            return [None] * len(taken)
        outputs = self._computed(group, material, inputs_of(asked, taken, self._network.inputs), deadline)
        parts = np.split(outputs.share, np.cumsum([each.rows for each in asked])[:-1])
        return [
            shares and Shares(self._deployment.id, each.request, self.number, {"outputs": own}, outputs.bits)
            for each, shares, own in zip(asked, taken, parts, strict=True)
        ]

    def _computed(self, group: _Group, material: Material, inputs: Mapping[str, Ring], deadline: Deadline) -> Shared:
        c = Computation(
            self.number,
            material,
            lambda sent: group.other.exchange(sent, deadline),
            weights=group.weights,
            shares=self._weights,
            fraction_bits=self._network.fraction_bits,
        )
        bits = self._network.fraction_bits
        return self._network.run(c, {name: Shared(share, bits) for name, share in inputs.items()})
