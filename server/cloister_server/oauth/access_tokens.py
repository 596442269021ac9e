"""What an access token of ours says (RFC 9068). Knows its form and its signature; nothing of who still stands behind it."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from time import time

from joserfc import jwt
from joserfc.jwk import ECKey

__all__ = [
    "ADMIN_CLIENT_ID",
    "ADMIN_SCOPE",
    "ALGORITHM",
    "LONGEST_LIFE_S",
    "TYPE",
    "USER_ID",
    "AccessToken",
    "key_id_of",
    "read_token",
]

ALGORITHM = "ES256"
TYPE = "at+jwt"  # RFC 9068
LONGEST_LIFE_S = 600
"""From `iat` to `exp`, whatever signed it."""

ADMIN_CLIENT_ID = "cloister-admin"
"""The client of `cloister-admin login`, that every deployment has. It acts for operators, whose second factor is asked for once more;
its tokens are bound to a key, and have this scope, which nobody else's do."""
ADMIN_SCOPE = "admin"

USER_ID = re.compile(r"us_[0-9a-f]{32}")
"""A person's id, which no app's is like."""
_CLOCKS_APART_S = 5
_LOGIN_ID = re.compile(r"lg_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class AccessToken:
    """What a token of ours says, and who signed it."""

    client_id: str
    subject: str
    """Who acts: the client itself, or the person that it acts for."""
    login_id: str | None
    """The person's login (`sid`); None where the client acts for itself."""
    key_id: str
    jti: str
    issued: int
    expires: int
    jkt: str | None
    """The thumbprint of the key that it is bound to (RFC 9449): without a proof of that it is worth nothing."""
    scope: str
    """'admin' where it is an operator's, else ''."""


def key_id_of(token: bytes) -> str:
    """The key that a token names, before anything of it is believed. Raises ValueError."""
    head = token.partition(b".")[0]
    header = json.loads(base64.urlsafe_b64decode(head + b"=" * (-len(head) % 4)))
    kid = header.get("kid") if isinstance(header, dict) else None
    if not isinstance(kid, str):
        raise ValueError("no key is named")
    return kid


def read_token(issuer: str, token: bytes, key: ECKey) -> AccessToken:
    """What the token says. Raises JoseError or ValueError unless this key signed it, of now and exactly as `server` does."""
    read = jwt.decode(token, key, algorithms=[ALGORITHM])
    if read.header != {"alg": ALGORITHM, "typ": TYPE, "kid": key.kid}:
        raise ValueError("another header than ours")
    claims, at = read.claims, time()
    client_id, jti, issued, expires = (claims.get(name) for name in ("client_id", "jti", "iat", "exp"))
    subject, login_id = claims.get("sub"), claims.get("sid")
    if claims.get("iss") != issuer or claims.get("aud") != issuer:
        raise ValueError("of or for somebody else")
    if login_id is None and subject != client_id:
        raise ValueError("of a client, for somebody else")
    if login_id is not None and not (_is_like(_LOGIN_ID, login_id) and _is_like(USER_ID, subject)):
        raise ValueError("of a person, without a login")
    if type(issued) is not int or type(expires) is not int or not isinstance(client_id, str):
        raise ValueError("claims of another type")
    if not isinstance(jti, str) or not 0 < len(jti) <= 64:
        raise ValueError("a token without an id could not be revoked")
    if expires <= at or issued > at + _CLOCKS_APART_S or expires - issued > LONGEST_LIFE_S:
        raise ValueError("not of now")
    bound = claims.get("cnf")
    if bound is not None and (not isinstance(bound, dict) or not isinstance(bound.get("jkt"), str)):
        raise ValueError("bound to something else")
    jkt = bound["jkt"] if bound else None
    scope = claims.get("scope") or ""
    if scope not in ("", ADMIN_SCOPE):
        raise ValueError("a scope of nobody's")
    if scope == ADMIN_SCOPE and (client_id != ADMIN_CLIENT_ID or login_id is None or jkt is None):
        raise ValueError("an operator's, and not by a login and bound to a key")
    return AccessToken(client_id, str(subject), login_id, str(key.kid), jti, issued, expires, jkt, str(scope))


def _is_like(pattern: re.Pattern[str], claim: object) -> bool:
    return isinstance(claim, str) and pattern.fullmatch(claim) is not None
