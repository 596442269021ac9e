"""The strict parser in front of Authlib: what a token request may look like, and nothing else (RFC 6749, 9700).

Authlib accepts duplicate parameters, parameters in the query and two ways of authenticating at once; none gets that far.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote_plus

__all__ = ["OAuthRefused", "TokenRequest", "parse"]

_MAX_BODY = 8192
_KNOWN = frozenset({"grant_type", "scope", "client_id", "client_secret"})


class OAuthRefused(Exception):
    """A refusal in RFC 6749's own shape."""

    def __init__(self, error: str, description: str, *, status: int = 400) -> None:
        super().__init__(description)
        self.error, self.description, self.status = error, description, status


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A well-formed token request, with exactly one pair of credentials."""

    grant_type: str
    client_id: str
    client_secret: str = field(repr=False)


def parse(*, query: bytes, content_type: str, authorization: str | None, body: bytes) -> TokenRequest:
    """Read a token request. Raises OAuthRefused."""
    if query:
        raise OAuthRefused("invalid_request", "token parameters belong in the body; send no query")
    if content_type.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded" or len(body) > _MAX_BODY:
        raise OAuthRefused("invalid_request", "send a short form: application/x-www-form-urlencoded")
    form = _form(body)
    unknown = form.keys() - _KNOWN
    if unknown:
        raise OAuthRefused("invalid_request", "the form has parameters that this endpoint does not know")
    if "grant_type" not in form:
        raise OAuthRefused("invalid_request", "grant_type is missing")
    if form.get("scope"):
        raise OAuthRefused(
            "invalid_scope", "no scopes are defined here; grants decide what an app may do. Leave scope out"
        )
    if authorization is not None:
        if "client_secret" in form:
            raise OAuthRefused(
                "invalid_request", "authenticate in one way: by the Authorization header or in the form, not both"
            )
        client_id, secret = _basic(authorization)
        if form.get("client_id", client_id) != client_id:
            raise OAuthRefused("invalid_request", "the form and the Authorization header name different clients")
    else:
        client_id, secret = form.get("client_id", ""), form.get("client_secret", "")
    return TokenRequest(form["grant_type"], client_id, secret)


def _form(body: bytes) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, strict_parsing=bool(body), errors="strict", max_num_fields=16
        )
    except (ValueError, UnicodeError):
        raise OAuthRefused("invalid_request", "the form is not well-formed UTF-8, percent-encoded") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise OAuthRefused("invalid_request", "a parameter comes twice; send each once")
    return form


def _basic(authorization: str) -> tuple[str, str]:
    scheme, _, encoded = authorization.partition(" ")
    try:
        if scheme.lower() != "basic":
            raise ValueError
        client_id, colon, secret = base64.b64decode(encoded, validate=True).decode("utf-8").partition(":")
        if not colon:
            raise ValueError
    except (ValueError, binascii.Error):
        raise OAuthRefused("invalid_client", "the client could not be authenticated", status=401) from None
    return unquote_plus(client_id), unquote_plus(secret)
