"""Gaussian noise from a cryptographic keystream, drawn ahead by a thread. Knows a count and a deviation; nothing of gradients.

The generator runs on the CPU, for every device: on CUDA the finished draws are copied over from pinned memory, and none is
made there. Each draw has its own key from the operating system, which nobody keeps: there is no seed, and what was drawn
cannot be drawn again, by a resumed run either.

Distribution. 30 random bits give u = (k + 1/2) / 2^30 and 32 an angle; Box and Muller make two Gaussians of them. Four are
summed into each coordinate, so that the largest reachable deviation is 13.1 standard deviations: Gaussians lie beyond it less
than once in 10^38 times. One summand ends at 6.5 of its own, which leaves out less than one in 10^10.

Independence. Of eight Gaussians a[i, j] and b[i, j], i, j in {0, 1}, come four coordinates,

    c[i, j] = (a[0, j] ± a[1, j]) + (b[i, 0] ± b[i, 1]),    minus where i (first bracket) or j (second) is 1.

Their eight-entry sign rows are orthogonal and equally long, so the coordinates are jointly Gaussian and exactly independent.
What summing is for survives seeing all of them: every linear combination of coordinates holds at least four of the
Gaussians (a row combination w, as a 2 x 2 matrix, leaves the supports of Hw and wH, which have 4 entries or more together),
so no unmixing isolates one whose reachable values could be listed, the attack of arXiv 2107.10138 (section 5.1 sums four).

Not promised: the arithmetic is float32, and attacks on the rounding of `sum + noise` itself (arXiv 2207.13793) are met by no
sampler; that floating-point noise acts as real noise stays an assumption.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from types import TracebackType
from typing import Self

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from cloister_privacy.errors import TrainingError

__all__ = ["NoiseAhead", "gaussian_noise"]

_COORDINATES = 8
"""Made together: four from the cosines of eight pairs, four from their sines."""

_MOST_GROUPS = 2**13
"""Groups of eight in one pass, at most: its calls are long against their overhead, its buffers (2 MB) short of the last cache."""

_READY = 2
"""Draws kept ahead. More would only hold memory."""


def gaussian_noise(count: int, *, std: float) -> Tensor:
    """`count` independent draws of N(0, std^2), as float32 on the CPU."""
    noise = torch.empty(count)
    _Generator(count, std=std).fill(noise.numpy())
    return noise


class NoiseAhead:
    """Draws of `count` coordinates as `gaussian_noise` makes them, on `device`, made by a thread before they are asked for.

    A context manager: the thread runs between entering and leaving, keeps up to two draws ready, and what is left at the end is
    dropped. Each draw is handed out once. `device` may be CUDA: then the draws are made on the CPU and copied without blocking.
    """

    def __init__(self, count: int, *, std: float, device: str | torch.device) -> None:
        self._count, self._std, self._device = count, std, torch.device(device)
        self._pinned = self._device.type == "cuda"
        self._ready: deque[Tensor] = deque()
        self._changed = threading.Condition()
        self._closed = True
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._process = 0

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise TrainingError("these draws were opened before; make new ones")
        self._closed, self._process = False, os.getpid()
        self._thread = threading.Thread(target=self._run, name="noise-ahead", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and drop the draws that were not taken. May be called twice."""
        if self._process != os.getpid():
            # A fork copies neither the thread nor, usefully, its lock; the draws it copied are the parent's.
            self._ready = deque()
            return
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        # Closed by a finalizer, this may run wherever the garbage collector does, in the thread itself too.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def take(self) -> Tensor:
        """A fresh draw, float32 [count] on the device; waits until there is one.

        Raises TrainingError if the draws are not open, if the thread failed, and in a forked process, where they would repeat.
        """
        if not self._closed and self._process != os.getpid():
            raise TrainingError("noise drawn before a fork belongs to the parent alone; open new draws in this process")
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed or self._failure)
            if self._closed:
                raise TrainingError("the noise was asked for outside of its `with` block")
            if not self._ready:
                raise TrainingError("the noise could not be drawn") from self._failure
            draw = self._ready.popleft()
            self._changed.notify_all()
        return draw.to(self._device, non_blocking=self._pinned)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < _READY)
                    if self._closed:
                        return
                draw = gaussian_noise(self._count, std=self._std)
                draw = draw.pin_memory() if self._pinned else draw
                with self._changed:
                    if not self._closed:
                        self._ready.append(draw)
                        self._changed.notify_all()
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()


class _Generator:
    """Buffers for draws of one size, for one thread at a time. numpy works here, not torch: it is the faster, and takes one core."""

    def __init__(self, count: int, *, std: float) -> None:
        # Passes of equal size, since what the last one makes too much is thrown away.
        passes = max(1, -(-count // (_COORDINATES * _MOST_GROUPS)))
        groups = -(-count // (_COORDINATES * passes))
        pairs = (2, 2, 2, groups)  # a or b, i, j
        half = 4 * math.prod(pairs)
        self._std, self._zeros, self._keystream = std, bytes(2 * half), bytearray(2 * half)
        self._radius_words = np.frombuffer(self._keystream, np.int32, half // 4).reshape(pairs)
        self._angle_words = np.frombuffer(self._keystream, np.int32, half // 4, half).reshape(pairs)
        self._radius, self._angle = np.empty(pairs, np.float32), np.empty(pairs, np.float32)
        self._gaussian, self._sum = np.empty(pairs, np.float32), np.empty(pairs, np.float32)
        self._coordinates = np.empty((2, 2, 2, groups), np.float32)  # cosine or sine, i, j

    def fill(self, noise: NDArray[np.float32]) -> None:
        """Write fresh noise over all of `noise`."""
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        made = self._coordinates.reshape(-1)
        for start in range(0, len(noise), max(1, len(made))):
            block = noise[start : start + len(made)]
            cipher.update_into(self._zeros, self._keystream)
            self._make()
            block[:] = made[: len(block)]

    def _make(self) -> None:
        radius, angle = self._radius, self._angle
        # Odd in (-2^31, 0): midpoints of 2^30 cells, exact next to 0. The factor keeps those that round to 1 below it, and
        # shrinks no radius.
        np.bitwise_or(self._radius_words, np.int32(1 - 2**31), out=self._radius_words)
        np.copyto(radius, self._radius_words, casting="unsafe")
        np.multiply(radius, np.float32(-(2.0**-31) * (1 - 2.0**-24)), out=radius)
        np.log2(radius, out=radius)
        np.multiply(radius, np.float32(-2 * math.log(2) * (self._std / 2) ** 2), out=radius)  # four of std / 2
        np.sqrt(radius, out=radius)
        np.copyto(angle, self._angle_words, casting="unsafe")
        np.multiply(angle, np.float32(math.pi * 2.0**-31), out=angle)
        for coordinates, half in zip(self._coordinates, (np.cos, np.sin), strict=True):
            half(angle, out=self._gaussian)
            np.multiply(self._gaussian, radius, out=self._gaussian)
            _mix(self._gaussian, self._sum, coordinates)


def _mix(gaussian: NDArray[np.float32], sums: NDArray[np.float32], coordinates: NDArray[np.float32]) -> None:
    """The sign rows of the module's docstring: [a or b, i, j, group] to [i, j, group]."""
    (a, b), (first, second) = gaussian, sums
    np.add(a[0], a[1], out=first[0])
    np.subtract(a[0], a[1], out=first[1])
    np.add(b[:, 0], b[:, 1], out=second[:, 0])
    np.subtract(b[:, 0], b[:, 1], out=second[:, 1])
    np.add(first, second, out=coordinates)
