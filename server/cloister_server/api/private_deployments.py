"""/v1/models/.../private-deployment: share a version's weights between two parties, and let clients ask them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from cloister.wire.private_deployments import (
    DeployPrivately,
    Permissions,
    PrivateDeploymentView,
    PrivateTerms,
    RoleFile,
    RoleName,
)
from cloister_server import private_deployments, private_sharing
from cloister_server.api.call import ReadCall, WriteCall

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["private inference"])

_PLACE = "/{model}/versions/{version}/private-deployment"

Version = Annotated[int, Path(ge=1, lt=2**31)]


@router.post("/{model}/private-deployments", status_code=201, response_model=PrivateDeploymentView)
def deploy_privately(model: str, body: DeployPrivately, call: WriteCall) -> Response:
    def make() -> private_sharing.Shared:
        opened = call.read(lambda s: private_sharing.opened(s, call.principal, call.service, model, body))
        return private_sharing.shared(call.service, opened, body)

    return call.once_made(
        body,
        make,
        lambda s, made: private_deployments.deploy(s, call.principal, call.service, model, body, made),
        place=private_sharing.at_work,
    )


@router.get(_PLACE)
def get_terms(model: str, version: Version, call: ReadCall) -> PrivateTerms:
    return call.read(lambda s: private_deployments.terms(s, call.principal, call.service, model, version))


@router.get(_PLACE + "/permissions")
def get_permissions(model: str, version: Version, call: ReadCall) -> Permissions:
    # It is a deed, and in the audit log as one.
    return call.write(lambda s: private_deployments.permissions(s, call.principal, call.service, model, version))


@router.get(_PLACE + "/roles/{role}")
def get_role_file(model: str, version: Version, role: RoleName, call: ReadCall) -> RoleFile:
    return call.read(lambda s: private_deployments.role_file(s, call.principal, call.service, model, version, role))


@router.delete(_PLACE, response_model=PrivateDeploymentView)
def end(model: str, version: Version, call: WriteCall) -> Response:
    return call.once(
        f"{model}/{version}".encode(),
        lambda s: private_deployments.end(s, call.principal, call.service, model, version),
        status=200,
    )
