"""Sealed objects: what was sealed opens, and nothing else does."""

from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_privacy.errors import PrivacyError
from cloister_privacy.sealing import (
    CHUNK_BYTES,
    Context,
    InvalidSeal,
    UnsupportedSeal,
    new_key,
    open_into,
    open_sealed,
    plaintext_length,
)
from cloister_privacy.sealing import seal as seal_with

KEY = hashlib.sha256(b"a key for tests").digest()
CONTEXT = Context(tenant="tn_" + "0" * 32, kind="weights", object="obj_" + "1" * 32)
HEADER = 96

fields = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)
contexts = st.builds(Context, tenant=fields, kind=fields, object=fields)
plaintexts = st.binary(max_size=400)
chunk_sizes = st.sampled_from([64, 128, 256, CHUNK_BYTES])


def seal(plaintext: bytes, *, chunk_bytes: int = 64, context: Context = CONTEXT) -> bytes:
    return seal_with(plaintext, key=KEY, context=context, chunk_bytes=chunk_bytes)


def refuse(sealed: bytes, *, key: bytes = KEY, context: Context = CONTEXT) -> None:
    """Refused, and a buffer lent for it holds no byte of a plaintext."""
    buffer = bytearray(1024)
    with pytest.raises(InvalidSeal):
        open_into(sealed, buffer, key=key, context=context)
    assert not any(buffer)
    with pytest.raises(InvalidSeal):
        open_sealed(sealed, key=key, context=context)


@settings(deadline=None)
@given(plaintext=plaintexts, context=contexts, chunk_bytes=chunk_sizes)
def test_what_was_sealed_opens(plaintext: bytes, context: Context, chunk_bytes: int) -> None:
    sealed = seal(plaintext, context=context, chunk_bytes=chunk_bytes)
    chunks = max(1, -(-len(plaintext) // chunk_bytes))
    assert len(sealed) == HEADER + len(plaintext) + 16 * chunks
    assert plaintext_length(sealed) == len(plaintext)
    assert bytes(open_sealed(sealed, key=KEY, context=context)) == plaintext


@pytest.mark.parametrize("length", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_the_usual_chunk_size_opens_at_its_edges(length: int) -> None:
    plaintext = (hashlib.sha256(b"x").digest() * (length // 32 + 1))[:length]
    assert bytes(open_sealed(seal(plaintext, chunk_bytes=CHUNK_BYTES), key=KEY, context=CONTEXT)) == plaintext


@settings(max_examples=15, deadline=None)
@given(plaintext=st.binary(max_size=150), mask=st.integers(1, 255))
def test_a_change_of_any_byte_is_refused(plaintext: bytes, mask: int) -> None:
    sealed = bytearray(seal(plaintext))
    for position in range(len(sealed)):
        sealed[position] ^= mask
        with pytest.raises(InvalidSeal):
            open_sealed(sealed, key=KEY, context=CONTEXT)
        sealed[position] ^= mask
    assert bytes(open_sealed(sealed, key=KEY, context=CONTEXT)) == plaintext


@settings(max_examples=15, deadline=None)
@given(plaintext=st.binary(max_size=150))
def test_a_cut_anywhere_is_refused(plaintext: bytes) -> None:
    sealed = seal(plaintext)
    for length in range(len(sealed)):
        refuse(sealed[:length])


@settings(deadline=None)
@given(plaintext=plaintexts, tail=st.binary(min_size=1, max_size=200))
def test_an_extended_object_is_refused(plaintext: bytes, tail: bytes) -> None:
    refuse(seal(plaintext) + tail)


@settings(deadline=None)
@given(plaintext=plaintexts, tail=st.binary(max_size=200), cut=st.integers(0, 200), length=st.integers(0, 500))
def test_a_length_rewritten_to_suit_a_cut_or_an_extension_is_refused(
    plaintext: bytes, tail: bytes, cut: int, length: int
) -> None:
    original = seal(plaintext)
    body = original[HEADER : len(original) - cut] + tail
    forged = original[:24] + length.to_bytes(8) + original[32:HEADER] + body
    if forged != original:
        refuse(forged)


@settings(deadline=None)
@given(plaintext=st.binary(min_size=129, max_size=400), data=st.data())
def test_chunks_in_another_order_are_refused(plaintext: bytes, data: st.DataObject) -> None:
    original = seal(plaintext)
    chunks = [original[at : at + 80] for at in range(HEADER, len(original), 80)]
    picked = data.draw(st.lists(st.sampled_from(chunks), min_size=len(chunks), max_size=len(chunks)))
    if picked != chunks:
        refuse(original[:HEADER] + b"".join(picked))


@settings(deadline=None)
@given(plaintext=plaintexts, cut=st.integers(1, HEADER + 200))
def test_a_splice_of_two_objects_of_one_key_and_context_is_refused(plaintext: bytes, cut: int) -> None:
    first, second = seal(plaintext), seal(plaintext)
    spliced = first[:cut] + second[cut:]
    if spliced not in (first, second):
        refuse(spliced)


@settings(deadline=None)
@given(mine=contexts, other=contexts)
def test_another_context_is_refused(mine: Context, other: Context) -> None:
    sealed = seal(b"weights", context=mine)
    if mine != other:
        refuse(sealed, context=other)


@settings(deadline=None)
@given(context=contexts, data=st.data())
def test_the_same_characters_cut_differently_are_another_context(context: Context, data: st.DataObject) -> None:
    text = context.tenant + context.kind + context.object
    first = data.draw(st.integers(1, len(text) - 2))
    second = data.draw(st.integers(first + 1, len(text) - 1))
    other = Context(tenant=text[:first], kind=text[first:second], object=text[second:])
    assert (other == context) == (other.to_bytes() == context.to_bytes())


@pytest.mark.parametrize("field", ["tenant", "kind", "object"])
def test_one_field_of_the_context_exchanged_is_refused(field: str) -> None:
    refuse(seal(b"weights"), context=replace(CONTEXT, **{field: "another"}))


def test_another_key_is_refused() -> None:
    refuse(seal(b"weights"), key=new_key())


@pytest.mark.parametrize("length", [2**40, 2**48, 2**63, 2**64 - 1])
def test_a_hostile_length_takes_no_memory(length: int) -> None:
    forged = bytearray(seal(b"x" * 1000))
    forged[24:32] = length.to_bytes(8)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidSeal):
            open_sealed(forged, key=KEY, context=CONTEXT)
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


def test_a_newer_format_is_refused_by_its_number() -> None:
    newer = seal(b"weights").replace(b"sealed/1\n", b"sealed/7\n", 1)
    with pytest.raises(UnsupportedSeal, match="format 7"):
        open_sealed(newer, key=KEY, context=CONTEXT)


def test_no_two_seals_of_one_plaintext_share_salt_commitment_or_ciphertext() -> None:
    first, second = seal(b"the same plaintext"), seal(b"the same plaintext")
    assert first[:32] == second[:32]
    assert first[32:64] != second[32:64] and first[64:96] != second[64:96] and first[96:] != second[96:]


def test_every_chunk_has_a_nonce_of_its_own_and_only_the_last_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    nonces: list[bytes] = []

    class Recorder:
        def __init__(self, key: bytes) -> None:
            self._cipher = AESGCM(key)

        def encrypt_into(self, nonce: bytes, data: memoryview, associated: bytes, sealed: memoryview) -> int:
            nonces.append(nonce)
            return self._cipher.encrypt_into(nonce, data, associated, sealed)

    monkeypatch.setattr("cloister_privacy.sealing.chunks.AESGCM", Recorder)
    seal(bytes(64 * 5))
    assert [nonce[-1] for nonce in nonces] == [0, 0, 0, 0, 1]
    assert [int.from_bytes(nonce[:-1]) for nonce in nonces] == [0, 1, 2, 3, 4]


def test_a_failure_in_the_last_chunk_zeroes_the_chunks_before_it() -> None:
    original = bytearray(seal(b"\xaa" * 300))
    original[-1] ^= 1
    buffer = bytearray(b"\x55" * 310)
    with pytest.raises(InvalidSeal):
        open_into(original, buffer, key=KEY, context=CONTEXT)
    assert buffer == bytes(300) + b"\x55" * 10


def test_a_refusal_before_the_first_chunk_leaves_the_buffer_alone() -> None:
    buffer = bytearray(b"\x55" * 300)
    with pytest.raises(InvalidSeal):
        open_into(seal(b"\xaa" * 300), buffer, key=new_key(), context=CONTEXT)
    assert buffer == b"\x55" * 300


def test_an_object_opens_into_the_callers_memory() -> None:
    buffer = bytearray(100)
    assert open_into(seal(b"weights"), memoryview(buffer)[10:50], key=KEY, context=CONTEXT) == 7
    assert buffer == bytes(10) + b"weights" + bytes(83)


@pytest.mark.parametrize("buffer", [bytearray(6), memoryview(bytes(100))], ids=["too small", "read-only"])
def test_a_buffer_that_cannot_take_the_plaintext_is_a_mistake_told_at_once(buffer: bytearray | memoryview) -> None:
    with pytest.raises(ValueError, match="at least 7 bytes"):
        open_into(seal(b"weights"), buffer, key=KEY, context=CONTEXT)


def test_the_plaintext_cannot_be_written_to() -> None:
    assert open_sealed(seal(b"weights"), key=KEY, context=CONTEXT).readonly


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_seal_and_open(kind: type[bytes] | type[bytearray] | type[memoryview]) -> None:
    sealed = seal_with(kind(b"weights"), key=KEY, context=CONTEXT)
    assert bytes(open_sealed(kind(sealed), key=KEY, context=CONTEXT)) == b"weights"


@pytest.mark.parametrize("chunk_bytes", [-64, 0, 1, 32, 65, 2**20 + 1, 2**25])
def test_a_chunk_size_out_of_bounds_is_a_mistake_told_at_once(chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        seal(b"weights", chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_key_of_another_length_is_a_mistake_told_at_once(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        seal_with(b"weights", key=bytes(length), context=CONTEXT)
    with pytest.raises(ValueError, match="32 bytes"):
        open_sealed(seal(b"weights"), key=bytes(length), context=CONTEXT)


@pytest.mark.parametrize("text", ["", "a b", "a\n", "\0", "é", "x" * 256])
@pytest.mark.parametrize("field", ["tenant", "kind", "object"])
def test_a_context_takes_visible_ascii_only(field: str, text: str) -> None:
    with pytest.raises(ValueError, match=field):
        replace(CONTEXT, **{field: text})


def test_an_invalid_seal_is_a_privacy_error_and_says_nothing_of_why() -> None:
    cut, changed = seal(b"weights")[:-1], bytearray(seal(b"weights"))
    changed[-1] ^= 1
    words = []
    for forged in (cut, bytes(changed)):
        with pytest.raises(PrivacyError) as refusal:
            open_sealed(forged, key=KEY, context=CONTEXT)
        words.append(str(refusal.value))
    assert words[0] == words[1]
