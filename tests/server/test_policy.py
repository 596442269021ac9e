"""Every verb is allowed by a grant, denied without one, and denied when nobody can be asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from cloister_server import audit, grants, policy
from cloister_server.errors import Forbidden, Invalid, NotFound, Unavailable
from cloister_server.policy import Allow, Authorized, Deny
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.queries import ANY, OPERATOR_VERBS, VERBS, visible_to
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, Dataset, Grant, Job, Model, Source, Tenant, Weights, new_id, now

HERE, THERE = "tn_" + "1" * 32, "tn_" + "2" * 32
WHO = Principal(HERE, "ap_" + "1" * 32, "app", "request-of-a-test")


def resource(table: type[Any], tenant_id: str = HERE, name: str = "thing") -> Any:
    """A row of the table, as little of it as the database takes."""
    if table is Tenant:
        return Tenant(id=tenant_id, name=tenant_id)
    if table is Source:
        return Source(
            tenant_id=tenant_id, id=new_id("src"), name=name, unit="row", adjacency="add_remove", epsilon=1.0,
            delta=1e-6, public=False, owner_id=WHO.id,
        )  # fmt: skip
    if table is Weights:
        return Weights(tenant_id=tenant_id, id=new_id("wts"), object_id="o", digest="0" * 64)
    if table is Model:
        return Model(tenant_id=tenant_id, id=new_id("mdl"), name=name, champion=0)
    source = resource(Source, tenant_id, f"of-{name}")
    dataset = Dataset(
        tenant_id=tenant_id, id=new_id("ds"), source_id=source.id, name=name, columns={}, nominal_size=1, capacity=1,
        capacity_rows=1, part_rows=1, parts=1, status="uploading",
    )  # fmt: skip
    if table is Dataset:
        return source, dataset
    model = resource(Model, tenant_id, f"by-{name}")
    return source, dataset, model, Job(
        tenant_id=tenant_id, id=new_id("job"), source_id=source.id, dataset_id=dataset.id, model_id=model.id,
        principal_id=WHO.id, request_id="r", spec_id="o", status="queued", steps=1, epsilon=1.0, delta=1e-6,
    )  # fmt: skip


def put(service: Service, table: type[Any], tenant_id: str = HERE, name: str = "thing") -> Any:
    made = resource(table, tenant_id, name)
    rows = made if isinstance(made, tuple) else (made,)
    with writing(service.engine) as session:
        for row in rows:
            session.add(row)
            session.flush()
    return rows[-1]


def grant(
    service: Service, verb: str, resource_id: str, *, effect: str = "allow", tenant_id: str = HERE, **more: Any
) -> str:
    row = Grant(
        tenant_id=tenant_id,
        id=new_id("gr"),
        principal_id=WHO.id,
        effect=effect,
        verb=verb,
        resource_id=resource_id,
        **more,
    )
    with writing(service.engine) as session:
        session.add(row)
    return row.id


def tenant_of(row: Any) -> str:
    return row.id if isinstance(row, Tenant) else row.tenant_id


def decide(service: Service, verb: str, row: Any) -> Allow | Deny:
    with reading(service.engine) as session:
        return policy.decide(session, WHO, verb, tenant_id=tenant_of(row), resource_id=row.id)


class _Unreachable(Session):
    """A session whose database went away."""

    def execute(self, *_: Any, **__: Any) -> Any:
        raise OperationalError("SELECT", {}, Exception("gone"))

    scalars = scalar = execute


@pytest.mark.shared
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_allowed_by_its_grant(service: Service, verb: str) -> None:
    tenant_id = new_id("tn")
    row = put(service, VERBS[verb], tenant_id)
    granted = grant(service, verb, row.id, tenant_id=tenant_id)
    assert decide(service, verb, row) == Allow(by=granted)


@pytest.mark.shared
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_denied_without_its_grant(service: Service, verb: str) -> None:
    tenant_id = new_id("tn")
    row = put(service, VERBS[verb], tenant_id)
    for other in VERBS:
        if other != verb:
            grant(service, other, ANY, tenant_id=tenant_id)
    assert decide(service, verb, row) == Deny("no grant matched")


@pytest.mark.shared
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_denied_when_the_store_is_unreachable(service: Service, verb: str) -> None:
    tenant_id = new_id("tn")
    row = put(service, VERBS[verb], tenant_id)
    grant(service, verb, ANY, tenant_id=tenant_id)
    session = _Unreachable(service.engine)
    assert isinstance(policy.decide(session, WHO, verb, tenant_id=tenant_id, resource_id=row.id), Deny)
    with pytest.raises(Unavailable):
        policy.authorize(session, WHO, verb, row)
    if VERBS[verb] is not Tenant:
        with pytest.raises(Unavailable):
            policy.find(session, WHO, verb, VERBS[verb], row.id)


def test_a_deny_goes_before_every_allow(service: Service) -> None:
    row = put(service, Model)
    grant(service, "model.read", row.id)
    grant(service, "model.read", ANY)
    denied = grant(service, "model.read", ANY, effect="deny")
    decision = decide(service, "model.read", row)
    assert isinstance(decision, Deny) and denied in decision.reason


def test_what_is_denied_altogether_is_not_even_there(service: Service) -> None:
    row, other = put(service, Model), put(service, Model, name="other")
    grant(service, "model.read", ANY)
    grant(service, "model.read", row.id, effect="deny")
    with reading(service.engine) as session:
        assert [each.id for each in session.scalars(visible_to(WHO, Model))] == [other.id]
        with pytest.raises(NotFound):
            policy.find(session, WHO, "model.read", Model, row.id)


def test_an_effect_that_nobody_knows_denies(service: Service) -> None:
    row = put(service, Model)
    grant(service, "model.read", row.id)
    grant(service, "model.read", row.id, effect="perhaps")
    assert isinstance(decide(service, "model.read", row), Deny)


def test_an_expired_grant_counts_for_nothing(service: Service) -> None:
    row = put(service, Model)
    grant(service, "model.read", row.id, expires=now() - timedelta(seconds=1))
    assert isinstance(decide(service, "model.read", row), Deny)
    grant(service, "model.read", row.id, effect="deny", expires=now() - timedelta(seconds=1))
    lasting = grant(service, "model.read", row.id, expires=now() + timedelta(minutes=1))
    assert decide(service, "model.read", row) == Allow(by=lasting)


def test_any_is_any_of_its_own_tenant_and_of_no_other(service: Service) -> None:
    mine, theirs = put(service, Model), put(service, Model, THERE)
    grant(service, "model.read", ANY)
    assert isinstance(decide(service, "model.read", mine), Allow)
    assert isinstance(decide(service, "model.read", theirs), Deny)


def test_a_grant_across_tenants_lets_in_by_id_and_never_by_name(service: Service) -> None:
    theirs = put(service, Model, THERE, "shared")
    grant(service, "model.predict", theirs.id, tenant_id=THERE)
    with reading(service.engine) as session:
        assert policy.find(session, WHO, "model.predict", Model, theirs.id).resource.id == theirs.id
        with pytest.raises(NotFound):
            policy.find(session, WHO, "model.predict", Model, "shared")


def test_not_yours_and_not_there_are_one_404_after_the_same_statements(service: Service) -> None:
    theirs = put(service, Model, THERE, "secret")
    seen: list[tuple[str, int]] = []
    event.listen(service.engine, "before_cursor_execute", lambda c, cu, sql, given, *_: seen.append((sql, len(given))))
    told = []
    for asked in (theirs.id, "mdl_" + "0" * 32, "secret", "nothing-of-this-name"):
        seen.clear()
        with reading(service.engine) as session, pytest.raises(NotFound) as refusal:
            policy.find(session, WHO, "model.predict", Model, asked)
        told.append((str(refusal.value), tuple(seen)))
    assert told[0] == told[1] and told[2] == told[3]
    assert told[0][0] == told[2][0]


_BUDGET = {"epsilon": 2.0, "reason": "because"}
ROUTES: list[tuple[type[Any], str, str, dict[str, Any] | None]] = [
    (Source, "GET", "/v1/sources/{id}", None),
    (Source, "GET", "/v1/sources/{id}/ledger", None),
    (Source, "PUT", "/v1/sources/{id}/budget", _BUDGET),
    (Source, "PUT", "/v1/sources/{id}/allowances/ap_x", _BUDGET),
    (Source, "POST", "/v1/sources/{id}/blocks", {"name": "new", "reason": "because"}),
    (Dataset, "GET", "/v1/datasets/{id}", None),
    (Dataset, "DELETE", "/v1/datasets/{id}", None),
    (Dataset, "POST", "/v1/queries/price", {"dataset": "{id}", "queries": [{"type": "count"}], "epsilon": 0.1}),
    (Job, "GET", "/v1/jobs/{id}", None),
    (Job, "POST", "/v1/jobs/{id}/cancel", None),
    (Job, "GET", "/v1/queries/{id}/answer", None),
    (Model, "GET", "/v1/models/{id}", None),
    (Model, "GET", "/v1/models/{id}/versions/1", None),
]
"""Every way to ask for one thing by its id, as (table, method, path, body)."""


def test_no_route_tells_not_yours_from_not_there_by_its_answer_or_its_statements(
    service: Service, http: TestClient, bearer: dict[str, str]
) -> None:
    theirs = {table: put(service, table, THERE, f"a-{table.__name__}").id for table in (Source, Dataset, Job, Model)}
    seen: list[str] = []
    event.listen(service.engine, "before_cursor_execute", lambda c, cu, sql, *_: seen.append(sql))

    def told(
        method: str, path: str, body: dict[str, Any] | None, asked: str
    ) -> tuple[int, dict[str, Any], tuple[str, ...]]:
        seen.clear()
        sent = None if body is None else {key: asked if value == "{id}" else value for key, value in body.items()}
        answer = http.request(method, path.format(id=asked), json=sent, headers=bearer)
        # Whether the caller's own app is still there, and its tenant's quota, is looked up first, and then not again for a second.
        first = ("BEGIN", "set_config", "FROM apps", "FROM signing_keys", "quota_requests")
        after = itertools.dropwhile(lambda sql: any(part in sql for part in first), seen)
        return answer.status_code, {**answer.json(), "request_id": ""}, tuple(after)

    for table, method, path, body in ROUTES:
        absent = f"{theirs[table].partition('_')[0]}_{'0' * 32}"
        first = told(method, path, body, absent)
        assert first[0] == 404 and first[2], f"{method} {path}: {first}"
        assert told(method, path, body, theirs[table]) == told(method, path, body, absent), f"{method} {path}"


def test_yours_but_not_this_verb_is_403(service: Service) -> None:
    row = put(service, Model)
    grant(service, "model.predict", row.id)
    with reading(service.engine) as session, pytest.raises(Forbidden):
        policy.find(session, WHO, "model.publish", Model, row.id)


def test_who_may_only_add_datasets_may_see_the_source_to_add_them_to(service: Service) -> None:
    source = put(service, Source)
    grant(service, "dataset.create", source.id)
    with reading(service.engine) as session:
        assert policy.find(session, WHO, "dataset.create", Source, source.id).resource.id == source.id
        assert list(session.scalars(visible_to(WHO, Dataset))) == []


def test_a_proof_is_made_by_policy_alone(service: Service) -> None:
    with pytest.raises(TypeError, match=r"only policy\.authorize"):
        Authorized(WHO, put(service, Model), "gr_x", object())


@pytest.mark.shared
@pytest.mark.parametrize("verb", [*VERBS, "tenant.administer"])
def test_an_operator_may_administer_and_reads_nobodys_data(service: Service, verb: str) -> None:
    operator = Principal.operator(HERE, request_id="request-of-a-test")
    with reading(service.engine) as session:
        here = policy.decide(session, operator, verb, tenant_id=HERE, resource_id="x")
        there = policy.decide(session, operator, verb, tenant_id=THERE, resource_id="x")
    assert isinstance(here, Allow) == (verb in OPERATOR_VERBS)
    assert isinstance(there, Deny)


def test_no_grant_makes_an_app_an_administrator(service: Service) -> None:
    tenant = put(service, Tenant)
    grant(service, "tenant.administer", ANY)
    assert isinstance(decide(service, "tenant.administer", tenant), Deny)
    with reading(service.engine) as session, pytest.raises(Forbidden):
        grants.listed(session, WHO)


_GRANTS = st.lists(
    st.tuples(
        st.sampled_from([verb for verb, table in VERBS.items() if table is Model]),
        st.sampled_from(["one", "two", ANY]),
        st.sampled_from(["allow", "allow", "deny"]),
        st.sampled_from([HERE, THERE]),
        st.sampled_from([None, -1, 1]),
    ),
    max_size=6,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_grants=_GRANTS)
def test_a_row_is_visible_if_and_only_if_some_verb_on_it_is_allowed(service: Service, given_grants: list[Any]) -> None:
    with Session(service.engine) as session:  # never committed: every example starts from nothing
        rows = {(tenant, name): resource(Model, tenant, name) for tenant in (HERE, THERE) for name in ("one", "two")}
        session.add_all(rows.values())
        for verb, name, effect, tenant, expiry in given_grants:
            session.add(
                Grant(
                    tenant_id=tenant, id=new_id("gr"), principal_id=WHO.id, verb=verb, effect=effect,
                    resource_id=ANY if name == ANY else rows[tenant, name].id,
                    expires=None if expiry is None else now() + timedelta(hours=expiry),
                )
            )  # fmt: skip
        session.flush()
        visible = {row.id for row in session.scalars(visible_to(WHO, Model))}
        allowed = {
            row.id
            for row in rows.values()
            for verb, table in VERBS.items()
            if table is Model
            and isinstance(policy.decide(session, WHO, verb, tenant_id=row.tenant_id, resource_id=row.id), Allow)
        }
        assert visible == allowed


def test_a_creators_grants_name_the_row_and_a_sources_go_to_its_owner(service: Service) -> None:
    source, model = put(service, Source), put(service, Model)
    operator = Principal.operator(HERE, request_id="request-of-a-test")
    with writing(service.engine) as session:
        grants.grant_to_creator(session, operator, source)
        grants.grant_to_creator(session, WHO, model)
    with reading(service.engine) as session:
        rows = [(row.principal_id, row.verb, row.resource_id) for row in session.scalars(select(Grant))]
    assert {(WHO.id, verb, source.id) for verb in ("source.read", "source.own", "dataset.create")} < set(rows)
    assert {(WHO.id, verb, model.id) for verb in ("model.read", "model.predict", "model.publish")} < set(rows)
    assert all(who == WHO.id for who, _, _ in rows)


def test_a_grant_that_could_never_match_is_refused(service: Service, make_client: Callable[..., Any]) -> None:
    client = make_client()
    operator = Principal.operator(client.tenant_id, request_id="request-of-a-test")
    with writing(service.engine) as session:
        for verb, resource_id in (("model.fly", ANY), ("model.read", new_id("mdl")), ("model.*", ANY)):
            with pytest.raises(Invalid):
                grants.add(session, operator, to=client.id, verb=verb, resource_id=resource_id)
        with pytest.raises(NotFound):
            grants.add(session, operator, to=new_id("ap"), verb="model.read", resource_id=ANY)


def test_a_denial_is_kept_once_though_its_transaction_is_rolled_back(service: Service) -> None:
    asked = "not/an id, but a text that somebody put into a path"
    with pytest.raises(NotFound) as refusal, audit.denials_kept(service.engine), writing(service.engine) as session:
        policy.find(session, WHO, "model.read", Model, asked)
    assert isinstance(refusal.value, policy.Denied)
    audit.keep_denial(service.engine, refusal.value)
    with reading(service.engine) as session:
        (row,) = session.scalars(select(AuditRow).where(AuditRow.principal_id == WHO.id))
    assert row.outcome.startswith("denied: ") and row.verb == "model.read" and row.request_id == WHO.request_id
    assert asked not in str(vars(row))
