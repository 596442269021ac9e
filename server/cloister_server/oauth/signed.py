"""Signed JSON of others, assertions and proofs, read strictly or refused. Knows bytes and public keys; nothing of who signs or why.

ES256 with a P-256 key and Ed25519 with an Ed25519 key, and which of them is the key's to say and never the header's. Our own
tokens are joserfc's to verify; it warns of the name EdDSA, which clients send.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from cloister_server.errors import Invalid

__all__ = [
    "ALGORITHMS",
    "InvalidSigned",
    "Signed",
    "decoded",
    "read_public_key",
    "read_signed",
    "require_public",
    "thumbprint",
    "verify",
]

ALGORITHMS = ("ES256", "Ed25519", "EdDSA")
"""RFC 7518, RFC 9864, RFC 8037: the last two are two names of one."""

_OF_KEY = {("EC", "P-256"): ("ES256",), ("OKP", "Ed25519"): ("Ed25519", "EdDSA")}
_COMPACT = re.compile(r"[A-Za-z0-9_-]{1,2048}\.[A-Za-z0-9_-]{1,8192}\.[A-Za-z0-9_-]{1,1024}")


class InvalidSigned(Exception):
    """It is not signed JSON as it must be; the message is for tests and never for whoever sent it."""


@dataclass(frozen=True, slots=True)
class Signed:
    """Its header and claims, of which nothing is to be believed before `verify`."""

    header: Mapping[str, Any]
    claims: Mapping[str, Any]
    content: bytes
    signature: bytes


def read_signed(token: str) -> Signed:
    """A compact JWS (RFC 7515) whose header and claims are JSON objects. Raises InvalidSigned."""
    if not _COMPACT.fullmatch(token):
        raise InvalidSigned("three parts of base64url")
    header, claims, signature = token.split(".")
    return Signed(_json(header), _json(claims), f"{header}.{claims}".encode(), decoded(signature))


def verify(signed: Signed, jwk: Mapping[str, Any]) -> None:
    """Raises InvalidSigned unless this public key signed it, with the one algorithm that the key is for."""
    if signed.header.get("alg") not in _OF_KEY.get((str(jwk.get("kty")), str(jwk.get("crv"))), ()):
        raise InvalidSigned("another algorithm than the key's")
    key = _key(jwk)
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signed.signature, signed.content)
            return
        if len(signed.signature) != 64:
            raise InvalidSigned("64 bytes, RFC 7518, 3.4")
        r, s = (int.from_bytes(half) for half in (signed.signature[:32], signed.signature[32:]))
        key.verify(encode_dss_signature(r, s), signed.content, ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise InvalidSigned("the signature") from None


def thumbprint(jwk: Mapping[str, Any]) -> str:
    """RFC 7638, of a P-256 or Ed25519 key."""
    names = ("crv", "kty", "x", "y") if jwk["kty"] == "EC" else ("crv", "kty", "x")
    canonical = json.dumps({name: jwk[name] for name in names}, separators=(",", ":"))
    return _text(hashlib.sha256(canonical.encode()).digest())


def require_public(jwk: Mapping[str, Any]) -> None:
    """Raises InvalidSigned unless this is a public key that `verify` takes."""
    _key(jwk)


def decoded(text: str) -> bytes:
    """Base64url without padding, of which each value has one form alone."""
    try:
        read = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvalidSigned("no base64url") from None
    if _text(read) != text:
        raise InvalidSigned("another form of base64url")
    return read


def read_public_key(content: bytes) -> dict[str, str]:
    """The JWK of a P-256 or Ed25519 public key, given as PEM or JWK. Raises Invalid, and quotes nothing of it."""
    if b"PRIVATE KEY" in content or b'"d"' in content:
        raise Invalid("this is a private key, which is nobody's but the client's; give its public half")
    try:
        if content.lstrip().startswith(b"{"):
            jwk = json.loads(content)
            return _jwk(_key({name: jwk[name] for name in ("kty", "crv", "x", "y") if name in jwk}))
        key = load_pem_public_key(content)
        if isinstance(key, (ec.EllipticCurvePublicKey, Ed25519PublicKey)):
            return _jwk(key)
    except (InvalidSigned, UnsupportedAlgorithm, ValueError, KeyError):
        pass
    raise Invalid("this is no public key of P-256 or Ed25519, as PEM or as one JWK; make one with either curve")


def _key(jwk: Mapping[str, Any]) -> ec.EllipticCurvePublicKey | Ed25519PublicKey:
    """Raises InvalidSigned unless it is a point of one of the two curves, and nothing private is in it."""
    if "d" in jwk or any(not isinstance(jwk.get(name), str) for name in ("kty", "crv", "x")):
        raise InvalidSigned("no public key")
    x = decoded(jwk["x"])
    try:
        match jwk["kty"], jwk["crv"]:
            case "OKP", "Ed25519":
                return Ed25519PublicKey.from_public_bytes(x)
            case "EC", "P-256" if isinstance(jwk.get("y"), str) and len(x) == 32 == len(y := decoded(jwk["y"])):
                return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + x + y)
    except ValueError:
        pass
    raise InvalidSigned("no key of P-256 or Ed25519")


def _jwk(key: ec.EllipticCurvePublicKey | Ed25519PublicKey) -> dict[str, str]:
    if isinstance(key, Ed25519PublicKey):
        return {"kty": "OKP", "crv": "Ed25519", "x": _text(key.public_bytes(Encoding.Raw, PublicFormat.Raw))}
    if not isinstance(key.curve, ec.SECP256R1):
        raise InvalidSigned("another curve")
    numbers = key.public_numbers()
    return {"kty": "EC", "crv": "P-256", "x": _text(numbers.x.to_bytes(32)), "y": _text(numbers.y.to_bytes(32))}


def _json(part: str) -> dict[str, Any]:
    try:
        read = json.loads(decoded(part), object_pairs_hook=_only_once, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidSigned("no JSON") from None
    if not isinstance(read, dict):
        raise InvalidSigned("no JSON object")
    return read


def _only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise InvalidSigned("a name stands twice")
    return dict(pairs)


def _refuse_constant(_: str) -> NoReturn:
    raise InvalidSigned("NaN or infinity")


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
