"""Faults on the way: what is retried, how long is waited, what is never sent, and what the errors say."""

from __future__ import annotations

import asyncio
import http.server
import threading
import time
from email.utils import formatdate
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError

import cloister
from cloister.wire.sources import CreateDataset
from fake_server import URL, Server, refusal

SOURCE = {
    "id": "src_" + "0" * 32,
    "name": "people",
    "unit": "row",
    "adjacency": "add_remove",
    "public": False,
    "budget": {"epsilon": 1, "delta": 1e-5, "spent": 0, "left": 1, "revision": 0},
    "created": "2026-01-01T00:00:00Z",
}


def create(client: cloister.Cloister) -> cloister.Source:
    return client.sources.create("people", epsilon=1, delta=1e-5)


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_write_is_retried_with_the_same_idempotency_key(server: Server, pauses: list[float], status: int) -> None:
    server.on("/v1/sources", refusal(status, "busy", "later"), httpx2.ConnectError("cut"), SOURCE)
    with server.client() as client:
        assert create(client).name == "people"
    sent = server.requests("/v1/sources")
    assert len(sent) == 3
    assert len({request.headers["idempotency-key"] for request in sent}) == 1
    assert len({request.headers["x-request-id"] for request in sent}) == 1
    assert len({request.content for request in sent}) == 1


def test_each_write_has_a_key_of_its_own(server: Server) -> None:
    server.on("/v1/sources", SOURCE)
    with server.client() as client:
        create(client)
        create(client)
    assert len({request.headers["idempotency-key"] for request in server.requests("/v1/sources")}) == 2


def test_the_pauses_double_with_jitter_and_stay_within_8_seconds(server: Server, pauses: list[float]) -> None:
    server.on("/v1/sources", refusal(503, "unavailable", "down"))
    with server.client(max_retries=6) as client, pytest.raises(cloister.ServerFault):
        create(client)
    for made, longest in zip(pauses, (0.5, 1, 2, 4, 8, 8), strict=True):
        assert longest / 2 <= made <= longest


def test_two_retries_are_made_and_then_the_refusal_is_told(server: Server, pauses: list[float]) -> None:
    server.on("/v1/sources", refusal(503, "unavailable", "down"))
    with server.client() as client, pytest.raises(cloister.ServerFault, match="down") as told:
        create(client)
    assert len(server.requests("/v1/sources")) == 3
    assert (told.value.status, told.value.code, told.value.request_id) == (503, "unavailable", "req-12345678")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500, 501])
def test_what_would_be_refused_again_is_not_retried(server: Server, pauses: list[float], status: int) -> None:
    server.on("/v1/sources", refusal(status, "no", "no"))
    with server.client() as client, pytest.raises(cloister.APIError):
        create(client)
    assert pauses == []


def test_retry_after_is_obeyed_in_seconds_and_as_a_date(server: Server, pauses: list[float]) -> None:
    later = formatdate(time.time() + 55, usegmt=True)
    server.on(
        "/v1/sources",
        refusal(429, "rate_limited", "slow down", {"Retry-After": "7"}),
        refusal(503, "unavailable", "down", {"Retry-After": later}),
        SOURCE,
    )
    with server.client() as client:
        create(client)
    assert pauses[0] == 7
    assert 20 < pauses[1] <= 55


def test_whoever_is_told_to_come_back_much_later_is_told_at_once(server: Server, pauses: list[float]) -> None:
    server.on("/v1/sources", refusal(429, "rate_limited", "tomorrow", {"Retry-After": "3600"}))
    with server.client() as client, pytest.raises(cloister.RateLimited) as told:
        create(client)
    assert told.value.retry_after_s == 3600
    assert pauses == []


def test_a_token_endpoint_that_is_busy_is_retried_too(server: Server, pauses: list[float]) -> None:
    busy = refusal(429, "rate_limited", "slow down", {"Retry-After": "3"})
    server.on("/oauth/token", busy, {"access_token": "t", "expires_in": 600}).on("/v1/sources", SOURCE)
    with server.client() as client:
        create(client)
    assert pauses == [3]


def test_a_time_out_and_a_lost_connection_are_named_with_host_and_request(server: Server, pauses: list[float]) -> None:
    for fault, kind, words in (
        (httpx2.ReadTimeout("slow"), cloister.TimedOut, "did not answer in time"),
        (httpx2.ConnectError("refused"), cloister.ConnectionFailed, "ConnectError: refused"),
    ):
        server.on("/v1/sources", fault)
        with server.client() as client, pytest.raises(kind, match=words) as told:
            create(client)
        assert "cloister.example:443" in str(told.value) and "server may be down" in str(told.value)
        assert server.asked[-1].headers["x-request-id"] in str(told.value)


@pytest.mark.parametrize("timeout_s", [None, 12.5])
def test_the_time_out_is_the_one_given_and_none_means_none(server: Server, timeout_s: float | None) -> None:
    server.on("/v1/sources", SOURCE)
    with server.client(timeout_s=timeout_s) as client:
        create(client)
    for request in server.asked:
        assert set(request.extensions["timeout"].values()) == {timeout_s}


def test_without_a_word_there_is_a_time_out(server: Server) -> None:
    server.on("/v1/sources", SOURCE)
    with server.client() as client:
        create(client)
    assert all(each and each > 0 for each in server.asked[-1].extensions["timeout"].values())


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "bad_request", cloister.BadRequest),
        (401, "unauthenticated", cloister.AuthenticationFailed),
        (403, "forbidden", cloister.PermissionDenied),
        (404, "not_found", cloister.NotFound),
        (409, "conflict", cloister.Conflict),
        (409, "budget_exceeded", cloister.BudgetExceeded),
        (409, "revision_moved", cloister.RevisionMoved),
        (409, "dataset_not_ready", cloister.Conflict),
        (413, "too_large", cloister.TooLarge),
        (418, "teapot", cloister.APIError),
        (422, "invalid_request", cloister.InvalidRequest),
        (422, "plan_impossible", cloister.InvalidRequest),
        (422, "rows_refused", cloister.RowsRefused),
        (429, "rate_limited", cloister.RateLimited),
        (500, "internal", cloister.ServerFault),
        (503, "unavailable", cloister.ServerFault),
    ],
)
def test_each_refusal_is_an_error_of_its_own_with_status_code_and_request_id_in_its_words(
    server: Server, status: int, code: str, kind: type[cloister.APIError]
) -> None:
    server.on("/v1/sources", refusal(status, code, "no, because", left=1))
    with server.client(max_retries=0) as client, pytest.raises(cloister.APIError) as told:
        create(client)
    assert type(told.value) is kind
    assert str(told.value) == f"no, because [{status} {code}, request req-12345678]"
    assert told.value.details == {"left": 1}


def test_a_refusal_over_budget_tells_what_is_left_what_would_fit_and_whom_to_ask(server: Server) -> None:
    details = {"asked": 19.0, "left": 8.5, "largest_epsilon": 8.25, "owners": ["ap_2"]}
    server.on("/v1/sources", refusal(409, "budget_exceeded", "no", **details))
    with server.client() as client, pytest.raises(cloister.BudgetExceeded) as told:
        create(client)
    assert (told.value.asked, told.value.left, told.value.largest_epsilon) == (19.0, 8.5, 8.25)
    assert told.value.owners == ["ap_2"]


def test_a_refusal_of_no_known_shape_still_has_status_and_request_id(server: Server, pauses: list[float]) -> None:
    for answer in (
        httpx2.Response(502, text="<html>Bad gateway</html>", headers={"X-Request-Id": "edge-1234"}),
        httpx2.Response(502, json=["no"], headers={"X-Request-Id": "edge-1234"}),
        httpx2.Response(502, json={"error": None, "details": 3}, headers={"X-Request-Id": "edge-1234"}),
    ):
        server.on("/v1/sources", answer)
        with server.client() as client, pytest.raises(cloister.ServerFault, match="502") as told:
            create(client)
        assert told.value.request_id == "edge-1234"


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.Response(200, text="<html>welcome</html>"),
        httpx2.Response(200, json=[1]),
        httpx2.Response(204),
        {"id": "src_1"},
    ],
)
def test_an_answer_that_is_not_ours_is_an_error_by_name(server: Server, answer: Any) -> None:
    server.on("/v1/sources", answer)
    with server.client() as client, pytest.raises(cloister.UnexpectedAnswer):
        create(client)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(server: Server, status: int) -> None:
    for elsewhere in ("https://elsewhere.example/v1/sources", "/v1/other"):
        server.on("/v1/sources", httpx2.Response(status, headers={"Location": elsewhere}))
        with server.client() as client, pytest.raises(cloister.UnexpectedAnswer, match="elsewhere"):
            create(client)
    assert {request.url.host for request in server.asked} == {"cloister.example"}
    assert {request.url.path for request in server.asked} == {"/oauth/token", "/v1/sources"}


@pytest.mark.parametrize("name", ["", ".", "..", "../tenants", "a/b", "a?name=b", "a#b", "a%2fb", "a b", "a" * 64])
def test_what_is_no_name_never_becomes_a_path(server: Server, name: str) -> None:
    with server.client() as client:
        for get in (client.sources.get, client.datasets.get, client.jobs.get, client.models.get):
            with pytest.raises(cloister.InvalidArgument):
                get(name)
    assert server.asked == []


def test_an_argument_that_no_server_would_accept_is_named_and_not_sent(server: Server) -> None:
    with server.client() as client:
        with pytest.raises(cloister.InvalidArgument, match=r"epsilon: .*greater than 0"):
            client.sources.create("people", epsilon=0, delta=1e-5)
        with pytest.raises(ValueError, match="name"):
            client.sources.create("no name", epsilon=1, delta=1e-5)
    assert server.asked == []


@pytest.mark.parametrize(
    "url", ["http://cloister.example", "http://10.0.0.1:8080", "http://127.0.0.1.example", "http://localhost.example"]
)
def test_plain_http_to_another_machine_is_refused_unless_allowed(server: Server, url: str) -> None:
    with pytest.raises(cloister.ConfigurationError, match="allow_insecure=True"):
        server.client(url=url)
    server.on("/v1/sources", SOURCE)
    with server.client(url=url, allow_insecure=True) as client:
        create(client)


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.0.0.1", "http://127.9.9.9:80", "http://[::1]:8080"])
def test_plain_http_to_this_machine_is_fine(server: Server, url: str) -> None:
    server.client(url=url).close()


@pytest.mark.parametrize(
    "url", ["", "cloister.example", "ftp://cloister.example", "https://", "https://a?b=c", "https://a#b"]
)
def test_what_is_no_base_url_is_refused(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOISTER_URL", raising=False)
    with pytest.raises(cloister.ConfigurationError):
        server.client(url=url)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        (f"{URL}/v1", URL),
        (f"{URL}/v1/", URL),
        (f"{URL}/behind/v2/models", f"{URL}/behind"),
        (f"{URL}/oauth/token", URL),
    ],
)
def test_a_path_of_the_api_is_no_base_url_and_the_right_one_is_named(server: Server, url: str, base: str) -> None:
    with pytest.raises(cloister.ConfigurationError, match=f"give '{base}'$"):
        server.client(url=url)


def test_a_closed_client_says_so(server: Server) -> None:
    client = server.client()
    client.close()
    with pytest.raises(cloister.ConfigurationError, match="this client is closed"):
        client.sources.get("people")

    async def journey() -> None:
        client = server.async_client()
        await client.close()
        await client.sources.get("people")

    with pytest.raises(cloister.ConfigurationError, match="this client is closed"):
        asyncio.run(journey())


def test_tls_to_a_port_of_plain_http_says_how_the_url_should_begin() -> None:
    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as plain:
        thread = threading.Thread(target=plain.serve_forever)
        thread.start()
        try:
            given = {"client_id": "ap_1", "client_secret": "s", "max_retries": 0}
            with (
                cloister.Cloister(f"https://127.0.0.1:{plain.server_port}", **given) as client,
                pytest.raises(cloister.ConnectionFailed, match="http://") as told,
            ):
                client.sources.get("people")
        finally:
            plain.shutdown()
            thread.join()
    assert f"127.0.0.1:{plain.server_port}" in str(told.value)


def test_a_name_with_a_blank_is_refused_in_words(server: Server) -> None:
    with server.client() as client, pytest.raises(cloister.InvalidArgument) as told:
        client.sources.create("My People", epsilon=1, delta=1e-5)
    assert "a letter first, then letters, digits, _ and -" in str(told.value) and "^" not in str(told.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (cloister.DP, "DP: give exactly one of epsilon, noise_multiplier and all_left"),
        (lambda: cloister.DP(epsilon=0), "DP: epsilon: .*greater than 0"),
        (lambda: cloister.Number(low=1, high=0), r"Number: low \(1.0\) must be below high \(0.0\)"),
        (lambda: cloister.Number(low=1), "Number: high: must be given"),
        (lambda: cloister.Number(low=1, high=2, hihg=2), "Number: hihg: is not known here"),
        (lambda: cloister.Category(values=(0, 1)), "^Category: values.0: must be text, in quotes$"),
        (lambda: cloister.Category(values=("a",)), "Category: values: .*at least 2"),
        (lambda: cloister.Tensor(shape=(0,), low=0, high=1), "Tensor: shape.0"),
        (lambda: cloister.layers.Linear(in_features=0, out_features=1), "Linear: in_features"),
        (lambda: cloister.Adam(learning_rate=-1), "Adam: learning_rate"),
        (lambda: cloister.DP(3), r"DP takes its fields by name: DP\(epsilon=..., "),
        (lambda: cloister.layers.MaxPool(kernel_size=2), "kernel_size: must be several values in brackets"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_words_by_a_cloister_error(make: Any, words: str) -> None:
    with pytest.raises(cloister.InvalidArgument, match=words) as told:
        make()
    assert isinstance(told.value, cloister.CloisterError) and isinstance(told.value, ValueError)
    assert told.value.__cause__ is None and "pydantic" not in str(told.value)


def test_the_wire_still_tells_the_place_of_each_wrong_field() -> None:
    given = {"source": "src_" + "0" * 32, "name": "d", "nominal_size": 1, "capacity": 1}
    columns = {"x": {"type": "number", "low": 1, "high": 0}, "y": {"type": "category", "values": [0]}}
    with pytest.raises(ValidationError) as told:
        CreateDataset.model_validate({**given, "columns": columns})
    assert {each["loc"][:3] for each in told.value.errors()} == {
        ("columns", "x", "number"),
        ("columns", "y", "category"),
    }


def test_a_password_in_the_url_is_refused_and_not_repeated(server: Server) -> None:
    with pytest.raises(cloister.ConfigurationError) as told:
        server.client(url="https://me:hunter2@cloister.example")
    assert "hunter2" not in str(told.value)


def test_a_base_url_with_a_path_is_kept(server: Server) -> None:
    server.on("/behind/v1/sources", SOURCE).on("/behind/oauth/token", {"access_token": "t", "expires_in": 600})
    with server.client(url=f"{URL}/behind/") as client:
        create(client)


def test_the_environment_fills_what_is_not_given(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("URL", "CLIENT_ID", "CLIENT_SECRET"):
        monkeypatch.delenv(f"CLOISTER_{variable}", raising=False)
    with pytest.raises(cloister.ConfigurationError, match="CLOISTER_URL"):
        cloister.Cloister()
    monkeypatch.setenv("CLOISTER_URL", URL)
    with pytest.raises(cloister.ConfigurationError, match="CLOISTER_CLIENT_ID"):
        cloister.Cloister()
    monkeypatch.setenv("CLOISTER_CLIENT_ID", "ap_1")
    with pytest.raises(cloister.ConfigurationError, match="CLOISTER_CLIENT_SECRET"):
        cloister.Cloister()
    monkeypatch.setenv("CLOISTER_CLIENT_SECRET", "s")
    server.on("/v1/sources", SOURCE)
    with cloister.Cloister(_transport=httpx2.MockTransport(server)) as client:
        create(client)


def test_the_async_client_retries_waits_and_fails_alike(server: Server, pauses: list[float]) -> None:
    server.on(
        "/v1/sources", refusal(503, "unavailable", "down", {"Retry-After": "2"}), httpx2.ConnectError("cut"), SOURCE
    )
    server.on("/v1/sources/missing", refusal(404, "not_found", "no such source"))

    async def journey() -> None:
        async with server.async_client() as client:
            assert (await client.sources.create("people", epsilon=1, delta=1e-5)).name == "people"
            with pytest.raises(cloister.NotFound, match="no such source"):
                await client.sources.get("missing")

    asyncio.run(journey())
    assert pauses[0] == 2
    assert len({request.headers["idempotency-key"] for request in server.requests("/v1/sources")}) == 1


def test_a_listing_turns_its_own_pages(server: Server) -> None:
    def page(request: httpx2.Request) -> dict[str, Any]:
        cursor = request.url.params.get("cursor")
        return {"items": [{**SOURCE, "name": cursor or "first"}], "next": None if cursor == "third" else
                {None: "second", "second": "third"}[cursor]}  # fmt: skip

    server.on("/v1/sources", page)
    with server.client() as client:
        assert [source.name for source in client.sources.list()] == ["first", "second", "third"]

    async def names() -> list[str]:
        async with server.async_client() as client:
            return [source.name async for source in client.sources.list()]

    assert asyncio.run(names()) == ["first", "second", "third"]
