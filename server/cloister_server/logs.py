"""Logs as JSON lines on standard error: an event and its fields. Keeps out what must not be read: messages of exceptions, tokens."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import traceback
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any, TextIO

from cloister_server.settings import RoleSettings, Settings

__all__ = ["JSONFormatter", "configure", "flush"]

_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_TOGETHER_S = 0.02

_encode = json.JSONEncoder(default=str).encode

_PRINT_SECRETS = frozenset(
    {"authlib", "boto3", "botocore", "h11", "httpcore2", "httpx2", "hvac", "requests", "s3transfer", "urllib3"}
)


class JSONFormatter(logging.Formatter):
    """One JSON object a line; what a call passes as `extra` becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}
        if record.exc_info and record.exc_info[0] is not None:
            # An exception's own words may quote data or parameters: its type and places say where to look.
            frames = traceback.extract_tb(record.exc_info[2])[-8:]
            line["error"] = record.exc_info[0].__name__
            line["where"] = [f"{frame.filename}:{frame.name}:{frame.lineno}" for frame in frames]
        return _encode(line)


class _Lines(logging.StreamHandler[TextIO]):
    """Writes together what an event loop logs within a moment; whatever else, and every warning, as it comes."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._waiting: list[str] = []
        self._writer: asyncio.AbstractEventLoop | None = None  # will write what waits; not if it stops

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.append(self.format(record) + self.terminator)
            loop = _running_loop() if record.levelno < logging.WARNING else None
            if loop is None:
                self.flush()
            elif loop is not self._writer:
                self._writer = loop
                loop.call_later(_TOGETHER_S, self.flush)
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        with self.lock or nullcontext():
            lines, self._waiting, self._writer = self._waiting, [], None
            if lines:
                self.stream.write("".join(lines))
            super().flush()


def configure(settings: Settings | RoleSettings) -> None:
    """Send every logger of this process to standard error; said again, it changes the level and adds nothing."""
    handler = _Lines(sys.stderr)
    handler.setFormatter(JSONFormatter())
    handler.addFilter(_prints_no_token)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line tells them
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)


def flush() -> None:
    """Write what waits: before whoever serves ends this process by a signal, which runs nothing at its exit."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _prints_no_token(record: logging.LogRecord) -> bool:
    """At DEBUG Authlib's grants print the tokens that they issue, HTTP libraries their headers, AWS' the keys that it is given."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] not in _PRINT_SECRETS
