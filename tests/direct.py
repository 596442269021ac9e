"""A client of an application in this process, called on the test's own thread: for tests that send very many requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

__all__ = ["direct"]


@contextmanager
def direct(app: Any) -> Iterator[httpx2.Client]:
    """Starlette's `TestClient` hands each request seven times from thread to thread: most of its time where cores are busy."""
    with (
        asyncio.Runner() as runner,
        httpx2.Client(transport=_Direct(app, runner), base_url="http://testserver") as http,
    ):
        yield http


class _Direct(httpx2.BaseTransport):
    def __init__(self, app: Any, runner: asyncio.Runner) -> None:
        self._asgi, self._runner = (
            httpx2.ASGITransport(app, raise_app_exceptions=False, client=("testclient", 1)),
            runner,
        )

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return self._runner.run(self._answered(request))

    async def _answered(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        answer = await self._asgi.handle_async_request(request)
        return httpx2.Response(answer.status_code, headers=answer.headers, content=await answer.aread())
