"""Tensors out of sealed safetensors, in place and without a copy. Knows torch and the safetensors layout; never unpickles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from cloister_privacy.sealing.arena import Arena, Lease
from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.layout import Place, read_layout
from cloister_privacy.sealing.memory import Memory, zero
from cloister_privacy.sealing.reader import SealedReader
from cloister_privacy.sealing.sources import Sealed

__all__ = ["OpenTensors", "TensorReader", "open_tensors", "pinned_memory"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def open_tensors(sealed: Sealed, *, key: bytes, context: Context, arena: Arena, threads: int = 1) -> OpenTensors:
    """All tensors of a sealed safetensors body, in the arena's memory, once every tag of the object has passed.

    Raises InvalidSeal, ArenaFull, or WeightsRefused where the body is not safetensors; nothing stays in the arena then.
    """
    reader = SealedReader(sealed, key=key, context=context, threads=threads)
    lease = arena.lease(max(reader.length, 1))
    try:
        memory = lease.memory[: reader.length]
        reader.read_into(memory)
        layout = read_layout(lambda start, stop: memory[start:stop], length=reader.length)
        tensors = {name: _tensor(place, memory[place.start : place.stop]) for name, place in layout.places.items()}
    except BaseException:
        zero(lease.memory)  # at once: the error's traceback may keep the lease for a while
        lease.release()
        raise
    return OpenTensors(tensors, metadata=layout.metadata, lease=lease)


class OpenTensors(Mapping[str, Tensor]):
    """Tensors by name, in leased memory, until closed: by `with`, or when nothing refers to them any more.

    A tensor that was taken out of here keeps the whole lease's memory, and its bytes, until it is gone too. Writing to one
    changes this copy alone.
    """

    def __init__(self, tensors: dict[str, Tensor], *, metadata: dict[str, str], lease: Lease) -> None:
        self.metadata = metadata
        self._tensors, self._lease = tensors, lease

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def to(self, device: torch.device | str) -> dict[str, Tensor]:
        """Copies on a device, complete at the return, so that the lease may end; asynchronous out of pinned memory."""
        copies = {name: tensor.to(device, non_blocking=True, copy=True) for name, tensor in self._tensors.items()}
        if torch.device(device).type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return copies

    def close(self) -> None:
        """End the lease; once more does nothing."""
        self._tensors = {}
        self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class TensorReader:
    """Single tensors, or some rows of one, out of a sealed safetensors body: each opens the chunks that cover it.

    What is read is authentic and at its place; nothing is proven of what was not read. A tensor holds its own lease of
    the arena's memory: that is zeroed when the tensor is gone. Raises WeightsRefused where the body is not safetensors.
    """

    def __init__(self, reader: SealedReader, *, arena: Arena) -> None:
        self._reader, self._arena = reader, arena
        self._layout = read_layout(reader.read, length=reader.length)

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._layout.metadata

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor that can be read."""
        return {name: place.shape for name, place in self._layout.places.items()}

    def read(self, name: str, *, rows: range | None = None) -> Tensor:
        """A tensor, or its rows of a range of step 1. Raises InvalidSeal, ArenaFull, KeyError, or ValueError for other rows."""
        place = self._layout.places[name]
        if rows is not None:
            place = place.rows(rows)
        if place.start == place.stop:
            return _tensor(place, memoryview(b""))
        memory = self._arena.lease(place.stop - place.start).memory
        self._reader.read_into(memory, start=place.start)
        return _tensor(place, memory)


def pinned_memory(size: int) -> Memory:
    """Page-locked zeros, out of which CUDA copies fast and beside the computation: for an Arena's `allocate`."""
    return torch.zeros(size, dtype=torch.uint8, pin_memory=True).numpy().data


def _tensor(place: Place, memory: memoryview) -> Tensor:
    """A tensor that is this memory and keeps it."""
    dtype = _DTYPES[place.dtype]
    if not len(memory):  # torch takes no empty buffer
        return torch.empty(place.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype).view(place.shape)
