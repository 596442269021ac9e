"""Private deployments: shares of a version's weights, stated and signed, and permissions to ask who has them. Knows SQL.

What a role is given is sealed for its key, and once more by the vault, so that it ends with the tenant's key.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from dataclasses import replace
from importlib.metadata import version as installed
from typing import TYPE_CHECKING, Any

from joserfc import jwt
from joserfc.jwk import ECKey
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister.wire.certificate import digest_of
from cloister.wire.private_deployments import (
    ROLES,
    DeployPrivately,
    Permissions,
    PrivateDeploymentView,
    PrivateTerms,
    RoleFile,
    RoleName,
    sign_private_deployment,
)
from cloister.wire.private_deployments import PrivateDeployment as Statement
from cloister.wire.private_requests import LONGEST_PERMISSION_S, PERMISSION_TYPE, audience
from cloister_server import audit, models, policy, quotas, vault
from cloister_server.errors import Conflict, Forbidden, NotFound
from cloister_server.oauth.access_tokens import ALGORITHM
from cloister_server.policy import Authorized
from cloister_server.principal import Principal
from cloister_server.private_sharing import DEPLOY, Shared, public_key
from cloister_server.service import Service
from cloister_server.store.tables import Model, ModelVersion, PrivateDeployment, now

if TYPE_CHECKING:
    pass

__all__ = ["deploy", "end", "permissions", "role_file", "terms"]

_BYTES_AT_ONCE = 2**25
"""The most randomness of one request, about: it decides how many rows one takes."""


def deploy(
    session: Session, principal: Principal, service: Service, id_or_name: str, body: DeployPrivately, made: Shared
) -> PrivateDeploymentView:
    """Make these shares the version's newest private deployment: signed, audited, and the ones before it over."""
    authorized, row = models.find_version(session, principal, id_or_name, made.version, verb=DEPLOY)
    model = authorized.resource
    session.get_one(Model, (model.tenant_id, model.id), with_for_update=True)  # one generation at a time
    before = _newest(session, row)
    key_id, private = vault.certificate_signer(session, service.keys)
    statement = Statement(
        id=made.id,
        tenant=row.tenant_id,
        model=row.model_id,
        version=row.version,
        generation=1 if before is None else before.generation + 1,
        certificate_digest=digest_of(row.certificate),
        network_digest=made.network_digest,
        fraction_bits=made.fraction_bits,
        layer_bits=made.layer_bits,
        rows_at_once=max(1, min(256, _BYTES_AT_ONCE * made.rows // max(1, made.measured.bytes_dealt))),
        rows_measured=made.rows,
        max_error=made.measured.max_error,
        equal_argmax=made.measured.equal_argmax,
        parties=body.parties,
        dealer=body.dealer,
        share_digests=(_sha256(made.sealed[0]), _sha256(made.sealed[1])),
        issuer=service.settings.issuer,
        development=body.development,
        server=installed("cloister"),
        since=now(),
    )
    envelope = sign_private_deployment(statement, private_key=private, key_id=key_id)
    files = _role_files(statement, envelope, made)
    files_id = vault.seal_object(session, service.blobs, files, tenant_id=row.tenant_id, kind="roles")
    session.add(
        PrivateDeployment(
            tenant_id=row.tenant_id,
            model_id=row.model_id,
            version=row.version,
            generation=statement.generation,
            id=made.id,
            statement=envelope,
            files_id=files_id,
        )
    )
    if before is not None:
        _end(session, service, before)
    audit.allowed(session, authorized, DEPLOY, f"{model.id}/{row.version}")
    quotas.require_sealed(session, principal, service, tenant_id=row.tenant_id, object_id=files_id)
    return _view(row, statement.generation, made.id, envelope)


def terms(session: Session, principal: Principal, service: Service, id_or_name: str, number: int) -> PrivateTerms:
    """What whoever may predict with a version needs in order to share an input: its architecture is public to them."""
    authorized, row = models.find_version(session, principal, id_or_name, number)
    _require_unbound(session, authorized)
    found = _standing(session, row)
    return PrivateTerms(
        statement=found.statement,
        certificate=row.certificate,
        architecture=models.architecture(session, service, row),
    )


def permissions(session: Session, principal: Principal, service: Service, id_or_name: str, number: int) -> Permissions:
    """One for each party, for a minute: whoever loses the grant, or the tenant its key, gets none from then on.

    The platform sees nothing of what is asked by them: that they were given is what its audit log tells.
    """
    authorized, row = models.find_version(session, principal, id_or_name, number)
    _require_unbound(session, authorized)
    found = _standing(session, row)
    vault.data_key(session, tenant_id=row.tenant_id, object_id=row.weights_id)  # it must be to be had still
    signer = vault.signing_key(session, service.keys, "token")
    key = ECKey.import_key(signer.secret, {"kid": signer.id, "use": "sig", "alg": ALGORITHM})
    header = {"alg": ALGORITHM, "typ": PERMISSION_TYPE, "kid": signer.id}
    at = int(time.time())
    claims = {"iss": service.settings.issuer, "sub": principal.id, "iat": at, "exp": at + LONGEST_PERMISSION_S}
    first, second = (
        jwt.encode(header, {**claims, "aud": audience(found.id, party), "jti": secrets.token_hex(16)}, key)
        for party in (0, 1)
    )
    audit.allowed(session, authorized, "model.predict_private", f"{row.model_id}/{row.version}")
    return Permissions(deployment=found.id, permissions=(first, second), expires_in=LONGEST_PERMISSION_S)


def role_file(
    session: Session, principal: Principal, service: Service, id_or_name: str, number: int, name: RoleName
) -> RoleFile:
    """What a role of the standing deployment is given: sealed for that role alone, and so for its owner to hand on."""
    _, row = models.find_version(session, principal, id_or_name, number, verb=DEPLOY)
    found = _standing(session, row)
    if found.files_id is None:
        raise NotFound("role file")
    files = vault.open_object(session, service.blobs, tenant_id=row.tenant_id, object_id=found.files_id)
    body = _split(files)[ROLES.index(name)]
    return RoleFile(role=name, deployment=found.id, file=base64.b64encode(body).decode())


def end(
    session: Session, principal: Principal, service: Service, id_or_name: str, number: int
) -> PrivateDeploymentView:
    """End the standing deployment: nobody gets a permission from here on. What the parties hold is theirs to delete."""
    authorized, row = models.find_version(session, principal, id_or_name, number, verb=DEPLOY)
    found = _standing(session, row)
    _end(session, service, found)
    audit.allowed(session, authorized, "model.end_private", f"{row.model_id}/{row.version}")
    return _view(row, found.generation, found.id, found.statement)


def _require_unbound(session: Session, authorized: Authorized[Model]) -> None:
    """Raise Forbidden where the grant bounds what a model answers, how often, or from where: the parties answer in shares, of which
    nobody can hold back any, and whoever has a permission asks them from anywhere, as often as they like for a minute."""
    _require_all(authorized)
    nowhere = replace(authorized.principal, address=None)
    try:
        anywhere = policy.authorize(session, nowhere, "model.predict", authorized.resource)
    except policy.Denied:
        raise Forbidden(
            "you may predict from some addresses alone, and nobody looks at addresses at the parties of private inference; ask the "
            "model's owner for a grant without that bound"
        ) from None
    _require_all(anywhere)


def _require_all(authorized: Authorized[Model]) -> None:
    if authorized.conditions.outputs is not None:
        raise Forbidden(
            f"your grant is for {authorized.conditions.outputs} outputs alone, and private inference answers with all; ask the "
            "model's owner for a grant without that bound"
        )
    if authorized.conditions.requests_per_minute is not None:
        raise Forbidden(
            f"your grant is for {authorized.conditions.requests_per_minute} requests a minute, which nobody counts at the parties of "
            "private inference; ask the model's owner for a grant without that bound"
        )


def _newest(session: Session, row: ModelVersion) -> PrivateDeployment | None:
    of_version = (
        PrivateDeployment.tenant_id == row.tenant_id,
        PrivateDeployment.model_id == row.model_id,
        PrivateDeployment.version == row.version,
    )
    newest = select(PrivateDeployment).where(*of_version).order_by(PrivateDeployment.generation.desc()).limit(1)
    return session.scalars(newest).one_or_none()


def _standing(session: Session, row: ModelVersion) -> PrivateDeployment:
    found = _newest(session, row)
    if found is None or found.ended is not None:
        raise Conflict(
            "this version is not deployed privately; ask its owner, who deploys it by model.deploy_privately",
            code="not_deployed_privately",
        )
    return found


def _end(session: Session, service: Service, row: PrivateDeployment) -> None:
    files_id, row.files_id, row.ended = row.files_id, None, row.ended or now()
    session.flush()
    if files_id is not None:
        vault.forget_objects(session, service.blobs, [files_id], tenant_id=row.tenant_id)


def _role_files(statement: Statement, envelope: dict[str, Any], made: Shared) -> bytes:
    """The three files, each behind its length."""
    from cloister_privacy.mpc import seal_role_file

    files = [
        seal_role_file(
            name,
            seal_to=public_key(statement.role(name).seal_to),
            statement=envelope,
            architecture=made.architecture,
            sealed_shares=shares,
        )
        for name, shares in zip(ROLES, (*made.sealed, b""), strict=True)
    ]
    return b"".join(len(each).to_bytes(8) + each for each in files)


def _split(files: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(files):
        length = int.from_bytes(files[at : at + 8])
        found.append(files[at + 8 : at + 8 + length])
        at += 8 + length
    return found


def _sha256(sealed: bytes) -> str:
    return hashlib.sha256(sealed).hexdigest()


def _view(row: ModelVersion, generation: int, deployment_id: str, statement: dict[str, Any]) -> PrivateDeploymentView:
    return PrivateDeploymentView(
        id=deployment_id, model=row.model_id, version=row.version, generation=generation, statement=statement
    )
