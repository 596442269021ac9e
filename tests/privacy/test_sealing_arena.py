"""The arena: warm memory that is zero whenever nobody holds it, and never leased twice. Looked at from outside."""

from __future__ import annotations

import gc
import hashlib
import mmap
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_privacy.errors import PrivacyError
from cloister_privacy.sealing import Arena, ArenaFull, Context, InvalidSeal, Lease, open_into, seal
from cloister_privacy.sealing.memory import address_of, private_memory, zero

KEY = hashlib.sha256(b"a key for tests").digest()
CONTEXT = Context(tenant="tn_" + "0" * 32, kind="weights", object="obj_" + "1" * 32)
PAGE = 2**16


class Watched:
    """An arena whose blocks the test can see."""

    def __init__(self, limit_bytes: int = 2**24) -> None:
        self.blocks: list[bytearray] = []
        self.arena = Arena(limit_bytes, allocate=self._allocate)

    def _allocate(self, size: int) -> bytearray:
        self.blocks.append(bytearray(size))
        return self.blocks[-1]

    @property
    def is_zero(self) -> bool:
        return not any(any(block) for block in self.blocks)


def test_a_lease_is_zeros_of_just_its_size_and_can_be_written() -> None:
    with Arena(2**20).lease(1000) as lease:
        assert len(lease.memory) == 1000 and not any(lease.memory) and not lease.memory.readonly
        lease.memory[:] = b"x" * 1000


def test_memory_is_zeroed_when_its_lease_ends_and_leased_again() -> None:
    watched = Watched()
    for _ in range(3):
        with watched.arena.lease(1000) as lease:
            assert not any(lease.memory)
            lease.memory[:] = b"x" * 1000
            assert not watched.is_zero
        assert watched.is_zero
    assert len(watched.blocks) == 1


def test_memory_that_something_still_refers_to_is_neither_zeroed_nor_leased_again() -> None:
    watched = Watched()
    with watched.arena.lease(1000) as lease:
        kept = lease.memory[10:20]
        kept[:] = b"y" * 10
    assert kept == b"y" * 10 and watched.arena.leased_bytes == PAGE
    with watched.arena.lease(1000) as other:
        other.memory[:] = b"z" * 1000
        assert kept == b"y" * 10 and len(watched.blocks) == 2
    del kept
    assert watched.is_zero and watched.arena.leased_bytes == 0


def test_a_lease_that_nobody_ends_ends_when_it_is_forgotten() -> None:
    watched = Watched()
    lease = watched.arena.lease(1000)
    lease.memory[:] = b"x" * 1000
    del lease
    assert watched.is_zero and watched.arena.leased_bytes == 0


def test_a_lease_in_a_cycle_ends_when_the_collector_finds_it() -> None:
    watched = Watched()

    class Holder:
        lease: Lease
        itself: Holder

    holder = Holder()
    holder.lease, holder.itself = watched.arena.lease(100), holder
    holder.lease.memory[:] = b"x" * 100
    del holder
    gc.collect()
    assert watched.is_zero and watched.arena.leased_bytes == 0


def test_a_released_lease_has_no_memory() -> None:
    lease = Arena(2**20).lease(10)
    lease.release()
    lease.release()
    with pytest.raises(ValueError, match="released"):
        _ = lease.memory


@pytest.mark.parametrize("size", [0, -1])
def test_a_lease_of_nothing_is_a_mistake_told_at_once(size: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Arena(2**20).lease(size)


def test_an_arena_gives_no_more_than_its_limit() -> None:
    arena = Arena(3 * PAGE)
    leases = [arena.lease(PAGE) for _ in range(3)]
    with pytest.raises(ArenaFull, match="end a lease") as refusal:
        arena.lease(1)
    assert isinstance(refusal.value, PrivacyError)
    leases.pop().release()
    arena.lease(1).release()
    with pytest.raises(ArenaFull):
        Arena(PAGE - 1).lease(1)


def test_idle_memory_of_the_wrong_size_makes_room() -> None:
    watched = Watched(4 * PAGE)
    for size in (PAGE, 3 * PAGE):
        watched.arena.lease(size).release()
    assert watched.arena.held_bytes == 4 * PAGE
    watched.arena.lease(4 * PAGE).release()
    assert watched.arena.held_bytes == 4 * PAGE and len(watched.blocks) == 3
    watched.arena.lease(PAGE).release()  # four times too large: it is not wasted on this
    assert watched.arena.held_bytes == PAGE


def test_trim_gives_idle_memory_back_and_leaves_leases_alone() -> None:
    arena = Arena(2**20)
    lease = arena.lease(PAGE)
    arena.lease(PAGE).release()
    lease.memory[:1] = b"x"
    arena.trim()
    assert arena.held_bytes == arena.leased_bytes == PAGE and lease.memory[0] == ord("x")


def test_large_memory_is_private_and_zero() -> None:
    memory = private_memory(2**22)
    view = memoryview(memory)
    assert isinstance(memory, mmap.mmap) and not any(view)
    view[-1] = 1
    zero(view)
    zero(view[:0])
    assert not any(view)


def test_private_memory_stays_out_of_core_dumps() -> None:
    memory = private_memory(2**22)
    address, flags = address_of(memory), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            start, stop = (int(number, 16) for number in first.split("-"))
        elif first == "VmFlags:" and start <= address < stop:
            flags = rest
    assert "dd" in flags.split()


def test_a_failed_open_leaves_the_arena_zero_at_once() -> None:
    watched = Watched()
    sealed = bytearray(seal(b"\xaa" * 1000, key=KEY, context=CONTEXT, chunk_bytes=64))
    sealed[-1] ^= 1
    with watched.arena.lease(1000) as lease, pytest.raises(InvalidSeal) as refusal:
        open_into(sealed, lease.memory, key=KEY, context=CONTEXT)
    assert refusal.value and watched.is_zero


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 4 * PAGE), st.booleans()), max_size=30))
def test_leases_never_overlap_and_are_always_zero_at_first(plan: list[tuple[int, bool]]) -> None:
    watched = Watched(8 * PAGE)
    held: list[tuple[Lease, bytes]] = []
    for number, (size, ends_one) in enumerate(plan):
        if ends_one and held:
            held.pop(number % len(held))
        mark = bytes([number + 1])
        try:
            lease = watched.arena.lease(size)
        except ArenaFull:
            continue
        assert not any(lease.memory)
        lease.memory[:] = mark * size
        held.append((lease, mark))
        assert watched.arena.leased_bytes <= watched.arena.held_bytes <= 8 * PAGE
    assert all(bytes(lease.memory) == mark * len(lease.memory) for lease, mark in held)
    lease = watched.arena.lease(1) if not held else held[0][0]  # the loop's name must not keep another
    held.clear()
    lease.release()
    assert watched.is_zero


def test_threads_may_share_an_arena() -> None:
    watched, wrong = Watched(), []

    def work(mark: int) -> None:
        for turn in range(200):
            with watched.arena.lease(1 + (mark * 7919 + turn * 104_729) % (3 * PAGE)) as lease:
                if any(lease.memory[:64]):
                    wrong.append("not zero")
                lease.memory[:64] = bytes([mark]) * len(lease.memory[:64])
                if any(byte != mark for byte in lease.memory[:64]):
                    wrong.append("shared")

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and watched.arena.leased_bytes == 0 and watched.is_zero
