"""A JSON document of another server, fetched so that it can neither mislead nor hold us. Knows HTTP; nothing of tokens or SQL.

The host's addresses are looked up once, all of them are checked, and one of those is connected to: a name cannot mean something
else a moment later. No redirect is followed, no proxy asked, no more than 256 KiB read, and all of it ends after five seconds.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from typing import Any, Literal, NoReturn, get_args
from urllib.parse import SplitResult, urlsplit

from cloister_server.store.session import in_transaction

__all__ = ["NETWORKS", "Network", "NotFetched", "fetch_json", "require_allowed", "require_no_transaction"]

Network = Literal["public", "private", "loopback"]
"""Where a server may be: anywhere on the Internet; there or in a network of ours (RFC 1918, RFC 4193); or on this machine,
for development: without TLS, too."""

NETWORKS: tuple[Network, ...] = get_args(Network)
MOST_BYTES = 256 * 2**10
WITHIN_S = 5.0
_OURS = tuple(ipaddress.ip_network(each) for each in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))


class NotFetched(Exception):
    """The document is not to be had, or is none that is taken; the message is for the operator."""


def require_allowed(url: str, *, network: Network | None) -> SplitResult:
    """The parts of a URL that may be asked at all. Raises NotFetched."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise NotFetched(f"{url[:200]!r} is no URL") from None
    if not host or port == 0 or not url.isascii() or any(c.isspace() for c in url) or len(url) > 2048:
        raise NotFetched(f"{url[:200]!r} is no URL with a host")
    if "@" in parts.netloc or parts.fragment or parts.query:
        raise NotFetched(f"{url[:200]!r} has a user, a query or a fragment in it")
    if parts.scheme != "https" and not (parts.scheme == "http" and network == "loopback"):
        raise NotFetched(f"{url[:200]!r} is not https; http is for development on this machine alone")
    return parts


def require_no_transaction() -> None:
    """Others would wait for a connection, or on SQLite for the database, as long as the other server takes."""
    if in_transaction():
        raise RuntimeError("another server is asked in no transaction")


def fetch_json(url: str, *, network: Network | None) -> dict[str, Any]:
    """The JSON object at this URL; with None, wherever that is. Raises NotFetched. Our fault where a transaction is open here."""
    require_no_transaction()
    parts = require_allowed(url, network=network)
    connection = _connection(parts, _addresses(parts, network))
    over = threading.Timer(WITHIN_S, connection.cut)  # a time limit on each read alone could be stretched byte by byte
    over.daemon = True
    over.start()
    try:
        body = _read(connection, parts.path or "/")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NotFetched(f"{url} did not answer as it must within {WITHIN_S:g} s ({type(error).__name__})") from None
    finally:
        over.cancel()
        connection.close()
    try:
        document = json.loads(body, object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise NotFetched(f"{url} is no JSON in which each name stands once") from None
    if not isinstance(document, dict):
        raise NotFetched(f"{url} is no JSON object")
    return document


def _read(connection: http.client.HTTPConnection, path: str) -> bytes:
    connection.request("GET", path, headers={"Accept": "application/json", "Accept-Encoding": "identity"})
    response = connection.getresponse()
    if response.status != 200:
        raise NotFetched(f"{connection.host}{path} answers {response.status}, and redirects are not followed")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise NotFetched(f"{connection.host}{path} is compressed, though that was not asked for")
    body = response.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise NotFetched(f"{connection.host}{path} is over {MOST_BYTES} bytes")
    if response.length:  # cut, by the other side or by us
        raise NotFetched(f"{connection.host}{path} ended before it was whole")
    return body


def _addresses(parts: SplitResult, network: Network | None) -> list[str]:
    """The host's addresses, all of which are where they may be."""
    host = str(parts.hostname)
    try:
        found = socket.getaddrinfo(host, _port(parts), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NotFetched(f"{host} has no address") from None
    addresses = [str(each[4][0]) for each in found]
    for each in addresses:
        if network is not None and not _is_in(each, network):
            raise NotFetched(f"{host} is at {each}, which is not in a {network} network")
    return addresses


def _is_in(address: str, network: Network) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    parsed = parsed if mapped is None else mapped
    if network == "loopback":
        return parsed.is_loopback
    is_ours = any(parsed in each for each in _OURS if each.version == parsed.version)
    return (parsed.is_global and not parsed.is_multicast) or (network == "private" and is_ours)


def _connection(parts: SplitResult, addresses: list[str]) -> _Plain:
    return (_Plain if parts.scheme == "http" else _Secured)(str(parts.hostname), _port(parts), addresses)


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


class _Plain(http.client.HTTPConnection):
    """A connection to one of the addresses that were checked, whatever the name means by now."""

    def __init__(self, host: str, port: int, addresses: list[str]) -> None:
        super().__init__(host, port, timeout=WITHIN_S)
        self._addresses, self._ends = addresses, time.monotonic() + WITHIN_S
        self._opened: socket.socket | None = None
        self._is_cut = False

    def connect(self) -> None:
        self._open()

    def _open(self) -> None:
        why: OSError = TimeoutError()
        for address in self._addresses:
            try:
                left_s = max(0.001, self._ends - time.monotonic())
                self._keep(socket.create_connection((address, self.port), left_s))
                self.sock.settimeout(WITHIN_S)
                return
            except OSError as error:
                why = error
        raise why

    def cut(self) -> None:
        """Let whoever reads find the end; `sock` is forgotten before the answer is read, where the other side is to close."""
        self._is_cut = True
        if self._opened is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._opened, socket.SHUT_RDWR)

    def _keep(self, opened: socket.socket) -> None:
        """What is to be cut from here on. Raises TimeoutError where that was to happen already."""
        self.sock = self._opened = opened
        if self._is_cut:
            raise TimeoutError


class _Secured(_Plain):
    """The same with TLS, whose certificate is of the name."""

    def connect(self) -> None:
        self._open()
        # The handshake by itself: it is to be cut, too, and before it there would be nothing to cut.
        context = ssl.create_default_context()
        secured = context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self._keep(secured)
        secured.do_handshake()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _refuse(_: str) -> NoReturn:
    raise ValueError("NaN or infinity")
