"""`cloister-admin tenant export`: all that a tenant has here, sealed for a key of its own, in one file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from cloister.wire.bundles import public_key_of
from cloister_server import bundles, deployment
from cloister_server.audit import denials_kept
from cloister_server.cli.terminal import JSON, operator_in, refusals, show
from cloister_server.errors import Conflict, Invalid
from cloister_server.settings import load_settings
from cloister_server.store.session import snapshot, writing

__all__ = ["export"]


def export(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="The tenant, by name or id.")],
    recipient: Annotated[
        str, typer.Option("--for", help="The public line that the tenant's `cloister bundle key` printed.")
    ],
    to: Annotated[Path, typer.Option(help="The bundle's file; nothing is overwritten.")],
    as_json: JSON = False,
) -> None:
    """Write all that a tenant has here into a bundle that nobody but the holder of the tenant's own key can open."""
    with refusals(as_json):
        try:
            public_key = public_key_of(recipient)
        except ValueError as error:
            raise Invalid(str(error)) from None
        service = deployment.open_service(load_settings())
        with denials_kept(service.engine), writing(service.engine) as session:
            operator = operator_in(session, tenant)
            bundles.note(session, operator)
        with snapshot(service.engine) as session:
            size = _write(to, bundles.sealed(session, operator, service, recipient=public_key))
        show({"tenant": operator.tenant_id, "bundle": str(to), "bytes": size}, as_json)


def _write(path: Path, pieces: Iterator[bytes]) -> int:
    """The whole file, durable, or none; its length."""
    draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            size = sum(map(file.write, pieces))
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # unlike rename, refuses to replace
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except FileExistsError:
        raise Conflict(f"{path} is there already, and nothing is overwritten; name another file") from None
    except OSError as error:
        raise Invalid(f"{path} cannot be written: {error.strerror}; see to the disk, or name another place") from None
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()
    return size
