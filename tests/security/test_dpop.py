"""Tokens that are bound to a key: worth nothing without it, nor with a proof of anything but this very request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from cloister_server.errors import Unauthenticated
from cloister_server.oauth.signed import read_public_key
from cloister_server.oauth.verifier import authenticate
from cloister_server.service import Service
from keys_of_clients import Signer, with_assertion

MINE, OTHER = Signer(), Signer()
GRANT = {"grant_type": "client_credentials"}
PATH = "/v1/sources"


@pytest.fixture
def url(service: Service) -> str:
    return f"{service.settings.issuer}{PATH}"


@pytest.fixture
def get_token(http: TestClient, service: Service) -> Callable[..., Any]:
    def ask(client: Any, signer: Signer | None = MINE, *, proof: str | None = None, **more: Any) -> Any:
        if proof is None and signer is not None:
            proof = signer.proof("POST", f"{service.settings.issuer}/oauth/token")
        headers = {} if proof is None else {"DPoP": proof}
        return http.post("/oauth/token", data=GRANT | more, auth=(client.id, client.secret), headers=headers)

    return ask


@pytest.fixture
def token(get_token: Callable[..., Any], steward: Any) -> str:
    answer = get_token(steward).json()
    assert answer["token_type"] == "DPoP"
    return str(answer["access_token"])


def sent(http: TestClient, token: str, *proofs: str, scheme: str = "DPoP") -> Any:
    headers = [("Authorization", f"{scheme} {token}"), *(("DPoP", proof) for proof in proofs)]
    return http.get(PATH, headers=headers)


@pytest.mark.parametrize("signer", [MINE, Signer.ed25519()], ids=["ES256", "Ed25519"])
def test_a_bound_token_and_a_proof_of_its_key_open(
    http: TestClient, url: str, steward: Any, get_token: Callable[..., Any], signer: Signer
) -> None:
    token = get_token(steward, signer).json()["access_token"]
    for _ in range(3):
        assert sent(http, token, signer.proof("GET", url, token)).status_code == 200
    told = http.post("/oauth/introspect", data={"token": token}, auth=(steward.id, steward.secret)).json()
    assert told["token_type"] == "DPoP" and told["cnf"] == {"jkt": signer.thumbprint}


@pytest.mark.parametrize("given", ["{}?limit=3#part", "{}#", "upper", "port"])
def test_urls_are_compared_as_urls(http: TestClient, url: str, token: str, given: str) -> None:
    named = {"upper": url.replace("http://", "HTTP://"), "port": url.replace("/sources", "/%73ources")}
    assert sent(http, token, MINE.proof("GET", named.get(given, given.format(url)), token)).status_code == 200


def test_a_bound_token_is_no_bearer_token(http: TestClient, url: str, token: str) -> None:
    proof = MINE.proof("GET", url, token)
    assert sent(http, token, proof).status_code == 200, "remembered from here on"
    for proofs in ((), (MINE.proof("GET", url, token),)):
        refused = sent(http, token, *proofs, scheme="Bearer")
        assert refused.status_code == 401 and 'error="invalid_token"' in refused.headers["www-authenticate"]
        assert "DPoP algs=" in refused.headers["www-authenticate"]


def test_a_bearer_token_is_not_bound_by_showing_a_proof(
    http: TestClient, url: str, steward: Any, get_token: Callable[..., Any]
) -> None:
    token = get_token(steward, None).json()["access_token"]
    assert sent(http, token, scheme="Bearer").status_code == 200
    assert sent(http, token, MINE.proof("GET", url, token)).status_code == 401


WRONG: dict[str, Callable[[str, str], tuple[str, ...]]] = {
    "no proof": lambda u, t: (),
    "two proofs": lambda u, t: (MINE.proof("GET", u, t), MINE.proof("GET", u, t)),
    "another key": lambda u, t: (OTHER.proof("GET", u, t),),
    "another key's signature": lambda u, t: (OTHER.proof("GET", u, t, header={"jwk": MINE.jwk}),),
    "another method": lambda u, t: (MINE.proof("POST", u, t),),
    "method in small letters": lambda u, t: (MINE.proof("get", u, t),),
    "no method": lambda u, t: (MINE.proof("GET", u, t, htm=None),),
    "another path": lambda u, t: (MINE.proof("GET", u + "/x", t),),
    "another host": lambda u, t: (MINE.proof("GET", "http://elsewhere.example/v1/sources", t),),
    "another port": lambda u, t: (MINE.proof("GET", "http://127.0.0.1:1/v1/sources", t),),
    "another scheme": lambda u, t: (MINE.proof("GET", u.replace("http:", "https:"), t),),
    "no url": lambda u, t: (MINE.proof("GET", u, t, htu=None),),
    "a url that is none": lambda u, t: (MINE.proof("GET", "http://[", t),),
    "a port that is none": lambda u, t: (MINE.proof("GET", "http://127.0.0.1:x/v1/sources", t),),
    "a url with a user": lambda u, t: (MINE.proof("GET", u.replace("//", "//user@"), t),),
    "a url not of utf-8": lambda u, t: (MINE.proof("GET", u + "/%ff", t),),
    "a path alone": lambda u, t: (MINE.proof("GET", PATH, t),),
    "no ath": lambda u, t: (MINE.proof("GET", u),),
    "ath of another token": lambda u, t: (MINE.proof("GET", u, t + "x"),),
    "ath a number": lambda u, t: (MINE.proof("GET", u, t, ath=1),),
    "old": lambda u, t: (MINE.proof("GET", u, t, iat=int(time.time()) - 100),),
    "of the future": lambda u, t: (MINE.proof("GET", u, t, iat=int(time.time()) + 100),),
    "no time": lambda u, t: (MINE.proof("GET", u, t, iat=None),),
    "a time that is true": lambda u, t: (MINE.proof("GET", u, t, iat=True),),
    "a time in words": lambda u, t: (MINE.proof("GET", u, t, iat="now"),),
    "no jti": lambda u, t: (MINE.proof("GET", u, t, jti=None),),
    "an empty jti": lambda u, t: (MINE.proof("GET", u, t, jti=""),),
    "an endless jti": lambda u, t: (MINE.proof("GET", u, t, jti="j" * 300),),
    "no typ": lambda u, t: (MINE.proof("GET", u, t, header={"typ": None}),),
    "typ JWT": lambda u, t: (MINE.proof("GET", u, t, header={"typ": "JWT"}),),
    "alg none": lambda u, t: (MINE.proof("GET", u, t, header={"alg": "none"}),),
    "alg HS256": lambda u, t: (MINE.proof("GET", u, t, header={"alg": "HS256"}),),
    "alg of another key": lambda u, t: (MINE.proof("GET", u, t, header={"alg": "Ed25519"}),),
    "no key": lambda u, t: (MINE.proof("GET", u, t, header={"jwk": None}),),
    "a key that is text": lambda u, t: (MINE.proof("GET", u, t, header={"jwk": "key"}),),
    "a private key": lambda u, t: (MINE.proof("GET", u, t, header={"jwk": {**MINE.jwk, "d": "x"}}),),
    "a shared key": lambda u, t: (MINE.proof("GET", u, t, header={"jwk": {"kty": "oct", "k": "eA"}}),),
    "a point off the curve": lambda u, t: (MINE.proof("GET", u, t, header={"jwk": {**MINE.jwk, "y": MINE.jwk["x"]}}),),
    "another curve": lambda u, t: (MINE.proof("GET", u, t, header={"jwk": {**MINE.jwk, "crv": "P-384"}}),),
    "more in its header": lambda u, t: (MINE.proof("GET", u, t, header={"kid": "x"}),),
    "critical": lambda u, t: (MINE.proof("GET", u, t, header={"crit": ["x"], "x": 1}),),
    "cut": lambda u, t: (MINE.proof("GET", u, t)[:-3],),
    "no jwt": lambda u, t: ("x",),
    "empty": lambda u, t: ("",),
    "two in one header": lambda u, t: (f"{MINE.proof('GET', u, t)}, {MINE.proof('GET', u, t)}",),
}


def test_every_wrong_proof_is_refused_with_a_challenge(http: TestClient, url: str, token: str) -> None:
    for name, wrong in WRONG.items():
        refused = sent(http, token, *wrong(url, token))
        assert refused.status_code == 401, (name, refused.text)
        assert refused.headers["www-authenticate"].startswith('DPoP error="invalid_dpop_proof"'), name
    assert sent(http, token, MINE.proof("GET", url, token)).status_code == 200


def test_a_proof_is_taken_once_by_all_processes_together(
    http: TestClient, service: Service, second_process: Service, url: str, token: str
) -> None:
    proof = MINE.proof("GET", url, token)
    with ThreadPoolExecutor(8) as pool:
        statuses = [each.result().status_code for each in [pool.submit(sent, http, token, proof) for _ in range(8)]]
    assert sorted(statuses) == [200] + [401] * 7
    headers = [(b"authorization", f"DPoP {token}".encode()), (b"dpop", proof.encode())]
    with pytest.raises(Unauthenticated):
        authenticate(second_process, headers, method="GET", path=PATH)
    fresh = [headers[0], (b"dpop", MINE.proof("GET", url, token).encode())]
    assert authenticate(second_process, fresh, method="GET", path=PATH).id


def test_a_client_that_must_prove_gets_no_other_token(
    service: Service, make_client: Callable[..., Any], get_token: Callable[..., Any]
) -> None:
    client, endpoint = make_client(dpop=True), f"{service.settings.issuer}/oauth/token"
    assert get_token(client).json()["token_type"] == "DPoP"
    once = MINE.proof("POST", endpoint)
    assert get_token(client, proof=once).status_code == 200
    wrong = [
        None,
        once,
        MINE.proof("GET", endpoint),
        MINE.proof("POST", endpoint + "/"),
        OTHER.proof("POST", endpoint, header={"jwk": MINE.jwk}),
        "x",
    ]
    for each in wrong:
        refused = get_token(client, None, proof=each)
        assert refused.status_code == 400 and refused.json()["error"] == "invalid_dpop_proof", each


def test_a_wrong_proof_is_refused_where_none_is_needed_and_wrong_credentials_before_it(
    service: Service, steward: Any, get_token: Callable[..., Any]
) -> None:
    assert get_token(steward, proof="x").json()["error"] == "invalid_dpop_proof"
    nobody = type(steward)(steward.tenant_id, steward.id, "cls_wrong")
    assert get_token(nobody, proof="x").json()["error"] == "invalid_client"


def test_predictions_ask_for_the_proof_too(http: TestClient, service: Service, token: str) -> None:
    path = "/v2/models/nobodys"
    proof = MINE.proof("GET", f"{service.settings.issuer}{path}", token)
    headers = {"Authorization": f"DPoP {token}"}
    assert http.get(path, headers=headers).status_code == 401
    assert http.get(path, headers={**headers, "DPoP": proof}).status_code == 404


def test_proofs_assertions_and_tokens_are_never_logged(
    http: TestClient, service: Service, make_client: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client = make_client(public_key=read_public_key(MINE.pem), dpop=True)
    assertion = MINE.assertion(client.id, service.settings.issuer)
    proof = MINE.proof("POST", f"{service.settings.issuer}/oauth/token")
    token = http.post("/oauth/token", data=with_assertion(assertion), headers={"DPoP": proof}).json()["access_token"]
    use = MINE.proof("GET", f"{service.settings.issuer}{PATH}", token)
    assert sent(http, token, use).status_code == 200
    assert sent(http, token, use).status_code == 401
    told = " ".join(str(vars(record)) for record in caplog.records if record.name != "httpx2")  # the test's own client
    assert "request" in told
    for secret in (assertion, proof, token, use):
        assert secret not in told and secret.rpartition(".")[2] not in told
