"""The certificate of a model version: what it cost in privacy, signed. An in-toto Statement in a DSSE envelope.

Knows Ed25519 and JSON; nothing of where envelopes are kept or by whom a key is vouched for. Whoever verifies brings
keys got from somewhere better than the envelope's own sender.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import AwareDatetime, Field, StringConstraints, ValidationError

from cloister.wire._errors import CloisterError, InvalidArgument
from cloister.wire._model import Count, Identifier, Name, PositiveFloat, Probability, Response
from cloister.wire.plans import Event

__all__ = [
    "PAYLOAD_TYPE",
    "PREDICATE_TYPE",
    "STATEMENT_TYPE",
    "Certificate",
    "Digest",
    "InvalidCertificate",
    "Keys",
    "key_id",
    "sign",
    "verify",
]

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:cloister:certificate:1"
_LARGEST_ENVELOPE = 2**20

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, in lower-case hexadecimal."""


Keys = Mapping[str, bytes | str | Ed25519PublicKey] | Mapping[str, Any] | Iterable[Mapping[str, Any]]
"""Public keys: by key id, each as 32 raw bytes, their hexadecimal or an object; or JWKs, as a list or as a JWK set."""


class InvalidCertificate(CloisterError):
    """An envelope that proves nothing: malformed, signed by no key that was given, or not about one model version."""


class Certificate(Response):
    """What the service states of one model version: immutable, and about the private rows of one dataset only."""

    tenant: Identifier
    model: Identifier
    name: Name
    version: Annotated[int, Field(ge=1)]
    job: Identifier
    source: Identifier
    dataset: Identifier
    weights_digest: Digest
    """Of the plain safetensors bytes: the statement's subject."""
    architecture_digest: Digest
    initial_digest: Digest
    """Of the weights before the first step: what was learned earlier, elsewhere, is not covered."""
    initial: Literal["drawn", "uploaded"] | str | None = None
    """Where those weights came from: drawn at random, or uploaded, and maybe trained on anything. None where it is not told."""
    epsilon: PositiveFloat
    """The run's own, at `delta`, by `accountant`."""
    delta: Probability
    event: Event
    """What the ledger charged."""
    clip: PositiveFloat
    nominal_size: Count
    capacity: Count | None = None
    """The most units that the owner declared there can be: the claim assumes it. None in certificates from before it was told."""
    rows_per_unit: Count | None = None
    """The most rows of one unit that a step read, each clipped to clip / rows_per_unit. None where `capacity` is."""
    unit: Literal["row", "user"] | str
    adjacency: Literal["add_remove"] | str
    accountant: Literal["rdp"] | str
    engine: dict[str, str]
    """The libraries that trained it -> their versions."""
    issued: AwareDatetime


def key_id(public_raw: bytes) -> str:
    """A public key's id: `ed25519:` and the first 16 bytes of the SHA-256 of its 32 raw bytes, in hexadecimal."""
    if len(public_raw) != 32:
        raise ValueError(f"an Ed25519 public key has 32 raw bytes, not {len(public_raw)}")
    return "ed25519:" + hashlib.sha256(public_raw).hexdigest()[:32]


def sign(certificate: Certificate, *, private_key: Ed25519PrivateKey, key_id: str) -> dict[str, Any]:
    """The certificate's DSSE envelope, ready to be stored as JSON. `key_id` must be that of the private key."""
    if key_id != _id_of(private_key.public_key()):
        raise ValueError(f"the private key is not {key_id}; sign with the key that the id names")
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [_subject(certificate)],
        "predicateType": PREDICATE_TYPE,
        "predicate": certificate.model_dump(mode="json"),
    }
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    signature = private_key.sign(_pre_authentication(PAYLOAD_TYPE, payload))
    return {
        "payload": base64.b64encode(payload).decode("ascii"),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": key_id, "sig": base64.b64encode(signature).decode("ascii")}],
    }


def verify(envelope: Mapping[str, Any] | str | bytes, keys: Keys) -> Certificate:
    """The certificate in an envelope that one of `keys` has signed, whole.

    Takes the envelope as JSON text or already read; the keys as `client.certificate_keys()` gives them, raw or in
    hexadecimal, or as `cloister-admin init` prints them. Whether the weights at hand are those of `weights_digest` is
    the caller's to compare. Raises InvalidCertificate, or InvalidArgument where the keys are in no known form.
    """
    known = _by_id(keys)
    if isinstance(envelope, str | bytes):
        envelope = _object(_read_json(envelope, "envelope"), "envelope")
    elif not isinstance(envelope, Mapping):
        raise InvalidCertificate(f"a {type(envelope).__name__} is no envelope; give model.certificate, or its JSON")
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        raise InvalidCertificate(f"the envelope's payloadType is not {PAYLOAD_TYPE}; it is no certificate")
    payload = _base64(envelope.get("payload"), "payload")
    signer, signature = _only_signature(envelope.get("signatures"))
    try:
        _known_key(signer, known).verify(signature, _pre_authentication(PAYLOAD_TYPE, payload))
    except InvalidSignature:
        raise InvalidCertificate("the signature is not the key's: the certificate was changed or forged") from None
    return _certificate(_object(_read_json(payload, "statement"), "statement"))


def _certificate(statement: dict[str, Any]) -> Certificate:
    if statement.get("_type") != STATEMENT_TYPE:
        raise InvalidCertificate(f"the statement's type is not {STATEMENT_TYPE}; it is no certificate")
    if statement.get("predicateType") != PREDICATE_TYPE:
        raise InvalidCertificate(f"the predicate's type is not {PREDICATE_TYPE}; verify with a release that knows it")
    try:
        certificate = Certificate.model_validate_json(json.dumps(statement.get("predicate")), strict=True)
    except ValidationError as exc:
        fields = sorted({".".join(str(part) for part in error["loc"]) for error in exc.errors()})
        raise InvalidCertificate(f"the predicate is malformed at: {', '.join(fields)}") from None
    if statement.get("subject") != [_subject(certificate)]:
        raise InvalidCertificate(
            "the statement's subject is not the model version and weights that its predicate names"
        )
    return certificate


def _subject(certificate: Certificate) -> dict[str, Any]:
    return {
        "name": f"{certificate.model}/versions/{certificate.version}",
        "digest": {"sha256": certificate.weights_digest},
    }


def _pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """DSSE's PAE, protocol v1: the signed bytes, in which type and payload cannot be taken for one another."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _only_signature(signatures: object) -> tuple[str, bytes]:
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise InvalidCertificate("a certificate carries exactly one signature")
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
