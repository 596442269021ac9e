"""What is stated after a certificate was signed: that its version is served, and what an audit found. Knows no server."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AwareDatetime, Field, StringConstraints, ValidationInfo, field_validator

from cloister.wire._model import Count, Identifier, PositiveFloat, Probability, Response
from cloister.wire.dsse import Digest, Envelope, Keys, canonical_json, sign_statement, verify_statement

__all__ = [
    "AUDIT_TYPE",
    "DEPLOYMENT_TYPE",
    "Audit",
    "Deployment",
    "sign_audit",
    "sign_deployment",
    "verify_audit",
    "verify_deployment",
]

DEPLOYMENT_TYPE = "urn:cloister:deployment:1"
AUDIT_TYPE = "urn:cloister:audit:1"


class Deployment(Response):
    """That a server answers predictions with the weights of a certificate."""

    tenant: Identifier
    model: Identifier
    version: Annotated[int, Field(ge=1)]
    certificate_digest: Digest
    """The certificate's `digest_of`: the statement's subject."""
    weights_digest: Digest
    """Of the plain safetensors bytes that the server opened."""
    server: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    """The version of the serving code."""
    since: AwareDatetime


class Audit(Response):
    """What canaries gave away of a run. An empirical bound, from below: it can refute a claim, and it guarantees nothing."""

    certificate_digest: Digest | None = None
    """The audited certificate's `digest_of`, the statement's subject. None where the engine was audited, and no version."""
    engine: Annotated[dict[str, str], Field(min_length=1)]
    """The libraries that trained -> their versions: the subject where no certificate is named."""
    method: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    """How the bound was got, with its source: `one-run canary audit, arXiv 2305.08846`."""
    canaries: Count
    steps: Count
    confidence: Probability
    """That the true epsilon is at least the bound."""
    epsilon_lower_bound: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    claimed_epsilon: PositiveFloat
    """The guarantee that was put to the test, at `delta`."""
    delta: Probability
    contradicts_claim: bool
    """Whether the bound is above what was claimed."""
    issued: AwareDatetime

    @field_validator("contradicts_claim")
    @classmethod
    def _as_the_figures_say(cls, contradicts: bool, info: ValidationInfo) -> bool:
        bound, claimed = info.data.get("epsilon_lower_bound"), info.data.get("claimed_epsilon")
        if bound is not None and claimed is not None and contradicts != (bound > claimed):
            raise ValueError("the bound and the claim say otherwise")
        return contradicts


def sign_deployment(deployment: Deployment, *, private_key: Ed25519PrivateKey, key_id: str) -> dict[str, Any]:
    """The deployment's DSSE envelope. `key_id` must be that of the private key."""
    return sign_statement(
        deployment,
        _of_deployment(deployment),
        predicate_type=DEPLOYMENT_TYPE,
        private_key=private_key,
        key_id=key_id,
    )


def verify_deployment(envelope: Envelope, keys: Keys) -> Deployment:
    """The deployment in an envelope that one of `keys` has signed, whole.

    Whether `certificate_digest` is that of the certificate at hand is the caller's to compare, by `digest_of`. Raises
    InvalidCertificate, or InvalidArgument where the keys are in no known form.
    """
    return verify_statement(envelope, keys, kind=Deployment, predicate_type=DEPLOYMENT_TYPE, subject=_of_deployment)


def sign_audit(audit: Audit, *, private_key: Ed25519PrivateKey, key_id: str) -> dict[str, Any]:
    """The audit's DSSE envelope. `key_id` must be that of the private key."""
    return sign_statement(audit, _of_audit(audit), predicate_type=AUDIT_TYPE, private_key=private_key, key_id=key_id)


def verify_audit(envelope: Envelope, keys: Keys) -> Audit:
    """The audit in an envelope that one of `keys` has signed, whole; as `verify_deployment`."""
    return verify_statement(envelope, keys, kind=Audit, predicate_type=AUDIT_TYPE, subject=_of_audit)


def _of_deployment(deployment: Deployment) -> dict[str, Any]:
    return _certificate(deployment.certificate_digest)


def _of_audit(audit: Audit) -> dict[str, Any]:
    if audit.certificate_digest is not None:
        return _certificate(audit.certificate_digest)
    return {"name": "engine", "digest": {"sha256": hashlib.sha256(canonical_json(audit.engine)).hexdigest()}}


def _certificate(digest: str) -> dict[str, Any]:
    return {"name": "certificate", "digest": {"sha256": digest}}
