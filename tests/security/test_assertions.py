"""private_key_jwt: who is let in by a signature, and every way to be refused alike."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from cloister_server.errors import Invalid
from cloister_server.oauth.signed import read_public_key, thumbprint
from cloister_server.service import Service
from cloister_server.store.session import reading
from cloister_server.store.tables import SeenProof
from keys_of_clients import ASSERTION_TYPE, Signer, with_assertion

SIGNERS = {"ES256": Signer(), "Ed25519": Signer.ed25519()}
OTHER = Signer()
LATER, EARLIER = 10_000, -10_000


@pytest.fixture
def keyed(make_client: Callable[..., Any]) -> Callable[[Signer], Any]:
    return lambda signer: make_client(public_key=read_public_key(signer.pem))


@pytest.mark.parametrize("signer", SIGNERS.values(), ids=SIGNERS)
def test_a_client_is_let_in_by_its_signature(
    http: TestClient, service: Service, keyed: Callable[[Signer], Any], signer: Signer
) -> None:
    client, issuer = keyed(signer), service.settings.issuer
    for header in ({}, {"typ": None}, {"typ": "JWT"}, {"kid": "any"}):
        answer = http.post("/oauth/token", data=with_assertion(signer.assertion(client.id, issuer, header=header)))
        assert answer.status_code == 200, answer.text
    named = with_assertion(signer.assertion(client.id, issuer), client_id=client.id)
    token = http.post("/oauth/token", data=named).json()["access_token"]
    assert http.get("/v1/sources", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    told = {name: value for name, value in named.items() if name != "grant_type"} | {"token": token}
    told["client_assertion"] = signer.assertion(client.id, issuer)
    assert http.post("/oauth/introspect", data=told).json()["active"] is True


def test_one_that_is_signed_for_an_hour_is_taken_for_five_minutes(
    http: TestClient, service: Service, keyed: Callable[[Signer], Any]
) -> None:
    signer, at = SIGNERS["ES256"], int(time.time())
    client = keyed(signer)
    for issued, status in ((at, 200), (at - 290, 200), (at - 310, 401)):
        assertion = signer.assertion(client.id, service.settings.issuer, iat=issued, exp=at + 3600)
        assert http.post("/oauth/token", data=with_assertion(assertion)).status_code == status, at - issued


def test_the_older_name_of_ed25519_is_understood(
    http: TestClient, service: Service, keyed: Callable[[Signer], Any]
) -> None:
    signer = SIGNERS["Ed25519"]
    client = keyed(signer)
    assertion = signer.assertion(client.id, service.settings.issuer, header={"alg": "EdDSA"})
    assert http.post("/oauth/token", data=with_assertion(assertion)).status_code == 200


WRONG: dict[str, Callable[[Signer, str, str], str]] = {
    "another key": lambda s, c, i: OTHER.assertion(c, i),
    "another kind of key": lambda s, c, i: SIGNERS["Ed25519"].assertion(c, i),
    "unknown client": lambda s, c, i: s.assertion("ap_" + "0" * 32, i),
    "no client id": lambda s, c, i: s.assertion("nobody", i),
    "iss of another": lambda s, c, i: s.assertion(c, i, iss="ap_" + "0" * 32),
    "iss missing": lambda s, c, i: s.assertion(c, i, iss=None),
    "sub missing": lambda s, c, i: s.assertion(c, i, sub=None),
    "sub a number": lambda s, c, i: s.assertion(c, i, sub=1),
    "aud the token endpoint": lambda s, c, i: s.assertion(c, i, aud=f"{i}/oauth/token"),
    "aud elsewhere": lambda s, c, i: s.assertion(c, i, aud="https://elsewhere.example"),
    "aud a list": lambda s, c, i: s.assertion(c, i, aud=[i]),
    "aud another's too": lambda s, c, i: s.assertion(c, i, aud=[i, "https://elsewhere.example"]),
    "aud with a slash": lambda s, c, i: s.assertion(c, i, aud=f"{i}/"),
    "aud missing": lambda s, c, i: s.assertion(c, i, aud=None),
    "exp missing": lambda s, c, i: s.assertion(c, i, exp=None),
    "expired": lambda s, c, i: s.assertion(c, i, exp=int(time.time()) - 1),
    "for hours": lambda s, c, i: s.assertion(c, i, iat=None, exp=int(time.time()) + LATER),
    "for hours since one": lambda s, c, i: s.assertion(c, i, iat=int(time.time()) - 3000, exp=int(time.time()) + 600),
    "exp a word": lambda s, c, i: s.assertion(c, i, exp="tomorrow"),
    "exp true": lambda s, c, i: s.assertion(c, i, exp=True),
    "exp infinite": lambda s, c, i: s.sign({}, {}, raw=f'{{"iss":"{c}","sub":"{c}","aud":"{i}","jti":"j","exp":1e999}}'),
    "exp not a number": lambda s, c, i: s.sign({}, {}, raw=f'{{"iss":"{c}","sub":"{c}","aud":"{i}","jti":"j","exp":NaN}}'),
    "issued in the future": lambda s, c, i: s.assertion(c, i, iat=int(time.time()) + LATER),
    "issued long ago": lambda s, c, i: s.assertion(c, i, iat=int(time.time()) + EARLIER),
    "not yet": lambda s, c, i: s.assertion(c, i, nbf=int(time.time()) + 100),
    "jti missing": lambda s, c, i: s.assertion(c, i, jti=None),
    "jti empty": lambda s, c, i: s.assertion(c, i, jti=""),
    "jti a number": lambda s, c, i: s.assertion(c, i, jti=7),
    "jti endless": lambda s, c, i: s.assertion(c, i, jti="j" * 300),
    "an access token's typ": lambda s, c, i: s.assertion(c, i, header={"typ": "at+jwt"}),
    "a proof's typ": lambda s, c, i: s.assertion(c, i, header={"typ": "dpop+jwt"}),
    "typ a number": lambda s, c, i: s.assertion(c, i, header={"typ": 1}),
    "a key of its own": lambda s, c, i: OTHER.assertion(c, i, header={"jwk": OTHER.jwk}),
    "a key elsewhere": lambda s, c, i: s.assertion(c, i, header={"jku": "https://elsewhere.example/keys"}),
    "critical": lambda s, c, i: s.assertion(c, i, header={"crit": ["b64"], "b64": False}),
    "alg none": lambda s, c, i: s.assertion(c, i, header={"alg": "none"}).rpartition(".")[0] + ".",
    "alg none, signed": lambda s, c, i: s.assertion(c, i, header={"alg": "none"}),
    "alg HS256": lambda s, c, i: s.assertion(c, i, header={"alg": "HS256"}),
    "alg RS256": lambda s, c, i: s.assertion(c, i, header={"alg": "RS256"}),
    "alg missing": lambda s, c, i: s.assertion(c, i, header={"alg": None}),
    "alg a list": lambda s, c, i: s.assertion(c, i, header={"alg": ["ES256"]}),
    "a name twice": lambda s, c, i: s.sign(
        {}, {}, raw=f'{{"sub":"{c}","iss":"{c}","aud":"{i}","jti":"j","exp":1,"exp":{int(time.time()) + 60}}}'
    ),
    "claims a list": lambda s, c, i: s.sign({}, {}, raw="[]"),
    "claims no json": lambda s, c, i: s.sign({}, {}, raw="{"),
    "claims too deep": lambda s, c, i: s.sign({}, {}, raw="[" * 3000),
    "signature cut": lambda s, c, i: s.assertion(c, i)[:-4],
    "signature zero": lambda s, c, i: s.assertion(c, i).rpartition(".")[0] + "." + "A" * 86,
    "signature empty": lambda s, c, i: s.assertion(c, i).rpartition(".")[0] + ".",
    "padded": lambda s, c, i: s.assertion(c, i) + "==",
    "two parts": lambda s, c, i: s.assertion(c, i).rpartition(".")[0],
    "no jwt": lambda s, c, i: "x",
    "five parts": lambda s, c, i: "a.b.c.d.e",
}  # fmt: skip


def test_every_wrong_assertion_is_refused_in_the_same_words(
    http: TestClient, service: Service, keyed: Callable[[Signer], Any]
) -> None:
    signer, issuer = SIGNERS["ES256"], service.settings.issuer
    client = keyed(signer)
    assert http.post("/oauth/token", data=with_assertion(signer.assertion(client.id, issuer))).status_code == 200
    told = {}
    for name, wrong in WRONG.items():
        answer = http.post("/oauth/token", data=with_assertion(wrong(signer, client.id, issuer)))
        assert answer.status_code == 401 and answer.json()["error"] == "invalid_client", (name, answer.text)
        told[answer.text] = name
    assert len(told) == 1, told
    with reading(service.engine) as session:
        assert len(session.scalars(select(SeenProof)).all()) == 1, "only what was valid is remembered"


def test_an_assertion_is_taken_once_however_many_show_it_at_once(
    http: TestClient, service: Service, keyed: Callable[[Signer], Any]
) -> None:
    signer = SIGNERS["ES256"]
    client = keyed(signer)
    form = with_assertion(signer.assertion(client.id, service.settings.issuer))
    with ThreadPoolExecutor(8) as pool:
        answers = [each.result() for each in [pool.submit(http.post, "/oauth/token", data=form) for _ in range(8)]]
    assert sorted(answer.status_code for answer in answers) == [200] + [401] * 7


def test_two_clients_may_use_the_same_id(http: TestClient, service: Service, keyed: Callable[[Signer], Any]) -> None:
    for signer in SIGNERS.values():
        assertion = signer.assertion(keyed(signer).id, service.settings.issuer, jti="the-same")
        assert http.post("/oauth/token", data=with_assertion(assertion)).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"client_assertion_type": ""},
        {"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:saml2-bearer"},
        {"client_assertion": ""},
        {"client_secret": "cls_x"},
    ],
)
def test_an_assertion_comes_with_its_type_and_with_no_other_credentials(
    http: TestClient, service: Service, keyed: Callable[[Signer], Any], change: dict[str, str]
) -> None:
    signer = SIGNERS["ES256"]
    good = with_assertion(signer.assertion(keyed(signer).id, service.settings.issuer))
    answer = http.post("/oauth/token", data=good | change)
    assert answer.status_code == 400 and answer.json()["error"] == "invalid_request"
    both = http.post("/oauth/token", data=good, auth=("ap_" + "0" * 32, "cls_x"))
    assert both.status_code == 400 and both.json()["error"] == "invalid_request"


def test_an_assertion_of_one_client_does_not_speak_for_another(
    http: TestClient, service: Service, keyed: Callable[[Signer], Any], steward: Any
) -> None:
    signer = SIGNERS["ES256"]
    good = with_assertion(signer.assertion(keyed(signer).id, service.settings.issuer), client_id=steward.id)
    assert http.post("/oauth/token", data=good).status_code == 401


def test_a_client_has_a_key_or_a_secret_and_never_both(
    http: TestClient, service: Service, keyed: Callable[[Signer], Any], steward: Any
) -> None:
    signer = SIGNERS["ES256"]
    client = keyed(signer)
    grant = {"grant_type": "client_credentials"}
    for secret in ("", steward.secret):
        assert http.post("/oauth/token", data=grant, auth=(client.id, secret)).status_code == 401
    claimed = with_assertion(signer.assertion(steward.id, service.settings.issuer))
    assert http.post("/oauth/token", data=claimed).status_code == 401


def test_public_keys_are_read_as_pem_and_jwk_and_private_ones_refused() -> None:
    for signer in SIGNERS.values():
        for content in (signer.pem, json.dumps({**signer.jwk, "use": "sig", "kid": "k"}).encode()):
            assert read_public_key(content) == signer.jwk
        assert thumbprint(signer.jwk) == signer.thumbprint
        for private in (signer.private_pem, json.dumps({**signer.jwk, "d": "secret-of-mine"}).encode()):
            with pytest.raises(Invalid, match="private key") as refused:
                read_public_key(private)
            assert "secret-of-mine" not in str(refused.value)
    good = SIGNERS["ES256"].jwk
    for wrong in (b"", b"{", b"{}", b"[]", json.dumps(good | {"crv": "P-384"}).encode(), json.dumps(good | {"y": good["x"]}).encode(),
                  json.dumps({"kty": "oct", "k": "x"}).encode(), secrets.token_bytes(64)):  # fmt: skip
        with pytest.raises(Invalid, match="P-256 or Ed25519"):
            read_public_key(wrong)
    assert ASSERTION_TYPE.endswith("jwt-bearer")
