"""Private deployments over HTTP: who may, what is refused and stated, what a role can open, and for how long one is permitted."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from certificates import signed
from cloister.wire.dsse import digest_of
from cloister.wire.oip import encode_request
from cloister.wire.private_deployments import ROLES, Role, verify_private_deployment
from cloister.wire.private_requests import audience
from cloister.wire.shares import decode, join
from cloister_privacy.architecture import Network
from cloister_privacy.architecture.weights import from_bytes, to_bytes
from cloister_privacy.mpc import (
    CoLocated,
    Limits,
    RoleFileRefused,
    SharedNetwork,
    open_role_file,
    seal_role_file,
    seal_shares,
    split_weights,
)
from cloister_server import grants, private_sharing, vault
from cloister_server.app import create_app
from cloister_server.errors import Unavailable
from cloister_server.oauth.fetching import NotFetched
from cloister_server.principal import Principal
from cloister_server.roles import identity
from cloister_server.roles.permissions import NotPermitted, Permissions
from cloister_server.roles.serving import limits_of
from cloister_server.service import Service
from cloister_server.settings import RoleSettings
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.conditions import Conditions
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, Grant, Model, ModelVersion, SealedObject, new_id
from mpc_groups import small_network

PLACE = "/v1/models/images/versions/1/private-deployment"
ROWS = np.random.default_rng(1).uniform(0, 1, (4, 4, 4)).astype(np.float32)
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


@pytest.fixture
def weights() -> bytes:
    return to_bytes(small_network())


@pytest.fixture
def model_id(service: Service, steward: Any, weights: bytes) -> str:
    def publish(session: Session) -> str:
        model = Model(tenant_id=steward.tenant_id, id=new_id("mdl"), name="images", champion=1)
        session.add(model)
        session.flush()
        sealed = vault.seal_object(session, service.blobs, weights, tenant_id=steward.tenant_id, kind="weights")
        session.add(
            ModelVersion(
                tenant_id=steward.tenant_id, model_id=model.id, version=1, job_id=new_id("job"), weights_id=sealed,
                certificate=signed(),
            )
        )  # fmt: skip
        return model.id

    return service.write(ALL_TENANTS, publish)


@pytest.fixture
def identities(tmp_path: Path) -> tuple[identity.RoleIdentity, ...]:
    made = []
    for name, host in zip(ROLES, HOSTS, strict=True):
        clients = None if name == "dealer" else 9443
        made.append(identity.create(tmp_path / name, operator=f"{name}'s", host=host, port=9444, client_port=clients))
    return tuple(made)


def asked(roles: Any, **more: Any) -> dict[str, Any]:
    records = [json.loads(each.record.model_dump_json()) for each in roles]
    rows = encode_request({"x": ROWS})["inputs"]
    return {"parties": records[:2], "dealer": records[2], "public_rows": rows, **more}


def deploy(http: TestClient, bearer: dict[str, str], body: dict[str, Any], **headers: str) -> Any:
    return http.post("/v1/models/images/private-deployments", json=body, headers={**bearer, **headers})


def certificate_keys(http: TestClient) -> Any:
    return http.get("/.well-known/cloister-certificate-keys").json()


def token_keys(http: TestClient) -> Callable[[], dict[str, Any]]:
    return lambda: {key["kid"]: key for key in http.get("/.well-known/jwks.json").json()["keys"]}


def file_of(http: TestClient, bearer: dict[str, str], role: str) -> bytes:
    return base64.b64decode(http.get(f"{PLACE}/roles/{role}", headers=bearer).json()["file"])


def test_what_is_stated_is_signed_and_each_role_opens_its_own_file_alone(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any, weights: bytes
) -> None:
    answer = deploy(http, bearer, asked(identities))
    assert answer.status_code == 201, answer.text
    keys = certificate_keys(http)
    stated = verify_private_deployment(answer.json()["statement"], keys)
    assert (stated.model, stated.version, stated.generation) == (model_id, 1, 1)
    assert stated.certificate_digest == digest_of(signed())
    assert [stated.role(name).digest for name in ROLES] == [each.record.digest for each in identities]
    assert stated.rows_measured == 4 and stated.max_error < 1e-4 and stated.equal_argmax == 1
    opened = []
    for name, mine in zip(ROLES, identities, strict=True):
        body = file_of(http, bearer, name)
        found = open_role_file(body, mine.opens, certificate_digest=mine.record.digest, keys=keys)
        assert (found.name, found.statement) == (name, stated)
        opened.append(found.weights)
        for other in identities:
            if other is not mine:
                with pytest.raises(RoleFileRefused, match="does not open"):
                    open_role_file(body, other.opens, certificate_digest=other.record.digest, keys=keys)
        with pytest.raises(RoleFileRefused, match="another role"):
            open_role_file(body, mine.opens, certificate_digest="0" * 64, keys=keys)
        with pytest.raises(RoleFileRefused, match="does not verify"):
            open_role_file(body, mine.opens, certificate_digest=mine.record.digest, keys={})
        for at in (0, len(b"cloister.role/"), 40, len(body) - 1 if name != "dealer" else 60):
            changed = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
            with pytest.raises(Exception, match=r"role file|another version|does not open"):
                open_role_file(changed, mine.opens, certificate_digest=mine.record.digest, keys=keys)
    assert opened[2] is None, "the dealer has no share"
    clear = from_bytes(weights).state_dict()["layers.1.weight"].numpy()
    joined = decode(join([each["layers.1.weight"] for each in opened[:2]]), fraction_bits=stated.fraction_bits)
    assert np.abs(joined - clear).max() < 1e-5
    assert np.abs(decode(opened[0]["layers.1.weight"]) - clear).min() > 1, "one share alone is noise"


def _of_large_numbers() -> Network:
    network = small_network()
    with torch.no_grad():
        for position, factor in ((1, 1e6), (3, 1e-6)):
            network.layers[position].weight.mul_(factor)
    return network


@pytest.mark.parametrize("weights", [to_bytes(_of_large_numbers())], ids=["large"])
def test_a_network_of_large_numbers_states_a_scale_for_each_layer(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any, weights: bytes
) -> None:
    answer = deploy(http, bearer, asked(identities))
    assert answer.status_code == 201, answer.text
    keys = certificate_keys(http)
    stated = verify_private_deployment(answer.json()["statement"], keys)
    assert stated.max_error < 1e-4 and len(stated.layer_bits) == 4 and stated.layer_bits[3][1] > 30
    opened = [
        open_role_file(file_of(http, bearer, name), mine.opens, certificate_digest=mine.record.digest, keys=keys)
        for name, mine in zip(ROLES, identities, strict=True)
    ]
    assert {each.network.digest for each in opened} == {stated.network_digest}
    shares = [each.weights["layers.3.weight"] for each in opened[:2] if each.weights]
    clear = from_bytes(weights).state_dict()["layers.3.weight"].numpy()
    assert np.abs(decode(join(shares), fraction_bits=stated.layer_bits[3][1]) - clear).max() < 1e-9


def test_a_share_that_somebody_else_sealed_for_a_party_is_no_share_of_the_deployment(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any
) -> None:
    """The statement, the architecture and the keys that files are sealed for are all public."""
    envelope = deploy(http, bearer, asked(identities)).json()["statement"]
    keys = certificate_keys(http)
    stated = verify_private_deployment(envelope, keys)
    network = small_network()
    shape = SharedNetwork(network.architecture, fraction_bits=stated.fraction_bits)
    others = split_weights(shape, small_network().state_dict())
    for party, mine in enumerate(identities[:2]):
        public = mine.opens.public_key()
        share = seal_shares(others[party], public, network=shape, deployment=stated.id, party=party)
        forged = seal_role_file(
            ROLES[party], seal_to=public, statement=envelope, architecture=network.architecture, sealed_shares=share
        )
        with pytest.raises(RoleFileRefused, match="not the stated one"):
            open_role_file(forged, mine.opens, certificate_digest=mine.record.digest, keys=keys)


def test_a_role_takes_no_more_rows_at_once_than_is_stated(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any
) -> None:
    stated = verify_private_deployment(
        deploy(http, bearer, asked(identities)).json()["statement"], certificate_keys(http)
    )
    settings = RoleSettings(file=Path("role"), certificate_keys=Path("keys"), request_s=7)
    limits = limits_of(settings, stated.model_copy(update={"rows_at_once": 3}))
    assert (limits.rows, limits.request_s) == (3, 7)


def test_only_whoever_is_granted_it_deploys_and_only_a_predictor_is_permitted(
    http: TestClient,
    service: Service,
    bearer: dict[str, str],
    bearer_of: Any,
    make_client: Any,
    steward: Any,
    model_id: str,
    identities: Any,
) -> None:
    body = asked(identities)
    predictor, nobody = make_client(role="predictor"), make_client(role="none")
    assert deploy(http, bearer_of(predictor), body).status_code == 403
    assert deploy(http, bearer_of(nobody), body).status_code == 404
    assert http.get(PLACE, headers=bearer_of(predictor)).json()["code"] == "not_deployed_privately"
    assert deploy(http, bearer, body).status_code == 201
    mine = bearer_of(predictor)
    assert http.get(f"{PLACE}/roles/party-0", headers=mine).status_code == 403
    assert http.get(PLACE, headers=mine).status_code == 200
    given = http.get(f"{PLACE}/permissions", headers=mine)
    assert given.status_code == 200
    for path in (PLACE, f"{PLACE}/permissions"):
        assert http.get(path, headers=bearer_of(nobody)).status_code == 404
    operator = Principal.operator(steward.tenant_id, request_id="request-of-a-test")
    with writing(service.engine) as session:
        grants.add(session, operator, to=predictor.id, verb="model.predict", resource_id=model_id, effect="deny")
    assert http.get(f"{PLACE}/permissions", headers=mine).status_code == 403, "from the next one on"
    with reading(service.engine) as session:
        rows = session.scalars(select(AuditRow).where(AuditRow.verb == "model.deploy_private")).all()
    outcomes = sorted(row.outcome.partition(":")[0] for row in rows)
    assert outcomes.count("allowed") == 1 and "denied" in outcomes
    with reading(service.engine) as session:
        (permitted,) = session.scalars(select(AuditRow).where(AuditRow.verb == "model.predict_private"))
        granted = session.get_one(Grant, (steward.tenant_id, permitted.grant_id))
    assert (permitted.principal_id, permitted.outcome, permitted.resource_id) == (
        predictor.id,
        "allowed",
        f"{model_id}/1",
    )
    assert permitted.request_id == given.headers["x-request-id"]
    assert (granted.principal_id, granted.verb) == (predictor.id, "model.predict")


@pytest.mark.parametrize(
    ("bound", "told"), [(Conditions(outputs="labels"), "labels"), (Conditions(requests_per_minute=60), "60 requests")]
)
def test_whose_grant_bounds_what_a_model_answers_or_how_often_is_permitted_nothing(
    http: TestClient, service: Service, bearer: dict[str, str], bearer_of: Any, make_client: Any, steward: Any,
    model_id: str, identities: Any, bound: Conditions, told: str,
) -> None:  # fmt: skip
    partner = make_client(role="none")
    operator = Principal.operator(steward.tenant_id, request_id="request-of-a-test")
    assert deploy(http, bearer, asked(identities)).status_code == 201
    with writing(service.engine) as session:
        grants.add(session, operator, to=partner.id, verb="model.predict", resource_id=model_id, conditions=bound)
    for path in (PLACE, f"{PLACE}/permissions"):
        answer = http.get(path, headers=bearer_of(partner))
        assert answer.status_code == 403 and told in answer.text


def test_who_may_predict_from_some_addresses_alone_is_permitted_nothing_and_who_may_from_others_too_is(
    http: TestClient, service: Service, bearer: dict[str, str], bearer_of: Any, make_client: Any, steward: Any,
    model_id: str, identities: Any,
) -> None:  # fmt: skip
    assert deploy(http, bearer, asked(identities)).status_code == 201
    there = TestClient(create_app(service), client=("10.0.0.1", 1), base_url=service.settings.issuer)
    operator = Principal.operator(steward.tenant_id, request_id="request-of-a-test")

    def answers(of: Any) -> list[int]:
        return [there.get(path, headers=bearer_of(of)).status_code for path in (PLACE, f"{PLACE}/permissions")]

    def grant(of: Any, **more: Any) -> None:
        with writing(service.engine) as session:
            grants.add(session, operator, to=of.id, verb="model.predict", resource_id=model_id, **more)

    partner, denied = make_client(role="none"), make_client(role="predictor")
    grant(partner, network="10.0.0.0/8")
    told = there.get(f"{PLACE}/permissions", headers=bearer_of(partner))
    assert answers(partner) == [403, 403] and "some addresses alone" in told.text
    grant(partner)
    assert answers(partner) == [200, 200]
    grant(denied, network="192.0.2.0/24", effect="deny")
    assert answers(denied) == [403, 403], "a party would take it from there"


def test_a_permission_is_for_one_party_for_a_minute_and_no_token_is_one(
    http: TestClient, bearer: dict[str, str], steward: Any, model_id: str, identities: Any
) -> None:
    deploy(http, bearer, asked(identities))
    found = http.get(f"{PLACE}/permissions", headers=bearer).json()
    issuer = json.loads(base64.urlsafe_b64decode(found["permissions"][0].split(".")[1] + "=="))["iss"]
    parties = [Permissions(issuer, audience(found["deployment"], n), token_keys(http)) for n in (0, 1)]
    for party, permission in zip(parties, found["permissions"], strict=True):
        assert party.subject(permission) == steward.id
    token = bearer["Authorization"].removeprefix("Bearer ")
    head, claims, signature = found["permissions"][0].split(".")
    longer = json.loads(base64.urlsafe_b64decode(claims + "=="))
    longer["exp"] += 3600
    forged = base64.urlsafe_b64encode(json.dumps(longer).encode()).decode().rstrip("=")
    for wrong in (found["permissions"][1], token, f"{head}.{forged}.{signature}", "", "a.b.c"):
        with pytest.raises(NotPermitted):
            parties[0].subject(wrong)
    assert http.get("/v1/models", headers={"Authorization": f"Bearer {found['permissions'][0]}"}).status_code == 401


def test_a_permission_ends_and_nobody_is_permitted_where_the_platform_cannot_be_asked(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(http, bearer, asked(identities))
    found = http.get(f"{PLACE}/permissions", headers=bearer).json()
    issuer = json.loads(base64.urlsafe_b64decode(found["permissions"][0].split(".")[1] + "=="))["iss"]

    def unreachable() -> dict[str, Any]:
        raise NotFetched("no platform")

    away = Permissions(issuer, audience(found["deployment"], 0), unreachable)
    with pytest.raises(NotPermitted, match="cannot be had"):
        away.subject(found["permissions"][0])
    there = Permissions(issuer, audience(found["deployment"], 0), token_keys(http))
    there.subject(found["permissions"][0])
    at = time.time() + 61
    monkeypatch.setattr("cloister_server.roles.permissions.time.time", lambda: at)
    with pytest.raises(NotPermitted):
        there.subject(found["permissions"][0])


def test_what_cannot_be_deployed_is_refused_by_name(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any
) -> None:
    many, large = np.zeros((65, 4, 4), np.float32), np.full((1, 4, 4), 1e15, np.float32)
    for change, code in (
        ({"public_rows": []}, "public_rows_needed"),
        ({"public_rows": encode_request({"x": many})["inputs"]}, "public_rows_needed"),
        ({"public_rows": encode_request({"x": large})["inputs"]}, "not_shared"),
        ({"public_rows": encode_request({"y": ROWS})["inputs"]}, "invalid_request"),
        ({"version": 2}, "not_found"),
        ({"unknown": 1}, "invalid_request"),
    ):
        assert deploy(http, bearer, asked(identities, **change)).json()["code"] == code


def test_a_network_whose_randomness_no_party_keeps_is_refused_and_so_are_rows_whose_randomness_takes_all_memory(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = SharedNetwork(small_network().architecture).material_bytes(1)
    monkeypatch.setattr(private_sharing, "_MOST_BYTES_MEASURED", 3 * row)
    told = deploy(http, bearer, asked(identities))
    assert told.json()["code"] == "public_rows_needed" and "3 are the most" in told.text
    monkeypatch.setattr("cloister_privacy.mpc.Limits", partial(Limits, disk_bytes=row))
    monkeypatch.setattr(private_sharing, "_MOST_BYTES_MEASURED", 4 * row)
    assert deploy(http, bearer, asked(identities)).status_code == 201
    monkeypatch.setattr("cloister_privacy.mpc.Limits", partial(Limits, disk_bytes=row - 1))
    told = deploy(http, bearer, asked(identities))
    assert told.json()["code"] == "not_shared" and f"{row} bytes" in told.text


def test_roles_that_are_one_or_expired_or_of_the_wrong_kind_are_refused(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any, tmp_path: Path
) -> None:
    first, second, dealer = identities
    expired = identity.create(tmp_path / "old", operator="old", host="127.0.0.9", port=1, client_port=2, days=-1)
    for roles, code in (
        ((first, first, dealer), "roles_not_apart"),
        ((first, dealer, second), "roles_not_apart"),
        ((first, expired, dealer), "role_expired"),
    ):
        assert deploy(http, bearer, asked(roles)).json()["code"] == code
    for name, same in (
        ("operator", first.record.operator),
        ("operator", f" {first.record.operator.upper()}"),
        ("host", first.record.host + "."),
        ("seal_to", first.record.seal_to),
    ):
        body = asked((first, second, dealer))
        body["parties"][1][name] = same
        assert deploy(http, bearer, body).json()["code"] == "roles_not_apart", name
    body["parties"][0]["certificate"] = "nothing"
    assert deploy(http, bearer, body).status_code == 422
    one = (first, second, dealer)
    together = asked(one, development=True)
    together["dealer"]["operator"] = together["parties"][0]["operator"]
    assert deploy(http, bearer, together).status_code == 201
    stated = verify_private_deployment(http.get(PLACE, headers=bearer).json()["statement"], certificate_keys(http))
    assert stated.development, "it is stated, for all to see"


def test_a_newer_generation_ends_the_one_before_and_the_end_takes_the_files(
    http: TestClient, service: Service, bearer: dict[str, str], model_id: str, identities: Any
) -> None:
    def files() -> int:
        with reading(service.engine) as session:
            return len(session.scalars(select(SealedObject.id).where(SealedObject.kind == "roles")).all())

    body = asked(identities)
    first = deploy(http, bearer, body, **{"Idempotency-Key": "once"}).json()
    again = deploy(http, bearer, body, **{"Idempotency-Key": "once"})
    assert again.json() == first and again.headers["Idempotency-Replayed"] == "true"
    second = deploy(http, bearer, body).json()
    assert (first["generation"], second["generation"], files()) == (1, 2, 1)
    assert http.get(f"{PLACE}/permissions", headers=bearer).json()["deployment"] == second["id"]
    ended = http.delete(PLACE, headers=bearer)
    assert ended.status_code == 200 and ended.json()["id"] == second["id"] and files() == 0
    for path in (PLACE, f"{PLACE}/permissions", f"{PLACE}/roles/dealer"):
        assert http.get(path, headers=bearer).json()["code"] == "not_deployed_privately"
    assert deploy(http, bearer, body).json()["generation"] == 3


def test_weights_are_opened_for_one_deployment_at_a_time_and_for_no_retry(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    share = private_sharing.shared

    def counted(service: Service, version: private_sharing.Opened, body: Any) -> private_sharing.Shared:
        opened.append(version.version)
        with pytest.raises(Unavailable), private_sharing.at_work():
            pass
        return share(service, version, body)

    monkeypatch.setattr(private_sharing, "shared", counted)
    monkeypatch.setattr(private_sharing, "_LONGEST_WAIT_S", 0.0)
    body, key = asked(identities), {"Idempotency-Key": "once"}
    with private_sharing.at_work():
        busy = deploy(http, bearer, body, **key)
    assert (busy.status_code, busy.json()["code"], opened) == (503, "private_deployment_busy", [])
    first = deploy(http, bearer, body, **key)
    assert first.status_code == 201, first.text
    with private_sharing.at_work():  # a retry needs no place
        again = deploy(http, bearer, body, **key)
        other = deploy(http, bearer, asked(identities, development=True), **key)
    assert again.json() == first.json() and again.headers["Idempotency-Replayed"] == "true"
    assert other.json()["code"] == "idempotency_mismatch" and opened == [1]


def test_a_retry_that_waited_for_its_place_finds_what_was_answered_meanwhile(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, key, answers = asked(identities), {"Idempotency-Key": "once"}, list[Any]()

    @contextmanager
    def waited() -> Iterator[None]:
        """As a place that is free when another request of the same key has been answered."""
        monkeypatch.setattr(private_sharing, "at_work", at_work)
        answers.append(deploy(http, bearer, body, **key))
        yield

    at_work = private_sharing.at_work
    monkeypatch.setattr(private_sharing, "at_work", waited)
    late = deploy(http, bearer, body, **key)
    assert late.headers["Idempotency-Replayed"] == "true" and late.json() == answers[0].json()
    assert late.json()["generation"] == 1


def test_a_role_refuses_a_deployment_of_roles_that_are_one(
    http: TestClient, bearer: dict[str, str], model_id: str, identities: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the platform states: a role looks for itself."""
    monkeypatch.setattr("cloister_server.private_sharing.shared_by", lambda roles: None)
    body = asked(identities)
    body["dealer"]["host"] = body["parties"][0]["host"]
    assert deploy(http, bearer, body).status_code == 201
    mine = identities[0]
    with pytest.raises(CoLocated, match="share their host"):
        open_role_file(
            file_of(http, bearer, "party-0"),
            mine.opens,
            certificate_digest=mine.record.digest,
            keys=certificate_keys(http),
        )


def test_a_record_is_a_certificate_and_a_key_that_somebody_can_hold(identities: Any) -> None:
    record = json.loads(identities[0].record.model_dump_json())
    for change in ({"seal_to": "00" * 32}, {"certificate": "x"}, {"host": "a b"}, {"port": 0}, {"more": 1}):
        with pytest.raises(ValueError, match="|".join(change)):
            Role.model_validate(record | change)
