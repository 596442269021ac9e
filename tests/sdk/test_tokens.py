"""Access tokens: fetched once for all, renewed in time, sent to one origin, and shown to nobody."""

from __future__ import annotations

import asyncio
import base64
import logging
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

import cloister
from cloister._auth import ClientCredentials
from fake_server import SECRET, URL, Server, refusal

PAGE = {"items": [], "next": None}
THREADS = 16


def bearer(request: httpx2.Request) -> str:
    return str(request.headers["authorization"])


def look(client: cloister.Cloister) -> None:
    assert list(client.sources.list()) == []


def test_the_secret_travels_in_a_header_to_the_token_endpoint_alone(server: Server) -> None:
    server.on("/v1/sources", PAGE)
    with server.client() as client:
        look(client)
    token, request = server.asked
    assert token.url.path == "/oauth/token" and token.content == b"grant_type=client_credentials"
    assert bearer(token) == "Basic " + base64.b64encode(f"ap_1:{SECRET}".encode()).decode()
    assert bearer(request) == "Bearer token-1"


def test_sixteen_threads_at_expiry_make_one_token_fetch(server: Server) -> None:
    server.delay_s = 0.02
    server.on("/v1/sources", PAGE)
    with server.client() as client:
        for fetches in (1, 2):
            start = threading.Barrier(THREADS)

            def go(start: threading.Barrier = start) -> None:
                start.wait()
                look(client)

            with ThreadPoolExecutor(THREADS) as pool:
                for done in [pool.submit(go) for _ in range(THREADS)]:
                    done.result()
            assert server.tokens == fetches
            client._sender._http.auth._renew_at = 0.0  # the token's time is up
    assert len(server.requests("/v1/sources")) == 2 * THREADS


def test_sixteen_tasks_at_expiry_make_one_token_fetch(server: Server) -> None:
    server.delay_s = 0.02
    server.on("/v1/sources", PAGE)

    async def journey() -> None:
        async with server.async_client() as client:

            async def go() -> None:
                assert [source async for source in client.sources.list()] == []

            await asyncio.gather(*(go() for _ in range(THREADS)))

    asyncio.run(journey())
    assert server.tokens == 1


def test_a_token_is_renewed_before_it_expires_and_kept_until_then(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("/v1/sources", PAGE)
    now = 1000.0
    monkeypatch.setattr("cloister._auth.monotonic", lambda: now)
    with server.client() as client:
        look(client)
        now += 569
        look(client)
        assert server.tokens == 1
        now += 2  # 29 s before the end of its 600
        look(client)
    assert [bearer(request) for request in server.requests("/v1/sources")] == [
        "Bearer token-1",
        "Bearer token-1",
        "Bearer token-2",
    ]


def test_a_refused_token_is_replaced_once(server: Server) -> None:
    server.on("/v1/sources", refusal(401, "unauthenticated", "expired"), PAGE)
    with server.client() as client:
        look(client)
    assert [bearer(request) for request in server.requests("/v1/sources")] == ["Bearer token-1", "Bearer token-2"]


def test_a_write_that_met_a_refused_token_is_sent_again_whole(server: Server) -> None:
    server.on("/v1/sources", refusal(401, "unauthenticated", "expired"), refusal(403, "forbidden", "no"))
    with server.client() as client, pytest.raises(cloister.PermissionDenied):
        client.sources.create("people", epsilon=1, delta=1e-5)
    first, second = server.requests("/v1/sources")
    assert first.content == second.content
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]


def test_a_token_refused_twice_is_an_error_and_not_a_loop(server: Server) -> None:
    server.on("/v1/sources", refusal(401, "unauthenticated", "disabled"))
    with server.client() as client, pytest.raises(cloister.AuthenticationFailed, match="disabled"):
        look(client)
    assert server.tokens == 2 and len(server.requests("/v1/sources")) == 2


def test_the_async_client_replaces_a_refused_token_once(server: Server) -> None:
    server.on("/v1/sources", refusal(401, "unauthenticated", "expired"), PAGE)

    async def journey() -> None:
        async with server.async_client() as client:
            assert [source async for source in client.sources.list()] == []

    asyncio.run(journey())
    assert server.tokens == 2


def test_the_token_endpoint_is_asked_within_the_same_time_limits(server: Server) -> None:
    server.on("/oauth/token", httpx2.ReadTimeout("slow"))
    with server.client(timeout_s=3, max_retries=0) as client, pytest.raises(cloister.TimedOut):
        look(client)
    assert set(server.asked[0].extensions["timeout"].values()) == {3}


def test_a_failed_fetch_leaves_the_lock_free(server: Server, pauses: list[float]) -> None:
    token = {"access_token": "t", "expires_in": 600}
    server.on("/oauth/token", httpx2.ConnectError("cut"), token).on("/v1/sources", PAGE)
    with server.client() as client:
        look(client)


def test_wrong_credentials_are_told_in_the_words_of_whoever_gave_them(server: Server) -> None:
    told = httpx2.Response(
        401,
        json={"error": "invalid_client", "error_description": "send client id and secret by HTTP Basic or in the form"},
        headers={"X-Request-Id": "req-87654321"},
    )
    server.on("/oauth/token", told)
    with server.client() as client, pytest.raises(cloister.AuthenticationFailed) as refused:
        look(client)
    for words in (
        "client_id and client_secret",
        "CLOISTER_CLIENT_SECRET",
        "[401 invalid_client, request req-87654321]",
    ):
        assert words in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("body", [{"hello": 1}, ["t"], {"access_token": "t"}, {"access_token": 1, "expires_in": 600}])
def test_an_answer_without_a_token_is_an_error_by_name(server: Server, body: Any) -> None:
    server.on("/oauth/token", httpx2.Response(200, json=body))
    with server.client() as client, pytest.raises(cloister.UnexpectedAnswer):
        look(client)


@pytest.mark.parametrize(
    "url",
    ["https://elsewhere.example/v1/sources", "http://cloister.example/v1/sources", "https://cloister.example:8443/v1"],
)
def test_the_token_is_never_sent_to_another_origin(server: Server, url: str) -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json=PAGE)

    auth = ClientCredentials(URL, "ap_1", SECRET)
    with httpx2.Client(auth=auth, transport=httpx2.MockTransport(answer)) as http:
        http.get(url)

    async def journey() -> None:
        async with httpx2.AsyncClient(auth=auth, transport=httpx2.MockTransport(answer)) as http:
            await http.get(url)

    asyncio.run(journey())
    assert len(seen) == 2 and all("authorization" not in request.headers for request in seen)


def test_plain_http_never_goes_through_a_proxy_of_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    secure = cloister.Cloister(URL, client_id="ap_1", client_secret=SECRET)
    plain = cloister.Cloister("http://127.0.0.1:1", client_id="ap_1", client_secret=SECRET)
    with secure, plain:
        assert secure._sender._http._mounts
        assert not plain._sender._http._mounts


@pytest.mark.parametrize("fault", ["refused", "cut"])
def test_no_repr_log_or_traceback_shows_secret_or_token(
    server: Server, pauses: list[float], caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    caplog.set_level(logging.DEBUG)
    faults = {"refused": refusal(401, "unauthenticated", "no"), "cut": httpx2.ConnectError("cut")}
    server.on("/v1/sources", faults[fault])
    with server.client() as client:
        with pytest.raises(cloister.CloisterError) as told:
            look(client)
        auth = client._sender._http.auth
        shown = [repr(client), repr(auth), repr(vars(auth)), repr(client.sources), caplog.text, repr(told.value)]
    told_in_full = traceback.TracebackException.from_exception(told.value, capture_locals=True)
    frames = [
        line
        for line in told_in_full.format()
        if "fake_server" not in line and "test_tokens" not in line  # what the tests themselves hold is no secret
    ]
    everything = "\n".join([*shown, *frames])
    basic = base64.b64encode(f"ap_1:{SECRET}".encode()).decode()
    for secret in (SECRET, basic, "token-1", "token-2"):
        assert secret not in everything
