"""Keys that a client proves to have: assertions of who it is (RFC 7523 as updated), proofs for each request (RFC 9449). No HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from cloister._errors import ConfigurationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["PrivateKey"]

_ASSERTION_LIFE_S = 60


class PrivateKey:
    """A private key of P-256 or Ed25519, which signs and is never shown. Safe to share between threads."""

    def __init__(self, key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec

        self._key = key
        public = key.public_key()
        if isinstance(public, ec.EllipticCurvePublicKey):
            numbers = public.public_numbers()
            x, y = (_text(each.to_bytes(32)) for each in (numbers.x, numbers.y))
            self._algorithm, self._jwk = "ES256", {"kty": "EC", "crv": "P-256", "x": x, "y": y}
        else:
            self._algorithm = "EdDSA"  # the name that every server knows; RFC 9864 has a newer one
            self._jwk = {"kty": "OKP", "crv": "Ed25519", "x": _text(public.public_bytes_raw())}

    def __repr__(self) -> str:
        return f"PrivateKey({self._algorithm})"

    @classmethod
    def generate(cls) -> PrivateKey:
        """One that lives as long as this object."""
        from cryptography.hazmat.primitives.asymmetric import ec

        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def kept(cls, text: str) -> PrivateKey:
        """The key that `for_keeping` wrote. Raises ValueError."""
        from cryptography.hazmat.primitives.asymmetric import ec

        return cls(ec.derive_private_key(int.from_bytes(bytes.fromhex(text)), ec.SECP256R1()))

    def for_keeping(self) -> SecretStr:
        """A key of P-256 as text, for a profile's secret and nowhere else."""
        from cryptography.hazmat.primitives.asymmetric import ec

        if not isinstance(self._key, ec.EllipticCurvePrivateKey):
            raise TypeError("only keys that were made here are kept")
        return SecretStr(f"{self._key.private_numbers().private_value:064x}")

    @classmethod
    def read(cls, file: Path) -> PrivateKey:
        """The key in a PEM file that nobody else can read. Raises ConfigurationError, and quotes nothing of the file."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            if file.stat().st_mode & 0o077:
                raise ConfigurationError(f"the private key {file} can be read by others; run `chmod 600 {file}`")
            key = load_pem_private_key(file.read_bytes(), password=None)
        except OSError as error:
            raise ConfigurationError(
                f"the private key {file} cannot be read: {error.strerror}; pass private_key=... or set CLOISTER_PRIVATE_KEY"
            ) from None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if isinstance(key, Ed25519PrivateKey) or (
            isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)
        ):
            return cls(key)
        raise ConfigurationError(
            f"{file} holds no private key of P-256 or Ed25519 as PEM without a passphrase; make one, and give its public half "
            "to the server's operator"
        )

    def assertion(self, client_id: str, issuer: str) -> str:
        """That this client asks this server, and no other, now and once."""
        at = int(time.time())
        claims = {"iss": client_id, "sub": client_id, "aud": issuer, "iat": at, "exp": at + _ASSERTION_LIFE_S}
        return self._sign({"typ": "client-authentication+jwt"}, claims)

    def proof(self, method: str, url: str, token: str | None = None) -> str:
        """That whoever sends this one request, with this token if any, has the key. `url` is without query and fragment."""
        claims: dict[str, Any] = {"htm": method, "htu": url, "iat": int(time.time())}
        if token is not None:
            claims["ath"] = _text(hashlib.sha256(token.encode()).digest())
        return self._sign({"typ": "dpop+jwt", "jwk": self._jwk}, claims)

    def _sign(self, header: dict[str, Any], claims: dict[str, Any]) -> str:
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
        from cryptography.hazmat.primitives.hashes import SHA256

        parts = ({"alg": self._algorithm, **header}, {**claims, "jti": secrets.token_urlsafe(16)})
        content = ".".join(_text(json.dumps(part).encode()) for part in parts)
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            r, s = decode_dss_signature(self._key.sign(content.encode(), ec.ECDSA(SHA256())))
            signature = r.to_bytes(32) + s.to_bytes(32)
        else:
            signature = self._key.sign(content.encode())
        return f"{content}.{_text(signature)}"


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
