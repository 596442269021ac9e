"""What the SDK's tests share: a server made of functions, and time that does not pass."""

from __future__ import annotations

import pytest

from cloister import _http, _operations
from fake_server import Server


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that would have been made: they are all the time that passes."""
    made: list[float] = []

    async def sleep(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr(_operations, "monotonic", lambda: sum(made))
    monkeypatch.setattr(_http.time, "sleep", made.append)
    monkeypatch.setattr(_http.asyncio, "sleep", sleep)
    return made
