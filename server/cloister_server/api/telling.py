"""No answer to whoever has a valid token goes out before the audit log has its row. Knows ASGI; `audit_batches` says what a row is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cloister_server import audit_batches
from cloister_server.api.problems import to_server_error
from cloister_server.errors import ServerError
from cloister_server.service import Service

__all__ = ["Telling"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Telling:
    """Tells of each authorised request as its answer begins; where the log cannot be written, that is the answer."""

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._engine = app, service.engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["state"]["noted"] = audit_batches.Noted()
        refusal: ServerError | None = None
        is_told = False

        async def once_told(message: Message) -> None:
            nonlocal refusal, is_told
            if message["type"] == "http.response.start":
                is_told = True
                try:
                    await self._tell(scope, message["status"])
                except ServerError as error:  # raised below: whoever answers here could not take it back
                    refusal = error
            if refusal is None:
                await send(message)

        try:
            await self._app(scope, receive, once_told)
        except Exception as error:
            if not is_told:
                await self._tell(scope, to_server_error(error).status)
            if refusal is None:
                raise
        if refusal is not None:
            raise refusal

    async def _tell(self, scope: Scope, status: int) -> None:
        principal, noted = scope["state"].get("principal"), scope["state"]["noted"]
        if principal is not None:
            template = getattr(scope.get("route"), "path", "/v2")
            await audit_batches.keep(self._engine, principal, noted, route=(scope["method"], template), status=status)
