"""An authorization server of others on loopback, whose keys, answers and tokens are as a test says."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from asked import asked_writing
from cloister_server import issuers
from cloister_server.oauth import fetching, issuer_keys
from cloister_server.service import Service
from keys_of_clients import Signer

CONFIGURATION, JWKS = "/.well-known/openid-configuration", "/jwks"


@dataclass
class Elsewhere:
    """The server: what it was asked for, how often, and what it answers instead of the right thing."""

    audience: str
    server: ThreadingHTTPServer
    signer: Signer = field(default_factory=Signer)
    keys: list[dict[str, Any]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server.server_port}"

    def documents(self) -> dict[str, Any]:
        return {CONFIGURATION: {"issuer": self.url, "jwks_uri": f"{self.url}{JWKS}"}, JWKS: {"keys": self.keys}}

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Those of a right access token (RFC 9068), but for what is given; None leaves a claim out."""
        at = int(time.time())
        right = {
            "iss": self.url,
            "aud": self.audience,
            "sub": "ada",
            "client_id": "an-app",
            "jti": secrets.token_hex(8),
            "iat": at,
            "exp": at + 300,
        }
        return right | changed

    def token(self, header: dict[str, Any] | None = None, *, by: Signer | None = None, **changed: Any) -> str:
        return (by or self.signer).sign({"typ": "at+jwt", "kid": "k1", **(header or {})}, self.claims(**changed))


@contextmanager
def elsewhere(audience: str) -> Iterator[Elsewhere]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked[self.path] += 1
            if self.path in made.answers:
                made.answers[self.path](self)
            else:
                send_json(self, made.documents().get(self.path))

        def log_message(self, *_: Any) -> None:
            """Nothing is told."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made = Elsewhere(audience, server)
    made.keys.append({**made.signer.jwk, "kid": "k1", "use": "sig", "alg": "ES256"})
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is: what an issuer answers comes in time, and no minute passes in which it is asked once."""
    monkeypatch.setattr(fetching, "WITHIN_S", 120.0)
    monkeypatch.setattr(issuer_keys, "_WAIT_S", 120.0)
    monkeypatch.setattr(issuer_keys, "APART_S", 1800.0)


def soon(holds: Callable[[], bool]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def send_json(handler: BaseHTTPRequestHandler, document: Any, *, status: int = 200, **headers: str) -> None:
    body = json.dumps(document).encode()
    handler.send_response(status if document is not None else 404)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def list_issuer(service: Service, issuer: str, *, algorithms: Any = ("RS256", "ES256"), typ: str = "at+jwt") -> None:
    """Put it on the list, as `cloister-admin issuer add` does."""
    found = issuers.discover(issuer, network="loopback", algorithms=algorithms)
    with asked_writing(service) as session:
        issuers.add(session, service, found, audience=None, typ=typ)
