"""The public keys of other issuers, fetched when they are needed and remembered for a while. Knows URLs and keys; no SQL.

Of an issuer one fetch is under way at a time and one begins each minute at most, whatever tokens come: ids of keys that are
nobody's fetch nothing. A few requests wait for a fetch, for seconds; the others are answered without it. Keys are remembered for
ten minutes, and for an hour where the issuer does not answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers

from cloister_server.oauth.fetching import WITHIN_S, Network, NotFetched, fetch_json, require_no_transaction
from cloister_server.oauth.signed import InvalidSigned, decoded, require_public

__all__ = ["ALGORITHMS", "IssuerKeys", "Key", "fetch_keys"]

log = logging.getLogger(__name__)

Key = RSAPublicKey | dict[str, str]
"""Of RSA; or, as a JWK, of P-256 or Ed25519."""

ALGORITHMS = {"RS256": "RSA", "PS256": "RSA", "ES256": "EC", "EdDSA": "OKP"}
"""What others may sign with (RFC 7518, RFC 8037), and the type of key that it takes: none that both sides would know."""

KEPT_S = 600.0
KEPT_UNANSWERED_S = 3600.0
APART_S = 60.0
_WAIT_S = WITHIN_S + 1
_MOST_WAITING = 4
_MOST_KEYS = 64
_FEWEST_RSA_BITS, _MOST_RSA_BITS = 2048, 4096
_PRIVATE = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")  # RFC 7518, section 6


def fetch_keys(jwks_uri: str, *, network: Network | None, algorithms: Collection[str]) -> dict[str, Key]:
    """Key id -> public key, of those that may sign; what is private, symmetric, ambiguous or weak is left out. Raises NotFetched."""
    listed = fetch_json(jwks_uri, network=network).get("keys")
    if not isinstance(listed, list) or len(listed) > _MOST_KEYS:
        raise NotFetched(f"{jwks_uri} is no set of at most {_MOST_KEYS} keys (RFC 7517)")
    ids = [each.get("kid") for each in listed if isinstance(each, dict)]
    read = [each for each in listed if isinstance(each, dict) and isinstance(each.get("kid"), str)]
    keys = {each["kid"]: _public(each, algorithms) for each in read if ids.count(each["kid"]) == 1}
    return {kid: key for kid, key in keys.items() if key is not None}


def _public(jwk: Mapping[str, Any], algorithms: Collection[str]) -> Key | None:
    """Its public key, if it is one, of a type that one of the algorithms takes, and for signatures."""
    if any(name in jwk for name in _PRIVATE) or jwk.get("use", "sig") != "sig":
        return None
    if jwk.get("alg") is not None and jwk["alg"] not in algorithms:
        return None
    kty = jwk.get("kty")
    if kty not in [ALGORITHMS[each] for each in algorithms]:
        return None
    try:
        if kty == "RSA":
            n, e = (int.from_bytes(decoded(jwk[name])) for name in ("n", "e"))
            return RSAPublicNumbers(e, n).public_key() if _FEWEST_RSA_BITS <= n.bit_length() <= _MOST_RSA_BITS else None
        key = {name: jwk[name] for name in ("kty", "crv", "x", *(("y",) if kty == "EC" else ()))}
        require_public(key)
        return key
    except (InvalidSigned, ValueError, TypeError, KeyError):
        return None


@dataclass(slots=True)
class _Issuer:
    """What is remembered of one issuer's keys; times by the monotonic clock."""

    keys: Mapping[str, Key] = field(default_factory=dict)
    fetched: float = -KEPT_UNANSWERED_S
    tried: float = -KEPT_UNANSWERED_S
    under_way: threading.Event | None = None
    waiting: int = 0


class IssuerKeys:
    """The keys that one process remembers, by issuer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._issuers: dict[str, _Issuer] = {}

    def find(
        self, issuer_id: str, key_id: str, *, jwks_uri: str, network: Network, algorithms: Collection[str]
    ) -> Key | None:
        """The issuer's key of this id, which may take some seconds to be known; never asked for in a transaction."""
        require_no_transaction()
        with self._lock:
            issuer, at = self._issuers.setdefault(issuer_id, _Issuer()), time.monotonic()
            known = issuer.keys.get(key_id) if at < issuer.fetched + KEPT_UNANSWERED_S else None
            if known is not None and at < issuer.fetched + KEPT_S:
                return known
            if issuer.under_way is None and at >= issuer.tried + APART_S:
                issuer.under_way, issuer.tried = threading.Event(), at
                given = (issuer, jwks_uri, network, tuple(algorithms))
                threading.Thread(target=self._fetch, args=given, name="issuer-keys", daemon=True).start()
            if known is not None or issuer.under_way is None or issuer.waiting >= _MOST_WAITING:
                return known
            issuer.waiting += 1
            under_way = issuer.under_way
        under_way.wait(_WAIT_S)
        with self._lock:
            issuer.waiting -= 1
            return issuer.keys.get(key_id) if time.monotonic() < issuer.fetched + KEPT_UNANSWERED_S else None

    def forget_all_but(self, issuer_ids: Collection[str]) -> None:
        """Forget the keys of issuers that are no more."""
        with self._lock:
            self._issuers = {each: kept for each, kept in self._issuers.items() if each in issuer_ids}

    def _fetch(self, issuer: _Issuer, jwks_uri: str, network: Network, algorithms: tuple[str, ...]) -> None:
        try:
            keys, at = fetch_keys(jwks_uri, network=network, algorithms=algorithms), time.monotonic()
            with self._lock:
                issuer.keys, issuer.fetched = keys, at
        except NotFetched as refusal:
            log.warning("issuer.keys_not_fetched", extra={"jwks_uri": jwks_uri, "why": str(refusal)})
        finally:
            with self._lock:
                under_way, issuer.under_way = issuer.under_way, None
            if under_way is not None:
                under_way.set()
