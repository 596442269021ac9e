"""A version's weights opened and shared between two parties, each share sealed for its party, and measured. Knows no statement.

Whoever opens the weights to share them is this process, which knows them anyway; no share is ever stored in the clear.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from sqlalchemy.orm import Session

from cloister.wire._errors import InvalidArgument
from cloister.wire.architecture import Architecture
from cloister.wire.certificate import Certificate
from cloister.wire.oip import InferRequest, MalformedTensor, decode_inputs
from cloister.wire.private_deployments import DeployPrivately, LayerBits, shared_by
from cloister_privacy.sealing import Arena
from cloister_server import models, vault
from cloister_server.errors import Invalid, Unavailable
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.tables import new_id, now
from cloister_server.vault import DataKey

if TYPE_CHECKING:
    from cloister_privacy.architecture import Network
    from cloister_privacy.mpc import MeasuredError

__all__ = ["DEPLOY", "Opened", "Shared", "at_work", "opened", "public_key", "shared"]

DEPLOY = "model.deploy_private"
"""The verb."""
_MOST_ROWS_MEASURED, _MOST_BYTES_MEASURED = 64, 2**30
"""The measurement deals randomness for all of its rows at once."""
_MOST_WAITING = 4
_LONGEST_WAIT_S = 10.0
_slot = threading.BoundedSemaphore(1)
_waiting = threading.BoundedSemaphore(1 + _MOST_WAITING)


@dataclass(frozen=True, slots=True)
class Opened:
    """A version that may be deployed privately, and what opens it."""

    tenant_id: str
    model_id: str
    version: int
    weights_id: str
    key: DataKey = field(repr=False)
    certificate: Certificate | None


@dataclass(frozen=True, slots=True)
class Shared:
    """A version's weights as two sealed shares, and what was measured of them."""

    id: str
    version: int
    architecture: Architecture
    network_digest: str
    fraction_bits: int
    layer_bits: tuple[LayerBits, ...]
    rows: int
    measured: MeasuredError
    sealed: tuple[bytes, bytes] = field(repr=False)


@contextmanager
def at_work() -> Iterator[None]:
    """Take the one place in this process where weights are opened and shared, so that however many ask at once fill no memory.

    Raises Unavailable where too many wait already, and after some seconds.
    """
    if not _waiting.acquire(blocking=False):
        raise _busy()
    try:
        if not _slot.acquire(timeout=_LONGEST_WAIT_S):
            raise _busy()
        try:
            yield
        finally:
            _slot.release()
    finally:
        _waiting.release()


def opened(session: Session, principal: Principal, service: Service, id_or_name: str, body: DeployPrivately) -> Opened:
    """The version that is asked for, if the principal may deploy it privately, and the request is one that can be met."""
    model, row = models.find_version(session, principal, id_or_name, body.version, verb=DEPLOY)
    roles = (*body.parties, body.dealer)
    what = shared_by(roles)
    if what is not None and not body.development:
        raise Invalid(
            f"two of the parties and the dealer share their {what}, and could put the shares together; name roles of different "
            "operators, or say development where nothing is private",
            code="roles_not_apart",
        )
    if any(party.client_port is None for party in body.parties):
        raise Invalid(
            "a party has no client_port; give the record of a party, and not a dealer's", code="roles_not_apart"
        )
    if any(role.not_after <= now() for role in roles):
        raise Invalid("a role's certificate has expired; have its operator make a new identity", code="role_expired")
    if not body.public_rows:
        raise Invalid(
            "there are no public rows, and without them nobody can say how far the shared network is from the one in the clear; "
            "send 1 to 64 rows that are nobody's secret, synthetic ones for instance",
            code="public_rows_needed",
        )
    key = vault.data_key(session, tenant_id=row.tenant_id, object_id=row.weights_id)
    certificate = models.certified(session, service.settings, row)
    return Opened(row.tenant_id, model.resource.id, row.version, row.weights_id, key, certificate)


def shared(service: Service, version: Opened, body: DeployPrivately) -> Shared:
    """The weights as two shares, each sealed for its party, with the error on the public rows. Slow: in no transaction."""
    from cloister_privacy.architecture.inputs import validate_inputs
    from cloister_privacy.errors import ArchitectureRefused, InputRefused
    from cloister_privacy.mpc import PrivateInferenceError, SharedNetwork, choose_scale, measure_error

    sealed = service.blobs.sealed(version.tenant_id, version.weights_id)
    network = models.open_network(
        sealed, version.key, arena=Arena(service.settings.model_cache_bytes), certificate=version.certificate
    )
    try:
        rows = validate_inputs(network.architecture, decode_inputs(InferRequest(inputs=list(body.public_rows))))
        bits, layer_bits = choose_scale(network, rows)
        shape = SharedNetwork(network.architecture, fraction_bits=bits, layer_bits=layer_bits)
        count = len(next(iter(rows.values())))
        most = _most_rows_measured(shape.material_bytes(1))
        if count > most:
            raise Invalid(f"there are {count} public rows; {most} are the most", code="public_rows_needed")
        measured = measure_error(network, rows, fraction_bits=bits, layer_bits=layer_bits)
        deployment_id = new_id("pd")
        parts = _sealed_shares(shape, network, body, deployment_id)
    except (PrivateInferenceError, ArchitectureRefused) as error:
        raise Invalid(str(error), code="not_shared") from None
    except (InputRefused, MalformedTensor, InvalidArgument) as error:
        raise Invalid(f"this cannot be shared: {error}") from None
    return Shared(
        deployment_id, version.version, network.architecture, shape.digest, bits, layer_bits, count, measured, parts
    )


def _most_rows_measured(row_bytes: int) -> int:
    """Raises Invalid where a party, as it is by default, would not take the randomness of one row."""
    from cloister_privacy.mpc import Limits

    if row_bytes > Limits().disk_bytes:
        raise Invalid(
            f"one row takes {row_bytes} bytes of randomness, and a party keeps {Limits().disk_bytes}; make a smaller network, with "
            "AveragePool in place of MaxPool, for instance",
            code="not_shared",
        )
    return min(_MOST_ROWS_MEASURED, max(1, _MOST_BYTES_MEASURED // max(1, row_bytes)))


def _busy() -> Unavailable:
    return Unavailable(
        "another network is being shared, and one is at a time; try again in a few seconds",
        code="private_deployment_busy",
    )


def _sealed_shares(shape: Any, network: Network, body: DeployPrivately, deployment_id: str) -> tuple[bytes, bytes]:
    from cloister_privacy.mpc import seal_shares, split_weights

    first, second = (
        seal_shares(share, public_key(role.seal_to), network=shape, deployment=deployment_id, party=party)
        for party, (share, role) in enumerate(
            zip(split_weights(shape, network.state_dict()), body.parties, strict=True)
        )
    )
    return first, second


def public_key(seal_to: str) -> X25519PublicKey:
    """What is sealed for a role is sealed for this."""
    return X25519PublicKey.from_public_bytes(bytes.fromhex(seal_to))
