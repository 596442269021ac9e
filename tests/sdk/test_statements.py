"""Deployments and audits: further statements, signed as certificates are, that name a certificate's digest."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from certificates import CERTIFICATE, KEY_ID, KEYS, PRIVATE, dsse, flipped, signed
from cloister.wire._errors import InvalidArgument
from cloister.wire.certificate import InvalidCertificate, digest_of, verify
from cloister.wire.statements import (
    Audit,
    Deployment,
    sign_audit,
    sign_deployment,
    verify_audit,
    verify_deployment,
)

DEPLOYMENT = Deployment(
    tenant=CERTIFICATE.tenant,
    model=CERTIFICATE.model,
    version=CERTIFICATE.version,
    certificate_digest=digest_of(signed()),
    weights_digest=CERTIFICATE.weights_digest,
    server="0.1.0",
    since=datetime(2026, 11, 24, 13, 0, tzinfo=UTC),
)
AUDIT = Audit(
    certificate_digest=digest_of(signed()),
    engine={"cloister": "0.1.0", "torch": "2.13.0"},
    method="one-run canary audit, arXiv 2305.08846",
    canaries=1000,
    steps=8,
    confidence=0.95,
    epsilon_lower_bound=0.9,
    claimed_epsilon=3.0,
    delta=1e-5,
    contradicts_claim=False,
    issued=datetime(2026, 11, 24, 14, 0, tzinfo=UTC),
)
OF_THE_ENGINE = AUDIT.model_copy(update={"certificate_digest": None})

SIGN = {Deployment: sign_deployment, Audit: sign_audit}
VERIFY = {Deployment: verify_deployment, Audit: verify_audit}
ALL = pytest.mark.parametrize("stated", [DEPLOYMENT, AUDIT, OF_THE_ENGINE], ids=["deployment", "audit", "engine"])


def envelope_of(stated: Any) -> dict[str, Any]:
    return SIGN[type(stated)](stated, private_key=PRIVATE, key_id=KEY_ID)


def statement(stated: Any, **changes: Any) -> dict[str, Any]:
    """The statement that was signed, with top-level fields exchanged."""
    return {**json.loads(base64.b64decode(envelope_of(stated)["payload"])), **changes}


@ALL
def test_what_was_signed_verifies(stated: Any) -> None:
    assert VERIFY[type(stated)](json.dumps(envelope_of(stated)), {KEY_ID: KEYS[KEY_ID].hex()}) == stated


@pytest.mark.parametrize("stated", [DEPLOYMENT, AUDIT], ids=["deployment", "audit"])
def test_a_statement_is_about_the_certificate_whose_digest_it_names(stated: Any) -> None:
    about = [{"name": "certificate", "digest": {"sha256": digest_of(signed())}}]
    assert statement(stated)["subject"] == about
    for subject in ([], about * 2, [{**about[0], "digest": {"sha256": "0" * 64}}]):
        with pytest.raises(InvalidCertificate, match="subject"):
            VERIFY[type(stated)](dsse(statement(stated, subject=subject)), KEYS)


def test_an_audit_of_no_certificate_is_about_the_versions_of_its_engine() -> None:
    (subject,) = statement(OF_THE_ENGINE)["subject"]
    versions = b'{"cloister":"0.1.0","torch":"2.13.0"}'
    assert subject == {"name": "engine", "digest": {"sha256": hashlib.sha256(versions).hexdigest()}}
    newer = {**statement(OF_THE_ENGINE)["predicate"], "engine": {"cloister": "0.2.0", "torch": "2.13.0"}}
    with pytest.raises(InvalidCertificate, match="subject"):
        verify_audit(dsse(statement(OF_THE_ENGINE, predicate=newer)), KEYS)


def test_statements_have_types_of_their_own_and_none_is_taken_for_another() -> None:
    types = {statement(stated)["predicateType"] for stated in (DEPLOYMENT, AUDIT)}
    assert types == {"urn:cloister:deployment:1", "urn:cloister:audit:1"}
    envelopes = {verify: signed(), verify_deployment: envelope_of(DEPLOYMENT), verify_audit: envelope_of(AUDIT)}
    for reader in envelopes:
        for other, envelope in envelopes.items():
            if other is reader:
                reader(envelope, KEYS)
                continue
            with pytest.raises(InvalidCertificate, match="predicate's type is not urn:cloister:"):
                reader(envelope, KEYS)


@ALL
def test_a_flip_of_any_bit_is_refused(stated: Any) -> None:
    for copy in flipped(json.dumps(envelope_of(stated)).encode()):
        with pytest.raises(InvalidCertificate):
            VERIFY[type(stated)](copy, KEYS)


@ALL
def test_only_a_known_key_signs(stated: Any) -> None:
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(ValueError, match="sign with the key"):
        SIGN[type(stated)](stated, private_key=stranger, key_id=KEY_ID)
    with pytest.raises(InvalidCertificate, match=KEY_ID):
        VERIFY[type(stated)](envelope_of(stated), {})
    with pytest.raises(InvalidArgument, match="no form of keys"):
        VERIFY[type(stated)](envelope_of(stated), 3)  # type: ignore[arg-type]  # what a careless caller gives


@pytest.mark.parametrize(
    ("stated", "field", "value"),
    [
        (DEPLOYMENT, "certificate_digest", None),
        (DEPLOYMENT, "weights_digest", "0" * 63),
        (DEPLOYMENT, "server", ""),
        (DEPLOYMENT, "since", "2026-11-24T13:00:00"),
        (AUDIT, "certificate_digest", "x"),
        (AUDIT, "engine", {}),
        (AUDIT, "method", ""),
        (AUDIT, "canaries", 0),
        (AUDIT, "steps", "8"),
        (AUDIT, "confidence", 1.0),
        (AUDIT, "epsilon_lower_bound", -0.1),
        (AUDIT, "claimed_epsilon", 0.0),
        (AUDIT, "delta", 0.0),
        (AUDIT, "contradicts_claim", True),
        (AUDIT, "contradicts_claim", 0),
    ],
)
def test_a_signed_field_out_of_bounds_is_refused_by_its_name(stated: Any, field: str, value: object) -> None:
    spoiled = statement(stated, predicate={**statement(stated)["predicate"], field: value})
    with pytest.raises(InvalidCertificate, match=field):
        VERIFY[type(stated)](dsse(spoiled), KEYS)


def test_an_audit_contradicts_a_claim_below_its_bound() -> None:
    figures = AUDIT.model_dump()
    refuted = Audit.model_validate({**figures, "epsilon_lower_bound": 3.1, "contradicts_claim": True})
    assert verify_audit(envelope_of(refuted), KEYS).contradicts_claim
    with pytest.raises(ValueError, match="the bound and the claim say otherwise"):
        Audit.model_validate({**figures, "epsilon_lower_bound": 3.1})
