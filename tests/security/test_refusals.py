"""A table of requests that no endpoint may accept, each answered with an error of OAuth and never with a failure of ours."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from keys_of_clients import ASSERTION_TYPE

FORM = "application/x-www-form-urlencoded"
PATHS = ("/oauth/token", "/oauth/introspect", "/oauth/revoke")
GOOD = b"grant_type=client_credentials&token=a.b.c"


def basic(raw: bytes) -> str:
    return "Basic " + base64.b64encode(raw).decode()


def mine(client: Any) -> str:
    return basic(f"{client.id}:{client.secret}".encode())


Case = tuple[bytes, dict[str, str], str]
"""Body, headers and query, of a client whose credentials are right where its own are sent."""

CASES: dict[str, Callable[[Any], Case]] = {
    # RFC 6749, 3.2: how a request is made
    "a parameter twice": lambda c: (GOOD + b"&grant_type=client_credentials&token=x", {"Authorization": mine(c)}, ""),
    "a foreign parameter twice": lambda c: (GOOD + b"&x=1&x=2", {"Authorization": mine(c)}, ""),
    "a parameter twice, once empty": lambda c: (GOOD + b"&token=&grant_type=", {"Authorization": mine(c)}, ""),
    "in the query": lambda c: (b"", {"Authorization": mine(c)}, "?grant_type=client_credentials&token=a"),
    "credentials in the query": lambda c: (GOOD, {}, f"?client_id={c.id}&client_secret={c.secret}"),
    "an unknown parameter in the query": lambda c: (GOOD, {"Authorization": mine(c)}, "?x=1"),
    "no body": lambda c: (b"", {"Authorization": mine(c)}, ""),
    "json": lambda c: (b'{"grant_type":"client_credentials"}', {"Authorization": mine(c), "Content-Type": "application/json"}, ""),
    "multipart": lambda c: (GOOD, {"Authorization": mine(c), "Content-Type": "multipart/form-data; boundary=x"}, ""),
    "text": lambda c: (GOOD, {"Authorization": mine(c), "Content-Type": "text/plain"}, ""),
    "a content type of noise": lambda c: (GOOD, {"Authorization": mine(c), "Content-Type": ";;;=,"}, ""),
    "latin-1": lambda c: (GOOD, {"Authorization": mine(c), "Content-Type": f"{FORM}; charset=latin-1"}, ""),
    "raw bytes": lambda c: (GOOD + b"&x=\xff\xfe", {"Authorization": mine(c)}, ""),
    "encoded, not of utf-8": lambda c: (GOOD + b"&x=%ff%fe", {"Authorization": mine(c)}, ""),
    "a surrogate": lambda c: (GOOD + b"&x=%ed%a0%80", {"Authorization": mine(c)}, ""),
    "no pairs": lambda c: (b"grant_type", {"Authorization": mine(c)}, ""),
    "too many": lambda c: (GOOD + b"".join(b"&x%d=1" % n for n in range(50)), {"Authorization": mine(c)}, ""),
    "too long": lambda c: (GOOD + b"&x=" + b"a" * 10_000, {"Authorization": mine(c)}, ""),
    # RFC 6749, 2.3: exactly one way to say who asks
    "no credentials": lambda c: (GOOD, {}, ""),
    "an id alone": lambda c: (GOOD + f"&client_id={c.id}".encode(), {}, ""),
    "a secret alone": lambda c: (GOOD + f"&client_secret={c.secret}".encode(), {}, ""),
    "an empty secret": lambda c: (GOOD + f"&client_id={c.id}&client_secret=".encode(), {}, ""),
    "header and form": lambda c: (GOOD + f"&client_id={c.id}&client_secret={c.secret}".encode(), {"Authorization": mine(c)}, ""),
    "header and assertion": lambda c: (GOOD + b"&client_assertion=x", {"Authorization": mine(c)}, ""),
    "form and assertion": lambda c: (
        GOOD + f"&client_id={c.id}&client_secret={c.secret}".encode() + f"&client_assertion_type={ASSERTION_TYPE}".encode(), {}, ""),
    "two clients": lambda c: (GOOD + b"&client_id=another", {"Authorization": mine(c)}, ""),
    "a bearer token": lambda c: (GOOD, {"Authorization": "Bearer a.b.c"}, ""),
    "digest": lambda c: (GOOD, {"Authorization": 'Digest username="x"'}, ""),
    "basic of nothing": lambda c: (GOOD, {"Authorization": "Basic"}, ""),
    "basic of noise": lambda c: (GOOD, {"Authorization": "Basic %%%"}, ""),
    "basic without a colon": lambda c: (GOOD, {"Authorization": basic(b"nobody")}, ""),
    "basic not of utf-8": lambda c: (GOOD, {"Authorization": basic(b"\xff\xfe:\xff")}, ""),
    "basic, encoded, not of utf-8": lambda c: (GOOD, {"Authorization": basic(b"%ff:%ff")}, ""),
    "basic with control characters": lambda c: (GOOD, {"Authorization": basic(f"{c.id}\x00:{c.secret}".encode())}, ""),
    "basic without padding": lambda c: (GOOD, {"Authorization": mine(c).rstrip("=") + "!"}, ""),
    "a secret with more": lambda c: (GOOD, {"Authorization": mine(type(c)(c.tenant_id, c.id, c.secret + "0"))}, ""),
    "a secret in capitals": lambda c: (GOOD, {"Authorization": mine(type(c)(c.tenant_id, c.id, c.secret.upper()))}, ""),
    "an id in capitals": lambda c: (GOOD, {"Authorization": mine(type(c)(c.tenant_id, c.id.upper(), c.secret))}, ""),
    "an id of sql": lambda c: (GOOD, {"Authorization": basic(f"ap_' OR '1'='1:{c.secret}".encode())}, ""),
    "an endless id": lambda c: (GOOD, {"Authorization": basic(b"a" * 4000 + b":x")}, ""),
    # RFC 7523
    "an assertion of noise": lambda c: (GOOD + f"&client_assertion=x&client_assertion_type={ASSERTION_TYPE}".encode(), {}, ""),
    "an assertion of nothing": lambda c: (GOOD + f"&client_assertion_type={ASSERTION_TYPE}".encode(), {}, ""),
    "an assertion without its type": lambda c: (GOOD + b"&client_assertion=a.b.c", {}, ""),
}  # fmt: skip

GRANTS: dict[str, bytes] = {
    "none": b"x=1",
    "empty": b"grant_type=",
    "unknown": b"grant_type=everything",
    "password (RFC 9700, 2.4)": b"grant_type=password&username=a&password=b",
    "implicit (RFC 9700, 2.1.2)": b"grant_type=implicit",
    "code, without an authorization": b"grant_type=authorization_code&code=x&redirect_uri=https://a.example&code_verifier="
    + b"a" * 43,
    "refresh, without a token": b"grant_type=refresh_token&refresh_token=x",
    "device, without an authorization": b"grant_type=urn:ietf:params:oauth:grant-type:device_code&device_code=x",
    "jwt-bearer": b"grant_type=urn:ietf:params:oauth:grant-type:jwt-bearer&assertion=a.b.c",
    "token exchange": b"grant_type=urn:ietf:params:oauth:grant-type:token-exchange&subject_token=a",
    "in capitals": b"grant_type=CLIENT_CREDENTIALS",
    "quoted": b"grant_type=%22client_credentials%22",
    "with a space": b"grant_type=client_credentials%20",
    "not of ascii": "grant_type=ä".encode().replace("ä".encode(), b"%C3%A4"),
    "a scope": b"grant_type=client_credentials&scope=admin",
    "many scopes": b"grant_type=client_credentials&scope=a%20b%20c",
    "a scope with a quote (RFC 6749, 3.3)": b"grant_type=client_credentials&scope=%22",
    "a scope not of ascii": b"grant_type=client_credentials&scope=%C3%A4",
}


@pytest.mark.parametrize("path", PATHS)
def test_no_malformed_request_is_accepted_and_none_fails(http: TestClient, steward: Any, path: str) -> None:
    for name, make in CASES.items():
        body, headers, query = make(steward)
        answer = http.post(path + query, content=body, headers={"Content-Type": FORM} | headers)
        assert answer.status_code in (400, 401), (name, answer.status_code, answer.text)
        assert answer.json()["error"] in ("invalid_request", "invalid_client"), (name, answer.text)
        assert steward.secret not in answer.text and "\\x" not in answer.text, name
    assert len(CASES) + len(GRANTS) >= 60


def test_no_other_grant_and_no_scope_gets_a_token(http: TestClient, steward: Any) -> None:
    for name, body in GRANTS.items():
        answer = http.post("/oauth/token", content=body, headers={"Content-Type": FORM, "Authorization": mine(steward)})
        assert answer.status_code == 400, (name, answer.text)
        known = ("unsupported_grant_type", "invalid_scope", "invalid_request", "unauthorized_client", "invalid_grant")
        assert answer.json()["error"] in known and "access_token" not in answer.text, (name, answer.text)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_tokens_are_asked_for_by_post_alone(http: TestClient, steward: Any, method: str, path: str) -> None:
    answer = http.request(method, path, headers={"Authorization": mine(steward)})
    assert answer.status_code == 405


def test_two_authorization_headers_are_refused(http: TestClient, steward: Any) -> None:
    headers = [("Content-Type", FORM), ("Authorization", mine(steward)), ("Authorization", mine(steward))]
    for path in PATHS:
        answer = http.post(path, content=GOOD, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"] == "invalid_request"


@pytest.mark.parametrize("where", ["query", "form", "cookie"])
def test_a_token_comes_in_the_header_alone(http: TestClient, bearer: dict[str, str], where: str) -> None:
    token = bearer["Authorization"].split(" ")[1]
    assert http.get("/v1/sources", headers=bearer).status_code == 200
    if where == "query":  # RFC 6750, 2.3, which RFC 9700, 4.3.2, forbids
        answer = http.get(f"/v1/sources?access_token={token}")
    elif where == "form":
        answer = http.post("/v1/sources", data={"access_token": token})
    else:
        answer = http.get("/v1/sources", headers={"Cookie": f"access_token={token}"})
    assert answer.status_code == 401


def test_what_is_noise_to_introspection_is_inactive_and_to_revocation_done(http: TestClient, steward: Any) -> None:
    for token in ("x", "a.b.c", "ä", "\x00", "a" * 5000, ".." , "e30.e30.", '"', "a b"):  # fmt: skip
        told = http.post("/oauth/introspect", data={"token": token}, auth=(steward.id, steward.secret))
        assert (told.status_code, told.json()) == (200, {"active": False}), token
        done = http.post("/oauth/revoke", data={"token": token}, auth=(steward.id, steward.secret))
        assert done.status_code == 200, token
