"""`cloister-server serve`: the supervisor of one API process and one worker. Trains nothing, answers nothing itself. Roles: `roles`.

A process that dies is started again; all of them die with the supervisor, by whatever death.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from subprocess import Popen
from typing import Annotated, Any, Literal

import typer

from cloister_server import deployment, logs, marking, processes
from cloister_server.cli import roles
from cloister_server.errors import StartRefused, Unavailable
from cloister_server.keyring import KeyRing
from cloister_server.settings import Settings, load_settings

__all__ = ["main"]

log = logging.getLogger(__name__)
cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_MODULES = {"api": "cloister_server.cli.api_process", "worker": "cloister_server.work.worker"}
_RESTART_S = 0.5
"""The pause before a dead process is started again."""
_GRACE_S = 8.0
"""SIGTERM to SIGKILL, all processes together."""


@cli.callback()
def _root() -> None:
    """The Cloister server, and the roles of private inference; settings come from CLOISTER_* in the environment."""


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    http_server: Annotated[Literal["granian", "uvicorn"] | None, typer.Option(help="The HTTP server.")] = None,
) -> None:
    """Serve the API and run training jobs until SIGTERM or Ctrl-C."""
    given = {"host": host, "port": port, "http_server": http_server}
    try:
        settings = load_settings(**{name: value for name, value in given.items() if value is not None})
        logs.configure(settings)
        _supervise(settings)
    except StartRefused as refusal:
        print(f"cloister-server: {refusal}", file=sys.stderr)
        raise typer.Exit(1) from None


roles.add_to(cli)


def _supervise(settings: Settings) -> None:
    stopping = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stopping.set())
    deployment.check_initialised(settings)  # the lock below would make the directory
    with processes.locked(
        settings.data_dir / "locks" / "serve.lock", wait_s=5, what=f"the data directory {settings.data_dir}"
    ) as lock:
        keys = deployment.open_keys(settings)
        _check(settings, keys)
        _check_port(settings)
        message = {"settings": settings.dump_with_secrets(), "keys": keys.to_message()}
        children = {name: _start(name, message, lock) for name in _MODULES}
        log.info("serving", extra={"url": settings.issuer})
        while not stopping.wait(0.1):
            for name, child in children.items():
                if child.poll() is not None:
                    log.error("process.died", extra={"child": name, "exit": child.returncode})
                    processes.end_group(child, grace_s=0)
                    if not stopping.wait(_RESTART_S):
                        children[name] = _start(name, message, lock)
        _stop(list(children.values()))


def _check(settings: Settings, keys: KeyRing) -> None:
    """Refuse here what every child would, and a store of objects that is not this deployment's, or cannot be asked."""
    service = deployment.open_service(settings, keys=keys)
    try:
        marking.require_ours(service)
    except Unavailable as refusal:
        raise StartRefused(f"{refusal.message} {refusal.cause}".strip()) from None
    finally:
        service.engine.dispose()


def _check_port(settings: Settings) -> None:
    """Refuse a taken port here: the API process would only die of it again and again."""
    try:
        with socket.create_server((settings.host, settings.port)):
            pass
    except OSError as error:
        raise StartRefused(
            f"cannot listen on {settings.host}:{settings.port} ({os.strerror(error.errno or 0)}); stop what does, or set CLOISTER_PORT"
        ) from None


def _start(name: str, message: Mapping[str, Any], lock: int) -> Popen[bytes]:
    return processes.start(_MODULES[name], message, pass_fds=(lock,))


def _stop(children: list[Popen[bytes]]) -> None:
    deadline = time.monotonic() + _GRACE_S
    for child in children:
        if child.poll() is None:
            child.terminate()
    for child in children:
        processes.end_group(child, grace_s=max(0.01, deadline - time.monotonic()))


def main() -> None:
    processes.refuse_core_dumps()
    cli()
