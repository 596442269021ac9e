"""The certificate of a model version: what it cost in privacy, signed. Knows what is stated; dsse knows how it is signed."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Mapping
from importlib.metadata import distributions
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AwareDatetime, Field, StringConstraints, ValidationInfo, field_validator

from cloister.wire._model import Count, Identifier, Name, PositiveFloat, Probability, Response
from cloister.wire.dsse import (
    PAYLOAD_TYPE,
    STATEMENT_TYPE,
    Digest,
    Envelope,
    InvalidCertificate,
    Keys,
    digest_of,
    key_id,
    sign_statement,
    verify_statement,
)
from cloister.wire.plans import Event

__all__ = [
    "PAYLOAD_TYPE",
    "PREDICATE_TYPE",
    "STATEMENT_TYPE",
    "Certificate",
    "ChargedEvent",
    "Digest",
    "InvalidCertificate",
    "Keys",
    "digest_of",
    "environment_digest",
    "installed_distributions",
    "key_id",
    "sign",
    "verify",
]

PREDICATE_TYPE = "urn:cloister:certificate:1"


class ChargedEvent(Response):
    """One row of a source's ledger that the run was charged by."""

    source: Identifier
    id: Annotated[str, StringConstraints(pattern=r"^[a-z]{2,4}_[0-9a-f]{32}/[0-9]{1,18}$")]
    """The source and the row's revision, `src_5f.../17`."""
    block: Annotated[int, Field(ge=0, lt=2**63)]
    """The block of the source's budget, as the row tells it."""
    digest: Digest
    """Of the row's canonical JSON."""

    @field_validator("id")
    @classmethod
    def _of_the_source(cls, row: str, info: ValidationInfo) -> str:
        if row.partition("/")[0] != info.data.get("source"):
            raise ValueError("the row is of another source's ledger")
        return row


class Certificate(Response):
    """What the service states of one model version: immutable, and about the private rows of its datasets only.

    What is None was not told: the first certificates were silent about it.
    """

    tenant: Identifier
    model: Identifier
    name: Name
    version: Annotated[int, Field(ge=1)]
    job: Identifier
    source: Identifier
    dataset: Identifier
    datasets: Annotated[tuple[Identifier, ...], Field(min_length=1)] | None = None
    """Every dataset that the run read; `dataset` is the first of them."""
    weights_digest: Digest
    """Of the plain safetensors bytes: the statement's subject."""
    sealed_digest: Digest | None = None
    """Of the sealed object that holds those weights, as it was first stored: all of its bytes."""
    architecture_digest: Digest
    initial_digest: Digest
    """Of the weights before the first step: what was learned earlier, elsewhere, is not covered."""
    initial: Literal["drawn", "uploaded"] | str | None = None
    """Where those weights came from: drawn at random, or uploaded, and maybe trained on anything. None where it is not told."""
    epsilon: PositiveFloat
    """The run's own, at `delta`, by `accountant`."""
    delta: Probability
    event: Event
    """What the ledger charged."""
    events: tuple[ChargedEvent, ...] | None = None
    """The ledger's rows that charged it."""
    sampler: Literal["poisson"] | str | None = None
    """How each step draws its units: by Poisson, each of them on its own with the event's `sampling_rate`."""
    clip: PositiveFloat
    nominal_size: Count
    capacity: Count | None = None
    """The most units that the owner declared there can be: the claim assumes it. None in certificates from before it was told."""
    rows_per_unit: Count | None = None
    """The most rows of one unit that a step read, each clipped to clip / rows_per_unit. None where `capacity` is."""
    unit: Literal["row", "user"] | str
    adjacency: Literal["add_remove"] | str
    accountant: Literal["rdp"] | str
    engine: dict[str, str]
    """The libraries that trained it and that accounted for it -> their versions."""
    code_version: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    """Of the service's own code: its release, or the revision that it was built from."""
    environment_digest: Digest | None = None
    """Of everything that was installed beside it, as the function of this name has it."""
    issued: AwareDatetime

    @field_validator("datasets")
    @classmethod
    def _begins_with_the_dataset(cls, datasets: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        if datasets is not None and datasets[0] != info.data.get("dataset"):
            raise ValueError("the first of the datasets is not the dataset")
        return datasets


def installed_distributions() -> dict[str, str]:
    """Name -> version of what is installed in this environment: of its own directories alone, since packages may add others to the
    path while they run."""
    own = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    return {each.name: each.version for each in distributions(path=own)}


def environment_digest(installed: Mapping[str, str]) -> str:
    """SHA-256 of the sorted lines `name==version`, each ended by a line feed, of every installed distribution.

    `pip list --format=freeze | LC_ALL=C sort | sha256sum` tells the same.
    """
    lines = sorted(f"{name}=={version}\n".encode() for name, version in installed.items())
    return hashlib.sha256(b"".join(lines)).hexdigest()


def sign(certificate: Certificate, *, private_key: Ed25519PrivateKey, key_id: str) -> dict[str, Any]:
    """The certificate's DSSE envelope, ready to be stored as JSON. `key_id` must be that of the private key."""
    return sign_statement(
        certificate, _subject(certificate), predicate_type=PREDICATE_TYPE, private_key=private_key, key_id=key_id
    )


def verify(envelope: Envelope, keys: Keys) -> Certificate:
    """The certificate in an envelope that one of `keys` has signed, whole.

    Takes the envelope as JSON text or already read; the keys as `client.certificate_keys()` gives them, raw or in
    hexadecimal, or as `cloister-admin init` prints them. Whether the weights at hand are those of `weights_digest` is
    the caller's to compare. Raises InvalidCertificate, or InvalidArgument where the keys are in no known form.
    """
    return verify_statement(envelope, keys, kind=Certificate, predicate_type=PREDICATE_TYPE, subject=_subject)


def _subject(certificate: Certificate) -> dict[str, Any]:
    return {
        "name": f"{certificate.model}/versions/{certificate.version}",
        "digest": {"sha256": certificate.weights_digest},
    }
