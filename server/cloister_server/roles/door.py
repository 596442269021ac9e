"""Where clients come to a party: TLS by the party's certificate, a permission, a share of the input; a share of the answer goes back.

Whoever has no permission is sent away before a share is read. Knows links and permissions; computes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

from pydantic import ValidationError

from cloister.wire.private_requests import ANSWERED, HEAD_BYTES, REFUSED, TAKEN, PartyRefusal, PrivateRequest
from cloister.wire.shares import Shares, SharesRefused
from cloister_privacy.mpc import (
    Identity,
    MaterialExhausted,
    Party,
    PrivateInferenceError,
    RequestDropped,
    SharedNetwork,
    SharesOfAnother,
)
from cloister_privacy.mpc.links import Deadline, Link, Listener
from cloister_privacy.mpc.places import Places
from cloister_server.roles.permissions import NotPermitted, Permissions
from cloister_server.roles.waiting import Busy, Request

__all__ = ["Door"]

log = logging.getLogger(__name__)

_MOST_CLIENTS = 256
"""Of them, whoever has shown no permission for longest makes room for the next."""
_MOST_EACH = 32
"""Of one caller, who would keep everybody else out by them."""
_MOST_ENDING = 64
"""Clients that made room, and whose threads have not ended."""
_IDLE_S = 60.0
_STEP_S = 20.0
"""For a client to send what it announced, or to take what it asked for."""
_LOOK_S = 0.05
_HEAD_OF_SHARES = 2048


class _Refused(Exception):
    def __init__(self, code: str, error: str, *, is_over: bool = False) -> None:
        super().__init__(error)
        self.refusal = PartyRefusal(code=code, error=error)
        self.is_over = is_over
        """Whether what the client would send next was not read, so that the link is of no more use."""


class Door:
    """Open to clients from its construction until `close`."""

    def __init__(
        self,
        identity: Identity,
        party: Party,
        network: SharedNetwork,
        *,
        deployment: str,
        permissions: Permissions,
        put: Callable[[Request], None],
        host: str,
        port: int,
        answer_s: float,
    ) -> None:
        self._party, self._network, self._deployment = party, network, deployment
        self._permissions, self._put, self._answer_s = permissions, put, answer_s
        self._changed, self._owed = threading.Condition(), 0
        self._places = Places(_MOST_CLIENTS, most_each=_MOST_EACH)
        self._threads = threading.BoundedSemaphore(_MOST_CLIENTS + _MOST_ENDING)
        self._listener = Listener(identity, None, host, port, on_link=self._serve)

    def close(self) -> None:
        """Take no more clients; those that are there are answered still."""
        self._listener.close()

    def drain(self, wait_s: float) -> None:
        """Return when nobody is owed an answer any more, or after so long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._owed, wait_s)

    def _serve(self, link: Link) -> None:
        if not self._threads.acquire(blocking=False):
            link.close()
            return
        place: socket.socket | None = None
        try:
            with contextlib.suppress(OSError):  # no descriptor is left
                place = self._places.take(link.fileno())
            if place is not None:
                self._serve_at(place, link)
        except RequestDropped:
            return  # the client is gone, or made room
        finally:
            link.close()
            if place is not None:
                self._places.leave(place)
            self._threads.release()

    def _serve_at(self, place: socket.socket, link: Link) -> None:
        idle_s = _STEP_S
        while link.wait(Deadline.after(idle_s)):
            with self._owing():
                if not self._answer(place, link):
                    return
            idle_s = _IDLE_S

    @contextmanager
    def _owing(self) -> Iterator[None]:
        with self._changed:
            self._owed += 1
        try:
            yield
        finally:
            with self._changed:
                self._owed -= 1
                self._changed.notify_all()

    def _answer(self, place: socket.socket, link: Link) -> bool:
        """Answer one request; whether the link is of more use."""
        try:
            answer, is_over = ANSWERED + self._answered(place, link).to_bytes(), False
        except _Refused as refused:
            answer, is_over = REFUSED + refused.refusal.model_dump_json().encode(), refused.is_over
        link.send(answer, Deadline.after(_STEP_S))
        return not is_over

    def _answered(self, place: socket.socket, link: Link) -> Shares:
        head, caller = self._announced(link.receive(HEAD_BYTES, Deadline.after(_STEP_S)))
        if not self._places.keep(place, caller):
            told = f"you have {_MOST_EACH} links to this party, and nobody has more; use those, or close one"
            raise _Refused("too_many_links", told, is_over=True)
        if head.rows > self._party.most_rows:
            told = f"the request has {head.rows} rows, and {self._party.most_rows} are the most; send fewer at once"
            raise _Refused("shares_refused", told, is_over=True)  # before there is room for them
        numbers = sum(8 * head.rows * _product(shape) for shape in self._network.inputs.values())
        body = link.receive(numbers + _HEAD_OF_SHARES * (1 + len(self._network.inputs)), Deadline.after(_STEP_S))
        try:
            shares = Shares.from_bytes(body)
            rows = self._party.check(shares)
        except (SharesRefused, SharesOfAnother) as exc:
            raise _Refused("shares_refused", str(exc)) from None
        if (shares.request.hex(), rows) != (head.request, head.rows):
            raise _Refused("shares_refused", "the shares are of another request than was announced; share them again")
        request = Request(caller, shares)
        try:
            self._put(request)
        except Busy as exc:
            raise _Refused("busy", str(exc)) from None
        try:
            link.send(TAKEN, Deadline.after(_STEP_S))
            return self._waited_for(request, link)
        finally:
            request.answer.cancel()  # where nobody waits for it any more: it would keep its place for ever

    def _announced(self, frame: bytes) -> tuple[PrivateRequest, str]:
        try:
            head = PrivateRequest.model_validate_json(frame)
        except ValidationError:
            raise _Refused("shares_refused", "this is no private request of version 1", is_over=True) from None
        if head.deployment != self._deployment:
            raise _Refused("stale", "this party serves another deployment; ask the platform again", is_over=True)
        try:
            return head, self._permissions.subject(head.permission)
        except NotPermitted as exc:
            raise _Refused("not_permitted", str(exc), is_over=True) from None

    def _waited_for(self, request: Request, link: Link) -> Shares:
        until = time.monotonic() + self._answer_s
        while True:
            try:
                return request.answer.result(timeout=_LOOK_S)
            except TimeoutError:
                # A client that left, or says what it was not asked for, waits no more.
                if link.wait(Deadline.after(0)) and request.answer.cancel():
                    raise RequestDropped("the client left") from None
                if time.monotonic() >= until:
                    request.answer.cancel()
                    raise _Refused("dropped", "the request was not answered in time; ask again") from None
            except MaterialExhausted as exc:
                raise _Refused("exhausted", str(exc)) from None
            except SharesOfAnother as exc:
                # The other party may have been started again since it took its share.
                raise _Refused("dropped", str(exc)) from None
            except (PrivateInferenceError, CancelledError):
                raise _Refused("dropped", "the request is gone with its randomness; ask again") from None


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for each in shape:
        product *= each
    return product
