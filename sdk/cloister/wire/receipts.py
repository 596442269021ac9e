"""The receipt of a shredding: which keys were destroyed, how finally, and what that covers and what it does not. Knows no server."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import timedelta
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AwareDatetime, Field, StringConstraints, ValidationInfo, field_validator

from cloister.wire._model import Identifier, Name, Response
from cloister.wire.dsse import Envelope, Keys, canonical_json, sign_statement, verify_statement

__all__ = ["RECEIPT_TYPE", "DestroyedKey", "KeystoreCopy", "Receipt", "is_receipt", "sign_receipt", "verify_receipt"]

RECEIPT_TYPE = "urn:cloister:shredding:1"

_Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
_Counted = Annotated[int, Field(ge=0, lt=2**63)]


class DestroyedKey(Response):
    """One version of the tenant's key-encryption key, which wrapped the keys of what the tenant had here."""

    version: Annotated[int, Field(ge=1)]
    key_id: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    """Its name with its provider; the key itself was never in the database."""
    provider: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    kind: Literal["local", "pkcs11", "aws_kms", "aws_kms_held", "vault_transit"] | str | None
    """None where the service does not know the provider any more."""
    created: AwareDatetime
    outcome: Literal["destroyed", "absent", "earlier", "left", "unreached"] | str
    """'destroyed' by the shredding; 'absent': when it was asked for, its provider did not have it any more, and who took it
    away is not known; 'earlier': the service had destroyed it before the shredding; 'left': it is the customer's own, which
    nobody but the customer destroys; 'unreached': it is with a provider that the customer holds, and had withdrawn by then."""
    destroyed: AwareDatetime
    """When its provider had destroyed it, or been told to; when it was missed, where it was absent."""
    claim: _Text
    """How final that is, as the provider's own interface says; nothing beyond it is claimed."""
    waiting_days: Annotated[int, Field(ge=0, le=36_500)] | None
    """How long the provider can still be told to give the key back. None where that is not known."""
    gone: AwareDatetime | None
    """From when on it is gone for good: `destroyed`, and the days that the provider waits."""

    @field_validator("gone")
    @classmethod
    def _after_the_days(cls, gone: AwareDatetime | None, info: ValidationInfo) -> AwareDatetime | None:
        destroyed, days = info.data.get("destroyed"), info.data.get("waiting_days")
        if destroyed is None:
            return gone  # which is told of as a fault of its own
        if gone != (None if days is None else destroyed + timedelta(days=days)):
            raise ValueError("it is not the day that the waiting days lead to")
        return gone


class KeystoreCopy(Response):
    """A backup of the service's own keystore that may hold keys of the receipt: with its root key, they open what they wrapped."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    place: _Text
    created: AwareDatetime
    keys: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    """The versions that were in the keystore when it was copied."""


class Receipt(Response):
    """What the service states of a tenant that it shredded: immutable, and no more than what it did itself."""

    tenant: Identifier
    name: Name
    begun: AwareDatetime
    """From when on the tenant's clients were refused and nothing new was sealed for it."""
    issued: AwareDatetime
    """When all of it was done."""
    keys: Annotated[tuple[DestroyedKey, ...], Field(min_length=1)]
    deleted: dict[str, _Counted]
    """What was deleted -> how many."""
    kept: dict[str, _Text]
    """What is still there, and why."""
    covers: dict[str, _Text]
    not_covered: dict[str, _Text]
    """What the destruction of the keys does not reach."""
    keystore_copies: tuple[KeystoreCopy, ...]
    """The backups of the keystore that the service knows of: nobody has to have told it of others."""
    server: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    """The version of the code that did it."""


def sign_receipt(receipt: Receipt, *, private_key: Ed25519PrivateKey, key_id: str) -> dict[str, Any]:
    """The receipt's DSSE envelope. `key_id` must be that of the private key."""
    return sign_statement(
        receipt, _subject(receipt), predicate_type=RECEIPT_TYPE, private_key=private_key, key_id=key_id
    )


def verify_receipt(envelope: Envelope, keys: Keys) -> Receipt:
    """The receipt in an envelope that one of `keys` has signed, whole.

    Raises InvalidCertificate, or InvalidArgument where the keys are in no known form.
    """
    return verify_statement(envelope, keys, kind=Receipt, predicate_type=RECEIPT_TYPE, subject=_subject)


def is_receipt(envelope: Envelope) -> bool:
    """Whether an envelope says that it is a receipt. Nothing is verified, and whatever cannot be read is none."""
    try:
        read = json.loads(envelope) if isinstance(envelope, str | bytes) else envelope
        return bool(json.loads(base64.b64decode(read["payload"]))["predicateType"] == RECEIPT_TYPE)
    except (LookupError, TypeError, ValueError, RecursionError):
        return False


def _subject(receipt: Receipt) -> dict[str, Any]:
    """The tenant, and the keys by their names: no two shreddings have a subject in common."""
    keys = [[key.version, key.provider, key.key_id] for key in receipt.keys]
    return {"name": receipt.tenant, "digest": {"sha256": hashlib.sha256(canonical_json(keys)).hexdigest()}}
