"""A proxy that writes down what passes, each way of each connection, and what TLS 1.3 makes of it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Way", "recording", "tls_payload"]

_HEAD = struct.Struct(">BHH")
_CHANGE_CIPHER_SPEC, _HANDSHAKE, _APPLICATION_DATA = 20, 22, 23
_IS_TLS_1_3 = bytes.fromhex("002b00020304")
"""The extension supported_versions as a server answers it (RFC 8446, 4.2.1)."""


@dataclass(slots=True)
class Way:
    """One way of one connection."""

    link: str
    is_from_client: bool
    passed: bytearray = field(default_factory=bytearray)


@contextmanager
def recording(listen: tuple[str, int], to: tuple[str, int], ways: list[Way], *, link: str = "") -> Iterator[None]:
    """Whoever comes to `listen` is led to `to`."""
    server = socket.create_server(listen)

    def pump(source: socket.socket, sink: socket.socket, way: Way) -> None:
        try:
            while data := source.recv(65536):
                way.passed += data
                sink.sendall(data)
        except OSError:
            return
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def lead(near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(to) as far:
            there, back = Way(link, True), Way(link, False)
            ways.extend((there, back))
            other = threading.Thread(target=pump, args=(far, near, back), daemon=True)
            other.start()
            pump(near, far, there)
            other.join()

    def accept() -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=lead, args=(near,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()


def tls_payload(way: Way) -> bytes:
    """What the records of application data hold; raises AssertionError where anything else passed than TLS 1.3.

    In the clear a client says one hello and a server one, each may change its cipher in name, and all else is application data.
    The last record may be cut, where a role was ended.
    """
    body, at, kinds, payload = bytes(way.passed), 0, list[int](), list[bytes]()
    while at + _HEAD.size <= len(body):
        kind, version, length = _HEAD.unpack_from(body, at)
        assert version == 0x0303 or (version, kind, at) == (0x0301, _HANDSHAKE, 0), f"{way.link}: no TLS 1.3 at {at}"
        assert length <= 2**14 + 256, f"{way.link}: a record of {length} bytes"
        record = body[at + _HEAD.size : at + _HEAD.size + length]
        if kind == _APPLICATION_DATA:
            payload.append(record)
        if kind == _HANDSHAKE and not way.is_from_client:
            assert _IS_TLS_1_3 in record, f"{way.link}: an older TLS"
        kinds.append(kind)
        at += _HEAD.size + length
    clear = [kind for kind in kinds if kind != _APPLICATION_DATA]
    assert clear in ([], [_HANDSHAKE], [_HANDSHAKE, _CHANGE_CIPHER_SPEC]), f"{way.link}: records of kinds {clear}"
    assert kinds[: len(clear)] == clear, f"{way.link}: in the clear later"
    return b"".join(payload)
