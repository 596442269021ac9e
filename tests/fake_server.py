"""A server made of functions, for the faults that a real one does not show on demand."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2

import cloister

__all__ = ["SECRET", "URL", "Server", "refusal"]

URL = "https://cloister.example"
SECRET = "sealed-in-the-vault-and-nowhere-else"


@dataclass
class Server:
    """Answers each path from a queue of answers (the last one for ever), and keeps what it was asked."""

    answers: dict[str, list[Any]] = field(default_factory=dict)
    asked: list[httpx2.Request] = field(default_factory=list)
    tokens: int = 0
    life_s: float = 600
    delay_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if self.delay_s:
            time.sleep(self.delay_s)
        return self._answer(request)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        with self.lock:
            self.asked.append(_copy(request))
            queue = self.answers.get(request.url.path)
            if queue is None and request.url.path == "/oauth/token":
                self.tokens += 1
                return httpx2.Response(200, json={"access_token": f"token-{self.tokens}", "expires_in": self.life_s})
            if queue is None:
                return refusal(404, "not_found", "nothing is here")
            answer = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = answer(request)
        return answer if isinstance(answer, httpx2.Response) else httpx2.Response(200, json=answer)

    def on(self, path: str, *answers: Any) -> Server:
        """Answer so on this path: a body, a response, an exception to raise, or a function of the request."""
        self.answers[path] = list(answers)
        return self

    def requests(self, path: str) -> list[httpx2.Request]:
        return [request for request in self.asked if request.url.path == path]

    def client(self, **options: Any) -> cloister.Cloister:
        return cloister.Cloister(
            options.pop("url", URL),
            client_id="ap_1",
            client_secret=SECRET,
            _transport=httpx2.MockTransport(self),
            **options,
        )

    def async_client(self, **options: Any) -> cloister.AsyncCloister:
        async def answer(request: httpx2.Request) -> httpx2.Response:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            return self._answer(request)

        return cloister.AsyncCloister(
            URL, client_id="ap_1", client_secret=SECRET, _transport=httpx2.MockTransport(answer), **options
        )


def _copy(request: httpx2.Request) -> httpx2.Request:
    """As it is now: a client may sign and send the same object again."""
    return httpx2.Request(
        request.method, request.url, headers=request.headers, content=request.content, extensions=request.extensions
    )


def refusal(
    status: int, code: str, sentence: str, headers: dict[str, str] | None = None, **details: Any
) -> httpx2.Response:
    body = {"error": sentence, "code": code, "request_id": "req-12345678", "details": details}
    return httpx2.Response(status, json=body, headers=headers)
