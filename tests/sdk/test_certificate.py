"""Certificates: what was signed verifies, here and in a verifier written from the DSSE and in-toto specifications alone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from certificates import CERTIFICATE, JWK, KEY_ID, KEYS, PRIVATE, RAW, TOLD_LATER, X, dsse, flipped, signed, statement
from cloister.wire._errors import CloisterError, InvalidArgument
from cloister.wire.certificate import (
    Certificate,
    ChargedEvent,
    InvalidCertificate,
    digest_of,
    environment_digest,
    installed_distributions,
    key_id,
    sign,
    verify,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "certificate-1.json").read_text())


class Refused(Exception):
    """What the independent verifier raises."""


def independent_verify(envelope_json: str, keys: dict[str, str]) -> dict[str, Any]:
    """DSSE v1.0.2 and in-toto Statement v1 with `cryptography` and `json` alone; the predicate."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise Refused
        return dict(pairs)

    def not_json(_: str) -> None:
        raise Refused

    def decoded(text: str) -> bytes:
        raw = base64.b64decode(text, validate=True)
        if base64.b64encode(raw).decode() != text:
            raise Refused
        return raw

    try:
        envelope = json.loads(envelope_json, object_pairs_hook=once)
        kind, payload = envelope["payloadType"], decoded(envelope["payload"])
        (signature,) = envelope["signatures"]
        raw_key = bytes.fromhex(keys[signature["keyid"]])
        if signature["keyid"] != "ed25519:" + hashlib.sha256(raw_key).digest()[:16].hex():
            raise Refused
        authenticated = f"DSSEv1 {len(kind.encode())} {kind} {len(payload)} ".encode() + payload
        Ed25519PublicKey.from_public_bytes(raw_key).verify(decoded(signature["sig"]), authenticated)
        statement = json.loads(payload, object_pairs_hook=once, parse_constant=not_json)
        predicate: dict[str, Any] = statement["predicate"]
        subject = {
            "name": f"{predicate['model']}/versions/{predicate['version']}",
            "digest": {"sha256": predicate["weights_digest"]},
        }
        types = (kind, statement["_type"], statement["predicateType"])
        if types != (
            "application/vnd.in-toto+json",
            "https://in-toto.io/Statement/v1",
            "urn:cloister:certificate:1",
        ):
            raise Refused
        if statement["subject"] != [subject] or not 0 < predicate["epsilon"] < math.inf:
            raise Refused
    except (InvalidSignature, KeyError, TypeError, ValueError) as exc:
        raise Refused from exc
    return predicate


def named(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def test_what_was_signed_verifies_from_text_from_bytes_and_from_objects() -> None:
    envelope = signed()
    text = json.dumps(envelope)
    for form in (envelope, text, text.encode(), json.loads(text)):
        assert verify(form, KEYS) == CERTIFICATE
    assert verify(envelope, {KEY_ID: PRIVATE.public_key()}) == CERTIFICATE


def test_what_was_signed_verifies_in_the_independent_verifier() -> None:
    envelope = json.dumps(signed())
    predicate = independent_verify(envelope, {KEY_ID: RAW.hex()})
    assert Certificate.model_validate(predicate) == CERTIFICATE


@named(VECTORS["good"])
def test_a_good_vector_verifies_in_both(vector: dict[str, Any]) -> None:
    certificate = verify(vector["envelope"], {name: bytes.fromhex(raw) for name, raw in vector["keys"].items()})
    assert certificate == Certificate.model_validate(vector["certificate"])
    predicate = independent_verify(vector["envelope"], vector["keys"])
    assert {name: predicate[name] for name in vector["certificate"]} == vector["certificate"]


@named(VECTORS["corrupted"])
def test_a_corrupted_vector_is_refused_by_both(vector: dict[str, Any]) -> None:
    with pytest.raises(InvalidCertificate):
        verify(vector["envelope"], {name: bytes.fromhex(raw) for name, raw in vector["keys"].items()})
    with pytest.raises(Refused):
        independent_verify(vector["envelope"], vector["keys"])


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_change_of_any_character_is_refused_or_changes_nothing(data: st.DataObject) -> None:
    text = json.dumps(signed())
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(min_codepoint=1, max_codepoint=0x17F))
    try:
        certificate = verify(text[:at] + other + text[at + 1 :], KEYS)
    except InvalidCertificate:
        return
    assert certificate == CERTIFICATE and (other == text[at] or text[at].isspace())


def test_a_flip_of_any_bit_of_the_file_is_refused() -> None:
    file = json.dumps(signed(), indent=1).encode()
    assert verify(file, KEYS) == CERTIFICATE
    for copy in flipped(file):
        with pytest.raises(InvalidCertificate):
            verify(copy, KEYS)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_change_of_any_payload_byte_is_refused(data: st.DataObject) -> None:
    envelope = signed()
    payload = bytearray(base64.b64decode(envelope["payload"]))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidCertificate, match="changed or forged"):
        verify({**envelope, "payload": base64.b64encode(payload).decode()}, KEYS)


def test_the_payload_type_is_under_the_signature() -> None:
    with pytest.raises(InvalidCertificate, match="payloadType"):
        verify(dsse(statement(), payload_type="application/json"), KEYS)
    with pytest.raises(InvalidCertificate, match="changed or forged"):
        verify({**dsse(statement(), payload_type="text/plain"), "payloadType": "application/vnd.in-toto+json"}, KEYS)


@pytest.mark.parametrize(
    "keys",
    [[JWK], {"keys": [JWK]}, {KEY_ID: RAW.hex()}, {KEY_ID: JWK}, ({"kty": "EC", "crv": "P-256", "kid": "t"}, JWK)],
    ids=["list", "set", "hex", "by id", "among others"],
)
def test_keys_are_taken_in_every_form_in_which_they_are_given_out(keys: Any) -> None:
    envelope = signed()
    assert verify(envelope, keys) == CERTIFICATE
    assert verify(envelope, json.loads(json.dumps(keys))) == CERTIFICATE


@pytest.mark.parametrize("keys", ["ed25519:1", b"x", None, 3, [RAW], {KEY_ID: 3}, {KEY_ID: "no hex"}], ids=repr)
def test_keys_of_no_known_form_are_refused_by_name(keys: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"client\.certificate_keys\(\)"):
        verify(signed(), keys)


@pytest.mark.parametrize("x", [None, "", "AAAA", "!", X[:-4]])
def test_a_jwk_that_holds_no_key_proves_nothing(x: Any) -> None:
    with pytest.raises(InvalidCertificate, match="no Ed25519 public key"):
        verify(signed(), [{**JWK, "x": x}])


@pytest.mark.parametrize("envelope", [None, 3, [], Path("certificate.json")], ids=repr)
def test_what_is_no_envelope_at_all_is_no_certificate(envelope: Any) -> None:
    with pytest.raises(InvalidCertificate):
        verify(envelope, KEYS)


def test_an_invalid_certificate_hangs_on_the_root_of_the_sdk() -> None:
    assert issubclass(InvalidCertificate, CloisterError)


def test_a_key_that_was_not_given_is_refused_by_its_id() -> None:
    envelope = signed()
    with pytest.raises(InvalidCertificate, match=KEY_ID):
        verify(envelope, {})


def test_a_key_given_under_anothers_id_is_refused() -> None:
    stranger = Ed25519PrivateKey.generate()
    raw = stranger.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    forged = sign(CERTIFICATE, private_key=stranger, key_id=key_id(raw))
    forged["signatures"][0]["keyid"] = KEY_ID
    with pytest.raises(InvalidCertificate, match="changed or forged"):
        verify(forged, KEYS)
    with pytest.raises(InvalidCertificate, match="another id"):
        verify(forged, {KEY_ID: raw})


@pytest.mark.parametrize("count", [0, 2])
def test_exactly_one_signature_is_asked_for(count: int) -> None:
    envelope = signed()
    with pytest.raises(InvalidCertificate, match="exactly one signature"):
        verify({**envelope, "signatures": envelope["signatures"] * count}, KEYS)


@pytest.mark.parametrize(
    "changes",
    [
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"predicateType": "urn:cloister:certificate:2"},
        {"subject": []},
        {"subject": [{"name": "another", "digest": {"sha256": CERTIFICATE.weights_digest}}]},
        {"predicate": None},
        {"predicate": {}},
    ],
    ids=str,
)
def test_a_signed_statement_of_another_kind_is_no_certificate(changes: dict[str, Any]) -> None:
    assert verify(dsse(statement()), KEYS) == CERTIFICATE
    with pytest.raises(InvalidCertificate):
        verify(dsse(statement(**changes)), KEYS)


def test_a_subject_of_other_weights_is_refused() -> None:
    other = statement()
    other["subject"][0]["digest"]["sha256"] = "0" * 64
    with pytest.raises(InvalidCertificate, match="subject"):
        verify(dsse(other), KEYS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epsilon", 0),
        ("epsilon", -1.0),
        ("epsilon", "1.25"),
        ("epsilon", None),
        ("delta", 1.0),
        ("version", 0),
        ("version", 1.5),
        ("capacity", 0),
        ("rows_per_unit", 0),
        ("weights_digest", "A" * 64),
        ("model", "digits"),
        ("issued", "2026-11-24T12:00:00"),
        ("engine", []),
        ("datasets", []),
        ("datasets", ["ds_" + "5" * 32]),
        ("datasets", "ds_" + "4" * 32),
        ("sealed_digest", ""),
        ("environment_digest", "0" * 63),
        ("code_version", ""),
        ("sampler", 1),
        ("events", [{}]),
        ("events", ["src_" + "3" * 32 + "/17"]),
    ],
)
def test_a_signed_predicate_with_a_field_out_of_bounds_is_refused_by_the_fields_name(field: str, value: object) -> None:
    with pytest.raises(InvalidCertificate, match=field):
        verify(dsse(statement(predicate={**statement()["predicate"], field: value})), KEYS)


def test_what_an_earlier_certificate_does_not_tell_is_told_to_be_unknown() -> None:
    told = {name: value for name, value in statement()["predicate"].items() if name not in TOLD_LATER}
    assert {name for name, field in Certificate.model_fields.items() if not field.is_required()} == TOLD_LATER
    earlier = verify(dsse(statement(predicate=told)), KEYS)
    assert {getattr(earlier, name) for name in TOLD_LATER} == {None}
    assert earlier == CERTIFICATE.model_copy(update=dict.fromkeys(TOLD_LATER))


def test_a_newer_service_may_state_more() -> None:
    more = statement(predicate={**statement()["predicate"], "not thought of yet": ["x"]})
    assert verify(dsse(more), KEYS) == CERTIFICATE


@pytest.mark.parametrize("spoil", ["repeated", "infinite", "nan", "not utf-8", "deep"])
def test_a_signed_payload_that_readers_could_read_differently_is_refused(spoil: str) -> None:
    text = json.dumps(statement())
    payload = {
        "repeated": text.replace('"epsilon": 1.25', '"epsilon": 0.1, "epsilon": 1.25').encode(),
        "infinite": text.replace("0.0042", "1e999").encode(),
        "nan": text.replace("0.0042", "NaN").encode(),
        "not utf-8": text.replace("digits", "d\u00efgits").encode("latin-1"),
        "deep": b"[" * 100_000,
    }[spoil]
    assert payload != text.encode()
    with pytest.raises(InvalidCertificate, match="not JSON, or repeats a key"):
        verify(dsse(payload), KEYS)


@pytest.mark.parametrize(
    "respelled",
    [
        lambda text: text.rstrip("=") if text.endswith("=") else text + "=",
        lambda text: text + "\n",
        lambda text: text[:10] + " " + text[10:],
        lambda text: "",
    ],
    ids=["padding", "line feed", "space", "empty"],
)
@pytest.mark.parametrize("where", ["payload", "sig"])
def test_base64_has_one_spelling(where: str, respelled: Any) -> None:
    envelope = signed()
    holder = envelope if where == "payload" else envelope["signatures"][0]
    holder[where] = respelled(holder[where])
    with pytest.raises(InvalidCertificate, match="base64"):
        verify(envelope, KEYS)


@pytest.mark.parametrize(
    "envelope",
    ["", "null", "[]", "{}", "{", b"\xff", '{"payloadType": 1, "payloadType": 1}', "[" * 100_000, " " * 2**21],
)
def test_what_is_no_envelope_is_refused(envelope: str | bytes) -> None:
    with pytest.raises(InvalidCertificate):
        verify(envelope, KEYS)


def test_a_signer_names_its_own_key() -> None:
    with pytest.raises(ValueError, match="sign with the key"):
        sign(CERTIFICATE, private_key=Ed25519PrivateKey.generate(), key_id=KEY_ID)


def test_a_key_id_is_the_start_of_the_public_keys_hash() -> None:
    assert key_id(bytes(32)) == "ed25519:" + hashlib.sha256(bytes(32)).hexdigest()[:32]
    with pytest.raises(ValueError, match="32 raw bytes"):
        key_id(bytes(31))


def test_no_infinite_figure_is_ever_signed() -> None:
    endless = CERTIFICATE.model_copy(update={"epsilon": math.inf})
    with pytest.raises(ValueError, match="JSON compliant"):
        sign(endless, private_key=PRIVATE, key_id=KEY_ID)


def test_nothing_is_signed_that_no_verifier_would_read() -> None:
    (row, _) = CERTIFICATE.events or ()
    with pytest.raises(ValueError, match="over 1048576 bytes"):
        signed(CERTIFICATE.model_copy(update={"events": (row,) * 5000}))


@pytest.mark.parametrize("row", ["src_" + "0" * 32 + "/17", "src_" + "3" * 32, "src_" + "3" * 32 + "/", "17"])
def test_a_charged_row_is_one_of_its_sources_ledger(row: str) -> None:
    good = CERTIFICATE.model_dump(mode="json")["events"][0]
    assert ChargedEvent.model_validate(good).id == good["id"]
    with pytest.raises(ValueError, match="id"):
        ChargedEvent.model_validate({**good, "id": row})
    events = [good, {**good, "id": row}]
    with pytest.raises(InvalidCertificate, match=r"events\.1\.id"):
        verify(dsse(statement(predicate={**statement()["predicate"], "events": events})), KEYS)


def test_a_digest_is_of_the_signed_bytes_however_the_envelope_is_written() -> None:
    envelope = signed()
    payload = base64.b64decode(envelope["payload"])
    for form in (envelope, json.dumps(envelope), json.dumps(envelope, indent=2).encode()):
        assert digest_of(form) == hashlib.sha256(payload).hexdigest()
    assert digest_of(signed(CERTIFICATE.model_copy(update={"version": 4}))) != digest_of(envelope)


@pytest.mark.parametrize("envelope", ["", "{}", [], {"payloadType": "application/vnd.in-toto+json", "payload": "A"}])
def test_what_is_no_envelope_has_no_digest(envelope: Any) -> None:
    with pytest.raises(InvalidCertificate):
        digest_of(envelope)


def test_an_environments_digest_is_of_its_sorted_lines() -> None:
    lines = b"numpy==2.5.1\ntorch==2.13.0\n"
    assert environment_digest({"torch": "2.13.0", "numpy": "2.5.1"}) == hashlib.sha256(lines).hexdigest()


def test_an_environments_digest_is_told_by_pip_too() -> None:
    listed = subprocess.run([sys.executable, "-m", "pip", "list", "--format=freeze"], capture_output=True, check=True)
    lines = sorted(listed.stdout.splitlines(keepends=True))
    import setuptools  # noqa: F401  # which puts packages of its own on the path

    assert (
        len(lines) > 10 and environment_digest(installed_distributions()) == hashlib.sha256(b"".join(lines)).hexdigest()
    )
