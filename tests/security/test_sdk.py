"""The SDK against a real server: by a key, with bound tokens, over revocations, from many threads and tasks at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

import cloister
from asked import asked_writing
from cloister._auth import ClientCredentials
from cloister._possession import PrivateKey
from cloister_server.oauth import server, signing_keys
from cloister_server.oauth.signed import read_public_key
from cloister_server.service import Service
from cloister_server.store.session import reading
from keys_of_clients import Signer

THREADS = 16
SIGNERS = {"ES256": Signer(), "Ed25519": Signer.ed25519()}


@pytest.fixture
def key_file(tmp_path: Path) -> Callable[[Signer], Path]:
    def write(signer: Signer, *, mode: int = 0o600) -> Path:
        file = tmp_path / "client.pem"
        file.write_bytes(signer.private_pem)
        file.chmod(mode)
        return file

    return write


@pytest.fixture
def issued(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each token that the server gave."""
    given: list[int] = []
    real = server._Tokens.generate
    monkeypatch.setattr(server._Tokens, "generate", lambda *a, **k: (given.append(1), real(*a, **k))[1])
    return given


def active_key(service: Service) -> str:
    with reading(service.engine) as session:
        return next(key.id for key in signing_keys.listed(session) if key.state == "active")


@pytest.mark.parametrize("dpop", [False, True], ids=["bearer", "dpop"])
@pytest.mark.parametrize("name", SIGNERS)
def test_sixteen_threads_work_by_one_key_and_one_token_and_over_its_revocation(
    served: Service, new_app: Any, key_file: Callable[..., Path], issued: list[int], name: str, dpop: bool
) -> None:
    app = new_app(f"sync-{name}-{dpop}", public_key=read_public_key(SIGNERS[name].pem), dpop=dpop)
    given: dict[str, Any] = {"client_id": app.id, "private_key": key_file(SIGNERS[name]), "dpop": dpop}
    with cloister.Cloister(served.settings.issuer, **given) as client:
        for fetches in (1, 2):
            start = threading.Barrier(THREADS)

            def go(start: threading.Barrier = start) -> None:
                start.wait()
                assert list(client.sources.list()) == []

            with ThreadPoolExecutor(THREADS) as pool:
                for done in [pool.submit(go) for _ in range(THREADS)]:
                    done.result()
            assert len(issued) == fetches
            with asked_writing(served) as session:
                signing_keys.revoke(session, served, active_key(served))


@pytest.mark.parametrize("dpop", [False, True], ids=["bearer", "dpop"])
def test_sixteen_tasks_work_by_one_key_and_one_token(
    served: Service, new_app: Any, key_file: Callable[..., Path], issued: list[int], dpop: bool
) -> None:
    signer = SIGNERS["ES256"]
    app = new_app(f"async-{dpop}", public_key=read_public_key(signer.pem), dpop=dpop)

    async def journey() -> None:
        given: dict[str, Any] = {"client_id": app.id, "private_key": key_file(signer), "dpop": dpop}
        async with cloister.AsyncCloister(served.settings.issuer, **given) as client:

            async def look() -> None:
                [source async for source in client.sources.list()]

            await asyncio.gather(*(look() for _ in range(THREADS)))
            assert len(issued) == 1
            with asked_writing(served) as session:
                signing_keys.revoke(session, served, active_key(served))
            await asyncio.gather(*(look() for _ in range(THREADS)))
            assert len(issued) == 2

    asyncio.run(journey())


def test_a_secret_may_get_bound_tokens_too(served: Service, new_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    app = new_app("bound-by-secret", dpop=True)
    given = {"client_id": app.id, "client_secret": app.secret}
    with (
        cloister.Cloister(served.settings.issuer, **given) as client,
        pytest.raises(cloister.AuthenticationFailed, match="pass dpop=True"),
    ):
        list(client.sources.list())
    monkeypatch.setenv("CLOISTER_DPOP", "1")
    with cloister.Cloister(served.settings.issuer, **given) as client:
        list(client.sources.list())


def test_another_key_is_told_in_the_words_of_whoever_gave_it(
    served: Service, new_app: Any, key_file: Callable[..., Path]
) -> None:
    app = new_app("another-key", public_key=read_public_key(SIGNERS["ES256"].pem))
    with (
        cloister.Cloister(served.settings.issuer, client_id=app.id, private_key=key_file(SIGNERS["Ed25519"])) as client,
        pytest.raises(cloister.AuthenticationFailed, match="CLOISTER_PRIVATE_KEY"),
    ):
        list(client.sources.list())


def test_an_assertion_is_for_the_server_that_was_named_and_for_no_other() -> None:
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(200, json={"access_token": "t", "expires_in": 600, "token_type": "DPoP"})

    auth = ClientCredentials("https://named.example", "ap_1", PrivateKey.generate(), dpop=True)
    with httpx2.Client(auth=auth, transport=httpx2.MockTransport(answer)) as http:
        http.get("https://named.example/v1/sources?secret=1")
        http.get("https://other.example/v1/sources")
    token, request, foreign = asked
    assert token.url == "https://named.example/oauth/token"
    assert not {"authorization", "dpop"} & foreign.headers.keys()
    assert request.headers["authorization"] == "DPoP t" and "dpop" in request.headers
    for shown in (repr(auth), repr(vars(auth))):
        assert "SecretStr('t')" not in shown and "PrivateKey(ES256)" in repr(vars(auth)) and "BEGIN" not in shown


@pytest.mark.parametrize("kind", ["Bearer", "MAC"])
def test_a_token_of_another_kind_than_asked_for_is_not_used(kind: str) -> None:
    answer = httpx2.Response(200, json={"access_token": "t", "expires_in": 600, "token_type": kind})
    auth = ClientCredentials("https://named.example", "ap_1", "secret", dpop=True)
    with (
        httpx2.Client(auth=auth, transport=httpx2.MockTransport(lambda _: answer)) as http,
        pytest.raises(cloister.UnexpectedAnswer, match="another kind"),
    ):
        http.get("https://named.example/v1/sources")


def test_a_key_is_refused_that_others_can_read_or_that_is_none(
    tmp_path: Path, key_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(match: str, **given: Any) -> None:
        with pytest.raises(cloister.ConfigurationError, match=match) as refused:
            cloister.Cloister("https://named.example", client_id="ap_1", **given)
        assert "BEGIN" not in str(refused.value)

    fails("chmod 600", private_key=key_file(SIGNERS["ES256"], mode=0o644))
    good = key_file(SIGNERS["ES256"])
    fails("one of them", private_key=good, client_secret="x")
    fails("No such file", private_key=tmp_path / "absent")
    wrong = tmp_path / "wrong.pem"
    for content in (b"", b"no pem", SIGNERS["ES256"].pem):
        wrong.write_bytes(content)
        wrong.chmod(0o600)
        fails("P-256 or Ed25519", private_key=wrong)
    monkeypatch.setenv("CLOISTER_PRIVATE_KEY", str(good))
    cloister.Cloister("https://named.example", client_id="ap_1").close()
    monkeypatch.setenv("CLOISTER_CLIENT_SECRET", "x")
    fails("one of them")
    cloister.Cloister("https://named.example", client_id="ap_1", client_secret="mine").close()
