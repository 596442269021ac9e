"""Role files: what a party or the dealer of one deployment is given, sealed for its own key. Knows bytes and keys; no disk.

`cloister.role/1`: the signed statement and the architecture, sealed together, and behind them a party's share of the weights,
sealed as `weights` has it. Whoever opens one verifies the statement by keys that they got elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from cloister.wire._hpke import SUITE
from cloister.wire.architecture import Architecture
from cloister.wire.dsse import InvalidCertificate, Keys
from cloister.wire.private_deployments import (
    ROLES,
    PrivateDeployment,
    Role,
    RoleName,
    network_digest,
    shared_by,
    verify_private_deployment,
)
from cloister_privacy.mpc.deployment import Deployment
from cloister_privacy.mpc.errors import CoLocated, RoleFileRefused
from cloister_privacy.mpc.links import Peer
from cloister_privacy.mpc.network import SharedNetwork
from cloister_privacy.mpc.ring import Ring
from cloister_privacy.mpc.weights import open_shares

__all__ = ["OpenedRole", "open_role_file", "seal_role_file"]

_MAGIC = b"cloister.role/"
_LINE = _MAGIC + b"1\n"
_LENGTH_BYTES = 8


class _Head(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: RoleName
    statement: dict[str, Any]
    architecture: Architecture


@dataclass(frozen=True, slots=True)
class OpenedRole:
    """What a role knows of its deployment."""

    name: RoleName
    statement: PrivateDeployment
    network: SharedNetwork
    weights: Mapping[str, Ring] | None = field(repr=False)
    """A party's share; None for the dealer."""

    @property
    def record(self) -> Role:
        return self.statement.role(self.name)

    def deployment(self, *, listen: str | None = None) -> Deployment:
        """With the pinned certificates. `listen` takes the place of this role's own host, where it binds to another address."""
        peers = [self._peer(name, listen) for name in ROLES]
        return Deployment(self.statement.id, (peers[0], peers[1]), peers[2])

    def _peer(self, name: RoleName, listen: str | None) -> Peer:
        role = self.statement.role(name)
        host = listen if listen is not None and name == self.name else role.host
        return Peer(name, role.certificate, host, role.port, role.operator)


def seal_role_file(
    name: RoleName,
    *,
    seal_to: X25519PublicKey,
    statement: Mapping[str, Any],
    architecture: Architecture,
    sealed_shares: bytes = b"",
) -> bytes:
    """For the holder of this key alone. `sealed_shares` are those that `seal_shares` made for a party."""
    head = _Head(role=name, statement=dict(statement), architecture=architecture).model_dump_json().encode()
    sealed = SUITE.encrypt(head, seal_to, info=_LINE)
    return _LINE + len(sealed).to_bytes(_LENGTH_BYTES) + sealed + sealed_shares


def open_role_file(body: bytes, private: X25519PrivateKey, *, certificate_digest: str, keys: Keys) -> OpenedRole:
    """What was sealed for this key, stated by one of `keys`, and for the role whose certificate has this digest.

    Raises RoleFileRefused, CoLocated and SharesOfAnother, and gives out nothing.
    """
    if not body.startswith(_LINE):
        what = "is of another version than 1" if body.startswith(_MAGIC) else "is no role file"
        raise RoleFileRefused(
            f"the file {what}; get it from the deployment's owner, who has it from `write_role_files`"
        )
    length = int.from_bytes(body[len(_LINE) : len(_LINE) + _LENGTH_BYTES])
    rest = body[len(_LINE) + _LENGTH_BYTES :]
    try:
        head = _Head.model_validate_json(SUITE.decrypt(rest[:length], private, info=_LINE))
        stated = verify_private_deployment(head.statement, keys)
    except (InvalidTag, ValidationError, ValueError):
        raise RoleFileRefused(
            "the role file does not open: it was changed, or sealed for another role's key; deploy with this role's record"
        ) from None
    except InvalidCertificate as exc:
        raise RoleFileRefused(
            f"the role file's statement does not verify ({exc}); compare the platform's keys"
        ) from None
    told = network_digest(head.architecture, stated.fraction_bits, stated.layer_bits)
    if told != stated.network_digest or stated.role(head.role).digest != certificate_digest:
        raise RoleFileRefused("the role file is of another role or network than its statement; deploy again")
    network = SharedNetwork(head.architecture, fraction_bits=stated.fraction_bits, layer_bits=stated.layer_bits)
    together = shared_by((*stated.parties, stated.dealer))
    if together is not None and not stated.development:
        raise CoLocated(
            f"two roles of this deployment share their {together}; deploy it under different administrators"
        )
    weights = None
    if head.role != "dealer":
        number = ROLES.index(head.role)
        if hashlib.sha256(rest[length:]).hexdigest() != stated.share_digests[number]:
            raise RoleFileRefused(
                "the role file's share of the weights is not the stated one: it was changed, or is another deployment's; get the file "
                "from the deployment's owner again"
            )
        weights = open_shares(rest[length:], private, network=network, deployment=stated.id, party=number)
    return OpenedRole(head.role, stated, network, weights)
