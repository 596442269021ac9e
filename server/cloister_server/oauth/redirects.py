"""Where an app may take people back to: what may be registered, and what a request means. Knows neither SQL nor HTTP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from cloister_server.errors import Invalid

__all__ = ["checked", "is_registered", "origin_of"]

_LONGEST = 2048
_MOST = 16
_LOOPBACK = ("127.0.0.1", "::1")
_PRIVATE_USE = re.compile(r"[a-z][a-z0-9-]*(\.[a-z0-9-]+)+")
_VISIBLE = re.compile(r"[\x21-\x7e]+")


def checked(uris: Sequence[str]) -> list[str]:
    """The addresses, if each may be registered. Raises Invalid.

    https, or http to 127.0.0.1 or [::1] (RFC 8252, section 7.3; not `localhost`, which may be anybody), or a private-use scheme with
    a dot in it (section 7.1); without fragment, user or wildcard.
    """
    if len(uris) > _MOST or len(set(uris)) != len(uris):
        raise Invalid(f"a client has {_MOST} redirect URIs at most, each once")
    for uri in uris:
        if not _may_be_registered(uri):
            raise Invalid(
                f"{uri[:200]!r} cannot be a redirect URI: give https://..., http://127.0.0.1/... (any port is taken then), "
                "http://[::1]/..., or a private scheme with a dot in it, as com.example.app:/...; no fragment, user or *"
            )
    return list(uris)


def is_registered(uri: str, registered: Sequence[str] | None) -> bool:
    """Whether it is one of them, character for character; of a loopback address whatever its port (RFC 8252, section 7.3)."""
    without_port = _without_loopback_port(uri)
    return any(
        uri == each or (without_port is not None and without_port == _without_loopback_port(each))
        for each in registered or ()
    )


def origin_of(uri: str) -> str:
    """For a content security policy's form-action: a browser follows a form's redirect only there."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc}" if parts.scheme in ("http", "https") else f"{parts.scheme}:"


def _may_be_registered(uri: str) -> bool:
    if not _VISIBLE.fullmatch(uri) or len(uri) > _LONGEST or any(bad in uri for bad in "*#\\\"'<>;,"):
        return False
    try:
        parts = urlsplit(uri)
        has_port = parts.port is not None
    except ValueError:
        return False
    if "@" in parts.netloc:
        return False
    if parts.scheme == "https":
        return bool(parts.hostname)
    if parts.scheme == "http":
        return parts.hostname in _LOOPBACK and (not has_port or parts.port != 0)
    return _PRIVATE_USE.fullmatch(parts.scheme) is not None and not parts.netloc and len(parts.path) > 0


def _without_loopback_port(uri: str) -> str | None:
    match = re.fullmatch(r"(http://(?:127\.0\.0\.1|\[::1\]))(?::[0-9]{1,5})?((?:[/?].*)?)", uri)
    return None if match is None else match[1] + match[2]
