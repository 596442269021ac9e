"""Models and their versions: published once per job, listed, opened into memory for serving. Knows SQL and the vault."""

from __future__ import annotations

import hashlib
from importlib.metadata import version as installed
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_der_private_key
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from cloister.wire import jobs as wire
from cloister.wire.certificate import (
    Certificate,
    ChargedEvent,
    digest_of,
    environment_digest,
    installed_distributions,
    sign,
    verify,
)
from cloister.wire.dsse import canonical_json
from cloister.wire.plans import NetworkView, TrainingSpec
from cloister.wire.statements import Audit, Deployment, sign_audit, sign_deployment
from cloister_privacy.plan import DPPlan
from cloister_server import ledger, plans, policy, vault
from cloister_server.errors import NotFound
from cloister_server.policy import Authorized
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import chain
from cloister_server.store.paging import page_of
from cloister_server.store.queries import public_keys
from cloister_server.store.tables import Attempt, Job, LedgerEntry, Model, ModelVersion, Source, now

if TYPE_CHECKING:
    from cloister_privacy.architecture import Network

__all__ = [
    "audit_statement",
    "deployment",
    "find_version",
    "get",
    "get_version",
    "listed",
    "network",
    "open_network",
    "publish",
    "schema",
    "schema_of",
    "versions",
]


_SCHEMAS_KEPT = 1024
_schemas: dict[str, wire.ModelSchema] = {}
"""By the id of the weights."""


def get(session: Session, principal: Principal, id_or_name: str) -> wire.Model:
    return view(policy.find(session, principal, "model.read", Model, id_or_name).resource)


def listed(session: Session, principal: Principal, *, cursor: str | None, limit: int) -> wire.Page:
    """The models that the principal may see."""
    return page_of(session, principal, Model, cursor=cursor, limit=limit, view=view)


def versions(session: Session, principal: Principal, id_or_name: str) -> wire.Page:
    """Every version of a model, oldest first."""
    model = policy.find(session, principal, "model.read", Model, id_or_name).resource
    rows = session.scalars(_versions(model).order_by(ModelVersion.version))
    return wire.Page(items=[view_version(model, row).model_dump(mode="json") for row in rows])


def get_version(session: Session, principal: Principal, id_or_name: str, number: int) -> wire.ModelVersion:
    model = policy.find(session, principal, "model.read", Model, id_or_name).resource
    return view_version(model, _version(session, model, number))


def deployment(
    session: Session, principal: Principal, service: Service, id_or_name: str, number: int
) -> dict[str, object]:
    """The signed statement that this server answers with a version, since it was published; it names the certificate's digest."""
    model = policy.find(session, principal, "model.read", Model, id_or_name).resource
    row = _version(session, model, number)
    certificate = verify(row.certificate, public_keys(session, "certificate"))
    key, private = _signer(session, service)
    statement = Deployment(
        tenant=model.tenant_id,
        model=model.id,
        version=row.version,
        certificate_digest=digest_of(row.certificate),
        weights_digest=certificate.weights_digest,
        server=installed("cloister"),
        since=row.created,
    )
    return sign_deployment(statement, private_key=private, key_id=key)


def audit_statement(
    session: Session, principal: Principal, service: Service, id_or_name: str, number: int
) -> dict[str, object]:
    """The signed statement of what canaries gave away, of a version whose run asked for an audit, about its certificate."""
    model = policy.find(session, principal, "model.read", Model, id_or_name).resource
    row = _version(session, model, number)
    trained = select(Attempt).where(
        Attempt.tenant_id == row.tenant_id, Attempt.job_id == row.job_id, Attempt.outcome == "trained"
    )
    found = (session.scalars(trained).one().result or {}).get("audit")
    if found is None:
        raise NotFound("audit of this version")
    certificate = verify(row.certificate, public_keys(session, "certificate"))
    key, private = _signer(session, service)
    statement = Audit(
        certificate_digest=digest_of(row.certificate),
        engine=certificate.engine,
        method="one-run canary audit of the engine at this epsilon, arXiv 2305.08846",
        issued=row.created,
        **found,
    )
    return sign_audit(statement, private_key=private, key_id=key)


def find_version(
    session: Session, principal: Principal, id_or_name: str, number: int | None
) -> tuple[Authorized[Model], ModelVersion]:
    """The version to answer with (the champion where none is named), if the principal may predict with it."""
    authorized = policy.find(session, principal, "model.predict", Model, id_or_name)
    return authorized, _version(session, authorized.resource, number or authorized.resource.champion)


def schema(session: Session, principal: Principal, service: Service, id_or_name: str, number: int) -> wire.ModelSchema:
    """What a version reads and predicts, for whoever may predict with it: it is sealed with the weights."""
    return schema_of(session, service, find_version(session, principal, id_or_name, number)[1])


def schema_of(session: Session, service: Service, row: ModelVersion) -> wire.ModelSchema:
    """What a version reads and predicts. It never changes, so it is read from the sealed weights once a process."""
    known = _schemas.get(row.weights_id)
    if known is None:
        spec = open_network(session, service, row).architecture
        known = _schemas[row.weights_id] = wire.ModelSchema(inputs=spec.inputs, target=spec.target, output=spec.output)
        while len(_schemas) > _SCHEMAS_KEPT:
            _schemas.pop(next(iter(_schemas)), None)
    return known


def network(session: Session, principal: Principal, service: Service, id_or_name: str, number: int) -> NetworkView:
    """A version's network as a table and as a picture, for whoever may publish to the model: it is sealed with the weights."""
    model = policy.find(session, principal, "model.publish", Model, id_or_name).resource
    return plans.view_network(open_network(session, service, _version(session, model, number)).architecture)


def open_network(session: Session, service: Service, row: ModelVersion) -> Network:
    """The version's network, opened from its sealed weights into memory."""
    from cloister_privacy.architecture import from_bytes

    weights = vault.open_object(session, service.keys, service.blobs, tenant_id=row.tenant_id, object_id=row.weights_id)
    return from_bytes(weights)


def publish(session: Session, service: Service, job: Job, *, attempt: Attempt, spec: TrainingSpec) -> int:
    """Make the attempt's weights the next version of the job's model, with its signed certificate. Once per job."""
    published = session.scalars(
        select(ModelVersion).where(ModelVersion.tenant_id == job.tenant_id, ModelVersion.job_id == job.id)
    ).one_or_none()
    if published is not None:
        return published.version
    model = session.get_one(Model, (job.tenant_id, job.model_id), with_for_update=True)
    newest = session.scalar(
        select(func.coalesce(func.max(ModelVersion.version), 0)).where(
            ModelVersion.tenant_id == model.tenant_id, ModelVersion.model_id == model.id
        )
    )
    number = int(newest or 0) + 1
    assert attempt.result is not None  # noqa: S101 (a 'trained' attempt has left one)
    session.add(
        ModelVersion(
            tenant_id=model.tenant_id,
            model_id=model.id,
            version=number,
            job_id=job.id,
            weights_id=attempt.result["weights_id"],
            certificate=_certificate(
                session, service, job, model=model, version=number, result=attempt.result, spec=spec
            ),
        )
    )
    model.champion = number
    return number


def view(model: Model) -> wire.Model:
    return wire.Model(id=model.id, name=model.name, champion=model.champion or None, created=model.created)


def view_version(model: Model, row: ModelVersion) -> wire.ModelVersion:
    return wire.ModelVersion(
        model=model.id,
        name=model.name,
        version=row.version,
        job=row.job_id,
        certificate=row.certificate,
        created=row.created,
    )


def _versions(model: Model) -> Select[ModelVersion]:
    return select(ModelVersion).where(ModelVersion.tenant_id == model.tenant_id, ModelVersion.model_id == model.id)


def _version(session: Session, model: Model, number: int) -> ModelVersion:
    row = session.get(ModelVersion, (model.tenant_id, model.id, number))
    if row is None:
        raise NotFound("model version")
    return row


def _certificate(
    session: Session,
    service: Service,
    job: Job,
    *,
    model: Model,
    version: int,
    result: dict[str, str],
    spec: TrainingSpec,
) -> dict[str, object]:
    source = session.get_one(Source, (job.tenant_id, job.source_id))
    plan = DPPlan.of(spec, unit=source.unit, adjacency=source.adjacency)
    certificate = Certificate(
        tenant=job.tenant_id,
        model=model.id,
        name=model.name,
        version=version,
        job=job.id,
        source=source.id,
        dataset=job.dataset_id,
        datasets=(spec.dataset, *spec.with_datasets),
        weights_digest=result["weights_digest"],
        sealed_digest=result.get("sealed_digest"),
        architecture_digest=result["architecture_digest"],
        initial_digest=result["initial_digest"],
        initial="drawn" if spec.initial is None else "uploaded",
        epsilon=plan.epsilon(),
        delta=plan.delta,
        event=plan.event(),
        events=tuple(
            _charged(row) for row in ledger.entries_of_job(session, job.tenant_id, job.id, "reserve", "settle")
        ),
        sampler="poisson",
        clip=plan.clip,
        nominal_size=plan.nominal_size,
        capacity=plan.capacity,
        rows_per_unit=plan.rows_per_unit,
        unit=plan.unit,
        adjacency=plan.adjacency,
        accountant="rdp",
        engine={name: installed(name) for name in ("cloister", "torch", "opacus")},
        code_version=installed("cloister"),
        environment_digest=environment_digest(installed_distributions()),
        issued=now(),
    )
    key, private = _signer(session, service)
    return sign(certificate, private_key=private, key_id=key)


def _charged(row: LedgerEntry) -> ChargedEvent:
    """A ledger row as a certificate names it: the reservation of each block, and the settlement."""
    digest = hashlib.sha256(canonical_json(chain.canonical(row))).hexdigest()
    return ChargedEvent(source=row.source_id, id=chain.row_id(row), block=row.block, digest=digest)


def _signer(session: Session, service: Service) -> tuple[str, Ed25519PrivateKey]:
    key = vault.signing_key(session, service.keys, "certificate")
    private = load_der_private_key(key.secret, None)
    assert isinstance(private, Ed25519PrivateKey)  # noqa: S101 (what vault made for this purpose)
    return key.id, private
