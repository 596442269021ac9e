"""The composition root: one ASGI application of FastAPI for everything but /v2, the raw predict route, and the edge around both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from cloister_server import logs
from cloister_server.api import (
    admin,
    datasets,
    discovery,
    document,
    identities,
    jobs,
    models,
    oauth,
    pages,
    plans,
    policy,
    private_deployments,
    problems,
    queries,
    sources,
    weights,
)
from cloister_server.api.edge import Edge, Guard, Limits, StrictJSON
from cloister_server.api.telling import Telling
from cloister_server.errors import ServerError
from cloister_server.predict import PredictRoute
from cloister_server.service import Service

__all__ = ["create_app"]

ASGIApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]


def create_app(service: Service) -> ASGIApp:
    """The whole API of one opened deployment."""
    api, predict = _api(service), PredictRoute(service)

    async def route(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        is_predict = scope["type"] == "http" and (scope["path"] == "/v2" or scope["path"].startswith("/v2/"))
        await (predict if is_predict else api)(scope, receive, send)

    return Edge(Telling(Limits(Guard(StrictJSON(route), service), service), service), service)


def _api(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        try:
            service.engine.dispose()
            await asyncio.sleep(0)  # what answered last says so
        finally:
            logs.flush()

    api = FastAPI(
        title="Cloister",
        version=version("cloister"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers=dict.fromkeys(
            (ServerError, HTTPException, RequestValidationError, Exception), problems.respond
        ),
    )
    api.state.service = service
    for each in (
        discovery, oauth, pages, identities, sources, datasets, plans, jobs, models, private_deployments, weights, queries,
        policy, admin,
    ):  # fmt: skip
        api.include_router(each.router)
    api.openapi = document.describe(api)  # type: ignore[method-assign]  # FastAPI's own way to replace it
    return api
