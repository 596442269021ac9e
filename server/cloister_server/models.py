"""Models and their versions: published once per job, listed, opened into memory for serving. Knows SQL and the vault."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from importlib.metadata import version as installed
from typing import TYPE_CHECKING

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from cloister.wire import jobs as wire
from cloister.wire.architecture import Architecture
from cloister.wire.certificate import (
    Certificate,
    ChargedEvent,
    InvalidCertificate,
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
from cloister_privacy.sealing import Arena, SealedReader
from cloister_privacy.sealing.layout import read_layout
from cloister_privacy.sealing.sources import Sealed
from cloister_server import ledger, plans, policy, vault
from cloister_server.errors import NotFound, ServerError
from cloister_server.policy import Authorized
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store import chain
from cloister_server.store.paging import page_of
from cloister_server.store.queries import public_keys
from cloister_server.store.tables import Attempt, Job, LedgerEntry, Model, ModelVersion, Source, now
from cloister_server.vault import DataKey

if TYPE_CHECKING:
    from cloister_privacy.architecture import Network

__all__ = [
    "architecture",
    "audit_statement",
    "certified",
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

log = logging.getLogger(__name__)

_THREADS = 2
"""That open one model's weights: from some megabytes on the second pays."""


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
    key, private = vault.certificate_signer(session, service.keys)
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
    key, private = vault.certificate_signer(session, service.keys)
    statement = Audit(
        certificate_digest=digest_of(row.certificate),
        engine=certificate.engine,
        method="one-run canary audit of the engine at this epsilon, arXiv 2305.08846",
        issued=row.created,
        **found,
    )
    return sign_audit(statement, private_key=private, key_id=key)


def find_version(
    session: Session, principal: Principal, id_or_name: str, number: int | None, *, verb: str = "model.predict"
) -> tuple[Authorized[Model], ModelVersion]:
    """The version to answer with (the champion where none is named), if the principal may do this with the model."""
    authorized = policy.find(session, principal, verb, Model, id_or_name)
    return authorized, _version(session, authorized.resource, number or authorized.resource.champion)


def schema(session: Session, principal: Principal, service: Service, id_or_name: str, number: int) -> wire.ModelSchema:
    """What a version reads and predicts, for whoever may predict with it: it is sealed with the weights."""
    return schema_of(session, service, find_version(session, principal, id_or_name, number)[1])


def schema_of(session: Session, service: Service, row: ModelVersion) -> wire.ModelSchema:
    """What a version reads and predicts. Nothing of it is remembered: it outlives the tenant's key by no moment."""
    spec = architecture(session, service, row)
    return wire.ModelSchema(inputs=spec.inputs, target=spec.target, output=spec.output)


def network(session: Session, principal: Principal, service: Service, id_or_name: str, number: int) -> NetworkView:
    """A version's network as a table and as a picture, for whoever may publish to the model: it is sealed with the weights."""
    model = policy.find(session, principal, "model.publish", Model, id_or_name).resource
    return plans.view_network(architecture(session, service, _version(session, model, number)))


def certified(session: Session, settings: Settings, row: ModelVersion) -> Certificate | None:
    """What a version's bytes are held against in strict mode: its certificate; None where that is off.

    Raises `weights_differ` unless it is signed here, and is this version's.
    """
    if not settings.strict:
        return None
    try:
        certificate = verify(row.certificate, public_keys(session, "certificate"))
    except InvalidCertificate:
        raise _differ("signature", tenant_id=row.tenant_id, model_id=row.model_id, version=row.version) from None
    if (certificate.tenant, certificate.model, certificate.version) != (row.tenant_id, row.model_id, row.version):
        raise _differ("version", tenant_id=row.tenant_id, model_id=row.model_id, version=row.version)
    return certificate


def open_network(sealed: Sealed, key: DataKey, *, arena: Arena, certificate: Certificate | None) -> Network:
    """A version's network on its weights in the arena's memory, which ends when nothing refers to the network any more.

    With a certificate, only if it is of these very weights: raises `weights_differ`. Raises InvalidSeal and ArenaFull. Whatever
    it raises, no weights are left.
    """
    from cloister_privacy.architecture.weights import digest_of, from_tensors
    from cloister_privacy.sealing.tensors import open_tensors

    opened = open_tensors(sealed, key=key.secret, context=key.context, arena=arena, threads=_THREADS)
    try:
        if certificate is not None:
            reader = SealedReader(sealed, key=key.secret, context=key.context)
            if digest_of(opened, reader=reader) != certificate.weights_digest:
                raise _differ_from(certificate, "weights")
            _require_architecture(certificate, opened.metadata)
        return from_tensors(opened, metadata=opened.metadata)
    except BaseException:
        for tensor in opened.values():
            tensor.zero_()  # at once: the error's traceback may keep them for a while
        opened.close()
        raise


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
    key, private = vault.certificate_signer(session, service.keys)
    return sign(certificate, private_key=private, key_id=key)


def _charged(row: LedgerEntry) -> ChargedEvent:
    """A ledger row as a certificate names it: the reservation of each block, and the settlement."""
    digest = hashlib.sha256(canonical_json(chain.canonical(row))).hexdigest()
    return ChargedEvent(source=row.source_id, id=chain.row_id(row), block=row.block, digest=digest)


def architecture(session: Session, service: Service, row: ModelVersion) -> Architecture:
    """A version's spec, from the header of its sealed weights: no more of them is opened than the chunks it lies in."""
    from cloister_privacy.architecture.weights import architecture_of

    key = vault.data_key(session, tenant_id=row.tenant_id, object_id=row.weights_id)
    reader = SealedReader(service.blobs.sealed(row.tenant_id, row.weights_id), key=key.secret, context=key.context)
    metadata = read_layout(reader.read, length=reader.length).metadata
    certificate = certified(session, service.settings, row)
    if certificate is not None:
        _require_architecture(certificate, metadata)
    return architecture_of(metadata)


def _require_architecture(certificate: Certificate, metadata: Mapping[str, str]) -> None:
    """The spec as it was written: read and written anew, it might have fields that came later."""
    written = metadata.get("architecture", "").encode()
    if hashlib.sha256(written).hexdigest() != certificate.architecture_digest:
        raise _differ_from(certificate, "architecture")


def _differ_from(certificate: Certificate, what: str) -> ServerError:
    return _differ(what, tenant_id=certificate.tenant, model_id=certificate.model, version=certificate.version)


def _differ(what: str, **version: str | int) -> ServerError:
    """Somebody, or something, changed what lies here: the operator's to look into, whoever asked."""
    log.error("model.weights_differ", extra={"what": what, **version})
    return ServerError(
        "what is stored of this model is not what its signed certificate is of, so nothing is answered with it; tell the "
        "server's operator the request id",
        code="weights_differ",
    )
