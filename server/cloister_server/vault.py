"""Keys and what they seal: tenant keys, single-use data keys, the service's own keys. Knows SQL and the key providers.

A tenant key (KEK) never leaves its provider; the database holds its id. A data key seals one byte stream, once,
and lies wrapped in the row of the object that it sealed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)
from sqlalchemy import Select, delete, event, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cloister.wire.certificate import key_id as certificate_key_id
from cloister_privacy.sealing import (
    Context,
    KeyMissing,
    KeyWithheld,
    ProviderUnavailable,
    new_key,
    open_sealed,
    seal,
)
from cloister_server import asking
from cloister_server.errors import ServerError, StartRefused, TenantKeyRefused, Unavailable
from cloister_server.keyring import KeyRing
from cloister_server.service import Service
from cloister_server.store.acting import for_tenants
from cloister_server.store.blobs import Blobs
from cloister_server.store.tables import SYSTEM, Job, SealedObject, SigningKey, TenantKey, new_id

__all__ = [
    "SYSTEM",
    "DataKey",
    "Kind",
    "Purpose",
    "SigningSecret",
    "WrappedKey",
    "abandon_object",
    "active_key",
    "certificate_signer",
    "content_mac",
    "data_key",
    "data_keys",
    "forget_objects",
    "new_data_key",
    "new_data_keys",
    "new_signing_key",
    "new_tenant_key",
    "open_object",
    "open_signing_keys",
    "pepper",
    "require_system_key",
    "seal_object",
    "service_key",
    "signing_context",
    "signing_key",
    "signing_keys",
    "unit_macs",
    "units_key",
    "unwrapped",
    "wrapped_key",
]

log = logging.getLogger(__name__)

_AT_ONCE = 500
"""Ids in one statement: databases bound the parameters of one."""

_UNITS_ID = "units"
"""The object id of the one key of a tenant that tells its users apart: a second one cannot be stored."""

Kind = Literal["part", "manifest", "spec", "checkpoint", "weights", "initial", "units", "answer", "recipient", "roles"]
Purpose = Literal["token", "certificate", "pepper"]


@dataclass(frozen=True, slots=True)
class DataKey:
    """A key for one byte stream, with the context that the stream is bound to."""

    object_id: str
    secret: bytes = field(repr=False)
    context: Context

    def derived(self, purpose: str) -> bytes:
        """32 bytes that are this key's and context's alone, for one purpose (HKDF-SHA512); what they are used for seals nothing."""
        info = f"cloister.{purpose}/1\n".encode() + self.context.to_bytes()
        return HKDF(SHA512(), length=32, salt=None, info=info).derive(self.secret)

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


def new_tenant_key(session: Session, *, provider: str, tenant_id: str | None = None) -> TenantKey:
    """The first key-encryption key of a tenant, or of the system, made in the provider and named in the session.

    A tenant's own id comes with it: it is chosen before the key is made, and the key is named by it.
    """
    of_tenant, key_id = asking.taken(session, _FirstKey(provider, tenant_id))
    key = TenantKey(tenant_id=of_tenant, version=1, provider=provider, key_id=key_id)
    session.add(key)
    return key


def active_key(session: Session, tenant_id: str) -> TenantKey | None:
    """The key that wraps what is new, locked against its end until this transaction's; None where there is none (any more)."""
    held = _active_key(tenant_id).with_for_update(read=True)
    # PostgreSQL waits for a key that is being replaced, and then leaves it out without a look at what came in its place.
    return session.scalars(held).one_or_none() or session.scalars(held).one_or_none()


def new_data_key(
    session: Session, *, tenant_id: str, kind: Kind, object_id: str | None = None, job: Job | None = None
) -> DataKey:
    """A fresh data key, its wrapped form in the session; it may seal one stream, in one process, once.

    `object_id` is given where there may be one of it alone. `job`: the one whose newest attempt it is for, where nothing names
    the object before that ends.
    """
    (key,) = new_data_keys(session, tenant_id=tenant_id, kind=kind, object_id=object_id, job=job)
    return key


def new_data_keys(
    session: Session,
    *,
    tenant_id: str,
    kind: Kind,
    count: int = 1,
    object_id: str | None = None,
    job: Job | None = None,
) -> list[DataKey]:
    """As many fresh keys, asked for together. Raises TenantKeyRefused where the tenant has no active key, or it is withheld."""
    tenant_key = active_key(session, tenant_id)
    if tenant_key is None:
        raise TenantKeyRefused(
            "the tenant's keys are destroyed, or on their way to it: nothing is sealed for it any more"
        )
    under = (tenant_key.provider, tenant_key.key_id)
    made = asking.taken(session, _FreshKeys(*under, tenant_id, kind, object_id, count))
    for key, wrapped in made:
        asking.note(session, WrappedKey(*under, wrapped, key.context), key.secret)
        session.add(
            SealedObject(
                tenant_id=tenant_id,
                id=key.object_id,
                kind=kind,
                key_version=tenant_key.version,
                wrapped_key=wrapped,
                job_id=job.id if job else None,
                attempt=job.attempt if job else None,
            )
        )
    session.flush()  # the row is there before its blob: by that a collection tells what is on its way from what is left over
    return [key for key, _ in made]


def data_key(session: Session, *, tenant_id: str, object_id: str) -> DataKey:
    """The data key of an object that is already sealed. Raises TenantKeyRefused where its KEK is not to be had any more."""
    (key,) = data_keys(session, [object_id], tenant_id=tenant_id)
    return key


def data_keys(session: Session, object_ids: Sequence[str], *, tenant_id: str) -> list[DataKey]:
    """As `data_key`, of many objects, asked for together."""
    wrapped = [wrapped_key(session, tenant_id=tenant_id, object_id=each) for each in object_ids]
    secrets = asking.answered(session, *wrapped)
    return [DataKey(each.context.object, secret, each.context) for each, secret in zip(wrapped, secrets, strict=True)]


def wrapped_key(session: Session, *, tenant_id: str, object_id: str) -> WrappedKey:
    """What `unwrapped` asks the provider. Raises TenantKeyRefused where the KEK is destroyed."""
    row = session.get(SealedObject, (tenant_id, object_id))
    tenant_key = session.get(TenantKey, (tenant_id, row.key_version)) if row else None
    if row is None or tenant_key is None or tenant_key.state == "destroyed":
        raise TenantKeyRefused("the key of this is destroyed: what it sealed opens for nobody any more")
    context = Context(tenant=tenant_id, kind=row.kind, object=object_id)
    return WrappedKey(tenant_key.provider, tenant_key.key_id, row.wrapped_key, context)


def unwrapped(keys: KeyRing, wrapped: WrappedKey) -> DataKey:
    """The data key, of its provider and not from memory: in no transaction. Raises TenantKeyRefused and Unavailable."""
    return DataKey(wrapped.context.object, wrapped.ask(keys), wrapped.context)


def seal_object(session: Session, blobs: Blobs, plaintext: bytes, *, tenant_id: str, kind: Kind) -> str:
    """Seal and store one object under a fresh key; its id may be named by rows of the same transaction."""
    key = new_data_key(session, tenant_id=tenant_id, kind=kind)
    sealed = seal(plaintext, key=key.secret, context=key.context)
    blobs.put(tenant_id, key.object_id, sealed)
    session.get_one(SealedObject, (tenant_id, key.object_id)).size = len(sealed)
    return key.object_id


def open_object(session: Session, blobs: Blobs, *, tenant_id: str, object_id: str) -> bytes:
    """The plaintext of an object, in memory only. Raises InvalidSeal where a bit of it was touched."""
    key = data_key(session, tenant_id=tenant_id, object_id=object_id)
    return bytes(open_sealed(blobs.get(tenant_id, object_id), key=key.secret, context=key.context))


def content_mac(session: Session, content: bytes, *, tenant_id: str, object_id: str) -> bytes:
    """HMAC-SHA256 of an object's plaintext, under a key that its data key derives for this alone.

    Whoever reads the database learns nothing from it, not even which objects hold the same; it dies with the data key.
    """
    key = data_key(session, tenant_id=tenant_id, object_id=object_id)
    return hmac.digest(key.derived("content"), content, hashlib.sha256)


def unit_macs(session: Session, ids: Iterable[bytes], *, tenant_id: str) -> list[bytes]:
    """HMAC-SHA256 of each user's id, under a key of the tenant's alone: of an id always the same, in whatever dataset.

    Whoever reads the database learns no id from it, and cannot try one out; it dies with the tenant's key.
    """
    secret = units_key(session, tenant_id=tenant_id).derived("units")
    return [hmac.digest(secret, each, "sha256") for each in ids]


def units_key(session: Session, *, tenant_id: str) -> DataKey:
    """The tenant's key for its users, made at the first look. It seals nothing: other keys are derived from it."""
    if session.get(SealedObject, (tenant_id, _UNITS_ID)) is None:
        try:
            with session.begin_nested():
                return new_data_key(session, tenant_id=tenant_id, kind="units", object_id=_UNITS_ID)
        except IntegrityError:
            pass  # of two that found none one waited for the other, and finds the other's now
    return data_key(session, tenant_id=tenant_id, object_id=_UNITS_ID)


def forget_objects(session: Session, blobs: Blobs, object_ids: Sequence[str], *, tenant_id: str) -> None:
    """Delete the wrapped keys of objects that nothing names any more and, once that is committed, their blobs.

    A blob that stays, because the process died in between, is bytes that no key opens, until they are collected.
    """
    for first in range(0, len(object_ids), _AT_ONCE):
        some = object_ids[first : first + _AT_ONCE]
        session.execute(delete(SealedObject).where(SealedObject.tenant_id == tenant_id, SealedObject.id.in_(some)))

    def remove_blobs(_: Session) -> None:
        abandon_object(blobs, *object_ids, tenant_id=tenant_id)

    event.listen(session, "after_commit", remove_blobs, once=True)


def abandon_object(blobs: Blobs, *object_ids: str, tenant_id: str) -> None:
    """Delete the blobs of objects whose keys are deleted, or never come to be stored: bytes that nothing opens."""
    try:
        blobs.delete(tenant_id, *object_ids)
    except Unavailable as error:  # they are collected later
        log.error("blob.not_deleted", extra={"object_ids": object_ids, "error": error.code})


def new_signing_key(session: Session, purpose: Purpose, *, state: str = "active") -> SigningSecret:
    """Create a key of the service, its private part wrapped by the system's key. Raises KeyProviderError."""
    kek = session.scalars(_active_key(SYSTEM)).one()
    made, wrapped = asking.taken(session, _FreshSigningKey(kek.provider, kek.key_id, purpose))
    session.add(
        SigningKey(
            id=made.id, purpose=purpose, public=made.public, wrapped=wrapped, key_version=kek.version, state=state
        )
    )
    return made


def signing_key(session: Session, keys: KeyRing, purpose: Purpose) -> SigningSecret:
    """The newest active key of this purpose. Raises StartRefused where `cloister-admin init` has not run, and KeyProviderError."""
    return signing_keys(session, keys, purpose)[0]


def signing_keys(session: Session, keys: KeyRing, *purposes: Purpose) -> list[SigningSecret]:
    """The same of several purposes, asked for together."""
    return open_signing_keys(session, keys, [_newest(session, purpose) for purpose in purposes])


def _newest(session: Session, purpose: Purpose) -> SigningKey:
    of_purpose = select(SigningKey).where(SigningKey.purpose == purpose, SigningKey.state == "active")
    row = session.scalars(of_purpose.order_by(SigningKey.created.desc()).limit(1)).one_or_none()
    if row is None:
        raise StartRefused(f"there is no {purpose} key: this deployment is not initialised; run `cloister-admin init`")
    return row


def service_key(service: Service, purpose: Purpose) -> SigningSecret:
    """The same key, read in a transaction of its own: to be called in none."""
    return service.read(for_tenants(SYSTEM), lambda session: signing_key(session, service.keys, purpose))


def pepper(service: Service) -> bytes:
    """What MACs of secrets, codes and cookies are keyed with, that are not stored themselves. To be called in no transaction."""
    return service_key(service, "pepper").secret


def open_signing_keys(session: Session, keys: KeyRing, rows: Sequence[SigningKey]) -> list[SigningSecret]:
    """The secrets of keys of the service, lately asked for or asked for now, together. Raises KeyProviderError."""
    known, asked = dict[str, bytes](), dict[str, _OftenSecret]()
    for row in rows:
        kek = session.get_one(TenantKey, (SYSTEM, row.key_version))
        if (secret := keys.remembered(kek.provider, kek.key_id, row.wrapped)) is not None:
            known[row.id] = secret
        else:
            context = signing_context(row.purpose, row.id)
            asked[row.id] = _OftenSecret(kek.provider, kek.key_id, row.wrapped, context)
    if asked:
        known.update(zip(asked, asking.answered(session, *asked.values()), strict=True))
    return [SigningSecret(row.id, known[row.id], row.public) for row in rows]


def require_system_key(session: Session) -> None:
    """Raise KeyMissing unless the key that the service's own keys are wrapped by is there, whatever is remembered of it."""
    kek = session.scalars(_active_key(SYSTEM)).one_or_none()
    if kek is None or not all(asking.answered(session, _HasKey(kek.provider, kek.key_id))):
        raise KeyMissing("the service's own key is gone; restore the keystore from its backup")


def certificate_signer(session: Session, keys: KeyRing) -> tuple[str, Ed25519PrivateKey]:
    """The id and the private half of the key that certificates, and whatever else the service states, are signed with."""
    key = signing_key(session, keys, "certificate")
    private = load_der_private_key(key.secret, password=None)
    assert isinstance(private, Ed25519PrivateKey)  # noqa: S101 (this purpose's keys are of no other kind)
    return key.id, private


def signing_context(purpose: str, key_id: str) -> Context:
    """What the wrapped form of a key of the service is bound to."""
    return Context(tenant=SYSTEM, kind=purpose, object=key_id)


@contextmanager
def _asking() -> Iterator[None]:
    """What a provider refuses, as what a caller may be told: a key that was taken away, or no answer. All else is our fault."""
    try:
        yield
    except KeyWithheld as error:
        refusal: ServerError = TenantKeyRefused(
            "the tenant's key is not to be had: whoever holds it has disabled, withdrawn or destroyed it. Nothing of the tenant "
            "opens before it is given back; ask the tenant's key holder, or the server's operator"
        )
        refusal.cause = str(error)
        raise refusal from None
    except ProviderUnavailable as error:
        refusal = Unavailable(
            "the key provider does not answer, so nothing can be opened or made now; retry in a moment"
        )
        refusal.cause = str(error)
        raise refusal from None


def _active_key(tenant_id: str) -> Select[TenantKey]:
    return select(TenantKey).where(TenantKey.tenant_id == tenant_id, TenantKey.state == "active")


@dataclass(frozen=True, slots=True)
class _FirstKey:
    """A tenant's id (the given one, or a new one) and that of its key, made in the provider."""

    provider: str
    tenant_id: str | None

    def ask(self, keys: KeyRing) -> tuple[str, str]:
        tenant_id = self.tenant_id or new_id("tn")
        key_id = f"{tenant_id}.{secrets.token_hex(8)}"
        with _asking():
            keys.of(self.provider).create_key(key_id)
        return tenant_id, key_id


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A data key as its row has it: what its provider is asked to unwrap."""

    provider: str
    key_id: str
    wrapped: bytes
    context: Context

    def ask(self, keys: KeyRing) -> bytes:
        with _asking():
            return keys.of(self.provider).unwrap(self.key_id, self.wrapped, context=self.context)


@dataclass(frozen=True, slots=True)
class _FreshKeys:
    """Data keys that seal nothing yet, each with its wrapped form."""

    provider: str
    key_id: str
    tenant_id: str
    kind: Kind
    object_id: str | None
    count: int

    def ask(self, keys: KeyRing) -> list[tuple[DataKey, bytes]]:
        made = []
        for _ in range(self.count):
            object_id, secret = self.object_id or new_id("rcp" if self.kind == "recipient" else "obj"), new_key()
            context = Context(tenant=self.tenant_id, kind=self.kind, object=object_id)
            with _asking():
                wrapped = keys.of(self.provider).wrap(self.key_id, secret, context=context)
            made.append((DataKey(object_id, secret, context), wrapped))
        return made


@dataclass(frozen=True, slots=True)
class _FreshSigningKey:
    provider: str
    key_id: str
    purpose: Purpose

    def ask(self, keys: KeyRing) -> tuple[SigningSecret, bytes]:
        name, secret, public = _generate(self.purpose)
        wrapped = keys.of(self.provider).wrap(self.key_id, secret, context=signing_context(self.purpose, name))
        return SigningSecret(name, secret, public), wrapped


@dataclass(frozen=True, slots=True)
class _OftenSecret:
    provider: str
    key_id: str
    wrapped: bytes
    context: Context

    def ask(self, keys: KeyRing) -> bytes:
        return keys.unwrap_often(self.provider, self.key_id, self.wrapped, context=self.context)


@dataclass(frozen=True, slots=True)
class _HasKey:
    provider: str
    key_id: str

    def ask(self, keys: KeyRing) -> bool:
        return keys.of(self.provider).has_key(self.key_id)


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
