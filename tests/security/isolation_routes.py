"""Every route of the API, with what may be asked of it about something of a tenant, and by which verb that is allowed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from accounts import COLUMNS
from cloister.wire.columns import Schema
from cloister.wire.private_deployments import ROLES
from cloister.wire.rows import encode_rows
from cloister.wire.weights import WEIGHTS_TYPE
from cloister_server.operations import OPERATIONS
from cloister_server.roles import identity

__all__ = [
    "ABOUT",
    "ADMIN",
    "CREATING",
    "ELSEWHERE",
    "LISTS",
    "POLICY",
    "PREDICT",
    "PREFIX",
    "TOKENS",
    "Asked",
    "Route",
]


@dataclass(frozen=True)
class Asked:
    """A request about one thing."""

    asker: str
    thing: str
    usable: dict[str, str]
    """By kind a thing of the asker's tenant, for what needs another one besides."""
    training: dict[str, Any]
    """A whole training specification, of whatever dataset."""
    fresh: str
    """A name that nothing has."""


@dataclass(frozen=True)
class Route:
    """One way to ask about a thing of this kind, allowed by the verb; `fine` are the answers to whom it is allowed."""

    method: str
    path: str
    kind: str
    verb: str
    fine: tuple[int, ...] = (200,)
    body: Callable[[Asked], dict[str, Any]] = field(default=lambda _: {})
    """What goes with the path, as for `httpx2`."""
    place: str = ""
    """Where the thing is named, if not in the path."""
    is_steady: bool = False
    """Whether it is about nothing else: then whoever may ask gets one of `fine`."""
    makes: str = ""

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}{f' ({self.place})' if self.place else ''}"


def _json(make: Callable[[Asked], Any]) -> Callable[[Asked], dict[str, Any]]:
    return lambda asked: {"json": make(asked)}


def _part(_: Asked) -> dict[str, Any]:
    rows = {"x": np.zeros(1, np.float32), "y": np.zeros(1, np.int32)}
    body = encode_rows(TypeAdapter(Schema).validate_python(COLUMNS), rows)
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    headers = {"Content-Digest": f"sha-256=:{digest}:", "Content-Type": "application/vnd.cloister.rows"}
    return {"content": body, "headers": headers}


def _query(asked: Asked, **more: Any) -> dict[str, Any]:
    return {"dataset": asked.thing, "queries": [{"type": "count"}], "epsilon": 0.001, **more}


def _asks(make: Callable[[Asked], Any]) -> Callable[[Asked], dict[str, Any]]:
    return _json(lambda asked: {"query": make(asked)})


def _evaluation(asked: Asked) -> dict[str, Any]:
    evaluated = {"type": "evaluation", "model": asked.thing, "version": 1}
    return _query(asked, dataset=asked.usable["dataset"], queries=[evaluated])


def _plan(**given: Any) -> dict[str, Any]:
    return {"target": "y", "privacy": {"noise_multiplier": 4.0}, "batch_size": 100, **given}


def _job(asked: Asked, **changed: Any) -> dict[str, Any]:
    return {"training": asked.training | changed, "model": asked.fresh}


@cache
def _deployment() -> dict[str, Any]:
    """Between three roles of three operators."""
    with TemporaryDirectory() as folder:
        made = [
            identity.create(
                Path(folder) / name, operator=name, host=f"127.0.0.{number}", port=9444,
                client_port=None if name == "dealer" else 9443,
            )
            for number, name in enumerate(ROLES, 1)
        ]  # fmt: skip
    *parties, dealer = (each.record.model_dump(mode="json") for each in made)
    return {"version": 1, "parties": parties, "dealer": dealer, "public_rows": [_AGES, _COLOURS]}


_BECAUSE = {"epsilon": 900.0, "reason": "because"}
_AGES = {"name": "age", "shape": [1], "datatype": "FP32", "data": [30.5]}
_COLOURS = {"name": "colour", "shape": [1], "datatype": "INT64", "data": [0]}
_INFER = _json(lambda _: {"inputs": [_AGES, _COLOURS]})
_SOURCE, _DATASET, _MODEL = "/v1/sources/{source}", "/v1/datasets/{dataset}", "/v1/models/{model}"
_VERSION = f"{_MODEL}/versions/{{version}}"
_PRIVATE = f"{_VERSION}/private-deployment"

ABOUT = (
    Route("GET", _SOURCE, "source", "source.read", is_steady=True),
    Route("GET", f"{_SOURCE}/ledger", "source", "source.read", is_steady=True),
    Route("PUT", f"{_SOURCE}/budget", "source", "source.own", (200, 422), _json(lambda _: _BECAUSE), is_steady=True),
    Route(
        "PUT", f"{_SOURCE}/allowances/{{client}}", "source", "source.own", (200, 422),
        _json(lambda _: {"epsilon": 5.0, "reason": "because"}), is_steady=True,
    ),
    Route(
        "POST", f"{_SOURCE}/blocks", "source", "source.own", (201, 409),
        _json(lambda asked: {"name": asked.fresh, "reason": "because"}), is_steady=True,
    ),
    Route(
        "POST", "/v1/datasets", "source", "dataset.create", (201, 409, 422),
        _json(lambda asked: {
            "source": asked.thing, "name": asked.fresh, "columns": COLUMNS, "nominal_size": 1000, "capacity": 2000,
        }), "body.source", is_steady=True,
    ),
    Route("GET", _DATASET, "dataset", "dataset.read", is_steady=True),
    Route("PUT", f"{_DATASET}/parts/{{number}}", "dataset", "dataset.upload", (201, 409), _part, is_steady=True),
    Route("POST", f"{_DATASET}/complete", "dataset", "dataset.upload", (200, 409), is_steady=True),
    Route("DELETE", _DATASET, "dataset", "dataset.upload", (200, 409), is_steady=True),
    Route(
        "POST", "/v1/plans", "dataset", "dataset.train", (200, 422),
        _json(lambda asked: _plan(dataset=asked.thing)), "body.dataset", True,
    ),
    Route(
        "POST", "/v1/plans", "dataset", "dataset.train", (200, 422),
        _json(lambda asked: _plan(dataset=asked.usable["dataset"], with_datasets=[asked.thing])), "body.with_datasets",
    ),
    Route(
        "POST", "/v1/plans", "weights", "weights.use", (200, 409, 422),
        _json(lambda asked: _plan(dataset=asked.usable["dataset"], initial=asked.thing)), "body.initial",
    ),
    Route(
        "POST", "/v1/jobs", "dataset", "dataset.train", (201, 409, 422),
        _json(lambda asked: _job(asked, dataset=asked.thing)), "body.training.dataset", True,
    ),
    Route(
        "POST", "/v1/jobs", "dataset", "dataset.train", (201, 409, 422),
        _json(lambda asked: _job(asked, dataset=asked.usable["dataset"], with_datasets=[asked.thing])), "body.training.with_datasets",
    ),
    Route(
        "POST", "/v1/jobs", "weights", "weights.use", (201, 409, 422),
        _json(lambda asked: _job(asked, dataset=asked.usable["dataset"], initial={"id": asked.thing, "digest": "0" * 64})),
        "body.training.initial",
    ),
    Route("POST", "/v1/queries/price", "dataset", "dataset.train", (200,), _json(_query), "body.dataset", True),
    Route("POST", "/v1/queries/price", "model", "model.predict", (200, 409, 422), _json(_evaluation), "body.queries.model"),
    Route("POST", "/v1/queries", "dataset", "dataset.train", (201, 409), _asks(_query), "body.query.dataset", True),
    Route("POST", "/v1/queries", "model", "model.predict", (201, 409, 422), _asks(_evaluation), "body.query.model"),
    Route("GET", "/v1/queries/{job}/answer", "job", "job.read", (200, 409), is_steady=True),
    Route("GET", "/v1/jobs/{job}", "job", "job.read", is_steady=True),
    Route("POST", "/v1/jobs/{job}/cancel", "job", "job.cancel", is_steady=True),
    Route("GET", _MODEL, "model", "model.read", is_steady=True),
    Route("GET", f"{_MODEL}/versions", "model", "model.read", is_steady=True),
    Route("GET", _VERSION, "model", "model.read", (200, 404), is_steady=True),
    Route("GET", f"{_VERSION}/schema", "model", "model.predict", (200, 404), is_steady=True),
    Route("GET", f"{_VERSION}/deployment", "model", "model.read", (200, 404), is_steady=True),
    Route("GET", f"{_VERSION}/audit", "model", "model.read", (404,), is_steady=True),
    Route("GET", f"{_VERSION}/network", "model", "model.publish", (200, 404), is_steady=True),
    Route(
        "POST", f"{_MODEL}/private-deployments", "model", "model.deploy_private", (201, 404), _json(lambda _: _deployment()),
        is_steady=True,
    ),
    Route("GET", _PRIVATE, "model", "model.predict", (200, 404, 409), is_steady=True),
    Route("GET", f"{_PRIVATE}/permissions", "model", "model.predict", (200, 404, 409), is_steady=True),
    Route("GET", f"{_PRIVATE}/roles/{{role}}", "model", "model.deploy_private", (200, 404, 409), is_steady=True),
    Route("DELETE", _PRIVATE, "model", "model.deploy_private", (200, 404, 409), is_steady=True),
)  # fmt: skip
"""Every way to name one thing. 404 is fine where a model that is there has no such version, or the version no audit."""

PREDICT = tuple(
    Route(method, f"/v2/models/{{model}}{version}{verb}", "model", "model.predict", (200, 404), body, is_steady=True)
    for version in ("", "/versions/{version}")
    for method, verb, body in (("GET", "", lambda _: {}), ("GET", "/ready", lambda _: {}), ("POST", "/infer", _INFER))
)
"""The routes of `PredictRoute`, which is no part of the framework's table."""

CREATING = (
    Route(
        "POST", "/v1/sources", "tenant", "source.create", (201, 409),
        _json(lambda asked: {"name": asked.fresh, "epsilon": 900.0, "delta": 1e-6}), makes="source",
    ),
    Route(
        "POST", "/v1/weights", "tenant", "weights.create", (201,),
        lambda _: {"content": WEIGHTS, "headers": {"Content-Type": WEIGHTS_TYPE}}, makes="weights",
    ),
)  # fmt: skip
"""What is made of nothing, in the asker's own tenant."""

PREFIX = {"source": "src", "dataset": "ds", "job": "job", "model": "mdl", "weights": "wts"}
POLICY = ("GET /v1/policy/explain", "GET /v1/policy/who-can")
LISTS = {"source": "/v1/sources", "dataset": "/v1/datasets", "job": "/v1/jobs", "model": "/v1/models"}
TOKENS = ("POST /oauth/token", "POST /oauth/introspect", "POST /oauth/revoke", "GET /v1/whoami")

ADMIN = tuple(f"POST /v1/admin/{name}" for name in OPERATIONS)
"""Operators': who is none is refused before anything is looked at, the same whatever is named (`test_operators`)."""

ELSEWHERE = {
    "GET /healthz": "nobody's",
    "GET /readyz": "nobody's",
    "GET /openapi.json": "nobody's",
    "GET /.well-known/oauth-authorization-server": "nobody's",
    "GET /.well-known/oauth-protected-resource": "nobody's",
    "GET /.well-known/jwks.json": "nobody's",
    "GET /.well-known/cloister-certificate-keys": "nobody's",
    "GET /v2": "nobody's",
    "GET /v2/health/live": "nobody's",
    "GET /v2/health/ready": "nobody's",
    "GET /oauth/authorize": "page",
    "POST /oauth/consent": "page",
    "GET /oauth/device": "page",
    "POST /oauth/device": "page",
    "GET /oauth/first-admin": "page",
    "POST /oauth/first-admin": "page",
    "GET /oauth/invitation": "page",
    "POST /oauth/invitation": "page",
    "POST /oauth/sign-in": "page",
    "POST /oauth/sign-out": "page",
    "POST /oauth/device_authorization": "page",
}
"""What names nothing of a tenant's, and what names an account or a client by its name: asked by rules of their own."""


def _weights() -> bytes:
    import safetensors.numpy

    return safetensors.numpy.save({"0": np.zeros((2, 2), np.float32)})


WEIGHTS = _weights()
