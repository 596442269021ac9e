"""Key providers to try: a real SoftHSM2 token, moto's KMS over real HTTP, a stand-in for Vault, and servers that fail.

PYTEST_DONT_REWRITE: its fixtures are a plug-in of the modules that also import its names, before pytest can.
"""

from __future__ import annotations

import base64
import functools
import gc
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = [
    "ACCOUNT",
    "FAULTS",
    "PIN",
    "SLOW",
    "TOKEN_LABEL",
    "VAULT_TOKEN",
    "Faulty",
    "VaultStandIn",
    "kms",
    "kms_client",
    "kms_server",
    "new_token",
    "refusals",
    "served",
    "softhsm",
    "token",
    "vault",
    "vault_state",
]

PIN = "7391-a-pin-of-tests"
TOKEN_LABEL = "cloister-tests"
VAULT_TOKEN = "s.token-of-tests-0123456789"
ACCOUNT = {
    "region": "eu-central-1",
    "access_key_id": "AKIAIOSFODNN7EXAMPLE",
    "secret_access_key": "a-secret-access-key",
}
_LIBRARIES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
    "/opt/homebrew/lib/softhsm/libsofthsm2.so",
)

if find_spec("botocore"):
    from botocore.loaders import JSONFileLoader

    _load = functools.cache(functools.partial(JSONFileLoader.load_file, JSONFileLoader()))
    JSONFileLoader.load_file = lambda _, path: _load(path)
"""The AWS SDK reads what it knows of KMS once, and not for each provider that is opened: that takes longer than most calls."""


@pytest.fixture(scope="session")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SoftHSM's library, with a token of this session: the library reads SOFTHSM2_CONF once in a process."""
    library = softhsm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(new_token(tmp_path_factory.mktemp("softhsm"))))
        yield library


@pytest.fixture(scope="session")
def kms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with kms_server(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture(scope="session")
def vault_state() -> dict[str, dict[str, Any]]:
    return {"keys": {}, "policy": {}}


@pytest.fixture(scope="session")
def vault(vault_state: dict[str, dict[str, Any]]) -> Iterator[str]:
    pytest.importorskip("hvac", reason="hvac is not installed: pip install 'cloister[vault]'")
    with served(VaultStandIn, **vault_state) as url:
        yield url


def softhsm() -> Path:
    """SoftHSM's library. Skips where it or python-pkcs11 is not installed."""
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed: pip install 'cloister[hsm]'")
    for library in map(Path, _LIBRARIES):
        if library.is_file():
            return library
    pytest.skip("SoftHSM2 is not installed: apt-get install softhsm2")


def new_token(home: Path, *, more: str = "") -> Path:
    """A token in a directory of its own; the configuration that SOFTHSM2_CONF is to name."""
    tokens, configuration = home / "tokens", home / "softhsm2.conf"
    tokens.mkdir(parents=True)
    configuration.write_text(f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n{more}")
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", TOKEN_LABEL, "--pin", PIN, "--so-pin", "so-" + PIN],
        env={**os.environ, "SOFTHSM2_CONF": str(configuration)},
        check=True,
        capture_output=True,
    )
    return configuration


@contextmanager
def kms_server(home: Path) -> Iterator[str]:
    """moto's server in a process of its own, on loopback. Skips where it is not installed."""
    for package, extra in (("boto3", "'cloister[aws]'"), ("moto", "moto"), ("flask_cors", "flask flask-cors")):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install {extra}")
    log = home / "moto.log"
    with log.open("wb") as written:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=written,
            stderr=written,
            env={**os.environ, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"},
        )
    try:
        give_up = time.monotonic() + 300
        while not (match := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert server.poll() is None and time.monotonic() < give_up, "moto's server did not start"
            time.sleep(0.1)
        yield match[1]
    finally:
        server.terminate()
        server.wait(60)


def kms_client(url: str) -> Any:
    """KMS itself, as an administrator of the account sees it."""
    import boto3

    account = {"aws_access_key_id": ACCOUNT["access_key_id"], "aws_secret_access_key": ACCOUNT["secret_access_key"]}
    return boto3.client("kms", endpoint_url=url, region_name=ACCOUNT["region"], **account)


@contextmanager
def served(handler: type[BaseHTTPRequestHandler], *, port: int = 0, **state: Any) -> Iterator[str]:
    """A handler behind a real socket on loopback."""
    bound = type(handler.__name__, (handler,), state)
    server = ThreadingHTTPServer(("127.0.0.1", port), bound)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def refusals(*calls: Callable[[], Any]) -> list[BaseException | None]:
    """What each call raises, all made at once: each may wait for as long as its patience lasts.

    Nobody's garbage is collected meanwhile: a finalizer would fail where an answer's nesting has used the stack up.
    """
    gc.disable()
    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            return [made.exception() for made in [pool.submit(call) for call in calls]]
    finally:
        gc.enable()


@dataclass(slots=True)
class _TransitKey:
    fields: dict[str, Any]
    versions: list[bytes] = field(default_factory=lambda: [secrets.token_bytes(32)])


class VaultStandIn(BaseHTTPRequestHandler):
    """The part of the transit interface that the provider uses, as Vault's and OpenBao's documentation and source tell it.

    It is no Vault: it shows shapes and errors, and that wrapped keys are bound; `keys` and `policy` are its state.
    """

    keys: dict[str, _TransitKey]
    policy: dict[str, Any]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        status, answer = self._answer(method, self.path, body)
        content = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.policy.get("is_sealed"):
            return 503, {"errors": ["Vault is sealed"]}
        if self.headers.get("X-Vault-Token") != VAULT_TOKEN:
            return 403, {"errors": ["permission denied"]}
        match = re.fullmatch(r"/v1/transit/(keys|encrypt|decrypt)/(\w(?:[\w.-]*\w)?)(/config|/rotate)?", path)
        if match is None:
            return 404, {"errors": [f'no handler for route "{path[4:]}". route entry not found.']}
        what, name, more = match.groups()
        if (method, what) in self.policy.get("denied", ()):
            return 403, {"errors": ["1 error occurred:\n\t* permission denied\n\n"]}
        if what == "keys":
            return self._key(method, name, more, body)
        key = self.keys.get(name)
        if key is None:
            if what == "decrypt" or not self.policy.get("may_upsert"):
                return 400, {"errors": ["encryption key not found"]}
            key = self.keys.setdefault(name, _TransitKey({"type": "aes256-gcm96", "derived": "context" in body}))
        if key.fields["derived"] and not body.get("context"):
            return 400, {"errors": ["missing 'context' for key derivation; the key was created using a derived key"]}
        return self._encrypt(key, body) if what == "encrypt" else self._decrypt(key, body)

    def _key(self, method: str, name: str, more: str | None, body: dict[str, Any]) -> tuple[int, Any]:
        if method == "POST" and more is None:
            warnings = [f"key {name} already existed"] if name in self.keys else None
            fields = {field: body[field] for field in ("type", "derived", "exportable", "allow_plaintext_backup")}
            self.keys.setdefault(name, _TransitKey({**fields, "deletion_allowed": False}))
            return 200, {"data": self.keys[name].fields, "warnings": warnings}
        key = self.keys.get(name)
        if key is None:
            return (404, {"errors": []}) if method == "GET" else (400, {"errors": ["could not delete key; not found"]})
        if method == "GET":
            told = {
                "imported_key": False,
                "latest_version": len(key.versions),
                "name": name,
                "supports_derivation": True,
            }
            return 200, {"data": {**told, **key.fields}}
        if more == "/config":
            key.fields.update(body)
            return 204, None
        if more == "/rotate":
            key.versions.append(secrets.token_bytes(32))
            return 204, None
        if not key.fields["deletion_allowed"]:
            return 400, {"errors": ["deletion is not allowed for this key"]}
        del self.keys[name]
        return 204, None

    def _encrypt(self, key: _TransitKey, body: dict[str, Any]) -> tuple[int, Any]:
        nonce, version = secrets.token_bytes(12), len(key.versions)
        sealed = nonce + self._cipher(key, version, body).encrypt(nonce, base64.b64decode(body["plaintext"]), None)
        told = f"vault:v{version}:{base64.b64encode(sealed).decode()}"
        return 200, {"data": {"ciphertext": told, "key_version": version}}

    def _decrypt(self, key: _TransitKey, body: dict[str, Any]) -> tuple[int, Any]:
        match = re.fullmatch(r"vault:v(\d+):(.*)", body["ciphertext"])
        if match is None:
            return 400, {"errors": ["invalid ciphertext: no prefix"]}
        version, sealed = int(match[1]), base64.b64decode(match[2])
        if not 1 <= version <= len(key.versions):
            return 400, {"errors": ["invalid ciphertext: version is too new"]}
        if len(sealed) < 12:
            return 400, {"errors": ["invalid ciphertext length"]}
        try:
            plaintext = self._cipher(key, version, body).decrypt(sealed[:12], sealed[12:], None)
        except InvalidTag:
            return 400, {"errors": ["cipher: message authentication failed"]}
        return 200, {"data": {"plaintext": base64.b64encode(plaintext).decode()}}

    def _cipher(self, key: _TransitKey, version: int, body: dict[str, Any]) -> AESGCM:
        context = base64.b64decode(body.get("context", ""), validate=True)
        return AESGCM(HKDF(SHA256(), length=32, salt=None, info=context).derive(key.versions[version - 1]))


class Faulty(BaseHTTPRequestHandler):
    """Answers the first question of any provider as it should, then everything by `faults[0]`."""

    faults: list[Callable[[Faulty], None]]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._fail()

    def do_POST(self) -> None:
        self._fail()

    def do_DELETE(self) -> None:
        self._fail()

    def _fail(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.close_connection = True
        with suppress(OSError):  # the other side gave up
            self.faults[0](self)

    def raw(self, content: bytes) -> None:
        self.wfile.write(content)

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.raw(f"HTTP/1.1 {status} x\r\nContent-Length: {len(content)}\r\n".encode())
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.raw(f"{name}: {value}\r\n".encode())
        self.raw(b"\r\n" + content)


def _trickle(handler: Faulty) -> None:
    """A byte at a time, each well before any library's patience for one read ends."""
    handler.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(600):
        handler.raw(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def _answering(status: int, content: bytes, **headers: str) -> Callable[[Faulty], None]:
    return lambda handler: handler.answer(status, content, **headers)


def _wrong_fields() -> bytes:
    """What each provider looks for, and none of it of the right kind."""
    key = {"KeyId": 7, "KeyState": ["Enabled"], "KeyManager": None}
    return json.dumps(
        {"KeyMetadata": key, "data": {"type": 1, "ciphertext": [], "plaintext": {}}, "errors": 5}
    ).encode()


SLOW = ("hangs", "trickles")
"""The faults for which nothing but one's own patience ends a wait, short there, and elsewhere long: a busy machine is slow too."""

FAULTS: dict[str, Callable[[Faulty], None]] = {
    "closes": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    "hangs": lambda _: time.sleep(60),
    "trickles": _trickle,
    "speaks no HTTP": lambda handler: handler.raw(b"220 mail.example ESMTP\r\n"),
    "cuts its answer": lambda handler: handler.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
    "500 with a page": _answering(500, b"<html>oops</html>", **{"Content-Type": "text/html"}),
    "503": _answering(503, b'{"errors": ["Vault is sealed"], "__type": "ServiceUnavailable"}'),
    "429": _answering(429, b'{"errors": [], "__type": "ThrottlingException"}'),
    "200 with a page": _answering(200, b"<html>welcome</html>", **{"Content-Type": "text/html"}),
    "200 and empty": _answering(200, b""),
    "no object": _answering(200, b"[1, 2]"),
    "null": _answering(200, b"null"),
    "an empty object": _answering(200, b"{}"),
    "wrong fields": _answering(200, _wrong_fields()),
    "not UTF-8": _answering(200, b'{"data": "\xff\xfe"}'),
    "deeply nested": _answering(200, b"[" * 100_000),
    "400 that is no object": _answering(400, b"[]"),
    "400 of wrong types": _answering(400, b'{"errors": [1, {}], "__type": 5, "message": []}'),
    "404 of wrong types": _answering(404, b'{"errors": {"a": 1}}'),
    "a redirect": _answering(307, b"", Location="http://127.0.0.1:9/"),
}
