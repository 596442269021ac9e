"""A role's identity on its disk: a certificate and its key, a key that files are sealed for, and the record that others pin.

Made once, in a directory of mode 0700, keys of mode 0600; the keys are never printed. Knows files; no network.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

from cloister.wire.private_deployments import Role
from cloister_privacy.mpc import Identity
from cloister_privacy.sealing import KeyProviderError
from cloister_privacy.sealing.files import make_directory, read_private, write_new
from cloister_server.errors import StartRefused

__all__ = ["RoleIdentity", "create", "read"]

_NAME, _OPENS, _RECORD = "role", "role.open", "role.json"
_KEY_BYTES = 32
_MOST_RECORD_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class RoleIdentity:
    """What a role holds, and how others know it."""

    tls: Identity
    opens: X25519PrivateKey = field(repr=False)
    """What is sealed for the record's `seal_to` opens by it."""
    record: Role


def create(
    directory: Path, *, operator: str, host: str, port: int, client_port: int | None = None, days: int = 365
) -> RoleIdentity:
    """A new identity. Raises StartRefused where there is one, or where it cannot be written."""
    if (directory / _RECORD).exists():
        raise StartRefused(f"{directory} has an identity already; print it without --init, or choose another directory")
    try:
        make_directory(directory)
        directory.chmod(0o700)
        tls = Identity.create(directory, _NAME, days=days, subject=f"cloister-{secrets.token_hex(8)}")
        opens = X25519PrivateKey.generate()
        write_new(directory / _OPENS, opens.private_bytes_raw())
        record = Role(
            operator=operator,
            host=host,
            port=port,
            client_port=client_port,
            certificate=tls.certificate.read_text(),
            seal_to=opens.public_key().public_bytes_raw().hex(),
        )
        write_new(directory / _RECORD, record.model_dump_json(indent=2).encode())
    except (KeyProviderError, OSError, ValueError) as error:
        raise StartRefused(f"no identity was made in {directory}: {error}") from None
    return RoleIdentity(tls, opens, record)


def read(directory: Path) -> RoleIdentity:
    """The identity that is there. Raises StartRefused, also where others can read its keys."""
    tls = Identity(directory / f"{_NAME}.crt", directory / f"{_NAME}.key")
    try:
        record = Role.model_validate_json((directory / _RECORD).read_bytes()[:_MOST_RECORD_BYTES])
        read_private(tls.key, limit=_MOST_RECORD_BYTES)
        opens = X25519PrivateKey.from_private_bytes(read_private(directory / _OPENS, limit=_KEY_BYTES))
    except FileNotFoundError:
        raise StartRefused(
            f"{directory} has no identity, or not all of one; make one by `cloister-server identity --init`"
        ) from None
    except (KeyProviderError, OSError) as error:
        raise StartRefused(str(error)) from None
    except (ValidationError, ValueError):
        raise StartRefused(f"the record in {directory} is not one; restore it, or make another identity") from None
    if record.certificate != tls.certificate.read_text():
        raise StartRefused(f"the record in {directory} names another certificate; restore both from one backup")
    return RoleIdentity(tls, opens, record)
