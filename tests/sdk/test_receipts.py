"""Receipts of shredding: verified as they were signed, refused when anything was changed, told in full by the command."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from certificates import KEY_ID, KEYS, PRIVATE, RAW, dsse, flipped, signed
from cloister.cli import main
from cloister.wire.certificate import InvalidCertificate, digest_of, verify
from cloister.wire.dsse import canonical_json
from cloister.wire.receipts import DestroyedKey, KeystoreCopy, Receipt, is_receipt, sign_receipt, verify_receipt

TENANT = "tn_" + "0" * 32
AT = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
RECEIPT = Receipt(
    tenant=TENANT,
    name="acme",
    begun=AT,
    issued=AT + timedelta(seconds=4),
    keys=(
        DestroyedKey(
            version=1, key_id=f"{TENANT}.1f", provider="local", kind="local", created=AT - timedelta(days=90),
            outcome="earlier", destroyed=AT - timedelta(days=1), claim="Overwritten.", waiting_days=0,
            gone=AT - timedelta(days=1),
        ),
        DestroyedKey(
            version=2, key_id=f"{TENANT}.2e", provider="kms", kind="aws_kms", created=AT - timedelta(days=2),
            outcome="destroyed", destroyed=AT, claim="Told to delete it.", waiting_days=7, gone=AT + timedelta(days=7),
        ),
    ),
    deleted={"objects": 41, "clients": 2},
    kept={"ledger": "What was spent stays spent."},
    covers={"data": "Rows and weights."},
    not_covered={"flash": "What flash keeps."},
    keystore_copies=(KeystoreCopy(id="kb_1", place="/backup/keystore.tar", created=AT - timedelta(days=3), keys=(1,)),),
    server="0.1.0",
)  # fmt: skip


def envelope(receipt: Receipt = RECEIPT) -> dict[str, Any]:
    return sign_receipt(receipt, private_key=PRIVATE, key_id=KEY_ID)


def statement(**changes: Any) -> dict[str, Any]:
    """The statement of RECEIPT, with fields of its predicate exchanged."""
    told: dict[str, Any] = json.loads(base64.b64decode(envelope()["payload"]))
    return {**told, "predicate": {**told["predicate"], **changes}}


def test_what_was_signed_verifies() -> None:
    assert verify_receipt(json.dumps(envelope()), {KEY_ID: KEYS[KEY_ID].hex()}) == RECEIPT
    names = [[1, "local", f"{TENANT}.1f"], [2, "kms", f"{TENANT}.2e"]]
    digest = hashlib.sha256(canonical_json(names)).hexdigest()
    assert statement()["subject"] == [{"name": TENANT, "digest": {"sha256": digest}}]


def test_a_flip_of_any_bit_is_refused() -> None:
    small = RECEIPT.model_copy(update={"keys": RECEIPT.keys[1:], "kept": {}, "covers": {}, "keystore_copies": ()})
    for copy in list(flipped(json.dumps(envelope(small)).encode()))[::7]:
        with pytest.raises(InvalidCertificate):
            verify_receipt(copy, KEYS)


def test_a_receipt_is_taken_for_no_certificate_and_no_certificate_for_a_receipt() -> None:
    assert is_receipt(envelope()) and is_receipt(json.dumps(envelope())) and not is_receipt(signed())
    for none in (b"", b"{", b"[]", b"{}", b'{"payload": "AAAA"}', b'{"payload": 3}', b"[" * 100_000, b"\xff"):
        assert not is_receipt(none)
    with pytest.raises(InvalidCertificate, match="predicate's type is not urn:cloister:certificate:1"):
        verify(envelope(), KEYS)
    with pytest.raises(InvalidCertificate, match="predicate's type is not urn:cloister:shredding:1"):
        verify_receipt(signed(), KEYS)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"keys": []}, "keys"),
        ({"keys": [{**statement()["predicate"]["keys"][1], "gone": "2026-11-24T12:00:00Z"}]}, "keys.0.gone"),
        ({"keys": [{**statement()["predicate"]["keys"][1], "waiting_days": None}]}, "keys.0.gone"),
        ({"keys": statement()["predicate"]["keys"][:1]}, "subject"),
        ({"tenant": "tn_" + "1" * 32}, "subject"),
        ({"deleted": {"objects": -1}}, "deleted.objects"),
        ({"not_covered": {"flash": ""}}, "not_covered.flash"),
        ({"begun": "2026-11-24T12:00:00"}, "begun"),
    ],
    ids=["no key", "gone too early", "no days", "a key less", "another tenant", "negative", "empty", "no zone"],
)
def test_what_cannot_be_true_is_refused_though_it_is_signed(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidCertificate, match=re.escape(why)):
        verify_receipt(dsse(statement(**changed)), KEYS)


def test_what_a_later_release_adds_is_ignored() -> None:
    assert verify_receipt(dsse(statement(colour="blue")), KEYS) == RECEIPT


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `cloister verify` on a receipt's file; the status, and what was printed where."""
    monkeypatch.chdir(tmp_path)
    Path("receipt.json").write_text(json.dumps(envelope()))
    Path("keys.json").write_text(json.dumps({KEY_ID: RAW.hex()}))

    def command(*options: str) -> tuple[int, str, str]:
        return main(["verify", "receipt.json", "--keys", "keys.json", *options]), *capsys.readouterr()

    return command


def test_the_command_tells_all_that_a_receipt_says(run: Callable[..., Any]) -> None:
    status, out, err = run()
    assert (status, err) == (0, "") and out.startswith("The signature holds: tenant acme was shredded.")
    for told in (
        TENANT, "version 2 in kms (aws_kms), destroyed 2026-11-24", "gone for good 2026-12-01", "Told to delete it.",
        "2 clients, 41 objects", "flash: What flash keeps.", "ledger: What was spent", "data: Rows and weights.",
        "/backup/keystore.tar", KEY_ID, digest_of(envelope()),
    ):  # fmt: skip
        assert told in out
    told = json.loads(run("--json")[1])
    assert Receipt.model_validate(told["receipt"]) == RECEIPT
    assert (told["digest"], told["signer"]) == (digest_of(envelope()), KEY_ID)


def test_the_command_refuses_a_changed_receipt_and_what_is_asked_of_none(run: Callable[..., Any]) -> None:
    for options in (["--weights", "keys.json"], ["--html", "page.html"]):
        status, out, err = run(*options)
        assert (status, out) == (1, "") and "receipt of shredding" in err and not Path("page.html").exists()
    payload = json.loads(base64.b64decode(envelope()["payload"]))
    payload["predicate"]["deleted"]["objects"] = 40
    changed = {**envelope(), "payload": base64.b64encode(canonical_json(payload)).decode()}
    Path("receipt.json").write_text(json.dumps(changed))
    status, out, err = run()
    assert (status, out) == (1, "") and "changed or forged" in err


DOCS = (Path(__file__).parents[2] / "docs" / "receipts.md").read_text()


def test_the_receipt_that_the_docs_show_is_a_whole_statement(run: Callable[..., Any]) -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL)
    stated: dict[str, Any] = json.loads(shown)
    receipt = verify_receipt(dsse(stated), KEYS)
    assert stated["predicate"].keys() == Receipt.model_fields.keys()
    assert stated["predicate"]["keys"][0].keys() == DestroyedKey.model_fields.keys()
    assert receipt.keys[0].waiting_days == 7


def test_the_commands_of_the_docs_run_as_they_stand(run: Callable[..., Any]) -> None:
    (shown,) = re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)
    for line in shown.splitlines():
        assert main(line.split()[1:]) == 0
