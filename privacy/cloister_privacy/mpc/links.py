"""Links between the parties and the dealer: TLS 1.3, both ends by pinned certificates, frames by length, and an end to every wait.

Whoever answers with another certificate than the pinned one is refused. Knows sockets and certificates; nothing of shares.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloister_privacy.mpc.errors import PeerRefused, RequestDropped
from cloister_privacy.mpc.places import Places
from cloister_privacy.sealing.files import write_new

__all__ = ["Deadline", "Identity", "Link", "Listener", "Peer", "connect"]

_LENGTH = struct.Struct(">Q")
_PIECE = 2**18
_AGAIN_S = 0.05
_HANDSHAKE_S = 10.0
_MOST_HANDSHAKES = 16
_MOST_ENDING = 64
"""Handshakes that were told to end, and have not ended, counted with those that go on."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A time on the monotonic clock by which something is over."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    @property
    def left_s(self) -> float:
        return max(0.0, self.at - time.monotonic())

    @property
    def is_past(self) -> bool:
        return time.monotonic() >= self.at


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom a link is to: where it listens, and the one certificate that it shows."""

    name: str
    certificate: str
    """PEM, self-signed."""
    host: str
    port: int
    operator: str = ""
    """Who says that it runs this peer: declared, and not proven."""

    @property
    def digest(self) -> str:
        """SHA-256 of the certificate, as a deployment's record pins it."""
        return _digest(ssl.PEM_cert_to_DER_cert(self.certificate))


@dataclass(frozen=True, slots=True)
class Identity:
    """A role's own certificate and key: files, the key's of mode 0600."""

    certificate: Path
    key: Path = field(repr=False)

    @classmethod
    def create(cls, directory: Path, name: str, *, days: int = 365, subject: str | None = None) -> Identity:
        """A new key on P-256 and a certificate that it signs itself; raises FileExistsError where there is one.

        The certificate's `subject`, by default the name, must be another for each that one peer pins together.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        told = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject or name)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(told)
            .issuer_name(told)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, now + datetime.timedelta(days=days)) - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=days))
            .sign(key, hashes.SHA256())
        )
        identity = cls(directory / f"{name}.crt", directory / f"{name}.key")
        plain = serialization.NoEncryption()
        pem = serialization.Encoding.PEM
        write_new(identity.key, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        write_new(identity.certificate, certificate.public_bytes(pem))
        return identity

    def peer(self, name: str, host: str, port: int, *, operator: str = "") -> Peer:
        """How others know this role."""
        return Peer(name, self.certificate.read_text(), host, port, operator)

    def context(self, peers: Iterable[Peer] | None, *, is_server: bool) -> ssl.SSLContext:
        """TLS 1.3 that asks for a certificate and takes these alone; the name in it says nothing, its bytes do. With None it asks for
        none: whoever comes must show who they are by other means."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE if peers is None else ssl.CERT_REQUIRED
        if peers is not None:
            context.load_verify_locations(cadata="".join(peer.certificate for peer in peers))
        context.load_cert_chain(self.certificate, self.key)
        if is_server:
            context.num_tickets = 0
        return context


class Link:
    """One peer at the other end. Not for two threads at once."""

    def __init__(self, sock: ssl.SSLSocket, peer: str) -> None:
        self._sock, self.peer = sock, peer
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.bytes_sent = 0

    def send(self, payload: bytes, deadline: Deadline) -> None:
        """One frame. Raises RequestDropped."""
        self._transfer(payload, None, deadline)

    def receive(self, limit: int, deadline: Deadline) -> bytes:
        """The next frame, of at most `limit` bytes. Raises RequestDropped."""
        head = bytearray(_LENGTH.size)
        self._transfer(None, head, deadline)
        (length,) = _LENGTH.unpack(head)
        if length > limit:
            raise RequestDropped(
                f"{self.peer} sent a frame of {length} bytes where {limit} is the most; form anew and try again"
            )
        body = bytearray(length)
        self._transfer(None, body, deadline)
        return bytes(body)

    def exchange(self, payload: bytes, deadline: Deadline) -> bytes:
        """A frame each, of the same length, both ways at once. Raises RequestDropped."""
        found = bytearray(_LENGTH.size + len(payload))
        self._transfer(payload, found, deadline)
        (length,) = _LENGTH.unpack_from(found)
        if length != len(payload):
            raise RequestDropped(f"{self.peer} is out of step; form anew and try again")
        return bytes(memoryview(found)[_LENGTH.size :])

    def wait(self, deadline: Deadline) -> bool:
        """Whether anything came before the deadline, be it the end."""
        return bool(self._sock.pending()) or self._select(read=True, write=False, timeout_s=deadline.left_s)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """Ends it for both; whoever waits for it wakes."""
        with contextlib.suppress(OSError):
            # Not SSLSocket's own: that ends TLS before the connection, and what another thread sends in between goes in the clear.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        self._sock.close()

    def _transfer(self, payload: bytes | None, into: bytearray | None, deadline: Deadline) -> None:
        out = memoryview(b"" if payload is None else _LENGTH.pack(len(payload)) + payload)
        target = memoryview(b"" if into is None else into)
        self.bytes_sent += len(out)
        try:
            while out or target:
                moved = False
                if out:
                    with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                        out = out[self._sock.send(out[:_PIECE]) :]
                        moved = True
                if target:
                    with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                        count = self._sock.recv_into(target)
                        if not count:
                            raise RequestDropped(f"{self.peer} closed the link; form anew and try again")
                        target = target[count:]
                        moved = True
                if deadline.is_past and (out or target):
                    raise RequestDropped(f"{self.peer} did not answer in time; form anew and try again")
                if not moved:
                    self._select(read=True, write=bool(out), timeout_s=deadline.left_s)
        except ssl.SSLError as exc:
            raise PeerRefused(
                f"{self.peer} ended the link ({exc.reason}); compare the certificates that are pinned"
            ) from exc
        except (OSError, ValueError) as exc:
            raise RequestDropped(f"the link to {self.peer} broke; form anew and try again") from exc

    def _select(self, *, read: bool, write: bool, timeout_s: float) -> bool:
        try:
            found = select.select([self._sock] if read else [], [self._sock] if write else [], [], timeout_s)
        except (OSError, ValueError):
            return True  # closed: whoever reads next is told
        return bool(found[0] or found[1])


def connect(identity: Identity, peer: Peer, deadline: Deadline) -> Link:
    """A link to a peer, tried again until it listens. Raises PeerRefused for another certificate, and RequestDropped."""
    context = identity.context([peer], is_server=False)
    while True:
        try:
            raw = socket.create_connection((peer.host, peer.port), timeout=max(0.01, deadline.left_s))
        except OSError as exc:
            if deadline.left_s <= _AGAIN_S:
                raise RequestDropped(
                    f"{peer.name} does not listen at {peer.host}:{peer.port}; start it and try again"
                ) from exc
            time.sleep(_AGAIN_S)
            continue
        return _secured(context, raw, [peer], min(_HANDSHAKE_S, deadline.left_s), is_server=False)


def _secured(
    context: ssl.SSLContext, raw: socket.socket, peers: Iterable[Peer] | None, timeout_s: float, *, is_server: bool
) -> Link:
    names = {peer.digest: peer.name for peer in peers or ()}
    told = "a peer" if len(names) != 1 else next(iter(names.values()))
    raw.settimeout(max(0.01, timeout_s))
    try:
        sock = context.wrap_socket(raw, server_side=is_server)
    except ssl.SSLCertVerificationError as exc:
        raw.close()
        raise PeerRefused(
            f"the certificate of {told} is not the pinned one, or no longer valid ({exc.verify_message}); renew the deployment"
        ) from exc
    except OSError as exc:
        raw.close()
        raise RequestDropped(f"{told} broke the handshake off; try again") from exc
    if peers is None:
        return Link(sock, "a client")
    digest = _digest(sock.getpeercert(binary_form=True) or b"")
    if digest not in names:
        sock.close()
        raise PeerRefused(f"{told} shows a certificate that is not pinned; renew the deployment")
    return Link(sock, names[digest])


class Listener:
    """Takes links of pinned peers, each handed to `on_link` in a thread of its own; whoever else knocks holds nobody up.

    With None in place of peers it takes anybody's, for clients who show a permission. It listens at the host's IPv4
    address, and at its IPv6 address where it has no other. Raises OSError where that is no address of this machine.
    """

    def __init__(
        self,
        identity: Identity,
        peers: Iterable[Peer] | None,
        host: str,
        port: int,
        *,
        on_link: Callable[[Link], None],
    ) -> None:
        self._peers = None if peers is None else tuple(peers)
        self._context = identity.context(self._peers, is_server=True)
        self._on_link, self._is_closed = on_link, False
        self._handshakes = Places(_MOST_HANDSHAKES)
        self._threads = threading.BoundedSemaphore(_MOST_ENDING)
        self._sock = socket.create_server((host, port), family=_family(host, port), backlog=64)
        self.port: int = self._sock.getsockname()[1]
        threading.Thread(target=self._accept, name=f"mpc-listen-{self.port}", daemon=True).start()

    def close(self) -> None:
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                raw, _ = self._sock.accept()
            except OSError:
                if not self._is_closed:
                    time.sleep(_AGAIN_S)
                continue
            if not self._threads.acquire(blocking=False):
                raw.close()
                continue
            handle: socket.socket | None = None
            with contextlib.suppress(OSError):  # no descriptor is left
                handle = self._handshakes.take(raw.fileno())
            if handle is None:
                raw.close()
                self._threads.release()
                continue
            threading.Thread(target=self._take, args=(raw, handle), daemon=True).start()

    def _take(self, raw: socket.socket, handle: socket.socket) -> None:
        try:
            link = _secured(self._context, raw, self._peers, _HANDSHAKE_S, is_server=True)
        except RequestDropped:
            return
        finally:
            self._handshakes.leave(handle)
            self._threads.release()
        self._on_link(link)


def _family(host: str, port: int) -> socket.AddressFamily:
    found = [each[0] for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    return socket.AF_INET if socket.AF_INET in found else found[0]


def _digest(certificate: bytes) -> str:
    return hashlib.sha256(certificate).hexdigest()
