"""Keys and what they seal: tenant keys, single-use data keys, the service's own keys. Knows SQL and the key provider.

A tenant key (KEK) never leaves the provider; the database holds its id. A data key seals one byte stream, once,
and lies wrapped in the row of the object that it sealed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from sqlalchemy import Select, delete, event, select
from sqlalchemy.orm import Session

from cloister.wire.certificate import key_id as certificate_key_id
from cloister_privacy.sealing import Context, KeyProvider, new_key, open_sealed, seal
from cloister_server.errors import StartRefused
from cloister_server.store.blobs import Blobs
from cloister_server.store.tables import SealedObject, SigningKey, TenantKey, new_id

__all__ = [
    "SYSTEM_KEY_ID",
    "DataKey",
    "Kind",
    "Purpose",
    "SigningSecret",
    "abandon_object",
    "content_mac",
    "data_key",
    "forget_objects",
    "new_data_key",
    "new_signing_key",
    "new_tenant_key",
    "open_object",
    "seal_object",
    "signing_key",
    "unit_macs",
]

log = logging.getLogger(__name__)

SYSTEM_KEY_ID = "system"
"""The key in the provider that wraps the service's own signing keys."""

_AT_ONCE = 500
"""Ids in one statement: databases bound the parameters of one."""

_UNITS_ID = "units"
"""The object id of the one key of a tenant that tells its users apart: a second one cannot be stored."""

Kind = Literal["part", "manifest", "spec", "checkpoint", "weights", "initial", "units", "answer"]
Purpose = Literal["token", "certificate", "pepper"]


@dataclass(frozen=True, slots=True)
class DataKey:
    """A key for one byte stream, with the context that the stream is bound to."""

    object_id: str
    secret: bytes = field(repr=False)
    context: Context

    def to_message(self) -> dict[str, str]:
        """For a child's pipe, and nowhere else."""
        return {"kind": self.context.kind, "object": self.object_id, "secret": base64.b64encode(self.secret).decode()}

    @classmethod
    def from_message(cls, tenant_id: str, message: dict[str, str]) -> DataKey:
        context = Context(tenant=tenant_id, kind=message["kind"], object=message["object"])
        return cls(message["object"], base64.b64decode(message["secret"]), context)


@dataclass(frozen=True, slots=True)
class SigningSecret:
    """A key of the service: PKCS#8 DER for 'token' and 'certificate', 32 raw bytes for 'pepper'."""

    id: str
    secret: bytes = field(repr=False)
    public: dict[str, Any]


def new_tenant_key(session: Session, keys: KeyProvider, tenant_id: str) -> None:
    """Create the tenant's first key-encryption key in the provider and name it in the database."""
    key_id = f"{tenant_id}.{secrets.token_hex(8)}"
    keys.create_key(key_id)
    session.add(TenantKey(tenant_id=tenant_id, version=1, key_id=key_id))


def new_data_key(session: Session, keys: KeyProvider, *, tenant_id: str, kind: Kind) -> DataKey:
    """A fresh data key, its wrapped form in the session; it may seal one stream, in one process, once."""
    tenant_key = session.scalars(_newest_tenant_key(tenant_id)).one()
    return _new_data_key(session, keys, tenant_key, kind=kind, object_id=new_id("obj"))


def data_key(session: Session, keys: KeyProvider, *, tenant_id: str, object_id: str) -> DataKey:
    """The data key of an object that is already sealed."""
    row = session.get_one(SealedObject, (tenant_id, object_id))
    tenant_key = session.get_one(TenantKey, (tenant_id, row.key_version))
    context = Context(tenant=tenant_id, kind=row.kind, object=object_id)
    return DataKey(object_id, keys.unwrap(tenant_key.key_id, row.wrapped_key, context=context), context)


def seal_object(
    session: Session, keys: KeyProvider, blobs: Blobs, plaintext: bytes, *, tenant_id: str, kind: Kind
) -> str:
    """Seal and store one object under a fresh key; its id may be named by rows of the same transaction."""
    key = new_data_key(session, keys, tenant_id=tenant_id, kind=kind)
    blobs.put(tenant_id, key.object_id, seal(plaintext, key=key.secret, context=key.context))
    return key.object_id


def open_object(session: Session, keys: KeyProvider, blobs: Blobs, *, tenant_id: str, object_id: str) -> bytes:
    """The plaintext of an object, in memory only. Raises InvalidSeal where a bit of it was touched."""
    key = data_key(session, keys, tenant_id=tenant_id, object_id=object_id)
    return bytes(open_sealed(blobs.get(tenant_id, object_id), key=key.secret, context=key.context))


def content_mac(session: Session, keys: KeyProvider, content: bytes, *, tenant_id: str, object_id: str) -> bytes:
    """HMAC-SHA256 of an object's plaintext, under a key that its data key derives for this alone.

    Whoever reads the database learns nothing from it, not even which objects hold the same; it dies with the data key.
    """
    key = data_key(session, keys, tenant_id=tenant_id, object_id=object_id)
    info = b"cloister.content/1\n" + key.context.to_bytes()
    return hmac.digest(HKDF(SHA512(), length=32, salt=None, info=info).derive(key.secret), content, hashlib.sha256)


def unit_macs(session: Session, keys: KeyProvider, ids: Iterable[bytes], *, tenant_id: str) -> list[bytes]:
    """HMAC-SHA256 of each user's id, under a key of the tenant's alone: of an id always the same, in whatever dataset.

    Whoever reads the database learns no id from it, and cannot try one out; it dies with the tenant's key.
    """
    key = _units_key(session, keys, tenant_id)
    info = b"cloister.units/1\n" + key.context.to_bytes()
    secret = HKDF(SHA512(), length=32, salt=None, info=info).derive(key.secret)
    return [hmac.digest(secret, each, "sha256") for each in ids]


def forget_objects(session: Session, blobs: Blobs, object_ids: Sequence[str], *, tenant_id: str) -> None:
    """Delete the wrapped keys of objects that nothing names any more and, once that is committed, their blobs.

    A blob that stays, because the process died in between, is bytes that no key opens.
    """
    for first in range(0, len(object_ids), _AT_ONCE):
        some = object_ids[first : first + _AT_ONCE]
        session.execute(delete(SealedObject).where(SealedObject.tenant_id == tenant_id, SealedObject.id.in_(some)))

    def remove_blobs(_: Session) -> None:
        for object_id in object_ids:
            abandon_object(blobs, object_id, tenant_id=tenant_id)

    event.listen(session, "after_commit", remove_blobs, once=True)


def abandon_object(blobs: Blobs, object_id: str, *, tenant_id: str) -> None:
    """Delete the blob of an object whose key is deleted, or never comes to be stored: bytes that nothing opens."""
    try:
        blobs.delete(tenant_id, object_id)
    except OSError as error:
        log.error("blob.not_deleted", extra={"object_id": object_id, "error": type(error).__name__})


def new_signing_key(session: Session, keys: KeyProvider, purpose: Purpose) -> SigningSecret:
    """Create a key of the service, its private part wrapped by the system key."""
    key_id, secret, public = _generate(purpose)
    wrapped = keys.wrap(SYSTEM_KEY_ID, secret, context=_signing_context(purpose, key_id))
    session.add(SigningKey(id=key_id, purpose=purpose, public=public, wrapped=wrapped))
    return SigningSecret(key_id, secret, public)


def signing_key(session: Session, keys: KeyProvider, purpose: Purpose) -> SigningSecret:
    """The newest key of this purpose. Raises StartRefused where `cloister-admin init` has not run."""
    row = session.scalars(
        select(SigningKey).where(SigningKey.purpose == purpose).order_by(SigningKey.created.desc()).limit(1)
    ).one_or_none()
    if row is None:
        raise StartRefused(f"there is no {purpose} key: this deployment is not initialised; run `cloister-admin init`")
    secret = keys.unwrap(SYSTEM_KEY_ID, row.wrapped, context=_signing_context(purpose, row.id))
    return SigningSecret(row.id, secret, row.public)


def _newest_tenant_key(tenant_id: str) -> Select[TenantKey]:
    return select(TenantKey).where(TenantKey.tenant_id == tenant_id).order_by(TenantKey.version.desc()).limit(1)


def _new_data_key(session: Session, keys: KeyProvider, tenant_key: TenantKey, *, kind: Kind, object_id: str) -> DataKey:
    tenant_id, secret = tenant_key.tenant_id, new_key()
    context = Context(tenant=tenant_id, kind=kind, object=object_id)
    session.add(
        SealedObject(
            tenant_id=tenant_id,
            id=object_id,
            kind=kind,
            key_version=tenant_key.version,
            wrapped_key=keys.wrap(tenant_key.key_id, secret, context=context),
        )
    )
    return DataKey(object_id, secret, context)


def _units_key(session: Session, keys: KeyProvider, tenant_id: str) -> DataKey:
    """The tenant's key for its users, made at the first look. It seals nothing: other keys are derived from it."""
    place = (tenant_id, _UNITS_ID)
    if session.get(SealedObject, place) is None:
        # Of two that find none one waits here, and then finds the other's.
        tenant_key = session.scalars(_newest_tenant_key(tenant_id).with_for_update()).one()
        if session.get(SealedObject, place) is None:
            return _new_data_key(session, keys, tenant_key, kind="units", object_id=_UNITS_ID)
    return data_key(session, keys, tenant_id=tenant_id, object_id=_UNITS_ID)


def _signing_context(purpose: Purpose, key_id: str) -> Context:
    return Context(tenant="system", kind=purpose, object=key_id)


def _generate(purpose: Purpose) -> tuple[str, bytes, dict[str, Any]]:
    if purpose == "pepper":
        return new_id("pep"), secrets.token_bytes(32), {}
    if purpose == "certificate":
        signer = Ed25519PrivateKey.generate()
        raw = signer.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        key_id = certificate_key_id(raw)
        secret = signer.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return key_id, secret, {"kty": "OKP", "crv": "Ed25519", "kid": key_id, "x": _b64(raw)}
    token_signer = ec.generate_private_key(ec.SECP256R1())
    numbers = token_signer.public_key().public_numbers()
    public = {"kty": "EC", "crv": "P-256", "x": _b64(numbers.x.to_bytes(32)), "y": _b64(numbers.y.to_bytes(32))}
    thumbprint = hashlib.sha256(
        f'{{"crv":"P-256","kty":"EC","x":"{public["x"]}","y":"{public["y"]}"}}'.encode()
    ).digest()  # RFC 7638
    key_id = _b64(thumbprint)
    secret = token_signer.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return key_id, secret, {**public, "kid": key_id, "alg": "ES256", "use": "sig"}


def _b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
