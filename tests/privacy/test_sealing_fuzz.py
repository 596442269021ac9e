"""Damage of every kind to sealed objects, before every reader: refused, nothing unproven given out, no memory left written.

A whole reader refuses. A stream gives at most a true beginning, and refuses. A range is refused or is what lies there. Damage is
written as a tuple, so that what was found once stays below as an explicit example.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloister_privacy.sealing import (
    Arena,
    Context,
    InvalidSeal,
    SealedReader,
    open_into,
    open_sealed,
    open_stream,
    plaintext_length,
    seal,
)
from cloister_privacy.sealing.tensors import TensorReader, open_tensors

KEY = hashlib.sha256(b"a key for tests").digest()
CONTEXT = Context(tenant="tn_" + "0" * 32, kind="weights", object="obj_" + "1" * 32)
HEADER, SIZE, STRIDE = 96, 64, 80
BODY = safetensors.torch.save({"a": torch.arange(16.0), "b": torch.arange(76, dtype=torch.int16)})
"""Six chunks: some of header, some of tensors, the last one short."""
SEALED, OTHER = (seal(BODY, key=KEY, context=CONTEXT, chunk_bytes=SIZE) for _ in range(2))
COUNT = 6
assert (COUNT - 1) * SIZE < len(BODY) < COUNT * SIZE
Damage = tuple[Any, ...]


def chunk(sealed: bytes, index: int) -> bytes:
    return sealed[HEADER + index * STRIDE : HEADER + (index + 1) * STRIDE]


def damaged(damage: Damage) -> bytes:
    """What the sealed body becomes."""
    kind, *how = damage
    chunks = [chunk(SEALED, index) for index in range(COUNT)]
    if kind == "flip":
        position, mask = how[0] % len(SEALED), how[1]
        return SEALED[:position] + bytes([SEALED[position] ^ mask]) + SEALED[position + 1 :]
    if kind == "cut":
        return SEALED[: how[0] % len(SEALED)]
    if kind == "extend":
        return SEALED + how[0]
    if kind == "insert":
        return SEALED[: how[0] % len(SEALED)] + how[1] + SEALED[how[0] % len(SEALED) :]
    if kind == "remove":
        start = how[0] % len(SEALED)
        return SEALED[:start] + SEALED[start + how[1] :]
    if kind == "order":
        return SEALED[:HEADER] + b"".join(chunks[index % COUNT] for index in how[0])
    if kind == "splice":  # a part of another object of the same key, context and length in its place
        start, stop = sorted((how[0] % (len(SEALED) + 1), how[1] % (len(SEALED) + 1)))
        return SEALED[:start] + OTHER[start:stop] + SEALED[stop:]
    if kind == "length":  # rewritten, the body cut or filled to suit
        length = how[0]
        fitting = length + 16 * max(1, -(-length // SIZE))
        body = SEALED[HEADER:] if how[1] else (SEALED[HEADER:] * 2)[:fitting].ljust(fitting, b"\0")
        return SEALED[:24] + length.to_bytes(8) + SEALED[32:HEADER] + body
    if kind == "size":
        return SEALED[:20] + how[0].to_bytes(4) + SEALED[24:]
    assert kind == "version"
    return SEALED.replace(b"sealed/1\n", b"sealed/%d\n" % how[0], 1)


any_byte, any_place = st.integers(1, 255), st.integers(0, 2**16)
DAMAGES = st.one_of(
    st.tuples(st.just("flip"), any_place, any_byte),
    st.tuples(st.just("cut"), any_place),
    st.tuples(st.just("extend"), st.binary(min_size=1, max_size=200)),
    st.tuples(st.just("insert"), any_place, st.binary(min_size=1, max_size=100)),
    st.tuples(st.just("remove"), any_place, st.integers(1, 200)),
    st.tuples(st.just("order"), st.lists(st.integers(0, COUNT - 1), max_size=COUNT + 2)),
    st.tuples(st.just("splice"), any_place, any_place),
    st.tuples(
        st.just("length"), st.integers(0, 600) | st.integers(0, 2**64 - 1).filter(lambda n: n > 2**40), st.just(True)
    ),
    st.tuples(st.just("length"), st.integers(0, 600), st.just(False)),
    st.tuples(st.just("size"), st.integers(0, 2**32 - 1) | st.sampled_from([2**n for n in range(32)])),
    st.tuples(st.just("version"), st.integers(0, 10**9)),
)

CORPUS: list[Damage] = [
    ("flip", 0, 1), ("flip", 16, 2), ("flip", 19, 1), ("flip", 21, 0x10), ("flip", 31, 1), ("flip", 32, 1), ("flip", 95, 0x80),
    ("flip", HEADER, 1), ("flip", HEADER + STRIDE - 1, 1), ("flip", len(SEALED) - 1, 0x80), ("flip", len(SEALED) - 17, 1),
    ("cut", 0), ("cut", 17), ("cut", 95), ("cut", HEADER), ("cut", 111), ("cut", HEADER + STRIDE), ("cut", len(SEALED) - 1),
    ("cut", HEADER + (COUNT - 1) * STRIDE), ("extend", b"\0"), ("extend", SEALED), ("extend", chunk(SEALED, COUNT - 1)),
    ("insert", HEADER, b"\0"), ("insert", 0, b"\xef\xbb\xbf"), ("remove", HEADER, STRIDE), ("remove", 18, 1),
    ("order", [1, 0, 2, 3, 4, 5]), ("order", [0, 1, 2, 3, 5, 4]), ("order", [0, 0, 2, 3, 4, 5]), ("order", [5]), ("order", []),
    ("order", [0, 1, 2, 3, 4]), ("order", [0, 1, 2, 3, 4, 5, 5]), ("splice", 0, HEADER), ("splice", HEADER, HEADER + STRIDE),
    ("splice", 32, 64), ("splice", 64, HEADER), ("splice", HEADER + (COUNT - 1) * STRIDE, len(SEALED)),
    ("length", len(BODY) - 1, False), ("length", len(BODY) + 1, False), ("length", SIZE, False), ("length", 0, False),
    ("length", 0, True), ("length", 2**48, True), ("length", 2**48 + 1, True), ("length", 2**64 - 1, True),
    ("size", 0), ("size", 32), ("size", 65), ("size", 128), ("size", 2**20), ("size", 2**24), ("size", 2**25), ("size", 2**31),
    ("version", 0), ("version", 2), ("version", 10**9),
]  # fmt: skip


# The readers: each gives what it gave out, as places and bytes, and whether it refused. ----------------------------------------

Given = tuple[list[tuple[int, bytes]], bool]
Reader = Callable[[bytes, bytes, Context], Given]


def whole(sealed: bytes, key: bytes, context: Context) -> Given:
    try:
        return [(0, bytes(open_sealed(sealed, key=key, context=context)))], False
    except InvalidSeal:
        return [], True


def into_an_arena(sealed: bytes, key: bytes, context: Context) -> Given:
    """As whole readers do; what a failure leaves in the arena's memory counts as given out."""
    block = bytearray(2**16)
    with Arena(2**16, allocate=lambda _: block).lease(2**12) as lease:
        try:
            length = open_into(sealed, lease.memory, key=key, context=context, threads=2)
            return [(0, bytes(lease.memory[:length]))], False
        except InvalidSeal:
            return [(0, bytes(block))] if any(block) else [], True
        except ValueError:  # the buffer is too small for what the header says: nothing was opened
            assert plaintext_length(sealed) > 2**12
            return [(0, bytes(block))] if any(block) else [], True


def as_tensors(sealed: bytes, key: bytes, context: Context) -> Given:
    blocks: list[bytearray] = []

    def allocate(size: int) -> bytearray:
        blocks.append(bytearray(size))
        return blocks[-1]

    try:
        with open_tensors(sealed, key=key, context=context, arena=Arena(2**24, allocate=allocate)) as tensors:
            return [(0, safetensors.torch.save(dict(tensors)))], False
    except InvalidSeal:
        return [(0, bytes(block)) for block in blocks if any(block)], True


def streaming(threads: int) -> Reader:
    def read(sealed: bytes, key: bytes, context: Context) -> Given:
        sink, is_refused = io.BytesIO(), False
        try:
            open_stream(io.BytesIO(sealed), sink, key=key, context=context, threads=threads)
        except InvalidSeal:
            is_refused = True
        return [(0, sink.getvalue())] if sink.getvalue() or not is_refused else [], is_refused

    return read


RANGES = [
    (0, 1),
    (0, SIZE),
    (SIZE - 1, SIZE + 1),
    (SIZE, 3 * SIZE),
    (100, 300),
    (len(BODY) - 1, len(BODY)),
    (0, len(BODY)),
]


def ranges(sealed: bytes, key: bytes, context: Context) -> Given:
    given: list[tuple[int, bytes]] = []
    refusals = 0
    try:
        reader = SealedReader(sealed, key=key, context=context)
    except InvalidSeal:
        return [], True
    for start, stop in RANGES:
        buffer = bytearray(stop - start)
        try:
            reader.read_into(buffer, start=start)
            given.append((start, bytes(buffer)))
        except InvalidSeal:
            refusals += 1
            assert not any(buffer)
        except ValueError:
            assert stop > reader.length
            refusals += 1
    return given, refusals > 0


def files(sealed: bytes, key: bytes, context: Context) -> Given:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "object"
        path.write_bytes(sealed)
        found = []
        with path.open("rb") as file:
            for source in (path, file):
                try:
                    found.append(bytes(open_sealed(source, key=key, context=context)))
                except InvalidSeal:
                    found.append(None)
    assert found[0] == found[1]
    return ([(0, found[0])], False) if found[0] is not None else ([], True)


WHOLE: dict[str, Reader] = {"whole": whole, "into an arena": into_an_arena, "as tensors": as_tensors, "files": files}
READERS: dict[str, Reader] = WHOLE | {"a stream": streaming(1), "a stream, threads": streaming(2), "ranges": ranges}


def require_refused(name: str, sealed: bytes, *, key: bytes = KEY, context: Context = CONTEXT) -> None:
    given, is_refused = READERS[name](sealed, key, context)
    assert is_refused
    assert all(BODY[start : start + len(part)] == part for start, part in given)
    assert not given or name not in WHOLE
    if name.startswith("a stream"):
        assert sum(len(part) for _, part in given) < len(BODY)


@pytest.mark.parametrize("name", READERS)
def test_the_undamaged_object_opens_before_every_reader(name: str) -> None:
    given, is_refused = READERS[name](SEALED, KEY, CONTEXT)
    assert not is_refused and given
    assert all(BODY[start : start + len(part)] == part for start, part in given)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", CORPUS, ids=[f"{number} {kind}" for number, (kind, *_) in enumerate(CORPUS)])
def test_the_corpus_is_refused_by_every_reader(damage: Damage, name: str) -> None:
    require_refused(name, damaged(damage))


@settings(deadline=None, max_examples=300)
@given(DAMAGES)
@example(("flip", 24, 0xFF))
@example(("order", [0, 1, 2, 3, 4, 4]))
@example(("remove", HEADER + 3 * STRIDE, 2 * STRIDE))
def test_any_damage_is_refused_by_every_reader(damage: Damage) -> None:
    sealed = damaged(damage)
    if sealed not in (SEALED, OTHER):
        for name in READERS:
            require_refused(name, sealed)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=400))
@example(b"")
@example(SEALED[:HEADER])
@example(b"cloister.sealed/1\n")
@example(b"cloister.sealed/1\n\0\1" + bytes(400))
def test_any_bytes_at_all_are_refused_by_every_reader(content: bytes) -> None:
    for name in READERS:
        given, is_refused = READERS[name](content, KEY, CONTEXT)
        assert is_refused and not given


def test_every_flip_of_every_byte_is_refused() -> None:
    sealed = bytearray(seal(BODY[:70], key=KEY, context=CONTEXT, chunk_bytes=SIZE))
    for position, mask in itertools.product(range(len(sealed)), range(1, 256)):
        sealed[position] ^= mask
        try:
            open_sealed(sealed, key=KEY, context=CONTEXT)
        except InvalidSeal:
            sealed[position] ^= mask
        else:
            pytest.fail(f"byte {position} changed by {mask:#x} and the object opened")


@pytest.mark.parametrize("name", READERS)
def test_every_byte_flipped_is_refused_by_every_reader(name: str) -> None:
    for position in range(0, len(SEALED), 7 if name == "files" else 1):
        require_refused(name, damaged(("flip", position, 1 << position % 8)))


@pytest.mark.parametrize("name", READERS)
def test_every_cut_is_refused_by_every_reader(name: str) -> None:
    for length in range(0, len(SEALED), 7 if name == "files" else 1):
        require_refused(name, SEALED[:length])


@pytest.mark.parametrize("name", READERS)
def test_every_exchange_of_two_chunks_is_refused_by_every_reader(name: str) -> None:
    for one, other in itertools.combinations(range(COUNT), 2):
        order = list(range(COUNT))
        order[one], order[other] = order[other], order[one]
        require_refused(name, damaged(("order", order)))


# Another's object in its place. --------------------------------------------------------------------------------------------

PLACES = [
    Context(tenant=tenant, kind=kind, object=version)
    for tenant in ("tn_a", "tn_b")
    for kind in ("weights", "checkpoint")
    for version in ("obj_1", "obj_2")
]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("has_one_key", [True, False], ids=["one key", "a key each"])
def test_an_object_of_another_tenant_kind_or_version_is_refused_by_every_reader(name: str, has_one_key: bool) -> None:
    keys = {place: KEY if has_one_key else hashlib.sha256(place.to_bytes()).digest() for place in PLACES}
    objects = {place: seal(BODY, key=keys[place], context=place, chunk_bytes=SIZE) for place in PLACES}
    for here, there in itertools.product(PLACES, PLACES):
        if here == there:
            assert not READERS[name](objects[there], keys[here], here)[1]
        else:
            require_refused(name, objects[there], key=keys[here], context=here)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_parts_of_another_tenants_object_in_ours_are_refused_by_every_reader(data: st.DataObject) -> None:
    theirs = seal(BODY, key=KEY, context=PLACES[-1], chunk_bytes=SIZE)
    start = data.draw(st.integers(0, len(SEALED) - 1))
    stop = data.draw(st.integers(start + 1, len(SEALED)))
    sealed = SEALED[:start] + theirs[start:stop] + SEALED[stop:]
    if sealed != SEALED:
        for name in READERS:
            require_refused(name, sealed)


def test_a_tensor_reader_gives_true_tensors_or_refuses() -> None:
    whole_tensors = safetensors.torch.load(BODY)
    for position in range(0, len(SEALED), 3):
        block = bytearray(2**16)
        try:
            arena = Arena(2**16, allocate=lambda _, block=block: block)
            reader = TensorReader(SealedReader(damaged(("flip", position, 1)), key=KEY, context=CONTEXT), arena=arena)
        except InvalidSeal:
            continue
        for name in whole_tensors:
            with contextlib.suppress(InvalidSeal):
                assert torch.equal(reader.read(name), whole_tensors[name])
            assert not any(block)
