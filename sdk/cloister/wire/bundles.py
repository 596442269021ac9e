"""A tenant's data taken along: named members, each sealed for one key (HPKE, RFC 9180), their list signed by the service.

Knows bytes and keys; nothing of what the members are, and no files. docs/spec/bundle.md is its specification.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pydantic import AwareDatetime, Field, StringConstraints

from cloister.wire._errors import CloisterError, InvalidArgument
from cloister.wire._hpke import KEY_BYTES, SUITE, body_of, is_public_key, line_of
from cloister.wire._model import Identifier, Response
from cloister.wire.dsse import Digest, Envelope, Keys, canonical_json, sign_statement, verify_statement

__all__ = [
    "BUNDLE_TYPE",
    "CONTENTS",
    "Contents",
    "InvalidBundle",
    "contents_digest",
    "new_private_key",
    "open_members",
    "private_key_of",
    "public_key_of",
    "public_line",
    "seal_members",
    "sign_contents",
    "verify_contents",
]

BUNDLE_TYPE = "urn:cloister:bundle:1"
CONTENTS = "contents.dsse.json"
"""The last member: the signed list of the others."""

_LINE = b"cloister.bundle/1\n"
_PRIVATE, _PUBLIC = "cloister-bundle-key-1:", "cloister-bundle-recipient-1:"
_ID_BYTES, _TAG_BYTES = 16, 16
_LARGEST_MEMBER, _PIECE_BYTES = 2**36, 2**24
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


class InvalidBundle(CloisterError):
    """A bundle that was changed or cut, or is for another key. One message for every reason."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message or "the bundle does not open: it was changed or cut short, or it is for another key; get it again"
        )


class Contents(Response):
    """What the service says it has put into a bundle."""

    tenant: Identifier
    tenant_name: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    members: Annotated[int, Field(ge=0)]
    contents_digest: Digest
    """`contents_digest` of the members: the statement's subject."""
    recipient: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    """The public line that the bundle was sealed for."""
    issued: AwareDatetime


@dataclass(frozen=True, slots=True)
class _Place:
    bundle_id: bytes
    index: int
    is_last: bool

    @property
    def info(self) -> bytes:
        return _LINE + self.bundle_id + self.index.to_bytes(8, "big") + bytes([self.is_last])


def new_private_key() -> str:
    """A fresh key pair's private line, for a file that nobody else reads; `public_line` tells the other half."""
    return line_of(_PRIVATE, X25519PrivateKey.generate().private_bytes_raw())


def private_key_of(line: str) -> X25519PrivateKey:
    """The private key in its line. Raises InvalidArgument, and quotes nothing of it."""
    return X25519PrivateKey.from_private_bytes(_of_line(_PRIVATE, line))


def public_line(key: X25519PrivateKey | X25519PublicKey) -> str:
    """The line to give to whoever makes a bundle: `cloister-bundle-recipient-1:…`."""
    public = key.public_key() if isinstance(key, X25519PrivateKey) else key
    return line_of(_PUBLIC, public.public_bytes_raw())


def public_key_of(line: str) -> X25519PublicKey:
    """The public key in its line. Raises InvalidArgument, also for one that nobody can hold the private half of."""
    public = _of_line(_PUBLIC, line)
    if not is_public_key(public):
        raise _mistyped(_PUBLIC)
    return X25519PublicKey.from_public_bytes(public)


def seal_members(members: Iterable[tuple[str, bytes]], *, recipient: X25519PublicKey) -> Iterator[bytes]:
    """A bundle's bytes, piece by piece, a member at a time in memory. Raises ValueError for a name that is no relative path."""
    bundle_id = secrets.token_bytes(_ID_BYTES)
    yield _LINE + bundle_id
    waiting: tuple[str, bytes] | None = None
    index = 0
    for member in members:
        if waiting is not None:
            yield _seal(waiting, _Place(bundle_id, index, is_last=False), recipient)
            index += 1
        waiting = member
    if waiting is None:
        raise ValueError("a bundle has at least one member")
    yield _seal(waiting, _Place(bundle_id, index, is_last=True), recipient)


def open_members(file: BinaryIO, *, private_key: X25519PrivateKey) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member, in order. Raises InvalidBundle: keep nothing before the last one has come."""
    head = file.read(len(_LINE) + _ID_BYTES)
    if head[: len(_LINE)] != _LINE:
        raise InvalidBundle("the file is not of cloister.bundle/1; give a bundle, or open it with a newer release")
    bundle_id, index = head[len(_LINE) :], 0
    following = _next(file)
    if following is None:
        raise InvalidBundle()
    while following is not None:
        sealed, following = following, _next(file)
        yield _open(sealed, _Place(bundle_id, index, is_last=following is None), private_key)
        index += 1


def contents_digest(digests: Iterable[tuple[str, str]]) -> str:
    """SHA-256 of the canonical JSON list of each member's name and SHA-256 in the bundle's order: `[[name, digest], ...]`."""
    return hashlib.sha256(canonical_json([[name, digest] for name, digest in digests])).hexdigest()


def sign_contents(contents: Contents, *, private_key: Ed25519PrivateKey, key_id: str) -> dict[str, Any]:
    """The contents' DSSE envelope. `key_id` must be that of the private key."""
    return sign_statement(
        contents, _subject(contents), predicate_type=BUNDLE_TYPE, private_key=private_key, key_id=key_id
    )


def verify_contents(envelope: Envelope, keys: Keys) -> Contents:
    """The contents in an envelope that one of `keys` has signed. Whether the members are those is the caller's to compare."""
    return verify_statement(envelope, keys, kind=Contents, predicate_type=BUNDLE_TYPE, subject=_subject)


def _subject(contents: Contents) -> dict[str, Any]:
    return {"name": "contents", "digest": {"sha256": contents.contents_digest}}


def _seal(member: tuple[str, bytes], place: _Place, recipient: X25519PublicKey) -> bytes:
    name, content = member
    if not _is_name(name):
        raise ValueError(f"{name!r} is no name for a member: a relative path of plain letters")
    encoded = name.encode("ascii")
    sealed = SUITE.encrypt(len(encoded).to_bytes(2, "big") + encoded + content, recipient, info=place.info)
    return len(sealed).to_bytes(8, "big") + sealed


def _open(sealed: bytes, place: _Place, private_key: X25519PrivateKey) -> tuple[str, bytes]:
    try:
        plain = SUITE.decrypt(sealed, private_key, info=place.info)
    except (InvalidTag, ValueError):
        raise InvalidBundle() from None
    end = 2 + int.from_bytes(plain[:2], "big")
    try:
        name = plain[2:end].decode("ascii")
    except UnicodeDecodeError:
        raise InvalidBundle() from None
    if len(plain) < end or not _is_name(name):
        raise InvalidBundle()
    return name, plain[end:]


def _next(file: BinaryIO) -> bytes | None:
    """The next sealed member; None where the file ends."""
    prefix = file.read(8)
    if not prefix:
        return None
    length = int.from_bytes(prefix, "big")
    if len(prefix) < 8 or not KEY_BYTES + _TAG_BYTES + 2 < length <= _LARGEST_MEMBER:
        raise InvalidBundle()
    sealed = bytearray()
    while len(sealed) < length:  # piece by piece: a length that was changed asks for more memory than there is
        piece = file.read(min(length - len(sealed), _PIECE_BYTES))
        if not piece:
            raise InvalidBundle()
        sealed += piece
    return bytes(sealed)


def _is_name(name: str) -> bool:
    return len(name) <= 512 and _NAME.fullmatch(name) is not None


def _of_line(prefix: str, line: str) -> bytes:
    key = body_of(prefix, line, length=KEY_BYTES)
    if key is None:
        raise _mistyped(prefix)
    return key


def _mistyped(prefix: str) -> InvalidArgument:
    return InvalidArgument(f"this is no line that begins with {prefix}, or it was mistyped; give it whole")
