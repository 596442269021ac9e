"""Weights that people upload to start training from: sealed at once, told by their digest. Knows SQL and the vault."""

from __future__ import annotations

from sqlalchemy.orm import Session

from cloister.wire.architecture import Architecture
from cloister.wire.layers import is_frozen
from cloister.wire.plans import Initial, LoRA
from cloister.wire.weights import Weights as WeightsView
from cloister_server import audit, grants, policy, quotas, vault
from cloister_server.errors import Conflict
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.tables import Dataset, Tenant, Weights, new_id

__all__ = ["create", "digest_of", "may_create", "require_named", "require_start", "usable"]


def may_create(session: Session, principal: Principal) -> policy.Authorized[Tenant]:
    """The proof that the principal may upload weights, asked for before they are read."""
    return policy.authorize(session, principal, "weights.create", session.get_one(Tenant, principal.tenant_id))


def digest_of(body: bytes) -> str:
    """The digest of uploaded weights. Raises InitialRefused unless they are finite float32 safetensors."""
    from cloister_privacy.training.start import digest_of as digest

    return digest(body)


def create(session: Session, principal: Principal, service: Service, body: bytes, *, digest: str) -> WeightsView:
    """Seal uploaded weights of this digest."""
    authorized, tenant_id = may_create(session, principal), principal.tenant_id
    object_id = vault.seal_object(session, service.blobs, body, tenant_id=tenant_id, kind="initial")
    row = Weights(tenant_id=tenant_id, id=new_id("wts"), object_id=object_id, digest=digest)
    session.add(row)
    session.flush()  # the grants name the row
    grants.grant_to_creator(session, principal, row)
    quotas.require_sealed(session, principal, service, tenant_id=tenant_id, object_id=object_id)
    audit.allowed(session, authorized, "weights.create", row.id)
    return WeightsView(id=row.id, digest=row.digest, created=row.created)


def usable(
    session: Session, principal: Principal, weights_id: str | None, *, dataset: Dataset
) -> policy.Authorized[Weights] | None:
    """The weights that a run on this dataset starts from, if the principal may use them; None where none are named."""
    if weights_id is None:
        return None
    authorized = policy.find(session, principal, "weights.use", Weights, weights_id)
    if authorized.resource.tenant_id != dataset.tenant_id:
        raise Conflict(
            "the weights are another tenant's than the dataset, and a run is sealed under one tenant's key; upload them as an app of "
            "the dataset's tenant",
            code="weights_elsewhere",
        )
    return authorized


def require_named(authorized: policy.Authorized[Weights] | None, named: Initial | None) -> None:
    """Refuse a spec that names these weights by another digest."""
    if authorized is not None and named is not None and authorized.resource.digest != named.digest:
        raise Conflict("the weights have another digest than the spec says; plan again", code="weights_differ")


def require_start(
    session: Session,
    service: Service,
    architecture: Architecture,
    lora: LoRA | None,
    authorized: policy.Authorized[Weights] | None,
) -> None:
    """Refuse a run that could not start: weights of another network, adapters for nothing. Slow: in no write transaction."""
    from cloister_privacy.training.start import require_start as require

    body = None
    if authorized is not None:
        row = authorized.resource
        body = vault.open_object(session, service.blobs, tenant_id=row.tenant_id, object_id=row.object_id)
    if body is not None or lora is not None or any(map(is_frozen, architecture.layers)):
        require(architecture, body, lora)
