"""The way to two parties: TLS 1.3 by their pinned certificates, a share to each, a share of the answer from each, until a deadline.

Knows sockets and shares; never the numbers that were shared.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cloister._errors import (
    PartyAnswerRefused,
    PartyBusy,
    PartyRefused,
    PartyUnavailable,
    PrivateInferenceFailed,
    StaleDeployment,
)
from cloister.wire.private_deployments import PrivateDeployment, Role
from cloister.wire.private_requests import ANSWERED, HEAD_BYTES, LENGTH, TAKEN, PartyRefusal, PrivateRequest
from cloister.wire.shares import Shares, SharesRefused, decode, encode, join, split

__all__ = ["Parties"]

_HEAD_OF_SHARES = 4096
_ERRORS: dict[str, type[PrivateInferenceFailed]] = {
    "busy": PartyBusy,
    "too_many_links": PartyBusy,
    "stale": StaleDeployment,
    "not_permitted": PartyRefused,
    "shares_refused": PartyRefused,
}
"""By what a party says; all else is PartyUnavailable."""


class Parties:
    """Both parties of a deployment, for one caller at a time. Connects when it is first asked; `with` closes the links."""

    def __init__(self, deployment: PrivateDeployment, *, outputs: int, until: float) -> None:
        self._deployment, self._outputs, self._until = deployment, outputs, until
        self._links: list[_Link] = []

    def __enter__(self) -> Parties:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._links = []

    def ask(
        self, inputs: Mapping[str, NDArray[np.float64]], permissions: Callable[[], tuple[str, str]]
    ) -> NDArray[np.float64]:
        """The network's outputs, [n, k], of numbers that leave here as shares alone.

        `permissions` gives those of now, however long a party was waited for before. After a failure in the middle it is
        asked once more, with fresh shares, as if it were another request. Raises NotFinite, OutOfRange and
        PrivateInferenceFailed, and what `permissions` raises.
        """
        bits = self._deployment.fraction_bits
        rings = {name: encode(name, each, fraction_bits=bits) for name, each in inputs.items()}
        try:
            return self._asked(rings, permissions)
        except PartyUnavailable:
            self.close()
            if time.monotonic() >= self._until:
                raise
        except BaseException:
            self.close()
            raise
        while True:
            time.sleep(_AGAIN_S)
            if self._all_listen():
                break
            if time.monotonic() >= self._until:
                raise PartyUnavailable("a party did not come back in time; try again later")
        return self._asked(rings, permissions)

    def _all_listen(self) -> bool:
        """Whether both can be reached, told without a share."""
        try:
            self._connect()
        except PartyUnavailable:
            self.close()
            return False
        return True

    def _connect(self) -> None:
        if not self._links:
            for role in self._deployment.parties:
                self._links.append(_Link(role, self._until))

    def _asked(
        self, rings: Mapping[str, NDArray[np.uint64]], permissions: Callable[[], tuple[str, str]]
    ) -> NDArray[np.float64]:
        self._connect()
        request, rows = os.urandom(16), len(next(iter(rings.values())))
        halves = {name: split(ring) for name, ring in rings.items()}
        # Party 1 first: party 0 announces the request as soon as it has its share.
        for party in (1, 0):
            shares = Shares(
                self._deployment.id,
                request,
                party,
                {name: each[party] for name, each in halves.items()},
                self._deployment.fraction_bits,
            )
            head = PrivateRequest(
                permission=permissions()[party], deployment=self._deployment.id, request=request.hex(), rows=rows
            )
            self._links[party].send(head.model_dump_json().encode(), shares.to_bytes())
            self._links[party].expect(TAKEN, limit_bytes=HEAD_BYTES)
        most = 8 * rows * self._outputs + _HEAD_OF_SHARES
        answers = [self._read(party, self._links[party].expect(ANSWERED, limit_bytes=most)) for party in (0, 1)]
        return self._joined(answers, request, rows)

    def _read(self, party: int, body: bytes) -> Shares:
        try:
            return Shares.from_bytes(body)
        except SharesRefused as exc:
            raise PartyAnswerRefused(f"party {party} answered what is no share ({exc}); ask its operator") from None

    def _joined(self, answers: Sequence[Shares], request: bytes, rows: int) -> NDArray[np.float64]:
        bits = {each.fraction_bits for each in answers}
        for party, each in enumerate(answers):
            found = (each.deployment, each.request, each.party, {n: share.shape for n, share in each.tensors.items()})
            if found != (self._deployment.id, request, party, {"outputs": (rows, self._outputs)}) or len(bits) != 1:
                raise PartyAnswerRefused(
                    f"party {party} answered another request, or in another shape; ask its operator"
                )
        (scale,) = bits
        numbers = decode(join([each.tensors["outputs"] for each in answers]), fraction_bits=scale)
        if np.abs(numbers).max() > self._deployment.largest_output:
            raise PartyAnswerRefused(
                "the two shares make no answer: one of them is garbage; ask the parties' operators"
            )
        return numbers


_AGAIN_S = 0.1


class _Link:
    """To one party."""

    def __init__(self, role: Role, until: float) -> None:
        self._until, self._who = until, f"the party of {role.operator!r} at {role.host}:{role.client_port}"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # its bytes are pinned, whatever name is in it
        context.load_verify_locations(cadata=role.certificate)
        try:
            raw = socket.create_connection((role.host, role.client_port or 0), timeout=self._left_s())
        except OSError as exc:
            raise PartyUnavailable(
                f"{self._who} cannot be reached ({exc.strerror or 'in time'}); try again later"
            ) from None
        try:
            self._sock = context.wrap_socket(raw)
        except ssl.SSLCertVerificationError as exc:
            raw.close()
            raise PartyRefused(
                f"{self._who} shows another certificate than the pinned one, or it expired ({exc.verify_message}); nothing was sent"
            ) from None
        except OSError as exc:
            raw.close()
            how = "did not answer in time" if isinstance(exc, TimeoutError) else "broke the handshake off"
            raise PartyUnavailable(f"{self._who} {how}; try again") from None
        if sha256(self._sock.getpeercert(binary_form=True) or b"").hexdigest() != role.digest:
            self._sock.close()
            raise PartyRefused(f"{self._who} shows another certificate than the pinned one; nothing was sent")
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def send(self, *frames: bytes) -> None:
        with self._failing():
            self._sock.settimeout(self._left_s())
            self._sock.sendall(b"".join(LENGTH.pack(len(frame)) + frame for frame in frames))

    def expect(self, said: bytes, *, limit_bytes: int) -> bytes:
        """What the party says behind this first byte. Raises what it refuses with."""
        with self._failing():
            (length,) = LENGTH.unpack(self._receive(LENGTH.size))
            if not 1 <= length <= max(limit_bytes, HEAD_BYTES):
                raise PartyAnswerRefused(f"{self._who} sent a frame of {length} bytes; ask its operator")
            frame = self._receive(length)
        if frame[:1] == said:
            return frame[1:]
        try:
            refusal = PartyRefusal.model_validate_json(frame[1:])
        except ValidationError:
            raise PartyAnswerRefused(f"{self._who} said what nobody understands; ask its operator") from None
        raise _ERRORS.get(refusal.code, PartyUnavailable)(f"{self._who}: {refusal.error}")

    def _receive(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            self._sock.settimeout(self._left_s())
            piece = self._sock.recv(min(count - len(found), 2**20))
            if not piece:
                raise ConnectionResetError
            found += piece
        return bytes(found)

    def _left_s(self) -> float:
        return max(0.001, self._until - time.monotonic())

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise PartyUnavailable(f"{self._who} did not answer in time; try again later") from None
        except OSError:
            raise PartyUnavailable(f"{self._who} broke the link; try again") from None
