"""Access tokens of other issuers, read by the rules that the operator has pinned, or refused. Knows nobody of ours.

What a token says of itself chooses nothing: its `iss` finds the rules, its `kid` one key of that issuer's, and the rules say with
which algorithms, for whom and of what type it must be (RFC 9068; RFC 8725). Where a header says that keys are (`jku`, `x5u`, `jwk`,
`x5c`) is not read. Who somebody is says `sub` alone: names and addresses of mail are given anew to others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS, AsymmetricPadding, PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256

from cloister_server.oauth.fetching import NETWORKS, Network
from cloister_server.oauth.issuer_keys import Key
from cloister_server.oauth.signed import InvalidSigned, Signed, read_signed, verify
from cloister_server.store.issuers import Issuer

__all__ = ["LONGEST_SUBJECT", "TYPES", "ForeignToken", "Rules", "issuer_named_in", "read_foreign"]

TYPES = ("at+jwt", "JWT")
"""RFC 9068's, and what Entra, Keycloak and others put there: those are told from ID tokens by their audience and claims."""

CLOCKS_APART_S = 30
LONGEST_LIFE_S = 86_400
_MOST_AUDIENCES = 16
LONGEST_SUBJECT = 255  # OpenID Connect Core 1.0, section 2
_OF_ID_TOKENS = ("nonce", "at_hash", "c_hash", "s_hash", "events")  # and of logout tokens
_OF_KEYCLOAK = ("Bearer", "DPoP")
"""The claim `typ` of its access tokens; "ID" and "Refresh" are those of others."""
_PADDINGS: dict[str, AsymmetricPadding] = {
    "RS256": PKCS1v15(),
    "PS256": PSS(MGF1(SHA256()), 32),
}  # RFC 7518, 3.3 and 3.5


@dataclass(frozen=True, slots=True)
class Rules:
    """An issuer whose tokens are taken, and how they must be."""

    id: str
    url: str
    jwks_uri: str
    audience: str
    algorithms: tuple[str, ...]
    typ: str
    network: Network

    @classmethod
    def of(cls, row: Issuer) -> Rules:
        network = next(each for each in NETWORKS if each == row.network)
        algorithms = tuple(row.algorithms)
        return cls(row.id, row.url, row.jwks_uri, row.audience, algorithms, row.typ, network)


@dataclass(frozen=True, slots=True)
class ForeignToken:
    """What a token of another issuer says that is believed: a subject of that issuer, and of no other."""

    issuer_id: str
    subject: str
    expires: float
    jkt: str | None
    """The thumbprint of the key that it is bound to (RFC 9449)."""


def issuer_named_in(token: bytes) -> str | None:
    """The `iss` that a token claims, which is nobody yet; None where it claims none. Raises InvalidSigned."""
    claimed = read_signed(token.decode("ascii")).claims.get("iss")
    return claimed if isinstance(claimed, str) else None


def read_foreign(rules: Rules, token: bytes, *, key_of: Callable[[str], Key | None]) -> ForeignToken:
    """A token of this issuer, of now and for us. Raises InvalidSigned, or ValueError, whatever is wrong.

    All that costs nothing is held against the rules first: `key_of` may have to ask the issuer.
    """
    signed = read_signed(token.decode("ascii"))
    kid, algorithm = _checked_header(rules, signed.header)
    told = _checked_claims(rules, signed.claims)
    key = key_of(kid)
    if key is None:
        raise InvalidSigned("no key of the issuer's")
    _verify(signed, key, algorithm)
    return told


def _checked_header(rules: Rules, header: Mapping[str, Any]) -> tuple[str, str]:
    kid, algorithm, typ = (header.get(name) for name in ("kid", "alg", "typ"))
    if algorithm not in rules.algorithms or not isinstance(kid, str) or not 0 < len(kid) <= 256:
        raise InvalidSigned("another algorithm than the issuer's, or no key is named")
    if not isinstance(typ, str):
        raise InvalidSigned("no type")
    # RFC 7515, section 4.1.9: it may be spelled as a media type, and case does not count.
    if typ.lower().removeprefix("application/") != rules.typ.lower():
        raise InvalidSigned("another type than the issuer's access tokens")
    if "crit" in header or "b64" in header or "enc" in header or "zip" in header:
        raise InvalidSigned("something that must be understood, and is not")
    return kid, str(algorithm)


def _checked_claims(rules: Rules, claims: Mapping[str, Any]) -> ForeignToken:
    subject, audience = claims.get("sub"), claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    if claims.get("iss") != rules.url or len(audiences) > _MOST_AUDIENCES or rules.audience not in audiences:
        raise InvalidSigned("of or for somebody else")
    if not isinstance(subject, str) or not 0 < len(subject) <= LONGEST_SUBJECT or not subject.isprintable():
        raise InvalidSigned("of nobody")
    if rules.typ == "at+jwt" and any(not isinstance(claims.get(name), str) for name in ("client_id", "jti")):
        raise InvalidSigned("without what RFC 9068, section 2.2, requires")
    if any(name in claims for name in _OF_ID_TOKENS) or claims.get("typ", "Bearer") not in _OF_KEYCLOAK:
        raise InvalidSigned("a token for something else than access")
    issued, expires = _time(claims, "iat"), _time(claims, "exp")
    not_before, at = _time(claims, "nbf") if "nbf" in claims else issued, time.time()
    if expires + CLOCKS_APART_S <= at or max(issued, not_before) > at + CLOCKS_APART_S:
        raise InvalidSigned("not of now")
    if not 0 < expires - issued <= LONGEST_LIFE_S:
        raise InvalidSigned("good for too long")
    bound = claims.get("cnf")
    if bound is not None and not (
        isinstance(bound, dict) and bound.keys() == {"jkt"} and isinstance(bound["jkt"], str)
    ):
        raise InvalidSigned("bound to something else")
    return ForeignToken(rules.id, subject, expires + CLOCKS_APART_S, bound["jkt"] if bound else None)


def _time(claims: Mapping[str, Any], name: str) -> float:
    """RFC 7519, section 2: seconds, which may have a fraction."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -(2**40) < value < 2**40:
        raise InvalidSigned(f"{name} is no time")
    return float(value)


def _verify(signed: Signed, key: Key, algorithm: str) -> None:
    if not isinstance(key, RSAPublicKey):
        verify(signed, key)  # with the one algorithm that the key is for
        return
    if algorithm not in _PADDINGS:
        raise InvalidSigned("another algorithm than the key's")
    try:
        key.verify(signed.signature, signed.content, _PADDINGS[algorithm], SHA256())
    except InvalidSignature:
        raise InvalidSigned("the signature") from None
