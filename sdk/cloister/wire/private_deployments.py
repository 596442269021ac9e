"""Private deployments: who the two parties and the dealer are, the signed statement that names them, and what is asked of them.

Knows certificates and JSON; nothing of shares, sockets or HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import AwareDatetime, Field, StringConstraints, field_validator

from cloister.wire._hpke import is_public_key
from cloister.wire._model import Body, Identifier, Request, Response
from cloister.wire.architecture import LAYER_LIMIT, Architecture
from cloister.wire.dsse import Digest, Envelope, Keys, sign_statement, verify_statement
from cloister.wire.oip import TensorJSON
from cloister.wire.shares import FRACTION_BITS, limit

__all__ = [
    "PRIVATE_DEPLOYMENT_TYPE",
    "ROLES",
    "DeployPrivately",
    "LayerBits",
    "Permissions",
    "PrivateDeployment",
    "PrivateDeploymentView",
    "PrivateTerms",
    "Role",
    "RoleFile",
    "RoleName",
    "network_digest",
    "shared_by",
    "sign_private_deployment",
    "verify_private_deployment",
]

PRIVATE_DEPLOYMENT_TYPE = "urn:cloister:private-deployment:1"

RoleName = Literal["party-0", "party-1", "dealer"]
ROLES: tuple[RoleName, ...] = ("party-0", "party-1", "dealer")

_LARGEST_CERTIFICATE = 8192


class Role(Request):
    """A party or a dealer as its operator declares it: `cloister-server identity` prints it. All of it is public."""

    operator: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    """Who says that they run it: declared, and not proven."""
    host: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.:-]{1,253}$")]
    port: Annotated[int, Field(ge=1, le=65535)]
    """Where the other roles reach it."""
    client_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Where clients reach a party; a dealer has none."""
    certificate: Annotated[str, StringConstraints(max_length=_LARGEST_CERTIFICATE)]
    """PEM, self-signed: the one that it shows to everybody."""
    seal_to: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """The X25519 key, in hexadecimal, that what is meant for it alone is sealed for."""

    @field_validator("certificate")
    @classmethod
    def _is_certificate(cls, pem: str) -> str:
        try:
            x509.load_pem_x509_certificate(pem.encode())
        except ValueError:
            raise ValueError("is no certificate in PEM; give what `cloister-server identity` printed") from None
        return pem

    @field_validator("seal_to")
    @classmethod
    def _is_key(cls, key: str) -> str:
        if not is_public_key(bytes.fromhex(key)):
            raise ValueError("is no X25519 key; give what `cloister-server identity` printed")
        return key

    @property
    def digest(self) -> str:
        """SHA-256 of the certificate's DER, in hexadecimal."""
        der = x509.load_pem_x509_certificate(self.certificate.encode()).public_bytes(Encoding.DER)
        return hashlib.sha256(der).hexdigest()

    @property
    def not_after(self) -> datetime:
        """When the certificate expires."""
        return x509.load_pem_x509_certificate(self.certificate.encode()).not_valid_after_utc


class DeployPrivately(Body):
    """Share a version's weights between two parties. `public_rows`: inputs, as for a prediction, that are nobody's secret."""

    version: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """The champion where none is named."""
    parties: tuple[Role, Role]
    dealer: Role
    public_rows: Annotated[tuple[TensorJSON, ...], Field(max_length=1024)] = ()
    """The error against the model in the clear is measured on them."""
    development: bool = False
    """Let one operator, host or certificate have two of the roles: nothing is private then."""


LayerBits = tuple[Annotated[int, Field(ge=0, le=55)], Annotated[int, Field(ge=0, le=55)]]
"""A layer's fraction bits: of what it reads, and of its weights."""


class PrivateDeployment(Response):
    """That a version's weights were shared between these parties, with that dealer. Its subject is the version's certificate."""

    id: Identifier
    tenant: Identifier
    model: Identifier
    version: Annotated[int, Field(ge=1)]
    generation: Annotated[int, Field(ge=1)]
    """1, 2, ...: how often this version was deployed privately. Only the newest answers."""
    certificate_digest: Digest
    """The privacy certificate's `digest_of`."""
    network_digest: Digest
    """`network_digest` of the architecture and all fraction bits."""
    fraction_bits: Annotated[int, Field(ge=8, le=FRACTION_BITS)]
    """Of the inputs, and of everything where `layer_bits` is empty."""
    layer_bits: Annotated[tuple[LayerBits, ...], Field(max_length=LAYER_LIMIT)] = ()
    """Of each layer, where numbers are so large that one scale does not fit all."""
    rows_at_once: Annotated[int, Field(ge=1, le=256)]
    """The most rows of one request."""
    rows_measured: Annotated[int, Field(ge=1)]
    max_error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """The largest difference of an output from the model in the clear, on the owner's public rows."""
    equal_argmax: Annotated[float, Field(ge=0, le=1)]
    """The share of those rows with the same largest output."""
    parties: tuple[Role, Role]
    dealer: Role
    share_digests: tuple[Digest, Digest]
    """SHA-256 of each party's share of the weights, as it is sealed for that party: anybody can seal another for the same key."""
    issuer: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    """Whose permissions the parties take."""
    development: bool
    server: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    since: AwareDatetime

    @property
    def largest_output(self) -> float:
        """Beyond it there is no answer."""
        return limit(self.fraction_bits, product_bits=sum(self.layer_bits[-1]) if self.layer_bits else None)

    def role(self, name: RoleName) -> Role:
        return (*self.parties, self.dealer)[ROLES.index(name)]


class PrivateDeploymentView(Response):
    """A private deployment as its owner sees it."""

    id: Identifier
    model: Identifier
    version: int
    generation: int
    statement: dict[str, Any]
    """A DSSE envelope; `verify_private_deployment` opens it."""


class PrivateTerms(Response):
    """What a client needs in order to share an input: for whoever may predict."""

    statement: dict[str, Any]
    certificate: dict[str, Any]
    """The version's privacy certificate, whose digest the statement names."""
    architecture: Architecture


class Permissions(Response):
    """One short-lived signed permission for each party. A party cannot use its own at the other."""

    deployment: Identifier
    permissions: tuple[str, str] = Field(repr=False)
    expires_in: int
    """Seconds."""


class RoleFile(Response):
    """What one role is given, sealed for it alone, in base64."""

    role: RoleName
    deployment: Identifier
    file: str = Field(repr=False)


class _Declared(Protocol):
    @property
    def operator(self) -> str: ...

    @property
    def host(self) -> str: ...

    @property
    def digest(self) -> str: ...


def shared_by(roles: Sequence[_Declared]) -> str | None:
    """What two of the roles have in common that they must not: their operator, host, certificate or the key that files are sealed
    for; None where nothing. Of operators and hosts neither case, nor blanks or a dot at the end, make two."""
    values: dict[str, list[str]] = {
        "operator": [" ".join(role.operator.split()).casefold() for role in roles],
        "host": [role.host.casefold().rstrip(".") for role in roles],
        "certificate": [role.digest for role in roles],
        "sealing key": [role.seal_to for role in roles if isinstance(role, Role)],
    }
    return next((what for what, each in values.items() if len(set(each)) < len(each)), None)


def network_digest(architecture: Architecture, fraction_bits: int, layer_bits: Sequence[LayerBits] = ()) -> str:
    """SHA-256 of what both parties, the dealer and every client must agree on."""
    scale = (
        f"{fraction_bits} {','.join(f'{value}+{weight}' for value, weight in layer_bits)}"
        if layer_bits
        else fraction_bits
    )
    told = f"cloister.mpc/1 {scale} {architecture.model_dump_json()}"
    return hashlib.sha256(told.encode()).hexdigest()


def sign_private_deployment(
    deployment: PrivateDeployment, *, private_key: Ed25519PrivateKey, key_id: str
) -> dict[str, Any]:
    """The DSSE envelope. `key_id` must be that of the private key."""
    return sign_statement(
        deployment,
        _subject(deployment),
        predicate_type=PRIVATE_DEPLOYMENT_TYPE,
        private_key=private_key,
        key_id=key_id,
    )


def verify_private_deployment(envelope: Envelope, keys: Keys) -> PrivateDeployment:
    """The deployment in an envelope that one of `keys` has signed, whole.

    Raises InvalidCertificate, or InvalidArgument where the keys are in no known form.
    """
    return verify_statement(
        envelope, keys, kind=PrivateDeployment, predicate_type=PRIVATE_DEPLOYMENT_TYPE, subject=_subject
    )


def _subject(deployment: PrivateDeployment) -> dict[str, Any]:
    return {"name": deployment.id, "digest": {"sha256": deployment.certificate_digest}}
