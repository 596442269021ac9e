"""Tokens: who gets one, what one says, and whose is believed."""

from __future__ import annotations

import base64
import hmac
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey
from sqlalchemy import delete, event
from starlette.testclient import TestClient

from asked import asked_reading
from cloister_server import vault
from cloister_server.errors import Unauthenticated
from cloister_server.oauth import access_tokens, client_secrets, verifier
from cloister_server.oauth.verifier import authenticate
from cloister_server.service import Service
from cloister_server.store.session import writing
from cloister_server.store.tables import App

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
GRANT = b"grant_type=client_credentials"


def basic(client_id: str, secret: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{client_id}:{secret}".encode()).decode()}


def claims_of(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    head, body, _ = token.split(".")
    return tuple(json.loads(base64.urlsafe_b64decode(part + "==")) for part in (head, body))  # type: ignore[return-value]


def sign(service: Service, claims: dict[str, Any], header: dict[str, Any] | None = None) -> str:
    """A token that our own key signed, so that nothing but what it says can refuse it."""
    with asked_reading(service) as session:
        key = vault.signing_key(session, service.keys, "token")
    return jwt.encode(
        {"alg": "ES256", "typ": "at+jwt", "kid": key.id, **(header or {})}, claims, ECKey.import_key(key.secret)
    )


def _joined(*parts: dict[str, Any]) -> str:
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts)


def good_claims(service: Service, client: Any) -> dict[str, Any]:
    at, issuer = int(time.time()), service.settings.issuer
    return {
        "iss": issuer,
        "aud": issuer,
        "sub": client.id,
        "client_id": client.id,
        "iat": at,
        "exp": at + 60,
        "jti": "x",
    }


def ask(service: Service, token: str) -> Any:
    headers = [(b"authorization", f"Bearer {token}".encode()), (b"x-request-id", b"request-1")]
    return authenticate(service, headers, method="GET", path="/v1/sources")


def test_a_token_is_rfc_9068_and_short_lived(http: TestClient, service: Service, steward: Any) -> None:
    answer = http.post("/oauth/token", data={"grant_type": "client_credentials"}, auth=(steward.id, steward.secret))
    assert answer.status_code == 200
    assert answer.json()["token_type"] == "Bearer" and answer.json()["expires_in"] <= 600
    assert answer.headers["cache-control"] == "no-store"
    header, claims = claims_of(answer.json()["access_token"])
    keys = http.get("/.well-known/jwks.json").json()["keys"]
    assert len(keys) == 2, "the one that signs, and the one that will"
    assert header == {"alg": "ES256", "typ": "at+jwt", "kid": keys[0]["kid"]}
    assert "d" not in keys[0]
    assert claims["iss"] == claims["aud"] == service.settings.issuer
    assert claims["sub"] == claims["client_id"] == steward.id
    assert claims["tenant"] == steward.tenant_id and claims["jti"]
    assert 0 < claims["exp"] - claims["iat"] <= 600


def test_the_secret_may_come_in_the_form_too(http: TestClient, steward: Any) -> None:
    form = {"grant_type": "client_credentials", "client_id": steward.id, "client_secret": steward.secret}
    assert http.post("/oauth/token", data=form).status_code == 200


def test_nobody_learns_which_clients_exist(http: TestClient, steward: Any) -> None:
    other = client_secrets.new_secret().get_secret_value()
    asked = [
        basic(steward.id, other),  # a wrong secret
        basic("ap_" + "0" * 32, other),  # an unknown client
        basic(steward.id, "cls_garbage"),
        basic("nobody", "nothing"),
        {"Authorization": "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode()},  # not UTF-8
        {"Authorization": "Basic %%%"},
        {"Authorization": "Digest x"},
        {},
    ]
    answers = [http.post("/oauth/token", content=GRANT, headers=FORM | each) for each in asked]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["error"] == "invalid_client"
    assert all(answer.headers["www-authenticate"].startswith("Basic") for answer in answers)


def test_garbage_is_refused_before_any_database_read(http: TestClient, service: Service, steward: Any) -> None:
    seen: list[str] = []
    event.listen(service.engine, "before_cursor_execute", lambda c, cu, statement, *_: seen.append(statement))
    http.post("/oauth/token", content=GRANT, headers=FORM | basic(steward.id, "cls_" + "0" * 72))
    assert seen == []
    http.post("/oauth/token", content=GRANT, headers=FORM | basic(steward.id, steward.secret))
    assert seen


@pytest.mark.shared
@pytest.mark.parametrize(
    ("body", "headers", "query"),
    [
        (GRANT + b"&grant_type=client_credentials", FORM, ""),
        (GRANT, FORM, "?grant_type=client_credentials"),
        (b'{"grant_type": "client_credentials"}', {"Content-Type": "application/json"}, ""),
        (GRANT + b"&client_secret=x", FORM, ""),
        (GRANT + b"&client_assertion=x", FORM, ""),
        (GRANT + b"&client_id=somebody-else", FORM, ""),
        (GRANT + b"&x=%ff", FORM, ""),
        (GRANT + "&x=ä".encode(), FORM, ""),
        (GRANT + b"".join(b"&x%d=1" % each for each in range(20)), FORM, ""),
        (GRANT, {"Content-Type": "application/x-www-form-urlencoded; charset=latin-1"}, ""),
    ],
    ids=[
        "twice",
        "query",
        "json",
        "two-ways",
        "assertion",
        "two-clients",
        "not-utf8",
        "raw-bytes",
        "fields",
        "charset",
    ],
)
def test_what_authlib_would_let_pass_is_refused(
    http: TestClient, steward: Any, body: bytes, headers: dict[str, str], query: str
) -> None:
    answer = http.post(f"/oauth/token{query}", content=body, headers=headers | basic(steward.id, steward.secret))
    assert answer.status_code == 400 and answer.json()["error"] == "invalid_request", answer.text


@pytest.mark.shared
@pytest.mark.parametrize(
    ("form", "error"),
    [
        ({"grant_type": "password", "username": "a", "password": "b"}, "unsupported_grant_type"),
        ({}, "invalid_request"),
        ({"grant_type": "client_credentials", "scope": "everything"}, "invalid_scope"),
    ],
)
def test_other_grants_and_scopes_are_refused_and_never_narrowed(
    http: TestClient, steward: Any, form: dict[str, str], error: str
) -> None:
    answer = http.post("/oauth/token", data=form, headers=FORM, auth=(steward.id, steward.secret))
    assert answer.status_code == 400 and answer.json()["error"] == error


def test_a_token_is_asked_for_by_post_alone(http: TestClient) -> None:
    assert http.get("/oauth/token").status_code == 405


@pytest.mark.shared
@pytest.mark.parametrize(
    "change",
    [
        {"iss": "https://elsewhere"},
        {"aud": "https://elsewhere"},
        {"sub": "ap_" + "0" * 32},
        {"exp": int(time.time()) - 1},
        {"exp": int(time.time()) + 1_000_000},
        {"exp": "tomorrow"},
        {"exp": True},
        {"iat": int(time.time()) + 1_000_000},  # beyond any run: this is read when the tests are collected
        {"client_id": 7, "sub": 7},
        {"client_id": "ap_" + "0" * 32, "sub": "ap_" + "0" * 32},
    ],
)
def test_a_signed_token_that_says_anything_else_is_refused(
    service: Service, steward: Any, change: dict[str, Any]
) -> None:
    assert ask(service, sign(service, good_claims(service, steward))).id == steward.id
    with pytest.raises(Unauthenticated):
        ask(service, sign(service, {**good_claims(service, steward), **change}))


@pytest.mark.shared
@pytest.mark.parametrize("header", [{"typ": "JWT"}, {"kid": "another"}, {"jku": "https://elsewhere"}])
def test_a_token_with_another_header_is_refused(service: Service, steward: Any, header: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        ask(service, sign(service, good_claims(service, steward), header))


def test_no_other_algorithm_and_no_other_key_is_believed(http: TestClient, service: Service, steward: Any) -> None:
    claims, public = good_claims(service, steward), http.get("/.well-known/jwks.json").json()["keys"][0]
    header = {"typ": "at+jwt", "kid": public["kid"]}
    stranger = ECKey.generate_key("P-256")
    pem = ECKey.import_key({k: v for k, v in public.items() if k in ("kty", "crv", "x", "y")}).as_pem(private=False)
    unsigned = _joined({"alg": "none", **header}, claims)
    confused = _joined({"alg": "HS256", **header}, claims)  # our public key as if it were a shared secret
    confused_mac = base64.urlsafe_b64encode(hmac.digest(pem, confused.encode(), "sha256")).rstrip(b"=").decode()
    for token in (
        jwt.encode({"alg": "ES256", **header}, claims, stranger),
        f"{confused}.{confused_mac}",
        f"{unsigned}.",
        "x",
        "x.y.z",
    ):
        with pytest.raises(Unauthenticated):
            ask(service, token)


def test_the_tenant_is_the_one_of_the_row_and_not_of_the_claim(
    service: Service, steward: Any, make_client: Callable[..., Any]
) -> None:
    stranger = make_client("stranger")
    token = sign(service, {**good_claims(service, steward), "tenant": stranger.tenant_id})
    assert ask(service, token).tenant_id == steward.tenant_id


def test_a_removed_app_is_out_within_a_second(
    http: TestClient, service: Service, steward: Any, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert http.get("/v1/sources", headers=bearer).status_code == 200
    with writing(service.engine) as session:
        session.execute(delete(App).where(App.id == steward.id))
    later = time.monotonic() + 1.01
    monkeypatch.setattr(verifier, "monotonic", lambda: later)
    assert http.get("/v1/sources", headers=bearer).status_code == 401


def test_a_remembered_token_expires_all_the_same(
    http: TestClient, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert http.get("/v1/sources", headers=bearer).status_code == 200
    later = time.time() + 601
    for each in (verifier, access_tokens):
        monkeypatch.setattr(each, "time", lambda: later)
    assert http.get("/v1/sources", headers=bearer).status_code == 401


def test_a_token_is_verified_once_a_minute_and_its_memory_is_bounded(
    service: Service, steward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []
    real = verifier.read_token
    monkeypatch.setattr(verifier, "read_token", lambda *given: (read.append(given[1]), real(*given))[1])
    monkeypatch.setattr(verifier, "_MOST_KEPT", 2)
    tokens = [sign(service, {**good_claims(service, steward), "jti": str(each)}) for each in range(3)]
    for token in (tokens[0], tokens[0], *tokens, tokens[0]):
        ask(service, token)
    assert len(read) == 4, "once each, and once more for the one that was forgotten"


def test_keys_are_looked_for_once_a_second_however_many_unknown_ones_are_named(
    service: Service, steward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(service, sign(service, good_claims(service, steward)))
    loads: list[int] = []
    real = verifier.token_keys
    monkeypatch.setattr(verifier, "token_keys", lambda session: (loads.append(1), real(session))[1])
    at = verifier.monotonic()
    monkeypatch.setattr(verifier, "monotonic", lambda: at)
    for each in range(200):
        with pytest.raises(Unauthenticated):
            ask(service, sign(service, good_claims(service, steward), {"kid": f"k{each}"}))
    assert len(loads) <= 1


@pytest.mark.shared
@pytest.mark.parametrize("header", [None, "Bearer", "Bearer  x", "Basic x", "Bearer a.b", "bearer " + "a" * 9000])
def test_what_is_no_token_is_401_with_a_bearer_challenge(http: TestClient, header: str | None) -> None:
    answer = http.get("/v1/sources", headers={"Authorization": header} if header else {})
    assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.json()["code"] == "unauthenticated"


def test_metadata_says_what_works_and_no_more(http: TestClient, service: Service) -> None:
    found = http.get("/.well-known/oauth-authorization-server").json()
    assert found["issuer"] == service.settings.issuer
    assert found["grant_types_supported"] == [
        "client_credentials",
        "authorization_code",
        "refresh_token",
        "urn:ietf:params:oauth:grant-type:device_code",
    ]
    assert found["response_types_supported"] == ["code"] and found["code_challenge_methods_supported"] == ["S256"]
    assert found["authorization_response_iss_parameter_supported"] is True
    assert "none" not in found["introspection_endpoint_auth_methods_supported"]
    assert found["token_endpoint"].endswith("/oauth/token") and found["jwks_uri"].endswith("/.well-known/jwks.json")
    keys = http.get("/.well-known/cloister-certificate-keys").json()["keys"]
    assert [sorted(key) for key in keys] == [["crv", "kid", "kty", "x"]]


def test_no_token_and_no_secret_is_ever_logged(
    http: TestClient, steward: Any, bearer_of: Callable[[Any], dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    header = bearer_of(steward)
    http.get("/v1/sources?secret=in-a-query", headers=header)
    # httpx2 is this test's own client, and no part of the server.
    told = " ".join(str(vars(record)) for record in caplog.records if record.name != "httpx2")
    assert "request" in told
    for secret in (header["Authorization"].split(" ")[1], steward.secret, "in-a-query"):
        assert secret not in told
    assert steward.secret not in repr(steward)


def test_a_secret_is_256_bits_spots_a_typo_and_is_bound_to_its_client() -> None:
    secret = client_secrets.new_secret().get_secret_value()
    assert secret.startswith("cls_") and len(bytes.fromhex(secret[4:-8])) == 32
    assert client_secrets.is_well_formed(secret)
    typo = secret[:10] + ("0" if secret[10] != "0" else "1") + secret[11:]
    assert not client_secrets.is_well_formed(typo)
    stored = client_secrets.mac(b"p" * 32, "ap_a", secret)
    assert client_secrets.matches(b"p" * 32, "ap_a", secret, stored=stored)
    assert not client_secrets.matches(b"p" * 32, "ap_b", secret, stored=stored)
    assert not client_secrets.matches(b"q" * 32, "ap_a", secret, stored=stored)
    assert not client_secrets.matches(b"p" * 32, "ap_a", secret, stored=None)
