"""The log of an event loop: lines of a moment are one write, in their order, and no warning waits."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import logging
import threading
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from cloister_server import logs
from cloister_server.app import create_app
from cloister_server.logs import JSONFormatter, _Lines
from cloister_server.service import Service


class Written(io.StringIO):
    """Remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[list[str]] = []

    def write(self, text: str) -> int:
        self.writes.append([json.loads(line)["event"] for line in text.splitlines()])
        return len(text)


@pytest.fixture
def written() -> Iterator[Written]:
    stream = Written()
    handler = _Lines(stream)
    handler.setFormatter(JSONFormatter())
    log = logging.getLogger("of.these.tests")
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO)
    yield stream
    log.removeHandler(handler)


def test_lines_of_a_moment_are_written_together(written: Written) -> None:
    log = logging.getLogger("of.these.tests")

    async def work() -> None:
        for each in "abc":
            log.info(each)
        assert written.writes == []
        while not written.writes:
            await asyncio.sleep(0.01)
        log.info("d")
        thread = threading.Thread(target=log.info, args=("of a thread",))
        thread.start()
        thread.join()
        assert written.writes == [["a", "b", "c"], ["d", "of a thread"]], "whoever has no loop does not wait"
        log.info("e")
        log.warning("f")
        assert written.writes[2:] == [["e", "f"]], "nor does a warning"
        log.info("g")

    asyncio.run(work())
    log.handlers[0].flush()
    assert written.writes[3:] == [["g"]], "what waits at the end is written at the process' end"
    log.info("no loop")
    assert written.writes[4:] == [["no loop"]]


def test_a_loop_that_stopped_before_it_wrote_keeps_no_other_from_writing(written: Written) -> None:
    log = logging.getLogger("of.these.tests")

    async def work(line: str, *, stays: bool) -> None:
        log.info(line)
        while stays and not written.writes:
            await asyncio.sleep(0.01)

    asyncio.run(work("a", stays=False))
    asyncio.run(work("b", stays=True))
    assert written.writes == [["a", "b"]]


def test_the_application_writes_what_waits_before_it_ends(
    service: Service, written: Written, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logs, "_TOGETHER_S", 3600)
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger("of.these.tests").handlers)
    with TestClient(create_app(service)) as http:
        assert http.get("/healthz").status_code == 200
        assert "request" not in itertools.chain(*written.writes)
    assert "request" in itertools.chain(*written.writes), (
        "some servers end their process by a signal, which runs nothing at exit"
    )
