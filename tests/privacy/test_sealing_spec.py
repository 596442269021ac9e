"""The sealed format against a second reader and writer, written from docs/spec/sealed.md alone, and against the vectors."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister_privacy.sealing import (
    Context,
    InvalidSeal,
    InvalidWrap,
    LocalKeyProvider,
    RecoveryKey,
    SealedReader,
    UnsupportedSeal,
    open_into,
    open_sealed,
    open_stream,
    seal,
)
from cloister_privacy.sealing.wrapping import unwrap_secret

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "sealed-1.json").read_text())


class Refused(Exception):
    """What the second reader raises."""


def named(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


# The second implementation: nothing of Cloister's below, and HKDF out of HMAC. -----------------------------------------


def hkdf(key: bytes, salt: bytes, info: bytes) -> tuple[bytes, bytes]:
    """RFC 5869 with SHA-512, for the 64 bytes of one block."""
    block = hmac.digest(hmac.digest(salt, key, "sha512"), info + b"\x01", "sha512")
    return block[:32], block[32:]


def lp(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode("ascii")


def bound(line: bytes, context: dict[str, str]) -> bytes:
    return line + lp(context["tenant"]) + lp(context["kind"]) + lp(context["object"])


def reference_seal(plaintext: bytes, key: bytes, context: dict[str, str], *, size: int, salt: bytes) -> bytes:
    fixed = b"cloister.sealed/1\n\x00\x01" + size.to_bytes(4, "big") + len(plaintext).to_bytes(8, "big") + salt
    enc_key, commitment = hkdf(key, salt, bound(b"cloister.sealed/1\n\x00\x01", context))
    header, sealed = fixed + commitment, fixed + commitment
    pieces = [plaintext[at : at + size] for at in range(0, len(plaintext), size)] or [b""]
    for i, piece in enumerate(pieces):
        nonce = i.to_bytes(11, "big") + (b"\x01" if i == len(pieces) - 1 else b"\x00")
        aad = hashlib.sha256(header).digest() + i.to_bytes(8, "big") + len(plaintext).to_bytes(8, "big")
        sealed += AESGCM(enc_key).encrypt(nonce, piece, aad)
    return sealed


def reference_open(sealed: bytes, key: bytes, context: dict[str, str]) -> bytes:
    header, rest = sealed[:96], sealed[96:]
    if header[:20] != b"cloister.sealed/1\n\x00\x01" or len(sealed) < 112:
        raise Refused
    size, length = int.from_bytes(header[20:24], "big"), int.from_bytes(header[24:32], "big")
    if bin(size).count("1") != 1 or not 2**6 <= size <= 2**24 or length > 2**48:
        raise Refused
    count = -(-length // size) if length else 1
    if len(rest) != length + 16 * count:
        raise Refused
    enc_key, commitment = hkdf(key, header[32:64], bound(header[:20], context))
    if not hmac.compare_digest(commitment, header[64:]):
        raise Refused
    plaintext = b""
    for i in range(count):
        chunk, rest = rest[: size + 16], rest[size + 16 :]
        nonce = i.to_bytes(11, "big") + (b"\x01" if i == count - 1 else b"\x00")
        aad = hashlib.sha256(header).digest() + i.to_bytes(8, "big") + length.to_bytes(8, "big")
        try:
            plaintext += AESGCM(enc_key).decrypt(nonce, chunk, aad)
        except InvalidTag:
            raise Refused from None
    return plaintext


def reference_chunk(sealed: bytes, i: int, key: bytes, context: dict[str, str]) -> bytes:
    """Chunk i alone, out of an object whose header says how many there are."""
    header = sealed[:96]
    size, length = int.from_bytes(header[20:24], "big"), int.from_bytes(header[24:32], "big")
    enc_key, commitment = hkdf(key, header[32:64], bound(header[:20], context))
    last = max(1, -(-length // size)) - 1
    stop = 96 + length + 16 * (last + 1) if i == last else 96 + (i + 1) * (size + 16)
    nonce = i.to_bytes(11, "big") + (b"\x01" if i == last else b"\x00")
    aad = hashlib.sha256(header).digest() + i.to_bytes(8, "big") + length.to_bytes(8, "big")
    if len(sealed) < stop or not hmac.compare_digest(commitment, header[64:]):
        raise Refused
    try:
        return AESGCM(enc_key).decrypt(nonce, sealed[96 + i * (size + 16) : stop], aad)
    except InvalidTag:
        raise Refused from None


def reference_range(sealed: bytes, start: int, stop: int, key: bytes, context: dict[str, str]) -> bytes:
    header = sealed[:96]
    size, length = int.from_bytes(header[20:24], "big"), int.from_bytes(header[24:32], "big")
    _, commitment = hkdf(key, header[32:64], bound(header[:20], context))
    if len(sealed) != 96 + length + 16 * max(1, -(-length // size)) or not hmac.compare_digest(commitment, header[64:]):
        raise Refused
    covering = range(start // size, -(-stop // size)) if start < stop else range(0 if length else 1)
    plaintext = b"".join(reference_chunk(sealed, i, key, context) for i in covering)
    return plaintext[start - covering.start * size :][: stop - start]


def reference_stream(sealed: bytes, key: bytes, context: dict[str, str]) -> Iterator[bytes]:
    if len(sealed) < 96:
        raise Refused
    size, length = int.from_bytes(sealed[20:24], "big"), int.from_bytes(sealed[24:32], "big")
    count = max(1, -(-length // size))
    for i in range(count):
        if i == count - 1 and len(sealed) != 96 + length + 16 * count:
            raise Refused
        yield reference_chunk(sealed, i, key, context)


def reference_unwrap(wrapped: bytes, key: bytes, info: bytes, line: bytes) -> bytes:
    salt, commitment, box = wrapped[len(line) :][:32], wrapped[len(line) :][32:64], wrapped[len(line) + 64 :]
    enc_key, expected = hkdf(key, salt, info)
    if not wrapped.startswith(line) or not hmac.compare_digest(commitment, expected):
        raise Refused
    try:
        return AESGCM(enc_key).decrypt(bytes(12), box, info)
    except InvalidTag:
        raise Refused from None


# The claims. -----------------------------------------------------------------------------------------------------------


@named(VECTORS["sealed"])
def test_a_good_vector_opens_in_both_readers_and_both_writers_write_it(vector: dict[str, Any]) -> None:
    key, sealed, plaintext = (bytes.fromhex(vector[name]) for name in ("key", "sealed", "plaintext"))
    assert bytes(open_sealed(sealed, key=key, context=Context(**vector["context"]))) == plaintext
    assert reference_open(sealed, key, vector["context"]) == plaintext
    size, salt = vector["chunk_bytes"], sealed[32:64]
    assert reference_seal(plaintext, key, vector["context"], size=size, salt=salt) == sealed
    ours = seal(plaintext, key=key, context=Context(**vector["context"]), chunk_bytes=size)
    assert reference_seal(plaintext, key, vector["context"], size=size, salt=ours[32:64]) == ours


@named(VECTORS["corrupted"])
def test_a_corrupted_vector_is_refused_by_both_readers(vector: dict[str, Any]) -> None:
    key, sealed, context = bytes.fromhex(vector["key"]), bytes.fromhex(vector["sealed"]), vector["context"]
    with pytest.raises(InvalidSeal) as refusal:
        open_sealed(sealed, key=key, context=Context(**context))
    assert type(refusal.value) is {"invalid": InvalidSeal, "unsupported": UnsupportedSeal}[vector["error"]]
    with pytest.raises(Refused):
        reference_open(sealed, key, context)
    with pytest.raises(InvalidSeal):
        reader = SealedReader(sealed, key=key, context=Context(**context))
        reader.read(0, reader.length)
    with pytest.raises(InvalidSeal):
        open_stream(io.BytesIO(sealed), io.BytesIO(), key=key, context=Context(**context))


def test_every_invalid_vector_is_refused_in_the_same_words() -> None:
    words = set()
    for vector in VECTORS["corrupted"]:
        if vector["error"] == "invalid":
            with pytest.raises(InvalidSeal) as refusal:
                open_sealed(
                    bytes.fromhex(vector["sealed"]),
                    key=bytes.fromhex(vector["key"]),
                    context=Context(**vector["context"]),
                )
            words.add((str(refusal.value), refusal.value.__suppress_context__ or refusal.value.__context__ is None))
    assert len(words) == 1 and words.pop()[1]


@named(VECTORS["corrupted"])
def test_a_refused_vector_leaves_no_byte_in_the_callers_buffer(vector: dict[str, Any]) -> None:
    buffer = bytearray(4096)
    with pytest.raises(InvalidSeal):
        open_into(
            bytes.fromhex(vector["sealed"]),
            buffer,
            key=bytes.fromhex(vector["key"]),
            context=Context(**vector["context"]),
        )
    assert not any(buffer)


@named(VECTORS["ranges"])
def test_a_range_of_the_vectors_opens_or_is_refused_as_it_says(vector: dict[str, Any]) -> None:
    key, sealed, context = bytes.fromhex(vector["key"]), bytes.fromhex(vector["sealed"]), vector["context"]
    start, stop = vector["start"], vector["stop"]
    if vector["plaintext"] is None:
        with pytest.raises(Refused):
            reference_range(sealed, start, stop, key, context)
        with pytest.raises(InvalidSeal):
            SealedReader(sealed, key=key, context=Context(**context)).read(start, stop)
    else:
        assert reference_range(sealed, start, stop, key, context).hex() == vector["plaintext"]
        found = SealedReader(sealed, key=key, context=Context(**context)).read(start, stop)
        assert found.hex() == vector["plaintext"]


@pytest.mark.parametrize("threads", [1, 2])
@named(VECTORS["streams"])
def test_a_stream_of_the_vectors_gives_what_it_says_and_no_more(vector: dict[str, Any], threads: int) -> None:
    key, sealed, context = bytes.fromhex(vector["key"]), bytes.fromhex(vector["sealed"]), vector["context"]
    given, plaintext, is_complete = b"", bytes.fromhex(vector["plaintext"]), True
    try:
        for chunk in reference_stream(sealed, key, context):
            given += chunk
    except Refused:
        is_complete = False
    assert (given, is_complete) == (plaintext, vector["complete"])
    sink, is_complete = io.BytesIO(), True
    try:
        open_stream(io.BytesIO(sealed), sink, key=key, context=Context(**context), threads=threads)
    except InvalidSeal:
        is_complete = False
    ours = sink.getvalue()
    assert (
        is_complete == vector["complete"] and plaintext.startswith(ours) and len(ours) % 64 in (0, len(plaintext) % 64)
    )
    assert ours == plaintext if threads == 1 or is_complete else True


@named(VECTORS["wrapped"])
def test_a_wrapped_vector_opens_or_is_refused_as_it_says(vector: dict[str, Any]) -> None:
    line, key, wrapped = b"cloister.wrapped/1\n", bytes.fromhex(vector["kek"]), bytes.fromhex(vector["wrapped"])
    binding = Context(**vector["context"]).to_bytes()
    if vector["secret"] is None:
        with pytest.raises(InvalidWrap):
            unwrap_secret(wrapped, key=key, line=line, binding=binding)
        with pytest.raises(Refused):
            reference_unwrap(wrapped, key, bound(line, vector["context"]), line)
    else:
        assert unwrap_secret(wrapped, key=key, line=line, binding=binding).hex() == vector["secret"]
        assert reference_unwrap(wrapped, key, bound(line, vector["context"]), line).hex() == vector["secret"]


@named(VECTORS["keystores"])
def test_a_keystore_of_the_vectors_opens_and_is_laid_out_as_the_specification_says(
    vector: dict[str, Any], tmp_path: Path
) -> None:
    directory, key_file = tmp_path / "keystore", tmp_path / "root.key"
    directory.mkdir(mode=0o700)
    key_file.touch(mode=0o600)
    key_file.write_text(vector.get("key_file", ""))
    record = json.loads(vector["record"])
    root, store_id = bytes.fromhex(vector["root_key"]), record["id"]
    check, name_key = hkdf(root, bytes.fromhex(store_id), b"cloister.keystore/1\n")
    assert check.hex() == record["check"]
    kek_name = hmac.digest(name_key, vector["key_id"].encode(), "sha256").hex() + ".kek"
    for name, content in (("keystore.json", vector["record"].encode()), (kek_name, bytes.fromhex(vector["kek_file"]))):
        (directory / name).touch(mode=0o600)
        (directory / name).write_bytes(content)
    if "passphrase" in vector:
        keys = LocalKeyProvider.open(directory, passphrase=vector["passphrase"])
    else:
        keys = LocalKeyProvider.open(directory, key_file=key_file)
    assert keys.root_key == root
    unwrapped = keys.unwrap(vector["key_id"], bytes.fromhex(vector["wrapped"]), context=Context(**vector["context"]))
    assert unwrapped.hex() == vector["secret"]
    line = b"cloister.kek/1\n"
    kek = reference_unwrap(bytes.fromhex(vector["kek_file"]), root, line + lp(store_id) + lp(vector["key_id"]), line)
    wrap_line = b"cloister.wrapped/1\n"
    info = bound(wrap_line, vector["context"])
    assert reference_unwrap(bytes.fromhex(vector["wrapped"]), kek, info, wrap_line).hex() == vector["secret"]


@named(VECTORS["recoveries"])
def test_a_recovery_of_the_vectors_opens_and_is_laid_out_as_the_specification_says(
    vector: dict[str, Any], tmp_path: Path
) -> None:
    directory, record = tmp_path / "keystore", json.loads(vector["record"])
    directory.mkdir(mode=0o700)
    (directory / "keystore.json").touch(mode=0o600)
    (directory / "keystore.json").write_text(vector["record"])
    root = bytes.fromhex(vector["root_key"])
    number = 0
    for digit in vector["recovery_key"].removeprefix("CR1").replace("-", ""):
        number = number * 32 + "0123456789ABCDEFGHJKMNPQRSTVWXYZ".index(digit)
    secret, checksum = number.to_bytes(35)[:32], number.to_bytes(35)[32:]
    assert checksum == hashlib.sha256(b"CR1" + secret).digest()[:3]
    line = b"cloister.recovery/1\n"
    wrapped = bytes.fromhex(record["recovery"]["wrapped"])
    assert reference_unwrap(wrapped, secret, line + lp(record["id"]), line) == root
    assert LocalKeyProvider.open_by_recovery(directory, RecoveryKey.parse(vector["recovery_key"])).root_key == root
    if "passphrase" in vector:
        assert LocalKeyProvider.open(directory, passphrase=vector["passphrase"]).root_key == root
