"""Check a certificate's or a receipt's file offline: its signature, by keys that you trust, and if these weights are its own."""

from __future__ import annotations

import hashlib
import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from cloister.cli.files import read, read_keys, unusable, write
from cloister.wire import page
from cloister.wire._errors import InvalidArgument
from cloister.wire.certificate import Certificate, InvalidCertificate, digest_of, verify
from cloister.wire.receipts import Receipt, is_receipt, verify_receipt

__all__ = ["describe", "printable", "run"]


def describe(parser: ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "certificate", type=Path, metavar="CERTIFICATE.json", help="the signed envelope, or a receipt's"
    )
    parser.add_argument(
        "--keys",
        type=Path,
        required=True,
        metavar="KEYS.json",
        help="the service's public keys, as `cloister-admin init --json` prints them or as key id -> hexadecimal",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE.safetensors", help="compare these weights with the certificate's"
    )
    parser.add_argument("--html", type=Path, metavar="PAGE.html", help="write the certificate as a page for people")
    parser.add_argument("--json", action="store_true", help="print the statement as JSON")


def run(given: Namespace) -> None:
    """Print what the certificate, or the receipt, states. Nothing is printed or written where anything is refused.

    Raises InvalidCertificate where it proves nothing or these are not its weights, InvalidArgument where a file is of no use.
    """
    envelope = read(given.certificate)
    if is_receipt(envelope):
        _tell_receipt(given, envelope)
        return
    certificate = verify(envelope, read_keys(given.keys))
    if given.weights is not None:
        _compare(given.weights, certificate)
    digest, signer = digest_of(envelope), json.loads(envelope)["signatures"][0]["keyid"]
    if given.html is not None:
        write(given.html, page.html(certificate, digest=digest, signer=signer))
    if given.json:
        stated = {"certificate": certificate.model_dump(mode="json"), "digest": digest, "signer": signer}
        print(json.dumps({**stated, "weights_compared": given.weights is not None}))
        return
    print(f"The signature holds: {certificate.name}, version {certificate.version}.")
    for name, value in _summary(certificate, digest=digest, signer=signer, weights=given.weights).items():
        print(f"  {name:<12} {printable(str(value))}")


def _tell_receipt(given: Namespace, envelope: bytes) -> None:
    if given.weights is not None or given.html is not None:
        raise InvalidArgument(
            "this is a receipt of shredding: no weights are its own, and it has no page; leave that out"
        )
    receipt = verify_receipt(envelope, read_keys(given.keys))
    digest, signer = digest_of(envelope), json.loads(envelope)["signatures"][0]["keyid"]
    if given.json:
        print(json.dumps({"receipt": receipt.model_dump(mode="json"), "digest": digest, "signer": signer}))
        return
    print(f"The signature holds: tenant {receipt.name} was shredded.")
    for name, value in _summary_of_receipt(receipt, digest=digest, signer=signer):
        print(f"  {name:<12} {printable(value)}")


def printable(text: str) -> str:
    """The text on one line, with whatever a terminal could take for a command, or could not show, written out."""
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


def _summary(certificate: Certificate, *, digest: str, signer: str, weights: Path | None) -> dict[str, object]:
    event = certificate.event
    start = {"drawn": "drawn at random", "uploaded": "uploaded; what they learned before is not covered"}
    compared = "not compared; give --weights FILE" if weights is None else f"those in {weights}"
    return {
        "epsilon": f"{certificate.epsilon!r} at delta {certificate.delta!r}, by {certificate.accountant}",
        "unit": f"{certificate.unit}, {certificate.adjacency}, {certificate.rows_per_unit or '?'} rows of each in a step",
        "mechanism": f"{event.mechanism}, sampler {certificate.sampler or 'not told'}",
        "noise": f"sigma {event.noise_multiplier!r}, clip {certificate.clip!r}",
        "sampling": f"q {event.sampling_rate!r}, {event.steps} steps",
        "size": f"nominal {certificate.nominal_size}, capacity {certificate.capacity or 'not told'}",
        "start": start.get(certificate.initial or "", "weights of an origin that is not told"),
        "weights": f"{certificate.weights_digest} ({compared})",
        "source": certificate.source,
        "datasets": ", ".join(certificate.datasets or (certificate.dataset,)),
        "model": certificate.model,
        "issued": certificate.issued.isoformat(),
        "signed by": signer,
        "digest": digest,
    }


def _summary_of_receipt(receipt: Receipt, *, digest: str, signer: str) -> list[tuple[str, str]]:
    keys = [
        f"version {key.version} in {key.provider} ({key.kind or 'of a kind not known'}), {key.outcome} "
        f"{key.destroyed.isoformat()}{f', gone for good {key.gone.isoformat()}' if key.gone else ''}. {key.claim}"
        for key in receipt.keys
    ]
    copies = [
        f"{each.place} of {each.created.isoformat()} may hold versions {', '.join(map(str, each.keys))}"
        for each in receipt.keystore_copies
    ]
    return [
        ("tenant", receipt.tenant),
        ("begun", receipt.begun.isoformat()),
        ("issued", receipt.issued.isoformat()),
        *(("key", key) for key in keys),
        ("deleted", ", ".join(f"{count} {what}" for what, count in receipt.deleted.items())),
        *(("kept", f"{what}: {why}") for what, why in receipt.kept.items()),
        *(("covered", f"{what}: {why}") for what, why in receipt.covers.items()),
        *(("not covered", f"{what}: {why}") for what, why in receipt.not_covered.items()),
        *(("copy of keys", copy) for copy in copies or ["no backup of the keystore is known that holds them"]),
        ("signed by", signer),
        ("digest", digest),
    ]


def _compare(path: Path, certificate: Certificate) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise unusable(path, exc) from exc
    if found != certificate.weights_digest:
        raise InvalidCertificate(
            f"{path} holds other weights: its SHA-256 is {found}, and the certificate is of {certificate.weights_digest}; "
            "get the file of this very version"
        )
