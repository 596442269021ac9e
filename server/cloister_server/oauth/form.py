"""What Authlib's core must never see: the token request read strictly, or refused. Knows bytes; nothing of SQL or keys.

One POSTed form, in UTF-8, no parameter twice, none in the URL, and exactly one way to say who asks.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from urllib.parse import parse_qsl, unquote_plus

from authlib.oauth2.rfc6749.errors import InvalidClientError, InvalidRequestError
from pydantic import SecretStr

__all__ = ["TokenRequest", "invalid_client", "read_form", "read_token_request"]

_MOST_FIELDS = 16
_MOST_BYTES = 8 * 2**10
_OTHER_CREDENTIALS = ("client_secret", "client_assertion", "client_assertion_type")
_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"  # RFC 7523, section 2.2
_VISIBLE = re.compile(r"[\x21-\x7e]{1,512}")  # RFC 6749, appendix A.1 and A.2, and shorter


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A form whose every parameter stands once, and the credentials that came with it: a secret, or an assertion."""

    parameters: Mapping[str, str]
    client_id: str
    """What the client calls itself; '' where its assertion alone says so."""
    client_secret: SecretStr
    """Empty where there is none: then only a public client can be meant."""
    assertion: SecretStr | None = None


def read_token_request(headers: Sequence[tuple[bytes, bytes]], query: bytes, body: bytes) -> TokenRequest:
    """Read a token request. Raises InvalidRequestError, or InvalidClientError where nobody, or nobody known, asks."""
    if query:
        raise InvalidRequestError("token parameters go into the body and never into the URL")
    fields = read_form(headers, body)
    authorization = [value for name, value in headers if name.lower() == b"authorization"]
    if len(authorization) > 1:
        raise InvalidRequestError("there is more than one Authorization header; send one")
    kept = {name: value for name, value in fields.items() if name not in _OTHER_CREDENTIALS}
    if authorization:
        if any(name in fields for name in _OTHER_CREDENTIALS):
            raise InvalidRequestError("the client authenticates in two ways at once; choose one")
        client_id, secret = _basic(authorization[0])
        if fields.get("client_id", client_id) != client_id:
            raise InvalidRequestError("the body names another client than the Authorization header")
    elif "client_assertion" in fields or "client_assertion_type" in fields:
        if "client_secret" in fields:
            raise InvalidRequestError("the client authenticates in two ways at once; choose one")
        if fields.get("client_assertion_type") != _ASSERTION_TYPE or "client_assertion" not in fields:
            raise InvalidRequestError(
                f"an assertion comes with client_assertion_type={_ASSERTION_TYPE}, and only with it"
            )
        return TokenRequest(kept, fields.get("client_id", ""), SecretStr(""), SecretStr(fields["client_assertion"]))
    else:
        client_id, secret = fields.get("client_id", ""), fields.get("client_secret", "")
    if not _VISIBLE.fullmatch(client_id) or not (secret == "" or _VISIBLE.fullmatch(secret)):
        raise invalid_client()
    return TokenRequest(kept, client_id, SecretStr(secret))


def invalid_client() -> InvalidClientError:
    """The one answer to every failure to say who asks, so that clients cannot be told apart by it."""
    return InvalidClientError(
        "the client is unknown, its secret or assertion is wrong, or there are no credentials; send client id and secret by "
        "HTTP Basic or in the form, or a fresh client_assertion: iss and sub the client id, aud this issuer and nothing else, "
        "iat within 5 minutes, exp after now, a jti never used before, signed with ES256 or Ed25519",
        status_code=401,
    )


def read_form(headers: Sequence[tuple[bytes, bytes]], body: bytes) -> dict[str, str]:
    """The parameters of a form, each once; those without a value are left out. Raises InvalidRequestError."""
    content_type = Message()
    content_type["content-type"] = b"".join(v for name, v in headers if name.lower() == b"content-type").decode(
        "latin-1"
    )
    if content_type.get_content_type() != "application/x-www-form-urlencoded":
        raise InvalidRequestError("a token request is a form: Content-Type: application/x-www-form-urlencoded")
    if str(content_type.get_param("charset", "utf-8")).lower() != "utf-8" or len(body) > _MOST_BYTES:
        raise InvalidRequestError("the form must be UTF-8 and at most 8 KiB long")
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=_MOST_FIELDS,
        )
    except ValueError:  # UnicodeDecodeError too
        raise InvalidRequestError("the body is not a form in UTF-8, or it has too many fields") from None
    if len({name for name, _ in pairs}) != len(pairs):
        raise InvalidRequestError("a parameter is given twice; give each once")
    return {name: value for name, value in pairs if value}  # RFC 6749, 3.2: without a value is omitted


def _basic(header: bytes) -> tuple[str, str]:
    """RFC 6749, 2.3.1: id and secret are form-encoded before they are joined; ours look the same either way."""
    scheme, _, encoded = header.partition(b" ")
    if scheme.lower() != b"basic":
        raise invalid_client()
    try:
        client_id, colon, secret = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
        if not colon:
            raise invalid_client()
        return unquote_plus(client_id, errors="strict"), unquote_plus(secret, errors="strict")
    except (binascii.Error, UnicodeDecodeError):
        raise invalid_client() from None
