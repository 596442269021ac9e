"""Recipients: a tenant's key pairs that uploads are sealed for on the client. Knows SQL, keys and the sealing; never a row.

A private key is derived, when it is needed, from a data key that seals nothing: a rotation of the tenant's key rewraps it, and
shredding the tenant ends it.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister.wire import recipients as wire
from cloister.wire.recipients import InvalidSealedPart, RecipientKey
from cloister_server import audit, policy, vault
from cloister_server.errors import Invalid
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.tables import SealedObject, Tenant
from cloister_server.vault import DataKey

__all__ = ["SealedPartRefused", "create", "listed", "open_part", "remove"]


class SealedPartRefused(Invalid):
    """A sealed part that does not open here. One message for every reason: whoever tries parts out learns nothing of a key."""

    default_code = "sealed_part_refused"

    def __init__(self) -> None:
        super().__init__(
            "the sealed part does not open: it was changed on the way, or sealed for another dataset, part or tenant, or for a "
            "recipient that is no more; get the tenant's current recipient line from its operator, and upload again with that"
        )


def create(session: Session, principal: Principal, service: Service) -> str:
    """A new recipient of the operator's tenant; its line, to be handed to whoever uploads by another way than this service."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    key = vault.new_data_key(session, tenant_id=tenant.id, kind="recipient")
    audit.allowed(session, authorized, "recipient.create", key.object_id)
    return _line(key)


def listed(session: Session, principal: Principal, service: Service) -> list[str]:
    """The lines of the operator's tenant, oldest first."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    of_tenant = (SealedObject.tenant_id == tenant.id, SealedObject.kind == "recipient")
    ids = session.scalars(select(SealedObject.id).where(*of_tenant).order_by(SealedObject.created, SealedObject.id))
    return [_line(key) for key in vault.data_keys(session, ids.all(), tenant_id=tenant.id)]


def remove(session: Session, principal: Principal, service: Service, recipient_id: str) -> None:
    """Delete a recipient of the operator's tenant: from then on what is sealed for it is refused."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    row = _row(session, tenant.id, recipient_id)
    if row is None:
        raise Invalid(f"the tenant has no recipient {recipient_id!r}; list its recipients, and give the id of one")
    session.delete(row)
    audit.allowed(session, authorized, "recipient.remove", recipient_id)


def open_part(
    session: Session, service: Service, *, tenant_id: str, dataset_id: str, number: int, sealed: bytes
) -> bytes:
    """The body of a part that was sealed for a recipient of this tenant and for this place. Raises SealedPartRefused."""
    try:
        recipient_id = wire.recipient_of(sealed)
        if _row(session, tenant_id, recipient_id) is None:
            raise InvalidSealedPart
        key = vault.data_key(session, tenant_id=tenant_id, object_id=recipient_id)
        return wire.open_part(
            _private(key), sealed, tenant=tenant_id, recipient_id=recipient_id, dataset=dataset_id, part=number
        )
    except InvalidSealedPart:
        raise SealedPartRefused from None


def _row(session: Session, tenant_id: str, recipient_id: str) -> SealedObject | None:
    row = session.get(SealedObject, (tenant_id, recipient_id))
    return row if row is not None and row.kind == "recipient" else None


def _private(key: DataKey) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(key.derived("recipient"))


def _line(key: DataKey) -> str:
    public = _private(key).public_key().public_bytes_raw()
    return str(RecipientKey(key.context.tenant, key.object_id, public))
