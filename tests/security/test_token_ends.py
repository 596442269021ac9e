"""Keys of tokens come and go without one valid token refused; what is revoked, token or key, is believed nowhere any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, select, update
from starlette.testclient import TestClient

from asked import asked_writing
from cloister_server import operators, shredding, tenants
from cloister_server.errors import Conflict, NotFound, Unauthenticated
from cloister_server.oauth import access_tokens, signing_keys, verifier
from cloister_server.oauth.verifier import authenticate
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.identities import User
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import App, RevokedToken, SigningKey, now

OUT = 401


def states(service: Service) -> list[str]:
    with reading(service.engine) as session:
        return [key.state for key in signing_keys.listed(session)]


def kid_of(service: Service, state: str) -> str:
    with reading(service.engine) as session:
        return next(key.id for key in signing_keys.listed(session) if key.state == state)


def published(service: Service, *, ago_s: float) -> None:
    """The next key was; the deployments of these tests are copies of one that may be of any age."""
    with writing(service.engine) as session:
        created = now() - timedelta(seconds=ago_s)
        session.execute(update(SigningKey).where(SigningKey.state == "next").values(created=created))


def rotate(service: Service) -> None:
    published(service, ago_s=signing_keys.PUBLISHED_S + 1)
    with asked_writing(service) as session:
        signing_keys.rotate(session, service)


def shown(http: TestClient) -> set[str]:
    return {key["kid"] for key in http.get("/.well-known/jwks.json").json()["keys"]}


def asks(service: Service, bearer: dict[str, str]) -> str:
    headers = [(b"authorization", bearer["Authorization"].encode())]
    return authenticate(service, headers, method="GET", path="/v1/sources").id


def form(http: TestClient, path: str, client: Any, **fields: str) -> Any:
    return http.post(path, data=fields, auth=(client.id, client.secret))


def token_of(bearer: dict[str, str]) -> str:
    return bearer["Authorization"].split(" ")[1]


def test_ten_rotations_refuse_no_valid_token_here_or_in_another_process(
    http: TestClient,
    service: Service,
    second_process: Service,
    steward: Any,
    bearer_of: Callable[[Any], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bearers, passed_s, real = [], 0.0, time.monotonic
    monkeypatch.setattr(verifier, "monotonic", lambda: real() + passed_s)
    for each in range(10):
        bearers.append(bearer_of(steward))
        signer = kid_of(service, "active")
        for bearer in bearers:
            assert http.get("/v1/sources", headers=bearer).status_code == 200
            assert asks(second_process, bearer) == steward.id
        rotate(service)
        passed_s += signing_keys.PUBLISHED_S
        assert kid_of(service, "active") != signer, each
        assert shown(http) >= {signer, kid_of(service, "active"), kid_of(service, "next")}
    assert states(service).count("active") == states(service).count("next") == 1


def test_the_next_key_is_published_for_two_minutes_before_it_signs(service: Service) -> None:
    published(service, ago_s=1)
    with asked_writing(service) as session, pytest.raises(Conflict, match=r"rotate again in 1[0-9][0-9] s"):
        signing_keys.rotate(session, service)
    assert sorted(states(service)) == ["active", "next"]


def test_a_retiring_key_is_shown_and_believed_until_its_last_token_is_expired(
    http: TestClient, service: Service, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = kid_of(service, "active")
    rotate(service)
    assert signer in shown(http)
    with reading(service.engine) as session:
        until = session.get_one(SigningKey, signer).until
    assert until is not None and until >= now() + timedelta(seconds=access_tokens.LONGEST_LIFE_S)
    with writing(service.engine) as session:
        session.execute(update(SigningKey).where(SigningKey.id == signer).values(until=now()))
    assert signer not in shown(http)
    later = time.monotonic() + 1.01
    monkeypatch.setattr(verifier, "monotonic", lambda: later)
    assert http.get("/v1/sources", headers=bearer).status_code == OUT


def test_one_request_looks_a_token_up_again_in_time_for_all_who_come_meanwhile(
    service: Service, steward: Any, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = [(b"authorization", bearer["Authorization"].encode())]
    at = time.monotonic()
    monkeypatch.setattr(verifier, "monotonic", lambda: at)
    assert asks(service, bearer) == steward.id
    at += 0.45
    assert all(verifier.recall(service, headers) for _ in range(3))
    at += 0.1
    assert [verifier.recall(service, headers) is None for _ in range(3)] == [True, False, False]
    assert asks(service, bearer) == steward.id
    at += 0.49  # over a second after it was first looked up
    assert all(verifier.recall(service, headers) for _ in range(3))
    at += 0.1
    assert verifier.recall(service, headers) is None
    with writing(service.engine) as session:
        session.execute(delete(App).where(App.id == steward.id))
    assert verifier.recall(service, headers), "who looks it up has not come to it yet"
    with pytest.raises(Unauthenticated):
        asks(service, bearer)
    assert verifier.recall(service, headers) is None, "nor is it believed until its second is over"


def test_a_revoked_key_is_out_at_once_here_and_within_a_second_elsewhere(
    http: TestClient,
    service: Service,
    second_process: Service,
    steward: Any,
    bearer: dict[str, str],
    bearer_of: Callable[[Any], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert http.get("/v1/sources", headers=bearer).status_code == 200
    assert asks(second_process, bearer) == steward.id
    stolen, following = kid_of(service, "active"), kid_of(service, "next")
    with asked_writing(service) as session:
        signing_keys.revoke(session, service, stolen)
    assert http.get("/v1/sources", headers=bearer).status_code == OUT
    assert kid_of(service, "active") == following and stolen not in shown(http)
    assert http.get("/v1/sources", headers=bearer_of(steward)).status_code == 200, "the next key signs at once"
    later = time.monotonic() + 1.01
    monkeypatch.setattr(verifier, "monotonic", lambda: later)
    with pytest.raises(Unauthenticated):
        asks(second_process, bearer)


def test_a_revoked_next_key_is_replaced_and_none_is_revoked_twice(service: Service) -> None:
    gone = kid_of(service, "next")
    with asked_writing(service) as session:
        signing_keys.revoke(session, service, gone)
    assert kid_of(service, "next") != gone
    with asked_writing(service) as session, pytest.raises(Conflict):
        signing_keys.revoke(session, service, gone)
    with asked_writing(service) as session, pytest.raises(NotFound):
        signing_keys.revoke(session, service, "nobody's")


def test_a_revocation_that_was_rolled_back_changes_nothing(
    http: TestClient, service: Service, bearer: dict[str, str]
) -> None:
    with pytest.raises(RuntimeError), asked_writing(service) as session:
        signing_keys.revoke(session, service, kid_of(service, "active"))
        raise RuntimeError
    assert http.get("/v1/sources", headers=bearer).status_code == 200


def test_a_token_is_introspected_by_a_client_of_its_tenant_alone(
    http: TestClient, service: Service, steward: Any, bearer: dict[str, str], make_client: Callable[..., Any]
) -> None:
    colleague, stranger = make_client(), make_client("stranger")
    for client in (steward, colleague):
        told = form(http, "/oauth/introspect", client, token=token_of(bearer)).json()
        assert told["active"] is True and told["client_id"] == told["sub"] == steward.id
        assert told["iss"] == told["aud"] == service.settings.issuer and told["exp"] > time.time() and told["jti"]
    noise = form(http, "/oauth/introspect", stranger, token="a.b.c")
    foreign = form(http, "/oauth/introspect", stranger, token=token_of(bearer))
    assert foreign.status_code == 200 and foreign.json() == noise.json() == {"active": False}


def test_a_revoked_token_is_out_at_the_next_request_and_elsewhere_within_a_second(
    http: TestClient,
    service: Service,
    second_process: Service,
    steward: Any,
    bearer: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert http.get("/v1/sources", headers=bearer).status_code == 200
    assert asks(second_process, bearer) == steward.id
    assert form(http, "/oauth/revoke", steward, token=token_of(bearer)).status_code == 200
    assert http.get("/v1/sources", headers=bearer).status_code == OUT
    assert form(http, "/oauth/introspect", steward, token=token_of(bearer)).json() == {"active": False}
    later = time.monotonic() + 1.01
    monkeypatch.setattr(verifier, "monotonic", lambda: later)
    with pytest.raises(Unauthenticated):
        asks(second_process, bearer)
    assert form(http, "/oauth/revoke", steward, token=token_of(bearer)).status_code == 200, "again, RFC 7009, 2.2"


def test_a_client_revokes_no_token_of_another_and_learns_nothing_of_it(
    http: TestClient, steward: Any, bearer: dict[str, str], make_client: Callable[..., Any]
) -> None:
    for client in (make_client(), make_client("stranger")):
        foreign = form(http, "/oauth/revoke", client, token=token_of(bearer))
        noise = form(http, "/oauth/revoke", client, token="noise")
        assert (foreign.status_code, foreign.text) == (noise.status_code, noise.text) == (200, "{}")
    assert http.get("/v1/sources", headers=bearer).status_code == 200


def test_ids_of_revoked_tokens_are_kept_until_those_would_have_expired(
    http: TestClient, service: Service, steward: Any, bearer_of: Callable[[Any], dict[str, str]]
) -> None:
    with writing(service.engine) as session:
        session.add(RevokedToken(jti="of-yesterday", until=now() - timedelta(days=1)))
    form(http, "/oauth/revoke", steward, token=token_of(bearer_of(steward)))
    with reading(service.engine) as session:
        kept = session.scalars(select(RevokedToken)).all()
    assert len(kept) == 1 and kept[0].until > now()


def test_a_token_of_whoever_is_no_more_is_out_at_the_next_request(
    http: TestClient,
    service: Service,
    steward: Any,
    bearer: dict[str, str],
    make_client: Callable[..., Any],
    bearer_of: Any,
) -> None:
    colleague = make_client()
    operator, theirs = Principal.operator(steward.tenant_id, request_id="request-of-a-test"), bearer_of(colleague)

    def seen() -> list[int]:
        return [http.get("/v1/sources", headers=each).status_code for each in (bearer, theirs)]

    assert seen() == [200, 200]
    with asked_writing(service) as session:
        tenants.remove_client(session, service, operator, colleague.id)
    assert seen() == [200, OUT]
    shredding.shred(service, operator)
    assert seen() == [OUT, OUT]


@pytest.mark.parametrize("path", ["/oauth/introspect", "/oauth/revoke"])
def test_nobody_asks_after_tokens_without_credentials(http: TestClient, bearer: dict[str, str], path: str) -> None:
    assert http.post(path, data={"token": token_of(bearer)}).status_code == OUT
    assert http.post(path, data={"token": token_of(bearer)}, headers=bearer).status_code == OUT
    assert http.get("/v1/sources", headers=bearer).status_code == 200


def test_challenges_name_the_metadata_and_only_blame_a_token_that_was_sent(
    http: TestClient, service: Service, bearer: dict[str, str], make_client: Callable[..., Any], bearer_of: Any
) -> None:
    url = f'resource_metadata="{service.settings.issuer}/.well-known/oauth-protected-resource"'
    nothing = http.get("/v1/sources").headers["www-authenticate"]
    assert nothing.startswith("Bearer ") and url in nothing and "error" not in nothing
    wrong = http.get("/v1/sources", headers={"Authorization": "Bearer a.b.c"}).headers["www-authenticate"]
    assert url in wrong and 'error="invalid_token"' in wrong
    found = http.get("/.well-known/oauth-protected-resource").json()
    assert found["resource"] == service.settings.issuer == found["authorization_servers"][0]
    nobody = bearer_of(make_client(role="trainer"))
    refused = http.post("/v1/sources", headers=nobody, json={"name": "s", "epsilon": 1, "delta": 1e-6})
    assert refused.status_code == 403 and 'error="insufficient_scope"' in refused.headers["www-authenticate"]


def test_of_two_operators_who_remove_each_other_at_once_one_is_left(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = operators.first_admin_token(service)
    assert token is not None
    operators.redeem(service, token.get_secret_value(), name="ada", request_id="request-of-a-test")
    asked, refusals, known = threading.Event(), [], operators.store.operators

    def of(session: Any) -> Principal:
        return tenants.operator_of(tenants.find_tenant(session, "operators"), request_id="request-of-a-test")

    def removed(session: Any, name: str) -> None:
        operators.remove(session, service, of(session), name, may_be_last=False)

    def other() -> None:
        try:
            service.write(ALL_TENANTS, lambda session: removed(session, "ada"))
        except Conflict as refusal:
            refusals.append(refusal.code)

    service.write(ALL_TENANTS, lambda session: operators.add(session, service, of(session), name="bob"))
    with writing(service.engine) as session:
        session.execute(update(User).values(status="active"))  # as if they had taken up their invitations
    thread = threading.Thread(target=other)
    with writing(service.engine) as session:
        removed(session, "bob")
        session.flush()
        monkeypatch.setattr(operators.store, "operators", lambda session: (known(session), asked.set())[0])
        thread.start()
        asked.wait(0.5)  # whoever does not wait for this transaction has looked by then
    thread.join(60)
    assert refusals == ["last_operator"]
    assert [each.name for each in service.read(ALL_TENANTS, operators.listed)] == ["ada"]
