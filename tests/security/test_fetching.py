"""What another server answers neither misleads nor holds us: where it may be, what it may say, how much, and for how long."""

from __future__ import annotations

import datetime
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from sqlalchemy import Engine, text

from cloister_server.errors import Invalid
from cloister_server.issuers import discover
from cloister_server.oauth import fetching
from cloister_server.oauth.fetching import MOST_BYTES, Network, NotFetched, fetch_json, require_allowed
from cloister_server.oauth.issuer_keys import IssuerKeys, fetch_keys
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import reading
from issuers import CONFIGURATION, JWKS, be_patient, elsewhere, send_json
from keys_of_clients import Signer, b64


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch)


WHERE: dict[str, tuple[Network, ...]] = {
    "1.1.1.1": ("public", "private"),
    "2606:4700::1111": ("public", "private"),
    "10.1.2.3": ("private",),
    "172.16.0.1": ("private",),
    "192.168.1.1": ("private",),
    "fd00::1": ("private",),
    "::ffff:10.1.2.3": ("private",),
    "127.0.0.1": ("loopback",),
    "127.9.9.9": ("loopback",),
    "::1": ("loopback",),
    "::ffff:127.0.0.1": ("loopback",),
    "169.254.169.254": (),
    "::ffff:169.254.169.254": (),
    "fe80::1%eth0": (),
    "100.64.0.1": (),
    "0.0.0.0": (),  # noqa: S104 (nothing is bound to it)
    "::": (),
    "224.0.0.1": (),
    "ff0e::1": (),
    "255.255.255.255": (),
    "192.0.2.1": (),
    "240.0.0.1": (),
}


@pytest.mark.parametrize("address", WHERE)
def test_an_address_is_in_the_networks_that_it_is_in_and_in_no_other(address: str) -> None:
    assert tuple(each for each in fetching.NETWORKS if fetching._is_in(address, each)) == WHERE[address]


@pytest.mark.parametrize(
    "url",
    [
        "http://issuer.example",
        "ftp://issuer.example",
        "file:///etc/passwd",
        "https://",
        "https:///path",
        "https://user@issuer.example",
        "https://user:secret@issuer.example",
        "https://issuer.example/?a=b",
        "https://issuer.example/#a",
        "https://issuer.example:0/",
        "https://issuer.example:99999/",
        "https://issuer.example/a b",
        "https://issuer.example/\r\nHost: other",
        "https://[::1",
        "https://\u0131ssuer.example",
        "issuer.example",
        "",
        f"https://issuer.example/{'a' * 3000}",
    ],
)
def test_what_is_no_https_url_of_a_host_is_not_asked(url: str) -> None:
    for network in ("public", "private"):
        with pytest.raises(NotFetched):
            require_allowed(url, network=network)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "0x7f000001", "2130706433", "127.1"])
def test_this_machine_by_any_name_is_not_in_a_public_network(host: str) -> None:
    with pytest.raises(NotFetched, match=r"not in a public network|no address"):
        fetch_json(f"https://{host}:1/", network="public")


def _redirect(handler: BaseHTTPRequestHandler) -> None:
    send_json(handler, {"keys": []}, status=302, Location="/elsewhere")


def _large(handler: BaseHTTPRequestHandler) -> None:
    send_json(handler, {"keys": [], "more": "x" * MOST_BYTES})


def _endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" " * 65536)
    except OSError:
        pass


def _cut_short(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"keys": []}')


def _raw(body: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


HURTFUL: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "a redirect": _redirect,
    "an error": lambda handler: send_json(handler, {"keys": []}, status=500),
    "a body that is too large": _large,
    "a body without an end": _endless,
    "a body that goes on in blanks": _raw(b'{"keys": []}' + b" " * MOST_BYTES),
    "a body that is cut short": _cut_short,
    "a body that is compressed": _raw(b"x", Content_Encoding="gzip"),
    "no JSON": _raw(b"<html>"),
    "a list": _raw(b"[]"),
    "a name twice": _raw(b'{"keys": [], "keys": []}'),
    "NaN": _raw(b'{"keys": NaN}'),
    "a depth": _raw(b"[" * 100_000),
    "no keys": _raw(b"{}"),
    "keys that are none": _raw(b'{"keys": {"kid": 1}}'),
    "too many keys": _raw(b'{"keys": [' + b",".join([b"{}"] * 65) + b"]}"),
    "no HTTP": lambda handler: handler.wfile.write(b"\x00\x01\x02 no HTTP\r\n\r\n"),
    "nothing": lambda handler: None,
}


@pytest.mark.parametrize("what", HURTFUL)
def test_an_answer_that_is_none_is_refused_by_name(what: str) -> None:
    with elsewhere("somebody") as made:
        made.answers[JWKS] = HURTFUL[what]
        with pytest.raises(NotFetched):
            fetch_keys(f"{made.url}{JWKS}", network="loopback", algorithms=("ES256",))
        assert made.asked == {JWKS: 1}


@pytest.mark.parametrize("at", ["headers", "body"])
def test_an_answer_that_comes_byte_by_byte_is_cut(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "WITHIN_S", 0.3)
    is_cut, over = threading.Event(), threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        try:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if at == "body" else b"X-Slow: "))
            while not over.wait(0.02):
                handler.wfile.write(b" ")
        except OSError:
            is_cut.set()

    with elsewhere("somebody") as made:
        made.answers[JWKS] = drip
        with pytest.raises(NotFetched):
            fetch_json(f"{made.url}{JWKS}", network="loopback")
        assert is_cut.wait(60)
        over.set()


def test_keys_that_are_private_symmetric_weak_ambiguous_or_for_something_else_are_left_out() -> None:
    def of_rsa(bits: int, **more: Any) -> dict[str, Any]:
        numbers = rsa.generate_private_key(65537, bits).public_key().public_numbers()
        n, e = (b64(each.to_bytes((each.bit_length() + 7) // 8)) for each in (numbers.n, numbers.e))
        return {"kty": "RSA", "n": n, "e": e, **more}

    ec_key, other = Signer().jwk, Signer().jwk
    leaked = Signer()
    d = b64(leaked.private.private_numbers().private_value.to_bytes(32))
    with elsewhere("somebody") as made:
        made.keys[:] = [
            {**ec_key, "kid": "good"},
            of_rsa(2048, kid="good-rsa", alg="RS256", x5c=["MIIB"]),
            {**Signer.ed25519().jwk, "kid": "good-ed"},
            of_rsa(1024, kid="weak"),
            {**leaked.jwk, "kid": "private", "d": d},
            {"kty": "oct", "kid": "symmetric", "k": "c2VjcmV0"},
            {**ec_key, "kid": "encrypts", "use": "enc"},
            {**ec_key, "kid": "signs-otherwise", "alg": "ES512"},
            {**ec_key, "kid": "twice"},
            {**other, "kid": "twice"},
            {**ec_key},
            {**ec_key, "kid": 7},
            {**ec_key, "kid": "off-the-curve", "y": ec_key["x"]},
            {**ec_key, "kid": "another-curve", "crv": "P-384"},
            {"kty": "EC", "kid": "empty"},
            {"kty": ["EC"], "kid": "no-type"},
            "no key",
        ]  # type: ignore[list-item]
        where = f"{made.url}{JWKS}"
        algorithms = ("RS256", "ES256", "EdDSA")
        assert fetch_keys(where, network="loopback", algorithms=algorithms).keys() == {"good", "good-rsa", "good-ed"}
        assert fetch_keys(where, network="loopback", algorithms=("PS256",)).keys() == set()


def test_discovery_is_of_this_very_issuer() -> None:
    def found(url: str) -> Any:
        return discover(url, network="loopback", algorithms=("ES256",))

    with elsewhere("somebody") as made:
        assert found(made.url).jwks_uri == f"{made.url}{JWKS}"
        metadata = made.documents()[CONFIGURATION]
        for wrong in (
            {"issuer": f"{made.url}/"},
            {"issuer": "https://another.example"},
            {"jwks_uri": None},
            {"jwks_uri": ["x"]},
            {"jwks_uri": "file:///etc/passwd"},
            {"jwks_uri": "https://127.0.0.1:1/jwks"},
        ):
            made.answers[CONFIGURATION] = lambda handler, wrong=wrong: send_json(handler, {**metadata, **wrong})  # type: ignore[misc]
            with pytest.raises(Invalid):
                found(made.url)
        made.answers[CONFIGURATION] = lambda handler: send_json(handler, None)
        # RFC 8414 for those that are no OpenID providers
        made.answers["/.well-known/oauth-authorization-server"] = lambda handler: send_json(handler, metadata)
        assert found(made.url).key_ids == ["k1"]
        with pytest.raises(Invalid, match="not https"):
            discover(made.url, network="private", algorithms=("ES256",))
        with pytest.raises(Invalid, match="no key"):
            discover(made.url, network="loopback", algorithms=("RS256",))
        for algorithms in (("HS256",), ("none",), ("ES256", "HS256"), ()):
            with pytest.raises(Invalid, match="signs with"):
                discover(made.url, network="loopback", algorithms=algorithms)


def test_a_server_is_who_its_certificate_says_or_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = self_signed(tmp_path)
    with elsewhere("somebody") as made:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        made.server.socket = context.wrap_socket(made.server.socket, server_side=True)
        made.scheme = "https"
        where = f"https://localhost:{made.server.server_port}{JWKS}"
        with pytest.raises(NotFetched, match="SSLCertVerificationError"):
            fetch_json(where, network="loopback")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch_json(where, network="loopback") == {"keys": made.keys}
        assert fetch_json(where, network=None) == {"keys": made.keys}, "wherever it is"
        with pytest.raises(NotFetched, match="SSLCertVerificationError"):  # of another name than the certificate's
            fetch_json(where.replace("localhost", "127.0.0.1"), network="loopback")


def self_signed(root: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    at = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(at - datetime.timedelta(days=1))
        .not_valid_after(at + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, SHA256())
    )
    place = root / "certificate.pem"
    place.write_bytes(Signer(key).private_pem + made.public_bytes(Encoding.PEM))
    return place


def test_nobody_is_asked_while_a_transaction_is_open(engine: Engine) -> None:
    with reading(engine, ALL_TENANTS) as session:
        session.execute(text("SELECT 1"))
        with pytest.raises(RuntimeError, match="no transaction"):
            fetch_json("https://issuer.example/", network="public")
        with pytest.raises(RuntimeError, match="no transaction"):
            where = "https://issuer.example/jwks"
            IssuerKeys().find("is_1", "k1", jwks_uri=where, network="public", algorithms=("ES256",))


def test_a_few_wait_for_an_issuer_that_is_slow_and_the_others_are_answered() -> None:
    answered, go_on, all_answered = [], threading.Event(), threading.Event()
    keys = IssuerKeys()

    with elsewhere("somebody") as made:

        def slow(handler: BaseHTTPRequestHandler) -> None:
            go_on.wait(60)
            send_json(handler, {"keys": made.keys})

        made.answers[JWKS] = slow

        def ask() -> None:
            where = {"jwks_uri": f"{made.url}{JWKS}", "algorithms": ("ES256",)}
            answered.append(keys.find("is_1", "k1", network="loopback", **where))  # type: ignore[arg-type]
            if len(answered) == 6:
                all_answered.set()

        threads = [threading.Thread(target=ask) for _ in range(10)]
        for each in threads:
            each.start()
        assert all_answered.wait(60)
        assert answered == [None] * 6
        go_on.set()
        for each in threads:
            each.join(60)
        assert len(answered) == 10 and all(answered[6:]) and made.asked == {JWKS: 1}
