"""Operators: the first by a token of `init`, all by a login with a second factor and a bound token, and nobody else by any."""

from __future__ import annotations

import base64
import json
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey
from sqlalchemy import select, update
from starlette.testclient import TestClient

from asked import asked_writing
from cloister_server import audit, operators, shredding, tenants, vault
from cloister_server.errors import Conflict
from cloister_server.oauth import authorizations
from cloister_server.oauth.foreign import ForeignToken
from cloister_server.oauth.verifier import _principal
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.operators import FirstAdminToken
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import now
from keys_of_clients import Signer
from operators import ADMIN_CLIENT, DEVICE_GRANT, Operating, allowed, begun, first_operator, page_of
from people import Human, forms, invited

NOTHING: dict[str, Any] = {"request": {}}


def test_only_an_operators_bound_token_with_its_key_opens(
    http: TestClient, service: Service, operator: Human, operating: Operating, make_client: Any
) -> None:
    path = "/v1/admin/tenant.list"

    def status(headers: dict[str, str]) -> tuple[int, str]:
        answer = http.post(path, json=NOTHING, headers=headers)
        return answer.status_code, answer.json().get("code", "")

    assert status(operating.headers(path))[0] == 200
    elsewhere_bound = operating.headers(path, signer=Signer())
    another_path = operating.headers("/v1/admin/tenant.create")
    without = {"Authorization": f"DPoP {operating.token}"}
    downgraded = {"Authorization": f"Bearer {operating.token}"}
    for headers in (elsewhere_bound, another_path, without, downgraded, operating.headers(path, scheme="Bearer")):
        assert status(headers)[0] == 401
    app = make_client("acme", dpop=True)
    signer = Signer()
    proof = {"DPoP": signer.proof("POST", f"{service.settings.issuer}/oauth/token")}
    given = http.post(
        "/oauth/token", data={"grant_type": "client_credentials"}, auth=(app.id, app.secret), headers=proof
    )
    bound = Operating(http, service.settings.issuer, signer, given.json()["access_token"])
    assert status(bound.headers(path)) == (403, "admin_scope_needed")
    person = invited(service, http, "bob").enrol()
    http.cookies.clear()
    for each in (person, operator):  # an operator, too, by the login that everybody has
        ordinary = begun(http, "cloister-cli", scope="").json()
        page = page_of(each, ordinary["user_code"])
        each.send("device", forms(page.text)["device"] | {"decision": "allow"})
        form = {"grant_type": DEVICE_GRANT, "client_id": "cloister-cli", "device_code": ordinary["device_code"]}
        token = http.post("/oauth/token", data=form).json()["access_token"]
        assert status({"Authorization": f"Bearer {token}"}) == (403, "admin_scope_needed")
        http.cookies.clear()
    foreign = ForeignToken("is_1", operator.id, 2**40, operating.signer.thumbprint)
    assert not _principal(foreign, ("tn_1", operator.id), "r").may_administer


def test_the_scope_is_believed_in_no_other_token_even_one_that_we_signed(
    http: TestClient, service: Service, operating: Operating, make_client: Any
) -> None:
    key, path, app = vault.service_key(service, "token"), "/v1/admin/tenant.list", make_client("acme")
    payload = operating.token.split(".")[1]
    genuine = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))

    def status(scheme: str = "DPoP", **changed: Any) -> int:
        claims = {name: value for name, value in (genuine | changed).items() if value is not None}
        signed = jwt.encode({"alg": "ES256", "typ": "at+jwt", "kid": key.id}, claims, ECKey.import_key(key.secret))
        forged = Operating(http, operating.issuer, operating.signer, signed)
        return int(http.post(path, json=NOTHING, headers=forged.headers(path, scheme=scheme)).status_code)

    assert status() == 200
    of_app = {"client_id": app.id, "sub": app.id, "sid": None}
    others: tuple[dict[str, Any], ...] = (
        {"client_id": "cloister-cli"},
        of_app,
        {"scope": "admin more"},
        {"scope": "read"},
    )
    assert [status(**each) for each in others] == [401] * 4
    assert [status("Bearer", cnf=None, **each) for each in ({}, *others)] == [401] * 5


def test_the_scope_comes_by_one_client_and_one_flow(
    http: TestClient, service: Service, operator: Human, operating: Operating, make_client: Any
) -> None:
    app = make_client("acme")
    for client_id, scope in (("cloister-cli", "admin"), (ADMIN_CLIENT, ""), (ADMIN_CLIENT, "admin more")):
        assert begun(http, client_id, scope).json()["error"] == "invalid_scope"
    credentials = {"auth": (app.id, app.secret)}
    asked = {"grant_type": "client_credentials", "scope": "admin"}
    assert http.post("/oauth/token", data=asked, **credentials).json()["error"] == "invalid_scope"
    assert operating.redeem(grant_type="client_credentials").json()["error"] == "unauthorized_client"
    query = {"response_type": "code", "client_id": ADMIN_CLIENT, "redirect_uri": "http://127.0.0.1/", "state": "s"}
    assert http.get("/oauth/authorize", params=query, follow_redirects=False).status_code == 400
    device = begun(http).json()
    redeemed = partial(operating.redeem, grant_type=DEVICE_GRANT, device_code=device["device_code"])
    for code in ("", "00000x"):
        answer = allowed(operator, device["user_code"], code=code)
        assert answer.status_code == 403 and "administer" in answer.text, "the second factor is shown once more"
        assert redeemed().json()["error"] == "authorization_pending"
    with asked_writing(service) as session:
        authorizations_ = session.scalars(select(authorizations.Authorization)).all()
        for each in authorizations_:
            each.polled = None
    assert "Allowed" in allowed(operator, device["user_code"]).text
    assert redeemed(is_bound=False).json()["error"] == "invalid_dpop_proof"
    assert redeemed(client_id="cloister-cli").json()["error"] == "invalid_grant"
    assert redeemed().status_code == 200
    refresh = {"grant_type": "refresh_token", "refresh_token": operating.refresh_token}
    assert operating.redeem(**refresh, is_bound=False).json()["error"] == "invalid_dpop_proof"
    assert operating.redeem(**refresh, signer=Signer()).json()["error"] == "invalid_grant"
    assert operating.redeem(**refresh).json()["scope"] == "admin"


def test_nobody_but_an_operator_is_asked(http: TestClient, service: Service, operating: Operating) -> None:
    http.cookies.clear()
    person = invited(service, http, "bob").enrol()
    device = begun(http).json()
    shown = page_of(person, device["user_code"])
    assert shown.status_code == 400 and "No device waits" in shown.text
    guessed = forms(shown.text)["device"] | {
        "user_code": device["user_code"],
        "decision": "allow",
        "code": person.code(),
    }
    assert person.send("device", guessed).status_code == 400
    pending = operating.redeem(grant_type=DEVICE_GRANT, device_code=device["device_code"])
    assert pending.json()["error"] == "authorization_pending"


def test_an_operator_who_is_removed_is_refused_on_the_next_request(
    http: TestClient, operator: Human, operating: Operating, service: Service, second_process: Service
) -> None:
    assert operating.ask("operator.remove", {"name": "ada"}, confirm="ada").json()["code"] == "last_operator"
    eve = operating.ask("operator.add", {"name": "eve"}).json()["answer"]
    assert [each["name"] for each in operating.ask("operator.list").json()["answer"]] == ["ada", "eve"]
    refused = operating.ask("operator.remove", {"name": "ada"}, confirm="ada").json()
    assert refused["code"] == "last_operator" and "take up an invitation" in refused["error"], "eve cannot sign in yet"
    assert operating.ask("operator.add", {"name": "bob"}).status_code == 200
    assert operating.ask("operator.remove", {"name": "bob"}, confirm="bob").status_code == 200, "nor could bob"
    http.cookies.clear()
    Human(service, http, eve["account"], eve["id"], eve["invitation"]).enrol()
    with writing(second_process.engine) as session:  # another process, of whose deeds this one hears within a second
        session.execute(
            update(authorizations.logins.User)
            .where(authorizations.logins.User.id == operator.id)
            .values(status="disabled")
        )
    answer = operating.ask("tenant.create", {"name": "acme"})
    assert (answer.status_code, answer.json().get("code")) in ((403, "no_operator"), (401, "unauthenticated"))
    refresh = {"grant_type": "refresh_token", "refresh_token": operating.refresh_token}
    assert operating.redeem(**refresh).json()["error"] == "invalid_grant"
    with writing(service.engine) as session:
        session.execute(
            update(authorizations.logins.User)
            .where(authorizations.logins.User.id == operator.id)
            .values(status="active")
        )
    assert operating.ask("operator.remove", {"name": "ada"}, confirm="eve").json()["code"] == "not_confirmed"
    assert operating.ask("operator.remove", {"name": "ada"}, confirm="ada").status_code == 200
    assert operating.ask("tenant.list").status_code == 401
    assert operating.redeem(**refresh).json()["error"] == "invalid_grant"


def test_the_audit_log_is_read_with_the_accounts_of_operators(
    operator: Human, operating: Operating, service: Service
) -> None:
    assert operating.ask("tenant.create", {"name": "acme"}).status_code == 200
    with writing(service.engine) as session:
        tenant = tenants.find_tenant(session, "acme")
        audit.told(session, Principal(tenant.id, "us_" + "0" * 32, "user", "request-of-a-test"), "something", "x")
    rows = operating.ask("audit.tail", {"tenant": "acme"}).json()["answer"]
    assert {(each["principal"], each["principal_name"]) for each in rows} == {
        (operator.id, "operators/ada"),
        ("us_" + "0" * 32, None),
    }


def test_a_first_admin_token_is_good_once_and_for_an_hour(http: TestClient, service: Service, quick: None) -> None:
    def redeemed(token: str) -> Any:
        asked = forms(http.get("/oauth/first-admin").text)["first-admin"]
        return http.post("/oauth/first-admin", data=asked | {"first_admin_token": token, "name": "ada"})

    def printed() -> str:
        token = operators.first_admin_token(service)
        assert token is not None
        return token.get_secret_value()

    first = printed()
    second = printed()
    for wrong in (first, "fat_" + "0" * 64, "x", second.upper(), f"{second} "):
        assert redeemed(wrong).status_code == 403 and "fat_" not in redeemed(wrong).text
    with writing(service.engine) as session:
        stored = session.scalars(select(FirstAdminToken)).one()
        assert second.encode() not in stored.mac
        session.execute(update(FirstAdminToken).values(until=now() - timedelta(seconds=1)))
    assert redeemed(second).status_code == 403, "an hour later"
    third = printed()
    human = first_operator(service, http, token=third)
    assert redeemed(third).status_code == 403 and operators.first_admin_token(service) is None
    with asked_writing(service) as session:
        assert [each.name for each in operators.listed(session)] == [human.account.partition("/")[2]]


def test_the_operators_tenant_is_nobodys(operating: Operating, service: Service) -> None:
    for name, request in (
        ("tenant.create", {"name": "operators"}),
        ("tenant.suspend", {"tenant": "operators"}),
        ("tenant.quota", {"tenant": "operators", "requests_per_minute": 0}),
        ("user.create", {"tenant": "operators", "name": "eve"}),
        ("user.disable", {"tenant": "operators", "user": "ada"}),
        ("user.delete", {"tenant": "operators", "user": "ada"}),
        ("client.create", {"tenant": "operators", "name": "app"}),
        ("group.create", {"tenant": "operators", "name": "team"}),
        ("group.add", {"tenant": "operators", "group": "team", "member": "ada"}),
        ("grant.add", {"tenant": "operators", "to": "ada", "verb": "model.read"}),
        ("issuer.map", {"tenant": "operators", "issuer": "https://i.example", "subject": "s", "to": "ada"}),
    ):
        for dry_run in (False, True):
            answer = operating.ask(name, request, dry_run=dry_run, confirm="ada")
            assert (answer.status_code, answer.json()["code"]) == (409, "operators_tenant"), name
    with reading(service.engine) as session:
        own = tenants.operator_of(tenants.find_tenant(session, "operators"), request_id="request-of-a-test")
        with pytest.raises(Conflict, match="neither suspended nor shredded"):
            shredding.plan(session, own)
    with pytest.raises(Conflict, match="neither suspended nor shredded"):
        shredding.shred(service, own)
