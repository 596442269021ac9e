"""One API process: the whole application on granian or uvicorn, until SIGTERM or the supervisor's death."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
from typing import Any

from cloister_privacy.accounting import epsilon_by_pld
from cloister_server import deployment, logs, processes
from cloister_server.app import create_app
from cloister_server.keyring import KeyRing
from cloister_server.settings import Settings


def main() -> int:
    message = processes.receive(follows_thread=True)
    settings = Settings.model_validate_json(message["settings"])
    logs.configure(settings)
    app = create_app(deployment.open_service(settings, keys=KeyRing.from_message(message["keys"])))
    threading.Thread(target=_warm_up, name="warm-up", daemon=True).start()
    serve = {"granian": _serve_granian, "uvicorn": _serve_uvicorn}[settings.http_server]
    asyncio.run(serve(app, settings))
    return 0


def _warm_up() -> None:
    """Load the accountants and torch while nobody waits: the first plan and the first prediction would take seconds longer."""
    import torch  # noqa: F401 (loaded for the models)

    epsilon_by_pld(0.01, 1.0, steps=1, delta=1e-5)
    # A million objects of modules stay: to look through them for garbage took a third of each request. How often it is looked for
    # stays as it is: what failed may leave its body in a cycle, which nothing else frees.
    gc.collect()
    gc.freeze()


async def _serve_granian(app: Any, settings: Settings) -> None:
    from granian.constants import Interfaces
    from granian.server.embed import Server

    # Embedded: granian's own process manager would leave a worker on the port when its parent is killed.
    server = Server(
        app,
        address=settings.host,
        port=settings.port,
        interface=Interfaces.ASGI,
        websockets=False,
        log_enabled=False,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
    await server.serve()


async def _serve_uvicorn(app: Any, settings: Settings) -> None:
    import uvicorn

    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    sys.exit(main())
