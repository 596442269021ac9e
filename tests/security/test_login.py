"""`cloister login`: a person at a command line, whose one token is kept from everybody else and used by one process at a time."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

import cloister
from asked import asked_writing
from cloister import _login
from cloister._login import Device, LoginCredentials
from cloister._profiles import Profile, ProfileStore
from cloister.cli import login as commands
from cloister.cli import main
from cloister_server import people, tenants
from cloister_server.service import Service
from people import Human, allowed

Login = Callable[..., int]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's logins are kept."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("URL", "CLIENT_ID", "CLIENT_SECRET", "PRIVATE_KEY", "PROFILE", "DPOP"):
        monkeypatch.delenv(f"CLOISTER_{name}", raising=False)
    return tmp_path / "cloister" / "profiles"


@pytest.fixture
def log_in(home: Path, served: Service, online: Human, monkeypatch: pytest.MonkeyPatch) -> Login:
    """Runs `cloister login`, whose code is allowed, or not, as soon as it is shown."""

    def run(*more: str, decision: str = "allow") -> int:
        def begun(*given: Any) -> Device:
            device = _login.begin(*given)
            allowed(online, f"{device.page}?user_code={device.user_code}", decision)
            return device

        monkeypatch.setattr(commands, "begin", begun)
        monkeypatch.setattr(commands, "wait", partial(_login.wait, pause=lambda _: None))
        return main(["login", served.settings.issuer, *more])

    return run


def kept(home: Path, name: str = "default") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((home / f"{name}.json").read_text())
    return content


def test_a_person_logs_in_works_and_logs_out(
    home: Path,
    served: Service,
    online: Human,
    log_in: Login,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    assert log_in() == 0
    first = kept(home)["refresh_token"]
    assert stat.S_IMODE((home / "default.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    with cloister.Cloister() as client:
        assert list(client.sources.list()) == [] == list(client.sources.list())
    second = kept(home)["refresh_token"]
    assert first != second
    assert main(["whoami"]) == 0 == main(["whoami", "--json"])
    told = capsys.readouterr().out
    assert online.account in told and json.loads(told.splitlines()[-1])["id"] == online.id
    third = kept(home)["refresh_token"]
    assert main(["logout"]) == 0 and not (home / "default.json").exists()
    form = {"grant_type": "refresh_token", "client_id": "cloister-cli", "refresh_token": third}
    assert (
        httpx2.post(f"{served.settings.issuer}/oauth/token", data=form, timeout=60).json()["error"] == "invalid_grant"
    )
    assert main(["logout"]) == 1 and main(["whoami"]) == 1
    told += "".join(capsys.readouterr()) + " ".join(str(vars(record)) for record in caplog.records)
    for secret in (first, second, third):
        assert secret not in told and secret.split(".")[2] not in told


def test_what_is_refused_is_told_in_words(
    home: Path, served: Service, online: Human, log_in: Login, capsys: pytest.CaptureFixture[str]
) -> None:
    assert log_in(decision="deny") == 1 and "not allowed" in capsys.readouterr().err
    assert not (home / "default.json").exists()
    assert log_in() == 0
    with asked_writing(served) as session:
        operator = tenants.operator_of(tenants.find_tenant(session, "acme"), request_id="request-of-a-test")
        people.disable(session, served, operator, online.id)
    with (
        cloister.Cloister() as client,
        pytest.raises(cloister.AuthenticationFailed, match="is over; run"),
    ):
        list(client.sources.list())
    assert main(["login", "http://127.0.0.1:1"]) == 1 and "could not be reached" in capsys.readouterr().err
    assert main(["login", "http://cloister.example"]) == 1 and "plain HTTP" in capsys.readouterr().err


def test_arguments_go_before_the_environment_and_that_before_the_login(
    home: Path, served: Service, log_in: Login, new_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert log_in() == 0
    url, before = served.settings.issuer, kept(home)
    cloister.Cloister(url).close()
    for other in ("http://127.0.0.1:1", "https://evil.example"):
        with pytest.raises(cloister.ConfigurationError, match="for no other server"):
            cloister.Cloister(other)
    app = new_app("goes-before")
    with cloister.Cloister(url, client_id=app.id, client_secret=app.secret) as client:
        list(client.sources.list())
    monkeypatch.setenv("CLOISTER_CLIENT_ID", app.id)
    with pytest.raises(cloister.ConfigurationError, match="no url"):
        cloister.Cloister()
    monkeypatch.setenv("CLOISTER_URL", url)
    monkeypatch.setenv("CLOISTER_CLIENT_SECRET", app.secret)
    with cloister.Cloister() as client:
        list(client.sources.list())
    assert kept(home) == before, "the login was not touched"
    for name in ("CLIENT_ID", "CLIENT_SECRET"):
        monkeypatch.delenv(f"CLOISTER_{name}")
    monkeypatch.setenv("CLOISTER_PROFILE", "second")
    with pytest.raises(cloister.ConfigurationError, match="cloister login"):
        cloister.Cloister()
    assert log_in() == 0 and kept(home) == before and kept(home, "second")["refresh_token"] != before["refresh_token"]
    for name in ("", "../x", "a/b", "x" * 80):
        with pytest.raises(cloister.ConfigurationError, match="no name"):
            ProfileStore(home, name)


def test_many_clients_share_one_login_and_never_use_a_token_twice(home: Path, log_in: Login) -> None:
    assert log_in() == 0
    start = threading.Barrier(6)

    def go(_: int) -> None:
        with cloister.Cloister() as client:
            start.wait()
            assert list(client.sources.list()) == []

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(go, range(6)))

    async def journey() -> None:
        async def look() -> None:
            async with cloister.AsyncCloister() as client:
                assert [each async for each in client.sources.list()] == []

        await asyncio.gather(*(look() for _ in range(6)))

    asyncio.run(journey())
    assert main(["whoami"]) == 0
    assert kept(home)["refresh_token"].split(".")[1] == "14", "one after the other"


def test_the_token_goes_to_the_server_of_the_login_alone(home: Path) -> None:
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        told = {"access_token": "t", "expires_in": 600, "token_type": "Bearer", "refresh_token": "next"}
        return httpx2.Response(200, json=told)

    store = ProfileStore(home, "default")
    store.write(Profile("https://named.example", "cloister-cli", SecretStr("first")))
    profile = store.read()
    assert profile is not None and "first" not in repr(profile)
    with httpx2.Client(auth=LoginCredentials(store, profile), transport=httpx2.MockTransport(answer)) as http:
        http.get("https://other.example/v1/sources")
        http.get("https://named.example/v1/sources")
    foreign, token, request = asked
    assert "authorization" not in foreign.headers and b"first" not in foreign.read()
    assert str(token.url) == "https://named.example/oauth/token" and b"refresh_token=first" in token.read()
    assert request.headers["authorization"] == "Bearer t" and kept(home)["refresh_token"] == "next"
    store.write(Profile("https://elsewhere.example", "cloister-cli", SecretStr("another")))
    with (
        httpx2.Client(auth=LoginCredentials(store, profile), transport=httpx2.MockTransport(answer)) as http,
        pytest.raises(cloister.ConfigurationError, match="logged out"),
    ):
        http.get("https://named.example/v1/sources")


def test_a_server_that_sends_people_elsewhere_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"device_code": "d", "user_code": "u", "verification_uri": "https://evil.example/device", "expires_in": 600}
    monkeypatch.setattr(_login, "_answered", lambda *_: told)
    with pytest.raises(cloister.UnexpectedAnswer, match="another server"):
        _login.begin("https://named.example")


def test_waiting_keeps_to_the_intervals_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(code: str) -> cloister.APIError:
        return cloister.BadRequest("no", status=400, code=code, request_id="r", details={})

    answers = iter(
        [
            refused("authorization_pending"),
            refused("slow_down"),
            cloister.ConnectionFailed("no"),
            {"refresh_token": "r"},
        ]
    )

    def answer(*_: object) -> Any:
        given = next(answers)
        if isinstance(given, Exception):
            raise given
        return given

    monkeypatch.setattr(_login, "_answered", answer)
    pauses: list[float] = []
    device = Device("https://named.example", "cloister-cli", SecretStr("d"), "u", "p", 600.0, 5.0)
    assert _login.wait(device, pause=pauses.append).refresh_token.get_secret_value() == "r"
    assert pauses == [5.0, 5.0, 10.0, 20.0]
    monkeypatch.setattr(_login, "_answered", lambda *_: (_ for _ in ()).throw(refused("authorization_pending")))
    with pytest.raises(cloister.ConfigurationError, match="in time"):
        _login.wait(device, pause=pauses.append)


def test_a_file_that_others_could_read_or_that_is_none_is_refused(home: Path, tmp_path: Path) -> None:
    store, profile = ProfileStore(home, "default"), Profile("https://named.example", "c", SecretStr("secret-token"))
    home.mkdir(parents=True)
    draft = home / ".default.draft"
    draft.write_text("left over")
    draft.chmod(0o666)
    store.write(profile)
    file = home / "default.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and not draft.exists()
    target = tmp_path / "elsewhere"
    draft.symlink_to(target)
    with pytest.raises(cloister.ConfigurationError):
        store.write(profile)
    assert not target.exists() and store.read() == profile
    draft.unlink()
    file.chmod(0o640)
    with pytest.raises(cloister.ConfigurationError, match="chmod 600"):
        store.read()
    good = file.read_text()
    for content in (
        "",
        "{",
        "[]",
        "null",
        good.replace("profile/1", "profile/2"),
        "[" * 30_000,
    ):
        file.write_text(content)
        file.chmod(0o600)
        with pytest.raises(cloister.ConfigurationError) as refused:
            store.read()
        assert "secret-token" not in str(refused.value)
    file.unlink()
    file.symlink_to(target)
    with pytest.raises(cloister.ConfigurationError):
        store.read()


def test_an_os_keyring_keeps_the_token_where_there_is_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets: dict[tuple[str, str], str] = {}
    keyring, fail = types.ModuleType("keyring"), types.ModuleType("keyring.backends.fail")
    fail.Keyring = type("Keyring", (), {})  # type: ignore[attr-defined]  # as the package has it
    vars(keyring).update(
        get_keyring=object,
        set_password=lambda service, name, value: secrets.__setitem__((service, name), value),
        get_password=lambda service, name: secrets.get((service, name)),
        delete_password=lambda service, name: secrets.pop((service, name)),
    )
    for name, module in (
        ("keyring", keyring),
        ("keyring.backends", types.ModuleType("keyring.backends")),
        ("keyring.backends.fail", fail),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    store, profile = ProfileStore(home, "default"), Profile("https://named.example", "c", SecretStr("secret-token"))
    store.write(profile)
    assert "secret-token" not in (home / "default.json").read_text() and list(secrets.values()) == ["secret-token"]
    assert store.read() == profile
    store.remove()
    assert secrets == {} and store.read() is None
    store.write(profile)
    secrets.clear()
    with pytest.raises(cloister.ConfigurationError, match="cloister login"):
        store.read()

    def locked(*_: object) -> None:
        raise RuntimeError("the keyring is locked")

    keyring.set_password = locked  # type: ignore[attr-defined]
    store.write(profile)
    assert kept(home)["kept_in"] == "file" and store.read() == profile
