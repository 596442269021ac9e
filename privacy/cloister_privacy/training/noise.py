"""Gaussian noise from a cryptographic keystream. Knows a count and a deviation; nothing of gradients.

The keystream runs on the CPU, for every device. Beside a GPU a thread draws it ahead, and its words are copied over from pinned
memory and made into Gaussians there. Where the network itself runs on the CPU every core is in use: a thread would only take one
away in the middle of a product that waits for all of them, so the words are drawn when they are asked for. Each block has its own
key from the operating system, which nobody keeps: there is no seed, and what was drawn cannot be drawn again, by a resumed run
either.

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
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from cloister_privacy.errors import TrainingError
from cloister_privacy.training.compilation import compiled
from cloister_privacy.training.keystream import fill
from cloister_privacy.training.native import kernels

__all__ = ["NoiseDraws"]

_TOGETHER = 8
"""Coordinates made of one group of words: four from the cosines of eight pairs, four from their sines."""

_BLOCK = 2**20
"""The most coordinates that one pass makes: 8 MiB of keystream."""

_MOST_PARTS = 16
"""How many passes' words one key makes at most, for small draws: the thread is woken, and takes the interpreter, but once."""

_READY = 1
"""Keystreams kept ahead. More would only hold memory."""


class NoiseDraws:
    """Draws of `count` coordinates of N(0, std^2) on `device`. Each word of the keystream is used once.

    A context manager. With `is_ahead` a thread runs between entering and leaving and keeps a keystream ready; what is left at
    the end is dropped. `is_compiled` compiles the way from words to Gaussians.
    """

    def __init__(
        self,
        count: int,
        *,
        std: float,
        device: str | torch.device,
        is_ahead: bool = False,
        is_compiled: bool = False,
    ) -> None:
        self._count, self._std, self._device, self._is_ahead = count, float(std), torch.device(device), is_ahead
        # Passes of equal size, since what the last one makes too much is thrown away.
        self._passes = -(-count // _BLOCK)
        self._groups = -(-count // (_TOGETHER * max(1, self._passes)))
        self._parts = min(_MOST_PARTS, _BLOCK // (_TOGETHER * self._groups)) if count and is_ahead else 1
        self._make: Callable[..., Tensor] = _gaussians
        if is_compiled and count:
            self._make = self._compiled()
        self._words: list[Tensor] = []
        self._ready: deque[Tensor] = deque()
        self._changed = threading.Condition()
        self._closed = True
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._process = 0

    def __enter__(self) -> Self:
        if self._process:
            raise TrainingError("these draws were opened before; make new ones")
        self._closed, self._process = False, os.getpid()
        if not self._is_ahead:
            return self
        self._thread = threading.Thread(target=self._run, name="noise-ahead", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and drop the keystream that was not taken. May be called twice."""
        if self._process != os.getpid():
            # A fork copies neither the thread nor, usefully, its lock; the words it copied are the parent's.
            self._ready, self._words = deque(), []
            return
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._words.clear()
            self._changed.notify_all()
        # Closed by a finalizer, this may run wherever the garbage collector does, in the thread itself too.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def take(self) -> Tensor:
        """A fresh draw, float32 [count] on the device.

        Raises TrainingError if the draws are not open, if the thread failed, and in a forked process, where they would repeat.
        """
        if not self._closed and self._process != os.getpid():
            raise TrainingError("noise drawn before a fork belongs to the parent alone; open new draws in this process")
        made = [self._make(self._next(), std=self._std) for _ in range(self._passes)]
        noise = made[0] if len(made) == 1 else torch.cat(made or [torch.empty(0, device=self._device)])
        return noise[: self._count]

    def _compiled(self) -> Callable[..., Tensor]:
        if self._device.type != "cpu":
            return compiled(_gaussians, _keystream(1, self._groups)[0].to(self._device), std=self._std)
        loops = kernels()
        return _gaussians if loops is None else loops.gaussians

    def _next(self) -> Tensor:
        """The words of one pass, on the device."""
        with self._changed:
            while not self._words:
                self._changed.wait_for(lambda: self._ready or self._closed or self._failure or not self._is_ahead)
                if self._closed:
                    raise TrainingError("the noise was asked for outside of its `with` block")
                if self._failure:
                    raise TrainingError("the noise could not be drawn") from self._failure
                drawn = self._ready.popleft() if self._is_ahead else _keystream(self._parts, self._groups)
                self._words.extend(drawn.to(self._device, non_blocking=True))
                self._changed.notify_all()
            return self._words.pop()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < _READY)
                    if self._closed:
                        return
                words = _keystream(self._parts, self._groups, is_pinned=self._device.type == "cuda")
                with self._changed:
                    if not self._closed:
                        self._ready.append(words)
                        self._changed.notify_all()
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()


def _keystream(parts: int, groups: int, *, is_pinned: bool = False) -> Tensor:
    """Uniform words, int32 [parts, radius or angle, a or b, i, j, groups]."""
    words = torch.empty((parts, 2, 2, 2, 2, groups), dtype=torch.int32, pin_memory=is_pinned)
    fill(words.view(-1).view(torch.uint8).numpy())
    return words


def _gaussians(words: Tensor, *, std: float) -> Tensor:
    """Uniform words, as `_keystream` gives them, to 8 * groups independent draws of N(0, std^2), float32."""
    radius_words, angle_words = words
    # Odd in (-2^31, 0): midpoints of 2^30 cells, exact next to 0. The factor keeps those that round to 1 below it, and
    # shrinks no radius.
    uniform = (radius_words | (1 - 2**31)).float() * (-(2.0**-31) * (1 - 2.0**-24))
    radius = (uniform.log2() * (-2 * math.log(2) * (std / 2) ** 2)).sqrt()  # four of std / 2
    angle = angle_words.float() * (math.pi * 2.0**-31)
    return torch.cat([_mixed(half(angle) * radius) for half in (torch.cos, torch.sin)]).flatten()


def _mixed(gaussian: Tensor) -> Tensor:
    """The sign rows of the module's docstring: [a or b, i, j, groups] to [4, groups]."""
    a, b = gaussian
    first = a[0] + a[1], a[0] - a[1]  # by i, each [j, groups]
    second = b[:, 0] + b[:, 1], b[:, 0] - b[:, 1]  # by j, each [i, groups]
    return torch.stack([first[i][j] + second[j][i] for i in range(2) for j in range(2)])
