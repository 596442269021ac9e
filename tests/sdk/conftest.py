"""What the SDK's tests share: a server made of functions, and time that does not pass."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from cloister import _http, _operations
from fake_server import Server


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that would have been made: they are all the time that passes for this thread. Others sleep."""
    made: list[float] = []
    mine, asyncio_sleep, time_sleep = threading.get_ident(), asyncio.sleep, time.sleep

    async def sleep(seconds: float, result: object = None) -> object:
        if threading.get_ident() != mine:
            return await asyncio_sleep(seconds, result)
        made.append(seconds)
        return result

    def pause(seconds: float) -> None:
        made.append(seconds) if threading.get_ident() == mine else time_sleep(seconds)

    monkeypatch.setattr(_operations, "monotonic", lambda: sum(made))
    monkeypatch.setattr(_http.time, "sleep", pause)
    monkeypatch.setattr(_http.asyncio, "sleep", sleep)
    return made
