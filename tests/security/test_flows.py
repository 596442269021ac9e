"""What a person allows an app, by a code in a browser or on a device: good once, for one app, and ended wherever there is a copy."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient

from asked import asked_writing
from cloister_server import tenants
from cloister_server.errors import Invalid, Unauthenticated
from cloister_server.oauth import passphrases, redirects, verifier
from cloister_server.oauth.verifier import authenticate
from cloister_server.service import Service
from cloister_server.store.identities import Authorization, Login
from cloister_server.store.session import reading
from cloister_server.store.tables import AuditRow, now
from keys_of_clients import Signer
from people import REDIRECT, Human, Pkce, exchanged, forms, invited, refreshed, request, told

DEVICE = "urn:ietf:params:oauth:grant-type:device_code"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passphrases, "MEMORY_KIB", 64)


@pytest.fixture
def ada(service: Service, http: TestClient) -> Human:
    return invited(service, http, "ada").enrol()


@pytest.fixture
def app(make_client: Callable[..., Any]) -> Any:
    return make_client(
        role="none", public=True, redirect_uris=[REDIRECT, "https://app.example/back?x=1", "com.example.app:/back"]
    )


def claims_of(token: str) -> dict[str, Any]:
    body = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return claims


def sources(http: TestClient, token: str) -> int:
    return int(http.get("/v1/sources", headers={"Authorization": f"Bearer {token}"}).status_code)


def moved(service: Service, **ago: float) -> None:
    """Let everything that was asked for have been so much earlier."""
    with asked_writing(service) as session:
        for row in session.scalars(select(Authorization)):
            row.until -= timedelta(**ago)
            row.polled = None if row.polled is None else row.polled - timedelta(**ago)


def test_a_code_gets_tokens_that_say_who_and_by_which_app(
    http: TestClient, service: Service, ada: Human, app: Any
) -> None:
    pkce = Pkce()
    back = ada.authorize(app, pkce)
    assert back["state"] == "a state" and back["iss"] == service.settings.issuer
    answer = exchanged(http, app, pkce, back["code"])
    tokens = answer.json()
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    assert tokens["token_type"] == "Bearer" and tokens["expires_in"] <= 600
    claims = claims_of(tokens["access_token"])
    assert (claims["sub"], claims["client_id"], claims["tenant"]) == (ada.id, app.id, app.tenant_id)
    assert claims["iss"] == claims["aud"] == service.settings.issuer
    assert sources(http, tokens["access_token"]) == 200
    with reading(service.engine) as session:
        row = session.scalars(select(AuditRow).where(AuditRow.verb == "login.begin")).one()
    assert (row.principal_id, row.resource_id, row.outcome) == (ada.id, app.id, "allowed") and row.request_id


def test_what_an_api_can_read_in_a_token_ends_and_refreshes_nothing(
    http: TestClient, service: Service, ada: Human, app: Any
) -> None:
    pkce = Pkce()
    tokens = exchanged(http, app, pkce, ada.authorize(app, pkce)["code"]).json()
    claims = claims_of(tokens["access_token"])
    handle = tokens["refresh_token"].split(".")[0].removeprefix("clr_")
    with reading(service.engine) as session:
        login = session.scalars(select(Login)).one()
    assert claims["sid"] == login.id and handle == login.handle and handle not in json.dumps(claims)
    for guess in (
        claims["sid"],
        f"clr_{claims['sid'].removeprefix('lg_')}.1.{'0' * 64}",
        f"clr_{handle}.1.{'0' * 64}",
        f"clr_{handle}.0.{tokens['refresh_token'].split('.')[2]}",
        f"clr_{handle}.2.{tokens['refresh_token'].split('.')[2]}",
        tokens["refresh_token"].upper(),
        tokens["refresh_token"] + " ",
    ):
        assert refreshed(http, app.id, guess).json()["error"] == "invalid_grant", guess
        http.post("/oauth/revoke", data={"client_id": app.id, "token": guess})
    assert sources(http, tokens["access_token"]) == 200
    assert refreshed(http, app.id, tokens["refresh_token"]).status_code == 200


def test_a_refresh_token_is_good_once_and_a_copy_ends_the_login(
    http: TestClient, service: Service, second_process: Service, ada: Human, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pkce = Pkce()
    first = exchanged(http, app, pkce, ada.authorize(app, pkce)["code"]).json()
    second = refreshed(http, app.id, first["refresh_token"]).json()
    third = refreshed(http, app.id, second["refresh_token"]).json()
    assert len({each["refresh_token"] for each in (first, second, third)}) == 3
    assert all(sources(http, each["access_token"]) == 200 for each in (first, second, third))
    given = [(b"authorization", f"Bearer {third['access_token']}".encode())]
    assert authenticate(second_process, given, method="GET", path="/v1/sources").id == ada.id
    assert refreshed(http, app.id, first["refresh_token"]).json()["error"] == "invalid_grant"
    assert refreshed(http, app.id, third["refresh_token"]).json()["error"] == "invalid_grant"
    assert [sources(http, each["access_token"]) for each in (first, second, third)] == [401] * 3
    later = time.monotonic() + 1.01
    monkeypatch.setattr(verifier, "monotonic", lambda: later)
    with pytest.raises(Unauthenticated):
        authenticate(second_process, given, method="GET", path="/v1/sources")


def test_a_code_that_is_shown_again_ends_what_it_had_begun(http: TestClient, ada: Human, app: Any) -> None:
    pkce = Pkce()
    code = ada.authorize(app, pkce)["code"]
    tokens = exchanged(http, app, pkce, code).json()
    assert sources(http, tokens["access_token"]) == 200
    assert exchanged(http, app, pkce, code).json()["error"] == "invalid_grant"
    assert sources(http, tokens["access_token"]) == 401
    assert refreshed(http, app.id, tokens["refresh_token"]).json()["error"] == "invalid_grant"


def test_revoking_a_refresh_token_ends_the_login_and_is_its_own_clients_alone(
    http: TestClient, ada: Human, app: Any, make_client: Callable[..., Any]
) -> None:
    other, steward, pkce = make_client(role="none", public=True), make_client(), Pkce()
    tokens = exchanged(http, app, pkce, ada.authorize(app, pkce)["code"]).json()
    told_to_steward = http.post(
        "/oauth/introspect", data={"token": tokens["access_token"]}, auth=(steward.id, steward.secret)
    )
    assert told_to_steward.json()["sub"] == ada.id and told_to_steward.json()["client_id"] == app.id
    foreign = http.post("/oauth/introspect", data={"token": tokens["refresh_token"]}, auth=(steward.id, steward.secret))
    assert foreign.json() == {"active": False}
    by_public = http.post("/oauth/introspect", data={"token": tokens["access_token"], "client_id": app.id})
    assert by_public.status_code == 401
    for token in (tokens["refresh_token"], tokens["access_token"]):
        assert http.post("/oauth/revoke", data={"token": token, "client_id": other.id}).status_code == 200
    assert sources(http, tokens["access_token"]) == 200
    assert http.post("/oauth/revoke", data={"token": tokens["access_token"], "client_id": app.id}).status_code == 200
    assert sources(http, tokens["access_token"]) == 401
    again = refreshed(http, app.id, tokens["refresh_token"]).json()
    assert http.post("/oauth/revoke", data={"token": again["refresh_token"], "client_id": app.id}).status_code == 200
    assert sources(http, again["access_token"]) == 401
    assert refreshed(http, app.id, again["refresh_token"]).json()["error"] == "invalid_grant"


def test_a_login_ends_with_its_client_and_by_itself(http: TestClient, service: Service, ada: Human, app: Any) -> None:
    pkce = Pkce()
    tokens = exchanged(http, app, pkce, ada.authorize(app, pkce)["code"]).json()
    with asked_writing(service) as session:
        session.execute(update(Login).values(until=now()))
    assert refreshed(http, app.id, tokens["refresh_token"]).json()["error"] == "invalid_grant"
    with asked_writing(service) as session:
        session.execute(update(Login).values(until=now() + timedelta(days=1), created=now() - timedelta(days=90)))
    tokens = refreshed(http, app.id, tokens["refresh_token"]).json()
    with reading(service.engine) as session:
        assert session.scalars(select(Login.until)).one() <= now(), "ninety days, however often it is refreshed"
    tokens = exchanged(http, app, pkce, ada.authorize(app, pkce)["code"]).json()
    bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
    assert http.get("/v1/whoami", headers=bearer).status_code == 200
    with asked_writing(service) as session:
        operator = tenants.operator_of(tenants.find_tenant(session, "acme"), request_id="request-of-a-test")
        tenants.remove_client(session, service, operator, app.id)
    assert http.get("/v1/whoami", headers=bearer).status_code == 401
    assert refreshed(http, app.id, tokens["refresh_token"]).status_code == 401
    with reading(service.engine) as session:
        assert session.scalars(select(Login)).all() == []


@pytest.mark.parametrize("is_public", [True, False])
def test_refresh_tokens_of_a_public_client_are_bound_to_its_key(
    http: TestClient, service: Service, ada: Human, make_client: Callable[..., Any], is_public: bool
) -> None:
    role: dict[str, Any] = {"role": "none", "public": True} if is_public else {}
    client = make_client(**role, dpop=True, redirect_uris=[REDIRECT])
    mine, others, pkce = Signer(), Signer(), Pkce()
    url = f"{service.settings.issuer}/oauth/token"
    auth: dict[str, Any] = {} if is_public else {"auth": (client.id, client.secret)}

    def asks(signer: Signer | None, form: dict[str, str]) -> Any:
        headers = {} if signer is None else {"DPoP": signer.proof("POST", url)}
        return http.post("/oauth/token", data={"client_id": client.id} | form, headers=headers, **auth)

    code = {
        "grant_type": "authorization_code",
        "code": ada.authorize(client, pkce, dpop_jkt=mine.thumbprint)["code"],
        "redirect_uri": REDIRECT,
        "code_verifier": pkce.verifier,
    }
    assert asks(None, code).json()["error"] == "invalid_dpop_proof"
    assert asks(others, code).json()["error"] == "invalid_grant"
    tokens = asks(mine, code).json()
    assert tokens["token_type"] == "DPoP" and claims_of(tokens["access_token"])["cnf"] == {"jkt": mine.thumbprint}
    assert sources(http, tokens["access_token"]) == 401, "as Bearer"
    form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
    assert asks(None, form).json()["error"] == "invalid_dpop_proof"
    with_others = asks(others, form)
    if is_public:
        assert with_others.json()["error"] == "invalid_grant"
        with_others = asks(mine, form)
    assert with_others.status_code == 200, "a client with a secret may change its key"


def test_a_loopback_address_has_any_port_and_no_other_address_has(http: TestClient, ada: Human, app: Any) -> None:
    pkce = Pkce()
    for uri in ("http://127.0.0.1:51234/callback", "http://127.0.0.1/callback", "com.example.app:/back"):
        code = ada.authorize(app, pkce, uri)["code"]
        assert exchanged(http, app, pkce, code).status_code == (200 if uri == REDIRECT else 400)
        assert exchanged(http, app, pkce, ada.authorize(app, pkce, uri)["code"], uri).status_code == 200
    back = ada.send(
        "consent",
        forms(ada.asked(**request(app, pkce, "https://app.example/back?x=1")).text)["consent"] | {"decision": "allow"},
    )
    assert back.headers["location"].startswith("https://app.example/back?x=1&code=")


@pytest.mark.parametrize(
    "uri",
    [
        "http://app.example/", "http://localhost/", "http://127.0.0.1.evil.example/", "http://10.0.0.1/", "https://", "https:///x",
        "javascript:alert(1)", "data:text/html,x", "myapp:/back", "https://a@b.example/", "https://a.example/#x", "https://*.example/",
        "https://a.example/ x", "https://a.example/\n", "//a.example/", "/back", "", "https://a.example\\@b", "ftp://a.example/",
        "https://a.example/" + "x" * 2100, "file:///etc/passwd", "https://a.example:99999999/", "com.example.app://host/x", "https://é.example/",
        "https://a.example/;x", "about:blank", "https://a.example/'",
    ],
)  # fmt: skip
def test_an_address_that_could_be_somebody_elses_is_not_registered(uri: str) -> None:
    with pytest.raises(Invalid):
        redirects.checked([uri])


NOWHERE: dict[str, dict[str, str]] = {
    "no client": {"client_id": ""},
    "an unknown client": {"client_id": "ap_" + "0" * 32},
    "a client of noise": {"client_id": "'"},
    "the client of the command line": {"client_id": "cloister-cli"},
    "no redirect_uri": {"redirect_uri": ""},
    "another": {"redirect_uri": "https://evil.example/"},
    "more path": {"redirect_uri": REDIRECT + "/more"},
    "a query more": {"redirect_uri": REDIRECT + "?x"},
    "a fragment": {"redirect_uri": REDIRECT + "#x"},
    "in capitals": {"redirect_uri": "http://127.0.0.1/CALLBACK"},
    "another loopback": {"redirect_uri": "http://[::1]/callback"},
    "localhost": {"redirect_uri": "http://localhost/callback"},
    "a user": {"redirect_uri": "http://127.0.0.1@evil.example/callback"},
    "a user with a port": {"redirect_uri": "http://127.0.0.1:1@evil.example/callback"},
    "a longer host": {"redirect_uri": "http://127.0.0.1.evil.example/callback"},
    "a port of https": {"redirect_uri": "https://app.example:444/back?x=1"},
    "another query": {"redirect_uri": "https://app.example/back?x=2"},
    "a path up": {"redirect_uri": "http://127.0.0.1/x/../callback"},
    "encoded": {"redirect_uri": "http://127.0.0.1/c%61llback"},
    "a newline": {"redirect_uri": REDIRECT + "\r\nSet-Cookie: x=1"},
    "an endless state": {"state": "x" * 1100},
    "a state not of ascii": {"state": "ä"},
}
"""RFC 6749, 4.1.2.1, and RFC 9700, 4.1: requests after which nobody is taken anywhere."""

REDIRECTED: dict[str, tuple[dict[str, str], str]] = {
    "no response type": ({"response_type": ""}, "invalid_request"),
    "implicit (RFC 9700, 2.1.2)": ({"response_type": "token"}, "unsupported_response_type"),
    "hybrid": ({"response_type": "code token"}, "unsupported_response_type"),
    "an id token": ({"response_type": "code id_token"}, "unsupported_response_type"),
    "a quote": ({"response_type": '"code"'}, "unsupported_response_type"),
    "not of ascii": ({"response_type": "códe"}, "unsupported_response_type"),
    "no challenge (RFC 9700, 2.1.1)": ({"code_challenge": "", "code_challenge_method": ""}, "invalid_request"),
    "no method": ({"code_challenge_method": ""}, "invalid_request"),
    "no challenge, but its method": ({"code_challenge": ""}, "invalid_request"),
    "plain (RFC 7636, 7.2)": ({"code_challenge_method": "plain"}, "invalid_request"),
    "s256 in small letters": ({"code_challenge_method": "s256"}, "invalid_request"),
    "a short challenge": ({"code_challenge": "a" * 42}, "invalid_request"),
    "a long challenge": ({"code_challenge": "a" * 44}, "invalid_request"),
    "a padded challenge": ({"code_challenge": "a" * 43 + "="}, "invalid_request"),
    "a challenge of other letters": ({"code_challenge": "+" * 43}, "invalid_request"),
    "a scope": ({"scope": "admin"}, "invalid_scope"),
    "a request object": ({"request": "a.b.c"}, "request_not_supported"),
    "a request by reference": ({"request_uri": "https://evil.example/"}, "request_uri_not_supported"),
    "a fragment answer": ({"response_mode": "fragment"}, "invalid_request"),
    "a posted answer": ({"response_mode": "form_post"}, "invalid_request"),
    "another resource": ({"resource": "https://other.example"}, "invalid_target"),
    "a thumbprint of noise": ({"dpop_jkt": "x"}, "invalid_request"),
}


def test_no_request_that_is_not_right_gets_a_code(http: TestClient, service: Service, ada: Human, app: Any) -> None:
    ada.authorize(app, Pkce())  # from here on somebody is signed in
    for name, wrong in NOWHERE.items():
        answer = http.get(
            "/oauth/authorize",
            params=request(app, Pkce()) | wrong if all(wrong.values()) else request(app, Pkce(), **wrong),
            follow_redirects=False,
        )
        assert answer.status_code == 400 and "location" not in answer.headers, name
        assert forms(answer.text) == {} and "evil.example" not in answer.text, name
    for name, (wrong, error) in REDIRECTED.items():
        answer = http.get("/oauth/authorize", params=request(app, Pkce(), **wrong), follow_redirects=False)
        assert answer.status_code == 303 and answer.headers["location"].startswith(REDIRECT + "?"), (name, answer.text)
        back = told(answer)
        assert (back["error"], back["state"], back["iss"]) == (error, "a state", service.settings.issuer), name
        assert "code" not in back, name
    right = "&".join(f"{k}={v}" for k, v in request(app, Pkce(), state="x").items()).replace("://", "%3A%2F%2F")
    for more in ("&state=y", "&client_id=x", "&x=1&x=1", "&x=%ff", "&novalue"):
        answer = http.get(f"/oauth/authorize?{right}{more}", follow_redirects=False)
        assert answer.status_code == 400 and "location" not in answer.headers, more
    assert http.get("/oauth/authorize", follow_redirects=False).status_code == 400
    assert http.post("/oauth/authorize", data=request(app, Pkce())).status_code == 405


CODES: dict[str, tuple[dict[str, str], str]] = {
    "no code": ({"code": ""}, "invalid_request"),
    "no verifier (RFC 9700, 2.1.1)": ({"code_verifier": ""}, "invalid_request"),
    "no redirect_uri": ({"redirect_uri": ""}, "invalid_request"),
    "another verifier": ({"code_verifier": "b" * 43}, "invalid_grant"),
    "the challenge for a verifier": ({"code_verifier": "<challenge>"}, "invalid_grant"),
    "a short verifier": ({"code_verifier": "a"}, "invalid_grant"),
    "a long verifier": ({"code_verifier": "a" * 129}, "invalid_grant"),
    "a verifier of other letters": ({"code_verifier": "ä" * 43}, "invalid_grant"),
    "another redirect_uri": ({"redirect_uri": "https://app.example/back?x=1"}, "invalid_grant"),
    "another port": ({"redirect_uri": "http://127.0.0.1:1/callback"}, "invalid_grant"),
    "a code of noise": ({"code": "x"}, "invalid_grant"),
    "a code with more": ({"code": "<code>0"}, "invalid_grant"),
    "a code of nobody": ({"code": "cla_" + "0" * 64}, "invalid_grant"),
    "another client's": ({"client_id": "<other>"}, "invalid_grant"),
    "a scope": ({"scope": "admin"}, "invalid_scope"),
    "another resource": ({"resource": "https://other.example"}, "invalid_target"),
    "a code as a refresh token": ({"grant_type": "refresh_token", "refresh_token": "<code>"}, "invalid_grant"),
    "a code as a device code": ({"grant_type": DEVICE, "device_code": "<code>"}, "invalid_grant"),
    "no refresh token": ({"grant_type": "refresh_token"}, "invalid_request"),
    "no device code": ({"grant_type": DEVICE}, "invalid_request"),
    "an access token for a refresh token": ({"grant_type": "refresh_token", "refresh_token": "a.b.c"}, "invalid_grant"),
    "client_credentials of a public client": ({"grant_type": "client_credentials"}, "unauthorized_client"),
    "a passphrase (RFC 9700, 2.4)": (
        {"grant_type": "password", "username": "ada", "password": "x"},
        "unsupported_grant_type",
    ),
    "an unknown client": ({"client_id": "ap_" + "0" * 32}, "invalid_client"),
    "no client": ({"client_id": ""}, "invalid_client"),
    "a secret of a client that has none": ({"client_secret": "cls_" + "0" * 72}, "invalid_client"),
}


def test_no_code_is_taken_that_is_not_right_in_all(
    http: TestClient, ada: Human, app: Any, make_client: Callable[..., Any]
) -> None:
    pkce, other = Pkce(), make_client(role="none", public=True, redirect_uris=[REDIRECT])
    code = ada.authorize(app, pkce)["code"]
    for name, (wrong, error) in CODES.items():
        meant = {"<code>": code, "<code>0": f"{code}0", "<other>": other.id, "<challenge>": pkce.challenge}
        filled = {field: meant.get(value, value) for field, value in wrong.items()}
        answer = exchanged(http, app, pkce, **({"code": code} | filled))
        assert answer.status_code in (400, 401) and answer.json()["error"] == error, (name, answer.text)
        assert "access_token" not in answer.text and code not in answer.text, name
    assert exchanged(http, app, pkce, code).status_code == 200, "and after all that it is still good"


def test_a_code_is_good_for_a_minute(http: TestClient, service: Service, ada: Human, app: Any) -> None:
    pkce = Pkce()
    code = ada.authorize(app, pkce)["code"]
    moved(service, seconds=61)
    assert exchanged(http, app, pkce, code).json()["error"] == "invalid_grant"


def test_an_app_of_another_tenant_gets_nothing(http: TestClient, ada: Human, make_client: Callable[..., Any]) -> None:
    foreign, pkce = make_client("stranger", role="none", public=True, redirect_uris=[REDIRECT]), Pkce()
    assert ada.authorize(foreign, pkce)["error"] == "access_denied"
    device = asked_by_device(http, foreign.id).json()
    page = signed_in_for_device(ada, device)
    shown = ada.send("device", forms(page.text)["device"])
    assert shown.status_code == 400 and "No device waits" in shown.text


def test_a_person_may_refuse(http: TestClient, service: Service, ada: Human, app: Any) -> None:
    back = ada.decide(ada.asked(**request(app, Pkce())), "deny")
    assert back["error"] == "access_denied" and back["iss"] == service.settings.issuer and "code" not in back
    for odd in ("", "ALLOW", "yes"):
        assert ada.decide(ada.asked(**request(app, Pkce())), odd)["error"] == "access_denied"


def asked_by_device(http: TestClient, client_id: str = "cloister-cli", **more: str) -> Any:
    return http.post("/oauth/device_authorization", data={"client_id": client_id, **more})


def polled(http: TestClient, code: str, client_id: str = "cloister-cli") -> Any:
    return http.post("/oauth/token", data={"grant_type": DEVICE, "client_id": client_id, "device_code": code})


def signed_in_for_device(human: Human, device: dict[str, Any]) -> Any:
    page = human.http.get("/oauth/device", params={"user_code": device["user_code"]})
    if "sign-in" not in forms(page.text):
        return page
    signed_in = human.sign_in(page)
    assert signed_in.status_code == 303 and signed_in.headers["location"].endswith(
        f"/oauth/device?user_code={device['user_code']}"
    )
    return human.http.get("/oauth/device", params={"user_code": device["user_code"]})


def decided(human: Human, device: dict[str, Any], decision: str) -> Any:
    shown = human.send("device", forms(signed_in_for_device(human, device).text)["device"])
    assert device["user_code"] in shown.text, shown.text
    return human.send("device", forms(shown.text)["device"] | {"decision": decision})


def test_a_device_gets_tokens_when_a_person_has_allowed_it(http: TestClient, service: Service, ada: Human) -> None:
    asked = asked_by_device(http)
    device = asked.json()
    assert device["verification_uri"] == f"{service.settings.issuer}/oauth/device" and device["interval"] == 5
    assert re.fullmatch("[BCDFGHJKLMNPQRSTVWXZ]{4}-[BCDFGHJKLMNPQRSTVWXZ]{4}", device["user_code"])
    assert polled(http, device["device_code"]).json()["error"] == "authorization_pending"
    moved(service, seconds=-30)  # as if it had been asked half a minute later, and so too soon now
    assert polled(http, device["device_code"]).json()["error"] == "slow_down"
    assert decided(ada, device, "allow").status_code == 200
    moved(service, seconds=60)
    tokens = polled(http, device["device_code"]).json()
    assert (
        claims_of(tokens["access_token"])["client_id"] == "cloister-cli"
        and sources(http, tokens["access_token"]) == 200
    )
    tokens = refreshed(http, "cloister-cli", tokens["refresh_token"]).json()
    moved(service, seconds=20)
    assert polled(http, device["device_code"]).json()["error"] == "invalid_grant", "once"
    assert sources(http, tokens["access_token"]) == 401, "a copy of the code ends what it began"


def test_a_device_that_is_refused_or_forgotten_gets_nothing(
    http: TestClient, service: Service, ada: Human, make_client: Callable[..., Any]
) -> None:
    other = make_client(role="none", public=True)
    device = asked_by_device(http).json()
    for wrong in ("cld_" + "0" * 64, "x", device["user_code"], device["device_code"] + "0"):
        assert polled(http, wrong).json()["error"] == "invalid_grant"
    assert polled(http, device["device_code"], other.id).json()["error"] == "invalid_grant", "another client's"
    assert decided(ada, device, "deny").status_code == 200
    assert polled(http, device["device_code"]).json()["error"] == "access_denied"
    again = ada.send("device", forms(http.get("/oauth/device").text)["device"] | {"user_code": device["user_code"]})
    assert again.status_code == 400, "nothing is left to decide"
    late = asked_by_device(http).json()
    moved(service, minutes=11)
    assert polled(http, late["device_code"]).json()["error"] == "expired_token"
    answer = ada.send("device", forms(http.get("/oauth/device").text)["device"] | {"user_code": late["user_code"]})
    assert answer.status_code == 400
    assert asked_by_device(http, scope="admin").json()["error"] == "invalid_scope"
    assert asked_by_device(http, "ap_" + "0" * 32).json()["error"] == "invalid_client"
    assert http.post("/oauth/device_authorization?client_id=cloister-cli").json()["error"] == "invalid_request"
    assert asked_by_device(http, client_secret="x").json()["error"] == "invalid_client"


def test_codes_of_devices_are_not_guessed_and_not_hoarded(
    http: TestClient, ada: Human, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister_server.oauth.sign_in._FIRST_DELAY_S", 600.0)
    page = signed_in_for_device(ada, {"user_code": "BBBB-BBBB"})
    statuses = [ada.send("device", forms(page.text)["device"]).status_code for _ in range(5)]
    assert statuses == [400, 400, 400, 429, 429]
    answers = [asked_by_device(http) for _ in range(22)]
    assert [each.status_code for each in answers] == [200] * 20 + [429] * 2
    assert answers[-1].json()["error"] == "slow_down" and answers[-1].headers["retry-after"]


def test_a_form_is_taken_from_our_own_page_in_the_same_browser_alone(
    http: TestClient, service: Service, ada: Human, app: Any
) -> None:
    page = ada.asked(**request(app, Pkce()))
    consent = forms(page.text)["consent"] | {"decision": "allow"}
    mine = http.cookies.get("cloister")
    wrong: dict[str, Any] = {
        "from another site": {"headers": {"Origin": "https://evil.example"}},
        "from nowhere": {"headers": {"Origin": "null"}},
        "told by the browser": {"headers": {"Sec-Fetch-Site": "cross-site"}},
        "another port": {"headers": {"Origin": "http://127.0.0.1:1"}},
    }
    for name, more in wrong.items():
        answer = ada.send("consent", consent, **more)
        assert answer.status_code == 403 and "location" not in answer.headers, name
    for name, token in {"none": "", "noise": "x", "another": "0" * 64, "not of ascii": "ä" * 32}.items():
        answer = ada.send("consent", {**consent, "form_token": token})
        assert answer.status_code == 403 and "location" not in answer.headers, name
    for body, kind in (
        (b"a=1&a=2", None),
        (b"{}", "application/json"),
        (b"\xff=1", None),
        (b"", None),
        (b"a" * 9000, None),
    ):
        headers = {"Content-Type": kind or "application/x-www-form-urlencoded"}
        for action in ("consent", "device", "invitation", "sign-in", "sign-out"):
            answer = http.post(f"/oauth/{action}", content=body, headers=headers, follow_redirects=False)
            assert answer.status_code in (400, 403) and "location" not in answer.headers, (action, body)
    for following in (
        "",
        "https://evil.example/",
        "//evil.example",
        "/oauth/authorize",
        "/v1/sources",
        "/oauth/device?x=1",
        "/oauth/device\n",
    ):
        fields = {
            "form_token": consent["form_token"],
            "following": following,
            "account": ada.account,
            "passphrase": "x",
            "code": "1",
        }
        assert ada.send("sign-in", fields).status_code == 400, following
    http.cookies.clear()
    assert ada.send("consent", consent).status_code == 403, "the form of another browser"
    http.cookies.set("cloister", "0" * 64)
    assert ada.send("consent", consent).status_code == 403
    http.cookies.clear()
    http.cookies.set("cloister", str(mine))
    answer = ada.send("consent", consent, headers={"Origin": service.settings.issuer, "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 303


def test_signing_in_changes_the_cookie_and_signing_out_ends_it(http: TestClient, ada: Human, app: Any) -> None:
    page = http.get("/oauth/authorize", params=request(app, Pkce()))
    before = http.cookies.get("cloister")
    signed_in = ada.sign_in(page)
    after = http.cookies.get("cloister")
    assert before and after and before != after
    attributes = signed_in.headers["set-cookie"].lower()
    assert "httponly" in attributes and "samesite=lax" in attributes and "path=/" in attributes
    consent = http.get("/oauth/authorize", params=request(app, Pkce()))
    assert ada.account in consent.text
    assert ada.send("sign-out", forms(consent.text)["sign-out"]).status_code == 200
    assert "sign-in" in forms(http.get("/oauth/authorize", params=request(app, Pkce())).text)


def test_pages_have_no_script_and_say_so(http: TestClient, ada: Human, app: Any) -> None:
    name = '<script>alert("x")</script>'
    page = http.get("/oauth/authorize", params=request(app, Pkce()))
    refused = ada.sign_in(page, account=name, passphrase="x")
    consent = ada.asked(**request(app, Pkce(), "https://app.example/back?x=1"))
    for each in (
        page,
        refused,
        consent,
        http.get("/oauth/invitation"),
        http.get("/oauth/device"),
        http.get("/oauth/authorize"),
    ):
        policy = each.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "script" not in policy
        assert each.headers["referrer-policy"] == "same-origin" and each.headers["cache-control"] == "no-store"
        assert each.headers["content-type"] == "text/html; charset=utf-8" and "<script" not in each.text
        assert '<html lang="en">' in each.text and each.text.count("<h1>") == 1
        assert each.text.count("<label ") == len(re.findall('<input id="', each.text)), "every field has its label"
    assert "form-action 'self' https://app.example;" in consent.headers["content-security-policy"]
    assert "&lt;script&gt;" in refused.text and 'role="alert"' in refused.text
    api = http.get("/healthz")
    assert (
        api.headers["content-security-policy"].startswith("default-src 'none'; frame")
        and api.headers["referrer-policy"] == "no-referrer"
    )


def test_with_tls_the_cookie_is_this_hosts_alone(service: Service) -> None:
    from cloister_server.app import create_app

    secure = Service(
        service.settings.model_copy(update={"issuer": "https://cloister.example"}),
        service.engine,
        service.keys,
        service.blobs,
    )
    with TestClient(create_app(secure), base_url="https://cloister.example") as http:
        cookie = http.get("/oauth/device").headers["set-cookie"]
    assert (
        cookie.startswith("__Host-cloister=")
        and "; Secure" in cookie
        and "; Path=/" in cookie
        and "domain" not in cookie.lower()
    )
