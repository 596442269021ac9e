"""Signed statements: an in-toto Statement in a DSSE envelope, by Ed25519.

Knows keys and JSON; nothing of what is stated, of where envelopes are kept or by whom a key is vouched for. Whoever
verifies brings keys got from somewhere better than the envelope's own sender.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, StringConstraints, ValidationError

from cloister.wire._errors import CloisterError, InvalidArgument

__all__ = [
    "PAYLOAD_TYPE",
    "STATEMENT_TYPE",
    "Digest",
    "Envelope",
    "InvalidCertificate",
    "Keys",
    "canonical_json",
    "digest_of",
    "key_id",
    "sign_statement",
    "verify_statement",
]

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_LARGEST_ENVELOPE = 2**20

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, in lower-case hexadecimal."""

Envelope = Mapping[str, Any] | str | bytes
"""A DSSE envelope: as JSON text, or already read."""

Keys = Mapping[str, bytes | str | Ed25519PublicKey] | Mapping[str, Any] | Iterable[Mapping[str, Any]]
"""Public keys: by key id, each as 32 raw bytes, their hexadecimal or an object; or JWKs, as a list or as a JWK set."""

_Predicate = TypeVar("_Predicate", bound=BaseModel)


class InvalidCertificate(CloisterError):
    """An envelope that proves nothing: malformed, signed by no key that was given, or stating something else."""


def key_id(public_raw: bytes) -> str:
    """A public key's id: `ed25519:` and the first 16 bytes of the SHA-256 of its 32 raw bytes, in hexadecimal."""
    if len(public_raw) != 32:
        raise ValueError(f"an Ed25519 public key has 32 raw bytes, not {len(public_raw)}")
    return "ed25519:" + hashlib.sha256(public_raw).hexdigest()[:32]


def canonical_json(value: object) -> bytes:
    """The one spelling of a JSON value that is signed and hashed: sorted keys, no blanks, ASCII alone, finite numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest_of(envelope: Envelope) -> str:
    """SHA-256 of the bytes that an envelope signs: by it later statements name this one.

    Nothing is verified: do that first. Raises InvalidCertificate where there is no payload to speak of.
    """
    return hashlib.sha256(_base64(_read(envelope).get("payload"), "payload")).hexdigest()


def sign_statement(
    predicate: BaseModel, subject: dict[str, Any], *, predicate_type: str, private_key: Ed25519PrivateKey, key_id: str
) -> dict[str, Any]:
    """The DSSE envelope of a statement, ready to be stored as JSON. `key_id` must be that of the private key.

    Raises ValueError where it is not, or where the envelope would be larger than what is ever verified.
    """
    if key_id != _id_of(private_key.public_key()):
        raise ValueError(f"the private key is not {key_id}; sign with the key that the id names")
    payload = canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [subject],
            "predicateType": predicate_type,
            "predicate": predicate.model_dump(mode="json"),
        }
    )
    signature = private_key.sign(_pre_authentication(PAYLOAD_TYPE, payload))
    envelope = {
        "payload": base64.b64encode(payload).decode("ascii"),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": key_id, "sig": base64.b64encode(signature).decode("ascii")}],
    }
    if len(json.dumps(envelope)) > _LARGEST_ENVELOPE:
        raise ValueError(f"the envelope is over {_LARGEST_ENVELOPE} bytes, which no verifier reads; state less")
    return envelope


def verify_statement(
    envelope: Envelope,
    keys: Keys,
    *,
    kind: type[_Predicate],
    predicate_type: str,
    subject: Callable[[_Predicate], dict[str, Any]],
) -> _Predicate:
    """The predicate in an envelope that one of `keys` has signed, whole, of this kind and about its own subject.

    Raises InvalidCertificate, or InvalidArgument where the keys are in no known form.
    """
    known = _by_id(keys)
    envelope = _read(envelope)
    payload = _base64(envelope.get("payload"), "payload")
    signer, signature = _only_signature(envelope.get("signatures"))
    try:
        _known_key(signer, known).verify(signature, _pre_authentication(PAYLOAD_TYPE, payload))
    except InvalidSignature:
        raise InvalidCertificate("the signature is not the key's: the statement was changed or forged") from None
    statement = _object(_read_json(payload, "statement"), "statement")
    if statement.get("_type") != STATEMENT_TYPE:
        raise InvalidCertificate(f"the statement's type is not {STATEMENT_TYPE}; verify with a release that knows it")
    if statement.get("predicateType") != predicate_type:
        raise InvalidCertificate(f"the predicate's type is not {predicate_type}; verify with a release that knows it")
    try:
        predicate = kind.model_validate_json(json.dumps(statement.get("predicate")), strict=True)
    except ValidationError as exc:
        fields = sorted({".".join(str(part) for part in error["loc"]) or "its root" for error in exc.errors()})
        raise InvalidCertificate(f"the predicate is malformed at: {', '.join(fields)}") from None
    if statement.get("subject") != [subject(predicate)]:
        raise InvalidCertificate("the statement's subject is not what its predicate is about; get it from the service")
    return predicate


def _read(envelope: Envelope) -> Mapping[str, Any]:
    if isinstance(envelope, str | bytes):
        envelope = _object(_read_json(envelope, "envelope"), "envelope")
    elif not isinstance(envelope, Mapping):
        raise InvalidCertificate(f"a {type(envelope).__name__} is no envelope; give model.certificate, or its JSON")
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        raise InvalidCertificate(f"the envelope's payloadType is not {PAYLOAD_TYPE}; it is no certificate")
    return envelope


def _pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """DSSE's PAE, protocol v1: the signed bytes, in which type and payload cannot be taken for one another."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _only_signature(signatures: object) -> tuple[str, bytes]:
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise InvalidCertificate("an envelope carries exactly one signature")
    entry = _object(signatures[0], "signature")
    signer = entry.get("keyid")
    if not isinstance(signer, str):
        raise InvalidCertificate("the signature names no key")
    return signer, _base64(entry.get("sig"), "sig")


def _known_key(signer: str, keys: Mapping[str, bytes | Ed25519PublicKey]) -> Ed25519PublicKey:
    given = keys.get(signer)
    if given is None:
        raise InvalidCertificate(f"the key {signer!r} is not among the {len(keys)} given; get the service's keys")
    try:
        key = Ed25519PublicKey.from_public_bytes(given) if isinstance(given, bytes) else given
    except ValueError:
        raise InvalidCertificate(f"what was given as {signer!r} is no Ed25519 public key") from None
    if _id_of(key) != signer:
        raise InvalidCertificate(f"the key given as {signer!r} has another id; get the service's keys again")
    return key


def _by_id(keys: Any) -> dict[str, bytes | Ed25519PublicKey]:
    """The keys by key id, whatever the form they were kept in. A key of another kind is left out: it signed nothing here."""
    given = keys["keys"] if isinstance(keys, Mapping) and isinstance(keys.get("keys"), list | tuple) else keys
    if isinstance(given, Mapping):
        return {str(name): _key(name, key) for name, key in given.items()}
    if isinstance(given, list | tuple) and all(isinstance(key, Mapping) for key in given):
        return {str(key["kid"]): _of_jwk(key) for key in given if key.get("crv") == "Ed25519" and "kid" in key}
    raise InvalidArgument(f"a {type(keys).__name__} is no form of keys; {_FORMS}")


def _key(name: object, key: object) -> bytes | Ed25519PublicKey:
    match key:
        case bytes() | Ed25519PublicKey():
            return key
        case str():
            try:
                return bytes.fromhex(key)
            except ValueError:
                raise InvalidArgument(f"the key {name!r} is text, and no hexadecimal; {_FORMS}") from None
        case Mapping():
            return _of_jwk(key)
        case _:
            raise InvalidArgument(f"the key {name!r} is a {type(key).__name__}; {_FORMS}")


def _of_jwk(key: Mapping[str, Any]) -> bytes:
    """RFC 8037, section 2."""
    x = key.get("x")
    try:
        return base64.urlsafe_b64decode(x + "=" * (-len(x) % 4)) if isinstance(x, str) else b""
    except (binascii.Error, ValueError):
        return b""


_FORMS = "give what client.certificate_keys() returns, or the list that `cloister-admin init` prints"


def _id_of(key: Ed25519PublicKey) -> str:
    return key_id(key.public_bytes(Encoding.Raw, PublicFormat.Raw))


def _base64(text: object, what: str) -> bytes:
    """Standard base64 with padding, in its one canonical spelling."""
    if not isinstance(text, str) or len(text) > _LARGEST_ENVELOPE:
        raise InvalidCertificate(f"the envelope's {what} is no base64 of a bearable length")
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if not decoded or base64.b64encode(decoded).decode("ascii") != text:
        raise InvalidCertificate(f"the envelope's {what} is not canonical base64")
    return decoded


def _read_json(text: str | bytes, what: str) -> object:
    """JSON as RFC 8259 has it: no NaN, and no key twice in an object, of which readers would see different ones."""
    if len(text) > _LARGEST_ENVELOPE:
        raise InvalidCertificate(f"the {what} is over {_LARGEST_ENVELOPE} bytes")
    try:
        value: object = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        raise InvalidCertificate(f"the {what} is not JSON, or repeats a key") from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a repeated key")
    return fields


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError("a number beyond what a float holds")
    return number


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidCertificate(f"the {what} is not a JSON object")
    return value
