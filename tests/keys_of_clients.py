"""What a client of its own making signs: assertions and proofs, right or wrong in one point."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@dataclass(frozen=True)
class Signer:
    """A private key of P-256 (ES256) or Ed25519 (EdDSA)."""

    private: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()), repr=False)

    @classmethod
    def ed25519(cls) -> Signer:
        return cls(Ed25519PrivateKey.generate())

    @property
    def alg(self) -> str:
        return "Ed25519" if isinstance(self.private, Ed25519PrivateKey) else "ES256"

    @property
    def pem(self) -> bytes:
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def private_pem(self) -> bytes:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def jwk(self) -> dict[str, str]:
        if self.alg == "Ed25519":
            raw = self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
            return {"kty": "OKP", "crv": "Ed25519", "x": b64(raw)}
        numbers = self.private.public_key().public_numbers()
        return {"kty": "EC", "crv": "P-256", "x": b64(numbers.x.to_bytes(32)), "y": b64(numbers.y.to_bytes(32))}

    @property
    def thumbprint(self) -> str:
        return b64(hashlib.sha256(json.dumps(dict(sorted(self.jwk.items())), separators=(",", ":")).encode()).digest())

    def sign(self, header: dict[str, Any], claims: Any, *, raw: str | None = None) -> str:
        """A compact JWS; a claim or header of None is left out. `raw` stands for the claims as they are."""
        kept = {name: value for name, value in {"alg": self.alg, **header}.items() if value is not None}
        body = raw if raw is not None else json.dumps({n: v for n, v in claims.items() if v is not None})
        content = f"{b64(json.dumps(kept).encode())}.{b64(body.encode())}"
        if self.alg == "Ed25519":
            signature = self.private.sign(content.encode())
        else:
            r, s = decode_dss_signature(self.private.sign(content.encode(), ec.ECDSA(SHA256())))
            signature = r.to_bytes(32) + s.to_bytes(32)
        return f"{content}.{b64(signature)}"

    def assertion(self, client_id: str, issuer: str, *, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """RFC 7523 as updated, right but for what is given."""
        at = int(time.time())
        good = {
            "iss": client_id,
            "sub": client_id,
            "aud": issuer,
            "iat": at,
            "exp": at + 60,
            "jti": secrets.token_hex(8),
        }
        return self.sign({"typ": "client-authentication+jwt", **(header or {})}, {**good, **claims})

    def proof(
        self, method: str, url: str, token: str | None = None, *, header: dict[str, Any] | None = None, **claims: Any
    ) -> str:
        """A proof of possession (RFC 9449), right but for what is given."""
        good = {"htm": method, "htu": url, "iat": int(time.time()), "jti": secrets.token_hex(8)}
        if token is not None:
            good["ath"] = b64(hashlib.sha256(token.encode()).digest())
        return self.sign({"typ": "dpop+jwt", "jwk": self.jwk, **(header or {})}, {**good, **claims})


def with_assertion(assertion: str, **fields: str) -> dict[str, str]:
    """The form of a token request."""
    good = {"grant_type": "client_credentials", "client_assertion_type": ASSERTION_TYPE, "client_assertion": assertion}
    return good | fields
