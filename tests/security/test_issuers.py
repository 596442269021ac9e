"""Tokens of other issuers: taken from those on the list, of subjects that are somebody here, and refused alike in every other case."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS, PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from sqlalchemy import Engine, select
from starlette.testclient import TestClient

from asked import asked_writing
from cloister_server import issuers, people, shredding, suspension, tenants
from cloister_server.errors import Conflict, Invalid
from cloister_server.oauth import issuer_keys
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.identities import User
from cloister_server.store.issuers import Issuer, IssuerSubject, standing_of_subject
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import App, AuditRow, Tenant, now
from issuers import JWKS, Elsewhere, be_patient, elsewhere, list_issuer, send_json, soon
from keys_of_clients import Signer, b64
from security.test_commands import admin  # noqa: F401 (a fixture)
from security.test_independent_clients import node  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch)


@pytest.fixture
def issuer(service: Service) -> Iterator[Elsewhere]:
    """An issuer that is on the list, with no subject that is anybody."""
    with elsewhere(service.settings.issuer) as made:
        list_issuer(service, made.url)
        yield made


@pytest.fixture
def ada(service: Service, steward: Any) -> str:
    """A person of acme, who has not taken up their invitation: they come by another issuer alone."""
    return person(service, steward.tenant_id, "ada")


def person(service: Service, tenant_id: str, name: str) -> str:
    with asked_writing(service) as session:
        return people.create(session, service, operator(tenant_id), name=name, role="steward").user_id


def operator(tenant_id: str) -> Principal:
    return Principal.operator(tenant_id, request_id="request-of-a-test")


def let_in(service: Service, tenant_id: str, url: str, subject: str = "ada", *, to: str = "ada") -> None:
    with asked_writing(service) as session:
        issuers.map_subject(session, service, operator(tenant_id), url=url, subject=subject, to=to)


@pytest.fixture
def known(service: Service, steward: Any, issuer: Elsewhere, ada: str) -> Elsewhere:
    """The issuer, whose `ada` is acme's."""
    let_in(service, steward.tenant_id, issuer.url)
    return issuer


def asked(http: TestClient, token: str, path: str = "/v1/whoami", scheme: str = "Bearer", **headers: str) -> Any:
    return http.get(path, headers={"Authorization": f"{scheme} {token}", **headers})


def test_a_subject_that_is_somebody_here_acts_as_that_person_and_may_what_they_are_granted(
    http: TestClient, service: Service, steward: Any, known: Elsewhere, ada: str
) -> None:
    told = asked(http, known.token()).json()
    assert (told["id"], told["kind"], told["name"], told["tenant"]) == (ada, "user", "ada", "acme")
    headers = {"Authorization": f"Bearer {known.token()}"}
    made = http.post("/v1/sources", headers=headers, json={"name": "people", "epsilon": 1, "delta": 1e-6})
    assert made.status_code == 201, made.text
    with reading(service.engine, ALL_TENANTS) as session:
        rows = session.scalars(select(AuditRow).where(AuditRow.verb.in_(("issuer.map", "source.create")))).all()
    assert {(row.verb, row.principal_id, row.tenant_id) for row in rows} == {
        ("issuer.map", "operator", steward.tenant_id),
        ("source.create", ada, steward.tenant_id),
    }
    with asked_writing(service) as session:
        nobody = people.create(session, service, operator(steward.tenant_id), name="eve", role="none").user_id
    let_in(service, steward.tenant_id, known.url, "eve", to=nobody)
    refused = http.post(
        "/v1/sources",
        headers={"Authorization": f"Bearer {known.token(sub='eve')}"},
        json={"name": "more", "epsilon": 1, "delta": 1e-6},
    )
    assert refused.status_code in (403, 404)


def test_what_a_right_token_may_look_like(http: TestClient, known: Elsewhere) -> None:
    at = int(time.time())
    for right in (
        known.token(aud=[known.audience, "somebody else"]),
        known.token(nbf=at, iat=at - 0.5, exp=at + 60.5),
        known.token({"typ": "application/AT+JWT"}),
        known.token({"x5t": "abc", "nonce": "of the header"}),
        known.token(email="somebody.elses@example.org", roles=["admin"] * 300),
    ):
        assert asked(http, right).status_code == 200


def signed_hs256(issuer: Elsewhere, secret: bytes) -> str:
    content = ".".join(
        b64(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "at+jwt", "kid": "k1"}, issuer.claims())
    )
    return f"{content}.{b64(hmac.digest(secret, content.encode(), hashlib.sha256))}"


def unsigned(issuer: Elsewhere, alg: str) -> str:
    header = {"alg": alg, "typ": "at+jwt", "kid": "k1"}
    return ".".join(b64(json.dumps(part).encode()) for part in (header, issuer.claims())) + ".AAAA"


def twice(issuer: Elsewhere, claim: str) -> str:
    body = json.dumps(issuer.claims())
    return issuer.signer.sign(
        {"typ": "at+jwt", "kid": "k1"}, None, raw=f'{body[:-1]}, "{claim}": {json.dumps("ada")}}}'
    )


def infinite(issuer: Elsewhere) -> str:
    return json.dumps(issuer.claims(exp=7777)).replace("7777", "1e999")


def at(seconds: float) -> int:
    return int(time.time() + seconds)


OTHER = Signer()
WRONG: dict[str, Callable[[Elsewhere, Elsewhere], str]] = {
    "iss of nobody": lambda a, b: a.token(iss="https://nobody.example"),
    "iss with a slash more": lambda a, b: a.token(iss=f"{a.url}/"),
    "iss in a list": lambda a, b: a.token(iss=[a.url]),
    "no iss": lambda a, b: a.token(iss=None),
    "our own iss, their key": lambda a, b: a.token(iss=a.audience),
    "iss of a, signed by b": lambda a, b: b.token(iss=a.url, sub="ada"),
    "iss of b, signed by a": lambda a, b: a.token(iss=b.url, sub="ada"),
    "the subject of a, of b": lambda a, b: b.token(sub="ada"),
    "the subject of b, of a": lambda a, b: a.token(sub="bob"),
    "a subject of nobody's": lambda a, b: a.token(sub="mallory"),
    "a subject in other case": lambda a, b: a.token(sub="Ada"),
    "an email of somebody's": lambda a, b: a.token(sub="mallory", email="ada", preferred_username="ada", oid="ada"),
    "the id of a principal": lambda a, b: a.token(sub="us_" + "0" * 32),
    "no subject": lambda a, b: a.token(sub=None),
    "a subject that is no text": lambda a, b: a.token(sub=7),
    "for somebody else": lambda a, b: a.token(aud="https://api.example"),
    "for their own client": lambda a, b: a.token(aud="an-app"),
    "for nobody": lambda a, b: a.token(aud=None),
    "for too many": lambda a, b: a.token(aud=[a.audience, *map(str, range(16))]),
    "typ of an ID token": lambda a, b: a.token({"typ": "JWT"}),
    "no typ": lambda a, b: a.token({"typ": None}),
    "typ of a proof": lambda a, b: a.token({"typ": "dpop+jwt"}),
    "claims of an ID token": lambda a, b: a.token(nonce="x", at_hash="y"),
    "claims of a logout token": lambda a, b: a.token(events={}),
    "Keycloak's refresh token": lambda a, b: a.token(typ="Refresh"),
    "without a client": lambda a, b: a.token(client_id=None),
    "without an id": lambda a, b: a.token(jti=None),
    "expired": lambda a, b: a.token(iat=at(-600), exp=at(-120)),
    "not yet": lambda a, b: a.token(nbf=at(300)),
    "of the future": lambda a, b: a.token(iat=at(300), exp=at(600)),
    "for ever": lambda a, b: a.token(exp=at(10**6)),
    "without an end": lambda a, b: a.token(exp=None),
    "without a beginning": lambda a, b: a.token(iat=None),
    "an end that is no number": lambda a, b: a.token(exp="9999999999"),
    "an end that no float holds": lambda a, b: a.token(exp=10**400),
    "an end that is infinite": lambda a, b: a.signer.sign({"typ": "at+jwt", "kid": "k1"}, None, raw=infinite(a)),
    "half a character": lambda a, b: a.token(sub="\ud800"),
    "a subject with a zero byte": lambda a, b: a.token(sub="ada\x00"),
    "an end that is true": lambda a, b: a.token(exp=True),
    "alg none": lambda a, b: unsigned(a, "none"),
    "alg None": lambda a, b: unsigned(a, "None"),
    "HS256 by the public key": lambda a, b: signed_hs256(a, a.signer.pem),
    "HS256 by the JWK": lambda a, b: signed_hs256(a, json.dumps(a.keys[0]).encode()),
    "HS256 by nothing": lambda a, b: signed_hs256(a, b""),
    "an algorithm that is not the issuer's": lambda a, b: a.token({"alg": "PS256"}),
    "an algorithm that is not the key's": lambda a, b: a.token({"alg": "RS256"}),
    "an algorithm that is a list": lambda a, b: a.token({"alg": ["ES256"]}),
    "signed by another": lambda a, b: a.token(by=OTHER),
    "a key in its header": lambda a, b: a.token({"jwk": OTHER.jwk}, by=OTHER),
    "a key set named in its header": lambda a, b: a.token({"jku": f"{b.url}{JWKS}"}, by=b.signer),
    "a certificate named in its header": lambda a, b: a.token({"x5u": f"{b.url}/x5u", "x5c": ["MIIB"]}, by=b.signer),
    "no key": lambda a, b: a.token({"kid": None}),
    "an unknown key": lambda a, b: a.token({"kid": "k2"}),
    "a key that is a path": lambda a, b: a.token({"kid": "../../../../dev/null"}),
    "a key that is a query": lambda a, b: a.token({"kid": "' OR 1=1 --"}),
    "a key that is a number": lambda a, b: a.token({"kid": 1}),
    "something critical": lambda a, b: a.token({"crit": ["exp"], "exp": 1}),
    "unencoded": lambda a, b: a.token({"b64": False, "crit": ["b64"]}),
    "compressed": lambda a, b: a.token({"zip": "DEF"}),
    "bound to a certificate": lambda a, b: a.token(cnf={"x5t#S256": "x"}),
    "bound, and sent as if it were not": lambda a, b: a.token(cnf={"jkt": OTHER.thumbprint}),
    "sub twice": lambda a, b: twice(a, "sub"),
    "iss twice": lambda a, b: twice(a, "iss"),
    "another signature": lambda a, b: a.token()[:-4] + "AAAA",
    "no signature": lambda a, b: a.token().rpartition(".")[0] + ".",
    "a fourth part": lambda a, b: a.token() + ".AAAA",
    "padded": lambda a, b: a.token() + "=",
    "claims that are a list": lambda a, b: a.signer.sign({"typ": "at+jwt", "kid": "k1"}, None, raw="[]"),
    "claims that are deep": lambda a, b: a.signer.sign({"typ": "at+jwt", "kid": "k1"}, None, raw="[" * 5000),
    "claims that are NaN": lambda a, b: a.signer.sign({"typ": "at+jwt", "kid": "k1"}, None, raw='{"exp": NaN}'),
    "long": lambda a, b: a.token(more="x" * 9000),
}


def test_whatever_is_wrong_with_a_token_is_refused_in_the_same_words(
    http: TestClient, service: Service, steward: Any, known: Elsewhere
) -> None:
    with elsewhere(service.settings.issuer) as second:
        list_issuer(service, second.url)
        let_in(service, steward.tenant_id, second.url, "bob", to=person(service, steward.tenant_id, "bob"))
        for right, name in ((known.token(), "ada"), (second.token(sub="bob"), "bob")):
            assert asked(http, right).json()["name"] == name
        told = {}
        for case, make in WRONG.items():
            answer = asked(http, make(known, second))
            body = {name: value for name, value in answer.json().items() if name != "request_id"}
            told[case] = (answer.status_code, json.dumps(body), answer.headers.get("WWW-Authenticate"))
        assert second.asked["/x5u"] == 0
    expected = told["iss of nobody"]
    assert expected[0] == 401 and 'error="invalid_token"' in str(expected[2])
    assert {case: answer for case, answer in told.items() if answer != expected} == {}


def test_a_key_of_rsa_signs_with_the_algorithms_that_are_the_issuers_and_with_no_other(
    http: TestClient, service: Service, steward: Any, ada: str
) -> None:
    private = rsa.generate_private_key(65537, 2048)
    n, e = (
        b64(each.to_bytes((each.bit_length() + 7) // 8)) for each in (private.public_key().public_numbers().n, 65537)
    )

    def signed(issuer: Elsewhere, alg: str, padding: Any) -> str:
        header = {"alg": alg, "typ": "at+jwt", "kid": "rsa"}
        content = ".".join(b64(json.dumps(part).encode()) for part in (header, issuer.claims()))
        return f"{content}.{b64(private.sign(content.encode(), padding, SHA256()))}"

    paddings = {"RS256": PKCS1v15(), "PS256": PSS(MGF1(SHA256()), 32)}
    for taken, refused in (("RS256", "PS256"), ("PS256", "RS256")):
        with elsewhere(service.settings.issuer) as made:
            made.keys[:] = [{"kty": "RSA", "n": n, "e": e, "kid": "rsa"}]
            list_issuer(service, made.url, algorithms=(taken,))
            let_in(service, steward.tenant_id, made.url)
            assert asked(http, signed(made, taken, paddings[taken])).json()["id"] == ada
            assert asked(http, signed(made, refused, paddings[refused])).status_code == 401
            assert asked(http, signed(made, taken, paddings[refused])).status_code == 401
            assert asked(http, signed(made, "ES256", paddings[taken])).status_code == 401


def test_a_flood_of_unknown_keys_fetches_nothing(http: TestClient, known: Elsewhere) -> None:
    assert asked(http, known.token()).status_code == 200
    before = known.asked[JWKS]
    for _ in range(200):
        assert asked(http, known.token({"kid": secrets.token_hex(8)})).status_code == 401
    assert known.asked[JWKS] == before
    assert asked(http, known.token()).status_code == 200


def test_a_key_that_the_issuer_shows_later_is_taken_a_minute_later(
    http: TestClient, known: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(http, known.token()).status_code == 200
    known.keys.append({**OTHER.jwk, "kid": "k2", "use": "sig"})
    rotated = known.token({"kid": "k2"}, by=OTHER)
    assert asked(http, rotated).status_code == 401
    monkeypatch.setattr(issuer_keys, "APART_S", 0.0)
    assert asked(http, rotated).status_code == 200
    known.answers[JWKS] = lambda handler: send_json(handler, None)
    monkeypatch.setattr(issuer_keys, "KEPT_S", 0.0)
    assert asked(http, known.token()).status_code == 200  # it does not answer, and what was known goes on for a while
    monkeypatch.setattr(issuer_keys, "KEPT_UNANSWERED_S", 0.0)
    assert asked(http, known.token()).status_code == 401


def test_a_bound_token_is_worth_nothing_without_its_key(http: TestClient, service: Service, known: Elsewhere) -> None:
    holder = Signer()
    token = known.token(cnf={"jkt": holder.thumbprint})
    proof = holder.proof("GET", f"{service.settings.issuer}/v1/whoami", token)
    assert asked(http, token).status_code == 401
    assert asked(http, token, scheme="DPoP").status_code == 401
    assert asked(http, token, scheme="DPoP", DPoP=proof).status_code == 200
    assert asked(http, known.token(), scheme="DPoP", DPoP=proof).status_code == 401


def test_an_app_comes_by_another_issuer_too_and_none_that_must_show_a_key(
    http: TestClient, service: Service, steward: Any, issuer: Elsewhere, make_client: Any
) -> None:
    let_in(service, steward.tenant_id, issuer.url, "robot", to=steward.id)
    assert asked(http, issuer.token(sub="robot")).json()["id"] == steward.id
    for kind in ({"dpop": True}, {"public": True, "role": "none"}):
        app = make_client("acme", **kind)
        with pytest.raises(Invalid, match="tokens of this deployment alone"):
            let_in(service, steward.tenant_id, issuer.url, "another", to=app.id)
    with asked_writing(service) as session:
        tenants.remove_client(session, service, operator(steward.tenant_id), steward.id)
        assert issuers.listed(session)[0][1] == 0


def test_a_subject_is_one_principal_of_one_tenant(
    service: Service, steward: Any, known: Elsewhere, make_client: Any
) -> None:
    other = make_client("other")
    with pytest.raises(Conflict, match="somebody here already"):
        let_in(service, other.tenant_id, known.url, to=person(service, other.tenant_id, "ada"))
    with pytest.raises(Invalid, match="another tenant"):
        let_in(service, other.tenant_id, known.url, "eve", to="acme/ada")


def test_what_ends_it_ends_it_at_the_next_request_here_and_soon_elsewhere(
    http: TestClient, service: Service, second_process: Service, steward: Any, known: Elsewhere
) -> None:
    from cloister_server.app import create_app

    acting, token = operator(steward.tenant_id), known.token()

    def undone(work: Callable[[Any], Any]) -> None:
        soon(lambda: all(asked(each, token).status_code == 200 for each in (http, there)))
        with asked_writing(service) as session:
            work(session)
        assert asked(http, token).status_code == 401
        soon(lambda: asked(there, token).status_code == 401)

    with TestClient(create_app(second_process), raise_server_exceptions=False) as there:
        undone(lambda session: suspension.suspend(session, service, acting))
        with asked_writing(service) as session:
            suspension.resume(session, service, acting)
        undone(lambda session: issuers.unmap_subject(session, service, acting, url=known.url, subject="ada"))
        let_in(service, steward.tenant_id, known.url)
        undone(lambda session: issuers.remove(session, service, known.url, request_id="request-of-a-test"))
    list_issuer(service, known.url)
    assert asked(http, known.token()).status_code == 401  # whoever was somebody by it is to be mapped anew


@pytest.mark.parametrize("end", ["disable", "reset", "remove"])
def test_an_account_that_is_ended_lets_nobody_in_by_another_issuer(
    http: TestClient, service: Service, steward: Any, known: Elsewhere, end: str
) -> None:
    assert asked(http, known.token()).status_code == 200
    with asked_writing(service) as session:
        getattr(people, end)(session, service, operator(steward.tenant_id), "ada")
    assert asked(http, known.token()).status_code == 401
    with asked_writing(service) as session:
        assert issuers.listed(session)[0][1] == 0


def test_a_shredded_tenant_has_no_subject(http: TestClient, service: Service, steward: Any, known: Elsewhere) -> None:
    assert asked(http, known.token()).status_code == 200
    shredding.shred(service, operator(steward.tenant_id))
    with reading(service.engine, ALL_TENANTS) as session:
        assert issuers.listed(session)[0][1] == 0
    soon(lambda: asked(http, known.token()).status_code == 401)


def test_a_subject_stands_while_all_does_that_it_stands_on(engine: Engine) -> None:
    with writing(engine, ALL_TENANTS) as session:
        for name in ("tn_1", "tn_2"):
            session.add(Tenant(id=name, name=name))
        for name in ("active", "invited", "disabled"):
            session.add(User(tenant_id="tn_1", id=f"us_{name}", name=name, status=name, totp_step=0))
        session.add(App(tenant_id="tn_1", id="ap_1", name="app", secret_mac=b""))
        rules = {"jwks_uri": "x", "audience": "x", "algorithms": ["ES256"], "typ": "JWT", "network": "public"}
        session.add(Issuer(id="is_1", url="https://one.example", **rules))
        session.add(Issuer(id="is_2", url="https://two.example", **rules))
        rows = {
            "active": ("is_1", "us_active"),
            "invited": ("is_1", "us_invited"),
            "app": ("is_1", "ap_1"),
            "disabled": ("is_1", "us_disabled"),
            "gone": ("is_1", "us_gone"),
            "of an issuer that is gone": ("is_3", "us_active"),
        }
        for subject, (issuer_id, principal_id) in rows.items():
            session.add(IssuerSubject(issuer_id=issuer_id, subject=subject, principal_id=principal_id))

    def standing() -> dict[str, Any]:
        with reading(engine, ALL_TENANTS) as session:
            found = {subject: standing_of_subject(session, row[0], subject) for subject, row in rows.items()}
            assert standing_of_subject(session, "is_2", "active") is None
        return {subject: each for subject, each in found.items() if each is not None}

    right = {"active": "us_active", "invited": "us_invited", "app": "ap_1"}
    assert standing() == {subject: ("tn_1", each) for subject, each in right.items()}
    for change in ({"suspended": now()}, {"status": "shredding"}):
        with writing(engine, ALL_TENANTS) as session:
            tenant = session.get_one(Tenant, "tn_1")
            tenant.suspended, tenant.status = change.get("suspended"), change.get("status", "active")
        assert standing() == {}


def test_the_operators_commands(admin: Any, http: TestClient, steward: Any, ada: str, service: Service) -> None:  # noqa: F811
    with elsewhere(service.settings.issuer) as made:
        add = ("issuer", "add", made.url, "--network", "loopback", "--algorithm", "ES256")
        assert admin(*add, "--dry-run")["keys"] == ["k1"]
        assert admin("issuer", "list") == []
        added = admin(*add)
        assert (added["audience"], added["typ"], added["algorithms"]) == (service.settings.issuer, "at+jwt", ["ES256"])
        mapping = ("issuer", "map", made.url, "ada", "--tenant", "acme", "--to", "ada")
        assert admin(*mapping, "--dry-run")["dry_run"] is True and admin("issuer", "subjects", "--tenant", "acme") == []
        assert admin(*mapping)["principal"] == ada
        assert admin("issuer", "list")[0]["subjects"] == 1
        (row,) = admin("issuer", "subjects", "--tenant", "acme")
        assert (row["issuer"], row["subject"], row["principal"]) == (made.url, "ada", ada)
        assert asked(http, made.token()).status_code == 200
        assert admin("issuer", "unmap", made.url, "ada", "--tenant", "acme", "--dry-run")["dry_run"] is True
        assert admin("issuer", "unmap", made.url, "ada", "--tenant", "acme")["principal"] == ada
        admin(*mapping)
        with pytest.raises(AssertionError, match="nothing was changed"):
            admin("issuer", "remove", made.url)
        assert admin("issuer", "remove", made.url, "--dry-run")["subjects"] == 1
        assert admin("issuer", "remove", made.url, "--confirm", made.url) == {"removed": made.url, "subjects": 1}
        assert admin("issuer", "list") == []
    with reading(service.engine, ALL_TENANTS) as session:
        verbs = session.scalars(select(AuditRow.verb).where(AuditRow.verb.startswith("issuer."))).all()
    assert sorted(verbs) == ["issuer.map", "issuer.map", "issuer.remove", "issuer.unmap"]


def test_a_real_issuer_is_taken_once_it_is_on_the_list_and_its_subject_is_somebody(
    node: str,  # noqa: F811
    http: TestClient,
    service: Service,
    steward: Any,
    ada: str,
) -> None:
    script = Path(__file__).parent / "node" / "issuer.mjs"
    given = {"audience": service.settings.issuer, "subject": "robot", "secret": secrets.token_hex(32)}
    with subprocess.Popen(
        [node, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as it:
        assert it.stdin is not None and it.stdout is not None
        it.stdin.write(json.dumps(given) + "\n")
        url = json.loads(it.stdout.readline())["issuer"]

        def token() -> str:
            assert it.stdin is not None and it.stdout is not None
            it.stdin.write("{}\n")
            return str(json.loads(it.stdout.readline())["token"])

        assert asked(http, token()).status_code == 401
        list_issuer(service, url)
        assert asked(http, token()).status_code == 401
        let_in(service, steward.tenant_id, url, "robot", to="ada")
        assert asked(http, token()).json()["id"] == ada
        with asked_writing(service) as session:
            issuers.remove(session, service, url, request_id="request-of-a-test")
        assert asked(http, token()).status_code == 401
        it.stdin.close()
