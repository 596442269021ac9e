"""Tensors out of sealed safetensors: in the arena's memory, as they were sealed, and refused where the body is anything else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloister_privacy.errors import WeightsRefused
from cloister_privacy.sealing import Arena, ArenaFull, Context, InvalidSeal, SealedReader, new_key, seal
from cloister_privacy.sealing.chunks import Chunks
from cloister_privacy.sealing.tensors import OpenTensors, TensorReader, open_tensors, pinned_memory

KEY = hashlib.sha256(b"a key for tests").digest()
CONTEXT = Context(tenant="tn_" + "0" * 32, kind="weights", object="obj_" + "1" * 32)
TENSORS = {
    "weight": torch.arange(60, dtype=torch.float32).reshape(20, 3),
    "bias": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "none": torch.zeros(0, 4),
    "mask": torch.tensor([True, False, True]),
    "double": torch.full((2, 2, 2), 0.1, dtype=torch.float64),
    "byte": torch.arange(5, dtype=torch.uint8),
}
BODY = safetensors.torch.save(TENSORS, metadata={"format": "test/1"})


def sealed_body(body: bytes = BODY) -> bytes:
    return seal(body, key=KEY, context=CONTEXT, chunk_bytes=64)


def opened(sealed: Any, arena: Arena, *, threads: int = 1) -> OpenTensors:
    return open_tensors(sealed, key=KEY, context=CONTEXT, arena=arena, threads=threads)


def reader_of(sealed: Any, arena: Arena) -> TensorReader:
    return TensorReader(SealedReader(sealed, key=KEY, context=CONTEXT), arena=arena)


def blocks_of(arena_bytes: int = 2**24) -> tuple[Arena, list[bytearray]]:
    """An arena, and its blocks to look at."""
    blocks: list[bytearray] = []

    def allocate(size: int) -> bytearray:
        blocks.append(bytearray(size))
        return blocks[-1]

    return Arena(arena_bytes, allocate=allocate), blocks


def body_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if not isinstance(header, bytes):  # aligned, as safetensors does it
        text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("threads", [1, 2])
def test_tensors_come_out_as_they_were_sealed(threads: int, tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(sealed_body())
    with path.open("rb") as file:
        for source in (sealed_body(), path, file):
            with opened(source, Arena(2**20), threads=threads) as tensors:
                assert tensors.metadata == {"format": "test/1"} and len(tensors) == len(TENSORS)
                assert set(tensors) == set(TENSORS)
                for name, tensor in TENSORS.items():
                    assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_comes_out_as_it_was_sealed(dtype: torch.dtype) -> None:
    tensor = torch.arange(2).to(dtype)
    with opened(sealed_body(safetensors.torch.save({"x": tensor})), Arena(2**20)) as tensors:
        assert tensors["x"].dtype == dtype and bytes(tensors["x"].view(torch.uint8)) == bytes(tensor.view(torch.uint8))


def test_tensors_lie_in_the_arena_and_nowhere_else() -> None:
    arena, blocks = blocks_of()
    with opened(sealed_body(), arena) as tensors:
        tensors["weight"][0, 0] = 99.0
        assert BODY[:40] in blocks[0] and torch.tensor([99.0]).numpy().tobytes() in blocks[0]
    assert len(blocks) == 1


def test_the_memory_is_zeroed_when_the_tensors_are_closed() -> None:
    arena, blocks = blocks_of()
    tensors = opened(sealed_body(), arena)
    assert any(blocks[0])
    tensors.close()
    tensors.close()
    assert not any(blocks[0]) and not len(tensors)


def test_a_tensor_that_outlives_its_lease_keeps_its_numbers_until_it_is_gone() -> None:
    arena, blocks = blocks_of()
    with opened(sealed_body(), arena) as tensors:
        kept = tensors["weight"][3:5]
    with opened(sealed_body(safetensors.torch.save({"other": torch.zeros(20)})), arena):
        assert torch.equal(kept, TENSORS["weight"][3:5]) and len(blocks) == 2
    del kept
    assert not any(any(block) for block in blocks) and arena.leased_bytes == 0


def test_copies_on_a_device_outlive_the_lease() -> None:
    arena, blocks = blocks_of()
    with opened(sealed_body(), arena) as tensors:
        copies = tensors.to("cpu")
    assert not any(blocks[0])
    assert all(torch.equal(copies[name], tensor) for name, tensor in TENSORS.items())


def test_memory_of_torchs_own_serves_an_arena() -> None:
    owners: list[torch.Tensor] = []

    def allocate(size: int) -> memoryview:  # as pinned_memory, which needs CUDA
        owners.append(torch.zeros(size, dtype=torch.uint8))
        return owners[-1].numpy().data

    with opened(sealed_body(), Arena(2**24, allocate=allocate)) as tensors:
        assert torch.equal(tensors["weight"], TENSORS["weight"]) and owners[0].any()
    assert not owners[0].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_memory_feeds_a_gpu() -> None:
    arena = Arena(2**24, allocate=pinned_memory)
    for _ in range(2):
        with opened(sealed_body(), arena) as tensors:
            assert tensors["weight"].is_pinned()
            copies = tensors.to("cuda")
        assert arena.leased_bytes == 0
        assert all(torch.equal(copies[name].cpu(), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failed_open_leaves_the_arena_zero(threads: int) -> None:
    arena, blocks = blocks_of()
    sealed = bytearray(sealed_body())
    sealed[-20] ^= 4
    with pytest.raises(InvalidSeal) as refusal:
        opened(sealed, arena, threads=threads)
    assert refusal.value and blocks and not any(blocks[0])
    with pytest.raises(InvalidSeal):
        open_tensors(sealed_body(), key=new_key(), context=CONTEXT, arena=arena)


def test_a_body_that_is_refused_leaves_the_arena_zero() -> None:
    arena, blocks = blocks_of()
    with pytest.raises(WeightsRefused) as refusal:
        opened(sealed_body(body_of({"x": {}}, b"\xaa" * 100)), arena)
    assert refusal.value and not any(blocks[0])


def test_an_arena_without_room_refuses_before_anything_is_decrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chunks, "open_into", lambda *_: pytest.fail("decrypted"))
    with pytest.raises(ArenaFull):
        opened(sealed_body(), Arena(100))


# Single tensors. -------------------------------------------------------------------------------------------------------


def test_a_single_tensor_is_what_was_sealed_and_is_zeroed_when_it_is_gone() -> None:
    arena, blocks = blocks_of()
    reader = reader_of(sealed_body(), arena)
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert reader.metadata == {"format": "test/1"}
    for name, tensor in TENSORS.items():
        found = reader.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    del found
    assert arena.leased_bytes == 0 and not any(any(block) for block in blocks)
    with pytest.raises(KeyError):
        reader.read("another")


@given(start=st.integers(0, 20), count=st.integers(0, 20))
@example(start=0, count=20)
@example(start=20, count=0)
def test_rows_are_what_lies_there(start: int, count: int) -> None:
    rows = range(start, min(start + count, 20))
    found = reader_of(sealed_body(), Arena(2**20)).read("weight", rows=rows)
    assert torch.equal(found, TENSORS["weight"][rows.start : rows.stop]) and found.shape == (len(rows), 3)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("weight", range(0, 21)),
        ("weight", range(-1, 3)),
        ("weight", range(0, 4, 2)),
        ("weight", range(4, 2)),
        ("steps", range(0)),
    ],
)
def test_rows_that_are_not_there_are_a_mistake_told_at_once(name: str, rows: range) -> None:
    with pytest.raises(ValueError, match="no rows"):
        reader_of(sealed_body(), Arena(2**20)).read(name, rows=rows)


def test_a_row_opens_the_chunks_that_cover_it_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    body = safetensors.torch.save({"table": torch.arange(64 * 100, dtype=torch.uint8).reshape(100, 64)})
    reader = reader_of(sealed_body(body), Arena(2**20))
    indices: list[int] = []
    genuine = Chunks.open_into

    def watched(self: Chunks, index: int, sealed: memoryview, plaintext: memoryview) -> None:
        indices.append(index)
        genuine(self, index, sealed, plaintext)

    monkeypatch.setattr(Chunks, "open_into", watched)
    row = reader.read("table", rows=range(50, 51))
    assert row.shape == (1, 64) and len(indices) <= 2


def test_a_changed_chunk_refuses_the_tensors_that_it_holds_and_no_other() -> None:
    body = safetensors.torch.save({"a": torch.zeros(256), "b": torch.ones(256)})
    sealed = bytearray(sealed_body(body))
    sealed[-1] ^= 1
    arena, blocks = blocks_of()
    reader = reader_of(sealed, arena)
    assert not reader.read("a").any()
    with pytest.raises(InvalidSeal):
        reader.read("b")
    assert not any(any(block) for block in blocks)


# Hostile bodies: sealed well, and made by anyone. ------------------------------------------------------------------------

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "nothing": b"",
    "a length and no header": bytes(8),
    "a header longer than the body": (100).to_bytes(8, "little") + b"{}",
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": body_of(b"pickle"),
    "a pickle": body_of(b"\x80\x04\x95"),
    "no object": body_of([]),
    "no UTF-8": body_of(b'{"\xff": {}}'),
    "nested deeply": body_of(b"[" * 100_000),
    "a number of many digits": body_of(b'{"x": ' + b"9" * 5000 + b"}"),
    "a name twice": body_of(b'{"x": %b, "x": %b}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
    "metadata of numbers": body_of({"__metadata__": {"format": 1}}),
    "metadata of no object": body_of({"__metadata__": "format"}),
    "an entry that is no object": body_of({"x": 1}),
    "an entry with a field more": body_of({"x": F32 | {"y": 1}}, bytes(8)),
    "an entry with a field less": body_of({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "an unknown type": body_of({"x": F32 | {"dtype": "F128"}}, bytes(8)),
    "a type that is no text": body_of({"x": F32 | {"dtype": ["F32"]}}, bytes(8)),
    "a shape of no list": body_of({"x": F32 | {"shape": 2}}, bytes(8)),
    "a shape of no whole numbers": body_of({"x": F32 | {"shape": [2.0]}}, bytes(8)),
    "a shape of booleans": body_of({"x": F32 | {"shape": [True, 2]}}, bytes(8)),
    "a negative size": body_of({"x": F32 | {"shape": [-2]}}, bytes(8)),
    "a size beyond all memory": body_of({"x": F32 | {"shape": [2**70, 0], "data_offsets": [0, 0]}}),
    "sizes that overflow": body_of({"x": F32 | {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}),
    "offsets that do not fit the shape": body_of({"x": F32 | {"shape": [3]}}, bytes(8)),
    "offsets the wrong way round": body_of({"x": F32 | {"data_offsets": [8, 0]}}, bytes(8)),
    "three offsets": body_of({"x": F32 | {"data_offsets": [0, 8, 8]}}, bytes(8)),
    "beyond the end": body_of({"x": F32}, bytes(4)),
    "bytes after the last tensor": body_of({"x": F32}, bytes(12)),
    "a gap": body_of({"x": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
    "an overlap": body_of({"x": F32, "y": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
    "an unaligned tensor": body_of(json.dumps({"x": F32}).encode().ljust(61), bytes(8)),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_refused_by_name(body: bytes) -> None:
    with pytest.raises(WeightsRefused, match="not safetensors"):
        opened(sealed_body(body), Arena(2**24))
    with pytest.raises(WeightsRefused, match="not safetensors"):
        reader_of(sealed_body(body), Arena(2**24))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_body_changed_anywhere_before_it_was_sealed_opens_or_is_refused_by_name(data: st.DataObject) -> None:
    body = bytearray(BODY)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(BODY) - len(BODY) // 3))] = data.draw(st.integers(0, 255))
    arena, blocks = blocks_of()
    try:
        with opened(sealed_body(bytes(body)), arena) as tensors:
            assert all(torch.is_tensor(tensors[name]) for name in tensors)
    except WeightsRefused:
        pass
    assert not any(any(block) for block in blocks)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_any_bytes_at_all_open_or_are_refused_by_name(body: bytes) -> None:
    with pytest.raises(WeightsRefused):
        opened(sealed_body(body), Arena(2**24))
