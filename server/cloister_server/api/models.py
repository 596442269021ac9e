"""/v1/models: models, their versions and their certificates. Predictions are at /v2."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path

from cloister.wire.jobs import Model, ModelSchema, ModelVersion, Page
from cloister.wire.plans import NetworkView
from cloister_server import models
from cloister_server.api.call import Cursor, Limit, ReadCall

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(call: ReadCall, cursor: Cursor = None, limit: Limit = 50) -> Page:
    return call.read(lambda session: models.listed(session, call.principal, cursor=cursor, limit=limit))


@router.get("/{model}")
def get_model(model: str, call: ReadCall) -> Model:
    return call.read(lambda session: models.get(session, call.principal, model))


@router.get("/{model}/versions")
def list_versions(model: str, call: ReadCall) -> Page:
    return call.read(lambda session: models.versions(session, call.principal, model))


@router.get("/{model}/versions/{version}")
def get_version(model: str, version: Annotated[int, Path(ge=0, lt=2**31)], call: ReadCall) -> ModelVersion:
    return call.read(lambda session: models.get_version(session, call.principal, model, version))


@router.get("/{model}/versions/{version}/schema")
def get_schema(model: str, version: Annotated[int, Path(ge=1, lt=2**31)], call: ReadCall) -> ModelSchema:
    return call.read(lambda session: models.schema(session, call.principal, call.service, model, version))


@router.get("/{model}/versions/{version}/deployment")
def get_deployment(model: str, version: Annotated[int, Path(ge=1, lt=2**31)], call: ReadCall) -> dict[str, Any]:
    return call.read(lambda session: models.deployment(session, call.principal, call.service, model, version))


@router.get("/{model}/versions/{version}/audit")
def get_audit(model: str, version: Annotated[int, Path(ge=1, lt=2**31)], call: ReadCall) -> dict[str, Any]:
    return call.read(lambda session: models.audit_statement(session, call.principal, call.service, model, version))


@router.get("/{model}/versions/{version}/network")
def get_network(model: str, version: Annotated[int, Path(ge=1, lt=2**31)], call: ReadCall) -> NetworkView:
    return call.read(lambda session: models.network(session, call.principal, call.service, model, version))
