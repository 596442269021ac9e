"""A certificate to test with, its signing key, and envelopes around whatever a signer may have been made to sign."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.wire.certificate import Certificate, ChargedEvent, key_id, sign
from cloister.wire.plans import Event

PRIVATE = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"a signing key for tests").digest())
RAW = PRIVATE.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
KEY_ID = key_id(RAW)
KEYS = {KEY_ID: RAW}
X = base64.urlsafe_b64encode(RAW).decode().rstrip("=")
JWK = {"kty": "OKP", "crv": "Ed25519", "kid": KEY_ID, "x": X}
WEIGHTS = b"weights"
SOURCE, DATASET = "src_" + "3" * 32, "ds_" + "4" * 32

CERTIFICATE = Certificate(
    tenant="tn_" + "0" * 32,
    model="mdl_" + "1" * 32,
    name="digits",
    version=3,
    job="job_" + "2" * 32,
    source=SOURCE,
    dataset=DATASET,
    datasets=(DATASET, "ds_" + "5" * 32),
    weights_digest=hashlib.sha256(WEIGHTS).hexdigest(),
    sealed_digest=hashlib.sha256(b"sealed weights").hexdigest(),
    architecture_digest=hashlib.sha256(b"architecture").hexdigest(),
    initial_digest=hashlib.sha256(b"initial weights").hexdigest(),
    initial="drawn",
    epsilon=1.25,
    delta=1e-6,
    event=Event(
        mechanism="poisson_subsampled_gaussian",
        noise_multiplier=1.1,
        sampling_rate=0.0042,
        steps=2344,
        unit="row",
        adjacency="add_remove",
    ),
    events=tuple(
        ChargedEvent(source=SOURCE, id=f"{SOURCE}/{row}", block=0, digest=hashlib.sha256(b"%d" % row).hexdigest())
        for row in (17, 18)
    ),
    sampler="poisson",
    clip=1.0,
    nominal_size=60_000,
    capacity=80_000,
    rows_per_unit=1,
    unit="row",
    adjacency="add_remove",
    accountant="rdp",
    engine={"cloister": "0.1.0", "torch": "2.13.0", "opacus": "1.6.0"},
    code_version="0.1.0",
    environment_digest=hashlib.sha256(b"torch==2.13.0\n").hexdigest(),
    issued=datetime(2026, 11, 24, 12, 0, tzinfo=UTC),
)

TOLD_LATER = {
    "capacity", "rows_per_unit", "initial", "datasets", "sealed_digest", "events", "sampler", "code_version",
    "environment_digest",
}  # fmt: skip
"""The fields that the first certificates did not have."""


def signed(certificate: Certificate = CERTIFICATE) -> dict[str, Any]:
    return sign(certificate, private_key=PRIVATE, key_id=KEY_ID)


def dsse(statement: object, *, payload_type: str = "application/vnd.in-toto+json") -> dict[str, Any]:
    """An envelope truly signed, around whatever a signer may have been made to sign."""
    payload = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
    authenticated = f"DSSEv1 {len(payload_type)} {payload_type} {len(payload)} ".encode() + payload
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": KEY_ID, "sig": base64.b64encode(PRIVATE.sign(authenticated)).decode()}],
    }


def statement(**changes: Any) -> dict[str, Any]:
    """The statement of CERTIFICATE, with top-level fields exchanged."""
    return {**json.loads(base64.b64decode(signed()["payload"])), **changes}


def flipped(file: bytes) -> Iterator[bytes]:
    """Every copy of the file that differs in one bit."""
    for at, byte in enumerate(file):
        for bit in range(8):
            yield file[:at] + bytes([byte ^ 1 << bit]) + file[at + 1 :]
