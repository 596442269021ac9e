"""Sealed parts against a second reader and writer, written from docs/spec/recipients.md and RFC 9180 alone, and the vectors."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

import cloister
from cloister import InvalidArgument
from cloister.wire.columns import Column, Schema
from cloister.wire.recipients import (
    SEALED_ROWS_TYPE,
    InvalidSealedPart,
    RecipientKey,
    RecipientRefused,
    open_part,
    padded_bytes,
    recipient_of,
    seal_part,
)
from cloister.wire.rows import arrays_of, decode_rows, encode_rows, part_rows
from fake_server import Server, refusal

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "recipients-1.json").read_text())
SOURCE, DATASET = "src_" + "0" * 32, "ds_" + "1" * 32
TENANT, RECIPIENT = "tn_" + "a" * 32, "rcp_" + "b" * 32
COLUMNS: dict[str, Column] = {"x": cloister.Tensor(shape=(16384,), low=0, high=1)}
"""64 KiB a row: 64 rows a part."""
HELD = X25519PrivateKey.from_private_bytes(bytes(range(32)))
TO = RecipientKey(TENANT, RECIPIENT, HELD.public_key().public_bytes_raw())


class Refused(Exception):
    """What the second reader raises."""


def named(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


# The second implementation: nothing of Cloister's below, and RFC 9180 out of X25519, HMAC and AES-GCM. ------------------

KEM = b"KEM" + bytes.fromhex("0020")
SUITE = b"HPKE" + bytes.fromhex("002000010002")
LINE = b"cloister.rows.sealed/1\n"


def extract(suite: bytes, salt: bytes, label: bytes, secret: bytes) -> bytes:
    """LabeledExtract, RFC 9180 section 4."""
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + secret, "sha256")


def expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    """LabeledExpand, RFC 9180 section 4, for what one block of HMAC-SHA256 gives."""
    return hmac.digest(key, length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info + b"\x01", "sha256")[:length]


def aead_of(shared: bytes, enc: bytes, public: bytes, info: bytes) -> tuple[AESGCM, bytes]:
    """The cipher and the nonce of a message: sections 4.1 and 5.1, base mode."""
    secret_of_kem = expand(KEM, extract(KEM, b"", b"eae_prk", shared), b"shared_secret", enc + public, 32)
    context = b"\x00" + extract(SUITE, b"", b"psk_id_hash", b"") + extract(SUITE, b"", b"info_hash", info)
    secret = extract(SUITE, secret_of_kem, b"secret", b"")
    return AESGCM(expand(SUITE, secret, b"key", context, 32)), expand(SUITE, secret, b"base_nonce", context, 12)


def info_of(tenant: str, recipient: str, dataset: str, part: int) -> bytes:
    fields = (tenant, recipient, dataset, str(part))
    return LINE + b"".join(len(field).to_bytes(2, "big") + field.encode("ascii") for field in fields)


def reference_seal(plaintext: bytes, ephemeral: bytes, public: bytes, place: tuple[str, str, str, int]) -> bytes:
    key = X25519PrivateKey.from_private_bytes(ephemeral)
    enc = key.public_key().public_bytes_raw()
    aead, nonce = aead_of(key.exchange(X25519PublicKey.from_public_bytes(public)), enc, public, info_of(*place))
    return LINE + bytes.fromhex(place[1][4:]) + enc + aead.encrypt(nonce, plaintext, b"")


def reference_pad(body: bytes, padded_to: int) -> bytes:
    return (len(body).to_bytes(8, "big") + body).ljust(padded_to, b"\x00")


def reference_open(sealed: bytes, private: bytes, place: tuple[str, str, str, int]) -> bytes:
    head = LINE + bytes.fromhex(place[1][4:])
    enc, box = sealed[len(head) :][:32], sealed[len(head) + 32 :]
    if not sealed.startswith(head) or len(enc) < 32:
        raise Refused
    key = X25519PrivateKey.from_private_bytes(private)
    try:
        shared = key.exchange(X25519PublicKey.from_public_bytes(enc))
        aead, nonce = aead_of(shared, enc, key.public_key().public_bytes_raw(), info_of(*place))
        plaintext = aead.decrypt(nonce, box, b"")
    except (InvalidTag, ValueError):
        raise Refused from None
    body = plaintext[8:][: int.from_bytes(plaintext[:8], "big")]
    if len(plaintext) < 8 or reference_pad(body, len(plaintext)) != plaintext:
        raise Refused
    return body


def reference_line(tenant: str, recipient: str, public: bytes) -> str:
    content = bytes.fromhex(tenant[3:]) + bytes.fromhex(recipient[4:]) + public
    checksum = hashlib.sha256(b"cloister-recipient-1:" + content).digest()[:4]
    return "cloister-recipient-1:" + base64.urlsafe_b64encode(content + checksum).decode().rstrip("=")


def place_of(vector: dict[str, Any]) -> tuple[str, str, str, int]:
    return vector["tenant"], vector["recipient"], vector["dataset"], vector["part"]


def opened(sealed: bytes, private: bytes, place: tuple[str, str, str, int]) -> bytes:
    tenant, recipient, dataset, part = place
    key = X25519PrivateKey.from_private_bytes(private)
    return open_part(key, sealed, tenant=tenant, recipient_id=recipient, dataset=dataset, part=part)


# The vectors. -----------------------------------------------------------------------------------------------------------


@named(VECTORS["lines"])
def test_a_line_is_read_and_written_by_both(vector: dict[str, Any]) -> None:
    fields = vector["tenant"], vector["recipient"], bytes.fromhex(vector["public"])
    assert RecipientKey.parse(vector["line"]) == RecipientKey(*fields) == RecipientKey.parse(vector["line"] + "\n")
    assert str(RecipientKey(*fields)) == reference_line(*fields) == vector["line"]


@named(VECTORS["refused_lines"])
def test_every_other_line_is_refused_and_not_repeated(vector: dict[str, Any]) -> None:
    with pytest.raises(RecipientRefused) as told:
        RecipientKey.parse(vector["line"])
    assert isinstance(told.value, ValueError) and isinstance(told.value, InvalidArgument)
    assert "operator" in str(told.value) and (len(vector["line"]) < 30 or vector["line"][21:] not in str(told.value))


@named(VECTORS["sealed"])
def test_a_good_vector_opens_in_both_readers_and_the_second_writer_writes_it(vector: dict[str, Any]) -> None:
    sealed, private, body = (bytes.fromhex(vector[name]) for name in ("sealed", "private", "body"))
    assert opened(sealed, private, place_of(vector)) == body
    assert reference_open(sealed, private, place_of(vector)) == body
    assert recipient_of(sealed) == vector["recipient"]
    public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    plaintext = reference_pad(body, vector["padded_to"])
    assert reference_seal(plaintext, bytes.fromhex(vector["ephemeral"]), public, place_of(vector)) == sealed
    to = RecipientKey(vector["tenant"], vector["recipient"], public)
    ours = seal_part(to, body, dataset=vector["dataset"], part=vector["part"], padded_to=vector["padded_to"])
    assert reference_open(ours, private, place_of(vector)) == body
    assert len(ours) == len(sealed) and ours != sealed


@named(VECTORS["corrupted"])
def test_a_corrupted_vector_is_refused_by_both_readers(vector: dict[str, Any]) -> None:
    sealed, private = bytes.fromhex(vector["sealed"]), bytes.fromhex(vector["private"])
    with pytest.raises(InvalidSealedPart) as told:
        opened(sealed, private, place_of(vector))
    assert str(told.value) == str(InvalidSealedPart()) and told.value.__cause__ is None
    with pytest.raises(Refused):
        reference_open(sealed, private, place_of(vector))


@named(VECTORS["padding"])
def test_padding_follows_from_the_schema_and_the_capacity(vector: dict[str, Any]) -> None:
    columns = TypeAdapter(Schema).validate_python(vector["columns"])
    given = padded_bytes(columns, capacity_rows=vector["capacity_rows"], part=vector["part"])
    assert given == vector["padded_to"]


# Properties. ------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 2**14), st.data())
def test_what_is_sealed_opens_in_its_own_place_and_in_no_other(
    body: bytes, space: int, part: int, data: st.DataObject
) -> None:
    sealed = seal_part(TO, body, dataset=DATASET, part=part, padded_to=8 + len(body) + space)
    place = (TENANT, RECIPIENT, DATASET, part)
    assert opened(sealed, HELD.private_bytes_raw(), place) == body
    ids = st.text("0123456789abcdef", min_size=32, max_size=32)
    other = (
        "tn_" + data.draw(ids, "tenant"),
        "rcp_" + data.draw(ids, "recipient"),
        "ds_" + data.draw(ids, "dataset"),
        data.draw(st.integers(0, 2**14), "part"),
    )
    for at, changed in enumerate(other):
        elsewhere = (*place[:at], changed, *place[at + 1 :])
        if elsewhere != place:
            with pytest.raises(InvalidSealedPart):
                opened(sealed, HELD.private_bytes_raw(), elsewhere)  # type: ignore[arg-type]  # a slice of a tuple has no places
    with pytest.raises(InvalidSealedPart):
        opened(sealed, data.draw(st.binary(min_size=32, max_size=32), "another key"), place)


@given(st.binary(max_size=100), st.integers(0, 64), st.data())
def test_no_bit_is_changed_and_no_byte_left_out_or_added(body: bytes, space: int, data: st.DataObject) -> None:
    sealed = seal_part(TO, body, dataset=DATASET, part=3, padded_to=8 + len(body) + space)
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1), "bit")
    flipped = bytearray(sealed)
    flipped[bit // 8] ^= 1 << bit % 8
    cut = sealed[: data.draw(st.integers(0, len(sealed) - 1), "length")]
    longer = sealed + data.draw(st.binary(min_size=1, max_size=40), "more")
    for wrong in (bytes(flipped), cut, longer):
        with pytest.raises(InvalidSealedPart):
            opened(wrong, HELD.private_bytes_raw(), (TENANT, RECIPIENT, DATASET, 3))


def test_every_bit_of_a_short_part_counts() -> None:
    sealed, place = seal_part(TO, b"row", dataset=DATASET, part=0, padded_to=16), (TENANT, RECIPIENT, DATASET, 0)
    assert opened(sealed, HELD.private_bytes_raw(), place) == b"row"
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidSealedPart):
            opened(bytes(flipped), HELD.private_bytes_raw(), place)


@given(st.integers(0, 90), st.characters(codec="ascii"))
def test_no_character_of_a_line_can_be_mistyped(at: int, typed: str) -> None:
    line = str(TO)
    place = len("cloister-recipient-1:") + at
    wrong = line[:place] + typed + line[place + 1 :]
    if wrong != line:
        with pytest.raises(RecipientRefused):
            RecipientKey.parse(wrong)


SCHEMAS: list[dict[str, Any]] = [
    {"x": {"type": "tensor", "shape": [4096], "low": 0, "high": 1}},
    {"x": {"type": "number", "low": 0, "high": 1}, "y": {"type": "category", "values": ["a", "b"]}},
    {"t": {"type": "text", "max_length": 2000}, "u": {"type": "unit"}, "i": {"type": "tensor", "shape": [3], "low": 0,
     "high": 255, "dtype": "uint8"}, "a": {"type": "audio", "rate": 8000, "max_samples": 500}},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=["tensor", "table", "mixed"])
@pytest.mark.parametrize("slots", [1, 9, 10, 11, 99, 100, 101, 255])
def test_the_length_tells_no_number_of_rows(schema: dict[str, Any], slots: int) -> None:
    columns = TypeAdapter(Schema).validate_python(schema)
    size = part_rows(columns)
    assert size > 255
    for capacity, part, room in ((slots, 0, slots), (3 * size + slots, 3, slots), (3 * size + slots, 1, size)):
        padded = padded_bytes(columns, capacity_rows=capacity, part=part)
        lengths = {
            len(seal_part(TO, empty_rows(columns, count), dataset=DATASET, part=part, padded_to=padded))
            for count in {1, 2, 9, 10, 11, 99, 100, 101, room - 1, room} & set(range(1, room + 1))
        }
        assert lengths == {len(LINE) + 16 + 32 + padded + 16}
        with pytest.raises(ValueError, match="does not fit"):
            seal_part(TO, empty_rows(columns, room + 1), dataset=DATASET, part=part, padded_to=padded)


def empty_rows(columns: dict[str, Column], count: int) -> bytes:
    return encode_rows(columns, {name: np.zeros((count, *shape), dtype) for name, dtype, shape in arrays_of(columns)})


# Uploads as the SDK sends them. -----------------------------------------------------------------------------------------


class Store:
    """The dataset routes of a server that holds a recipient's key: opens parts, keeps what they held, never overwrites one."""

    def __init__(self, server: Server) -> None:
        self.bodies: dict[int, bytes] = {}
        self.sent: dict[int, list[bytes]] = {}
        self.declared: Any = None
        server.on("/v1/datasets", self.declare).on("/v1/datasets/d", self.view)
        server.on(f"/v1/datasets/{DATASET}/complete", self.view)
        for number in range(4):
            server.on(f"/v1/datasets/{DATASET}/parts/{number}", self.part)

    def declare(self, request: httpx2.Request) -> Any:
        if self.declared:
            return refusal(409, "conflict", "a dataset named 'd' is already there")
        self.declared = json.loads(request.content)
        return self.view(request)

    def view(self, _: httpx2.Request) -> Any:
        rest = {"id": DATASET, "status": "uploading", "created": "2026-01-01T00:00:00Z"}
        return {"capacity_rows": self.declared["capacity"], **self.declared, **rest}

    def part(self, request: httpx2.Request) -> Any:
        number, body = self.open(request)
        if number in self.bodies:
            is_same = self.bodies[number] == body
            return refusal(409, "conflict", "stored already", part_exists=True, same_content=is_same)
        self.bodies[number] = body
        return {"part": number}

    def open(self, request: httpx2.Request) -> tuple[int, bytes]:
        number = int(request.url.path.rsplit("/", 1)[1])
        digest = base64.b64encode(hashlib.sha256(request.content).digest()).decode()
        assert request.headers["content-digest"] == f"sha-256=:{digest}:"
        assert request.headers["content-type"] == SEALED_ROWS_TYPE
        self.sent.setdefault(number, []).append(request.content)
        return number, opened(request.content, HELD.private_bytes_raw(), (TENANT, RECIPIENT, DATASET, number))


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.random.default_rng(seed).random((count, 16384), dtype=np.float32)}


GIVEN: dict[str, Any] = {"source": SOURCE, "columns": COLUMNS, "nominal_size": 100, "capacity": 150}


@pytest.mark.parametrize("where", ["upload", "client", "both"])
def test_every_part_is_sealed_for_the_pinned_recipient(server: Server, where: str) -> None:
    store, data = Store(server), rows(130)
    stranger = RecipientKey(TENANT, "rcp_" + "c" * 32, X25519PrivateKey.generate().public_key().public_bytes_raw())
    on_client = {"client": str(TO), "both": str(stranger)}.get(where)
    on_upload = {} if where == "client" else {"seal_to": str(TO)}
    with server.client(seal_to=on_client) as client:
        client.datasets.upload("d", data, **GIVEN, **on_upload)
    found = [decode_rows(COLUMNS, store.bodies[number])["x"] for number in range(3)]
    assert np.array_equal(np.concatenate(found), data["x"]) and [len(each) for each in found] == [64, 64, 2]
    assert not any("recipient" in request.url.path for request in server.asked)


def test_the_async_client_seals_alike(server: Server) -> None:
    store, data = Store(server), rows(70)

    async def journey() -> None:
        async with server.async_client(seal_to=str(TO)) as client:
            await client.datasets.upload("d", data, **GIVEN)

    asyncio.run(journey())
    assert np.array_equal(decode_rows(COLUMNS, store.bodies[0])["x"], data["x"][:64])


def test_parts_are_as_long_whatever_is_in_them(server: Server) -> None:
    lengths: list[list[int]] = []
    for count in (1, 64, 65, 127):
        store = Store(server)
        with server.client(seal_to=str(TO)) as client:
            client.datasets.upload("d", rows(count), **GIVEN)
        lengths.append([len(sent[0]) for _, sent in sorted(store.sent.items())])
    assert lengths[0] == lengths[1] == lengths[2][:1] and len(set(lengths[2] + lengths[3])) == 1


def test_a_retry_sends_the_very_bytes_that_it_sent_before(server: Server, pauses: list[float]) -> None:
    store = Store(server)
    path = f"/v1/datasets/{DATASET}/parts/0"

    def lose(request: httpx2.Request) -> Any:
        store.part(request)
        raise httpx2.ReadError("cut")

    def replay(request: httpx2.Request) -> Any:
        number, _ = store.open(request)
        return {"part": number}

    server.on(path, lose, replay)
    with server.client() as client:
        client.datasets.upload("d", rows(3), seal_to=str(TO), **GIVEN)
    first, again = server.requests(path)
    assert first.content == again.content and first.headers["idempotency-key"] == again.headers["idempotency-key"]


def test_an_upload_that_was_cut_short_is_taken_up_sealed_anew(server: Server, pauses: list[float]) -> None:
    store, data = Store(server), rows(130)
    second = f"/v1/datasets/{DATASET}/parts/1"
    server.on(second, httpx2.ConnectError("cut"))
    with server.client(seal_to=str(TO)) as client:
        with pytest.raises(cloister.ConnectionFailed):
            client.datasets.upload("d", data, **GIVEN)
        server.on(second, store.part)
        with pytest.raises(cloister.UploadDiffers):
            client.datasets.upload("d", rows(130, seed=1), **GIVEN)
        client.datasets.upload("d", data, **GIVEN)
    assert sorted(store.bodies) == [0, 1, 2] and len(store.sent[0]) == 3 == len(set(store.sent[0]))
    assert np.array_equal(decode_rows(COLUMNS, store.bodies[1])["x"], data["x"][64:128])


@pytest.mark.parametrize("line", ["", "cloister-recipient-1:", str(TO)[:-1], str(TO).upper(), f" {TO}", 7])
def test_a_malformed_line_is_refused_before_anything_is_sent(server: Server, line: Any) -> None:
    with pytest.raises(InvalidArgument, match="recipient"):
        server.client(seal_to=line)
    with server.client() as client, pytest.raises(InvalidArgument, match="recipient"):
        client.datasets.upload("d", rows(1), seal_to=line, **GIVEN)
    with pytest.raises(InvalidArgument, match="recipient"):
        server.async_client(seal_to=line)
    assert server.asked == []
