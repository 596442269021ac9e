"""A few tenants of one real deployment, and what they ask of it, beside the oracle that says what they must be told."""

from __future__ import annotations

import itertools
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from httpx2 import Client, Response
from sqlalchemy import event, update

from accounts import COLUMNS
from asked import asked_writing
from certificates import CERTIFICATE
from cloister.wire.certificate import sign
from cloister_server import grants, groups, people, suspension, tenants, vault
from cloister_server.grants import Role
from cloister_server.oauth import logins
from cloister_server.oauth.server import _Client, _Person, _Tokens
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.identities import User
from cloister_server.store.session import writing
from cloister_server.store.tables import Attempt, Grant, Job, Model, ModelVersion, new_id, now
from security.isolation_oracle import ANY, VERBS, Oracle, Permit, Row, Who
from security.isolation_routes import CREATING, LISTS, PREFIX, Asked, Route

__all__ = ["World", "told"]

_ID = re.compile(r"(?:ap|ds|grp|gr|job|mdl|src|tn|us|wts)_[0-9a-f]{32}")
_WRITE = re.compile(r"\s*(?:INSERT INTO|UPDATE|DELETE FROM) (\w+)")
_OF_GATE = re.compile(r"own_\d+_\d+")
_OF_REFUSALS = {"audit", "links"}
"""The tables that a refusal is written to."""
_REQUEST_ID = "request-of-a-test"
_ROLES: tuple[tuple[str, Role], ...] = (("steward", "steward"), ("other", "none"))


def told(answer: Response) -> tuple[int, Any, dict[str, str]]:
    """All of an answer but which request it is of."""
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    is_json = "json" in answer.headers.get("content-type", "")
    body = {**answer.json(), "request_id": ""} if is_json and isinstance(answer.json(), dict) else answer.text
    return answer.status_code, body, headers


class World:
    """Tenants that a test made. Each has an app that may do all, an app and a person that are granted nothing, and some things."""

    def __init__(
        self,
        service: Service,
        http: Client,
        *,
        weights: bytes,
        training: dict[str, Any],
        tally: Counter[str],
        elsewhere: set[str],
    ) -> None:
        self.service, self.http, self.weights, self.training = service, http, weights, training
        self.tally, self.elsewhere = tally, elsewhere
        """What was asked how often with which outcome, and the ids of what earlier worlds left in the same database."""
        self.oracle = Oracle()
        self.fresh = (f"n{number}" for number in itertools.count())

    # What there is, and what the operators do.

    def add_tenant(self) -> None:
        """Its things are called as everybody's are."""
        pepper = vault.pepper(self.service)
        with asked_writing(self.service) as session:
            made = tenants.create_tenant(
                session, self.service.keys, name=f"t{secrets.token_hex(6)}", request_id=_REQUEST_ID
            )
            session.flush()
            operator = self.operator(made.id)
            apps = [
                tenants.create_client(session, self.service.keys, operator, name=name, role=role)
                for name, role in _ROLES
            ]
            person = people.create(session, self.service, operator, name="person", role="none").user_id
            session.flush()
            session.get_one(User, (made.id, person)).status = "active"
            of = {"tenant_id": made.id, "user_id": person, "client_id": apps[1][0].id}
            begun = logins.begin(session, pepper, **of, jkt=None, request_id=_REQUEST_ID)
        self.oracle.suspended[made.id] = False
        for app, secret in apps:
            answer = self.http.post(
                "/oauth/token", data={"grant_type": "client_credentials"}, auth=(app.id, secret or "")
            )
            who = Who(made.id, app.id, "app", app.name, _bearer(answer.json()), secret or "")
            self.oracle.people.append(who)
        token = _Tokens(self.service, None, begun).generate(
            "authorization_code", _Client(apps[1][0]), user=_Person(person), scope="", include_refresh_token=False
        )
        self.oracle.people.append(Who(made.id, person, "user", "person", _bearer(token)))
        steward = self.oracle.people[-3]
        self.oracle.permits += [
            Permit(made.id, "", steward.id, verb, ANY, True) for verbs in VERBS.values() for verb in verbs
        ]
        self._furnish(steward)

    def _furnish(self, who: Who) -> None:
        source = self.make(who, CREATING[0], name="people")
        declared = {"source": source, "name": "rows", "columns": COLUMNS, "nominal_size": 1000, "capacity": 2000}
        dataset = self._made(who, "dataset", self.send(who, "POST", "/v1/datasets", json=declared), who.tenant)
        self.send(who, "POST", f"/v1/datasets/{dataset}/complete")
        self.make(who, CREATING[1])
        query = {"dataset": dataset, "queries": [{"type": "count"}], "epsilon": 0.001}
        job = self._made(who, "job", self.send(who, "POST", "/v1/queries", json={"query": query}), who.tenant)
        self._publish(who, job)

    def _publish(self, who: Who, job_id: str) -> None:
        """A model with a version, as the worker leaves it."""
        tenant_id = who.tenant
        with asked_writing(self.service) as session:
            model = Model(tenant_id=tenant_id, id=new_id("mdl"), name="kinds", champion=1)
            session.add(model)
            session.flush()
            key_id, private = vault.certificate_signer(session, self.service.keys)
            of = {"tenant": tenant_id, "model": model.id, "version": 1, "job": job_id}
            sealed = vault.seal_object(session, self.service.blobs, self.weights, tenant_id=tenant_id, kind="weights")
            version = {"tenant_id": tenant_id, "model_id": model.id, "version": 1, "job_id": job_id}
            certificate = sign(CERTIFICATE.model_copy(update=of), private_key=private, key_id=key_id)
            session.add(ModelVersion(**version, weights_id=sealed, certificate=certificate))
            session.get_one(Job, (tenant_id, job_id)).attempt = 1
            session.add(
                Attempt(tenant_id=tenant_id, job_id=job_id, number=1, from_step=0, outcome="trained", result={})
            )
        self.oracle.rows[model.id] = Row("model", tenant_id, model.id, "kinds")

    def operator(self, tenant_id: str) -> Principal:
        return Principal.operator(tenant_id, request_id=_REQUEST_ID)

    def give(self, tenant_id: str, holder: str, verb: str, on: str, *, allows: bool, is_over: bool) -> None:
        effect: Any = "allow" if allows else "deny"
        expires = now() + timedelta(hours=1)
        with asked_writing(self.service) as session:
            made = grants.add(
                session, self.operator(tenant_id), to=holder, verb=verb, resource_id=on, effect=effect, expires=expires
            ).id
        permit = Permit(tenant_id, made, holder, verb, on, allows, is_over=False)
        self.oracle.permits.append(permit)
        if is_over:
            self.expire(permit)

    def withdraw(self, permit: Permit) -> None:
        with asked_writing(self.service) as session:
            grants.remove(session, self.operator(permit.tenant), permit.id)
        self.oracle.permits.remove(permit)

    def expire(self, permit: Permit) -> None:
        """Its hour is over, without waiting for it."""
        with writing(self.service.engine) as session:
            session.execute(update(Grant).where(Grant.id == permit.id).values(expires=now() - timedelta(seconds=1)))
        permit.is_over = True

    def add_group(self, tenant_id: str) -> None:
        with asked_writing(self.service) as session:
            made = groups.create(session, self.operator(tenant_id), name=f"g{secrets.token_hex(6)}").id
        self.oracle.groups[made] = (tenant_id, set())

    def put_in(self, group: str, who: Who) -> None:
        tenant_id, members = self.oracle.groups[group]
        with asked_writing(self.service) as session:
            groups.add(session, self.operator(tenant_id), group, who.id)
        members.add(who.id)

    def take_out(self, group: str, who_id: str) -> None:
        tenant_id, members = self.oracle.groups[group]
        with asked_writing(self.service) as session:
            groups.remove(session, self.operator(tenant_id), group, who_id)
        members.discard(who_id)

    def delete_group(self, group: str) -> None:
        with asked_writing(self.service) as session:
            groups.delete(session, self.operator(self.oracle.groups[group][0]), group)
        self.oracle.left(group)

    def suspend(self, tenant_id: str, *, is_suspended: bool) -> None:
        act = suspension.suspend if is_suspended else suspension.resume
        with asked_writing(self.service) as session:
            act(session, self.service, self.operator(tenant_id))
        self.oracle.suspended[tenant_id] = is_suspended

    def remove(self, who: Who) -> None:
        """An app or a person, with all that they hold; whoever acts by the app acts no more."""
        with asked_writing(self.service) as session:
            if who.kind == "user":
                people.remove(session, self.service, self.operator(who.tenant), who.id)
            else:
                tenants.remove_client(session, self.service, self.operator(who.tenant), who.id)
        who.is_gone = True
        self.oracle.left(who.id)
        for each in self.oracle.people:  # the person's login is by this app
            if who.kind == "app" and who.name == "other" and each.tenant == who.tenant and each.kind == "user":
                each.is_signed_out = True

    # What is asked.

    def send(self, who: Who, method: str, path: str, **more: Any) -> Response:
        headers = {**who.bearer, **more.pop("headers", {})}
        return self.http.request(method, path, headers=headers, **more)

    def ask(self, who: Who, route: Route, thing: Row, *, by: str = "") -> Response:
        """Ask it about a thing by its id or, of one's own tenant, its name; whatever the answer, it must be the oracle's."""
        of = self.oracle
        meant: Row | None = thing
        if by == "name":
            meant = of.named(who, route.kind, thing.name)
        with self._watched() as writes:
            answer = self._asked(who, route, thing.name if by == "name" else thing.id)
        where = f"{route.name} by {who} about {thing}: {answer.status_code} {answer.text}"
        if not of.is_let_in(who):
            outcome = "not let in"
            assert answer.status_code == 401, where
        elif meant is None or not of.sees(who, meant):
            outcome = "not there"
            absent = "nobody-called-anything-so" if by == "name" else f"{PREFIX[route.kind]}_{'0' * 32}"
            same = self._asked(who, route, absent)
            assert told(answer) == told(same), f"{where}, and of what never existed: {same.status_code} {same.text}"
            assert answer.status_code in (403, 404, 409, 422) if not route.is_steady else answer.status_code == 404, (
                where
            )
        elif not of.may(who, route.verb, meant):
            outcome = "not this"
            assert answer.status_code == 403 or not route.is_steady, where
            assert not answer.is_success, where
        else:
            outcome = "allowed"
            assert answer.status_code in route.fine or not route.is_steady, where
        foreign = "" if meant is None or meant.tenant == who.tenant else " across tenants"
        self.tally[f"{route.name}: {outcome}{foreign}"] += 1
        self._check(who, answer, meant if outcome == "allowed" else None, writes, where)
        if answer.is_success and meant is not None:
            self._note(who, route, answer, meant)
        return answer

    def _asked(self, who: Who, route: Route, thing: str) -> Response:
        usable = {row.kind: row.id for row in reversed(self.oracle.rows.values()) if row.tenant == who.tenant}
        asked = Asked(who.id, thing, usable, self.training, next(self.fresh))
        places = {"client": who.id, "number": 0, "version": 1, "role": "dealer"}
        path = route.path.format_map({**places, **dict.fromkeys(PREFIX, thing)})
        return self.send(who, route.method, path, **route.body(asked))

    def _check(
        self, who: Who, answer: Response, row: Row | None, writes: list[tuple[str, set[str]]], where: str
    ) -> None:
        """No id of a third tenant is told, nothing of one is written, and of what is refused nothing but the refusal."""
        may_be_told = {who.tenant} if row is None else self.oracle.tellable(who, row)
        owners = self.oracle.owners()
        for found in set(_ID.findall(answer.text)):
            assert found not in self.elsewhere and owners.get(found, who.tenant) in may_be_told, (
                f"{found} is told: {where}"
            )
        may_be_written = {who.tenant} if row is None else {who.tenant, row.tenant}
        for table, tenant_ids in writes:
            assert tenant_ids & self.oracle.suspended.keys() <= may_be_written, (
                f"{table} of another is written: {where}"
            )
            assert row is not None or table in _OF_REFUSALS, f"{table} is written: {where}"

    def _note(self, who: Who, route: Route, answer: Response, thing: Row) -> None:
        """What there is now that was not, and the other way round."""
        body = answer.json()
        if route.method == "DELETE" and route.kind == "dataset":
            self.oracle.deleted(thing.id)
        elif answer.status_code == 201 and route.path == "/v1/datasets":
            self._made(who, "dataset", answer, thing.tenant)
        elif answer.status_code == 201 and route.path in ("/v1/jobs", "/v1/queries"):
            tenant = self.oracle.rows[body["dataset"]].tenant
            self._made(who, "job", answer, tenant)
            if body["model"] is not None and body["model"] not in self.oracle.rows:
                self.oracle.made(who, Row("model", tenant, body["model"], ""))

    def make(self, who: Who, route: Route, *, name: str = "") -> str:
        """Something new in one's own tenant; '' where that is refused."""
        asked = Asked(who.id, "", {}, {}, name or next(self.fresh))
        with self._watched() as writes:
            answer = self.send(who, route.method, route.path, **route.body(asked))
        where = f"{route.name} by {who}: {answer.status_code} {answer.text}"
        own = self.oracle.tenant(who.tenant)
        may = self.oracle.may(who, route.verb, own)
        expected = (401,) if not self.oracle.is_let_in(who) else route.fine if may else (403,)
        assert answer.status_code in expected, where
        self.tally[f"{route.name}: {'allowed' if may else 'not this'}"] += 1
        self._check(who, answer, own, writes, where)
        return self._made(who, route.makes, answer, who.tenant) if answer.is_success else ""

    def _made(self, who: Who, kind: str, answer: Response, tenant_id: str) -> str:
        assert answer.status_code == 201, answer.text
        body = answer.json()
        self.oracle.made(who, Row(kind, tenant_id, body["id"], body.get("name", "")))
        return str(body["id"])

    def listed(self, who: Who, kind: str, *, limit: int = 200, cursor: str = "") -> list[str]:
        """The ids on all pages from the cursor on."""
        found, params = [], {"limit": limit, **({"cursor": cursor} if cursor else {})}
        while True:
            answer = self.send(who, "GET", LISTS[kind], params=params)
            assert answer.status_code == 200, answer.text
            page = answer.json()
            found += [item["id"] for item in page["items"]]
            if page["next"] is None:
                return found
            params["cursor"] = page["next"]

    @contextmanager
    def _watched(self) -> Iterator[list[tuple[str, set[str]]]]:
        """The tables that are written to meanwhile, each with the tenants that are named."""
        written: list[tuple[str, set[str]]] = []

        def note(_: Any, __: Any, sql: str, given: Any, context: Any, ___: bool) -> None:
            if found := _WRITE.match(sql):
                written.append(
                    (found[1], _tenants_in(given if context.compiled is None else context.compiled_parameters))
                )

        event.listen(self.service.engine, "before_cursor_execute", note)
        try:
            yield written
        finally:
            event.remove(self.service.engine, "before_cursor_execute", note)


def _tenants_in(parameters: Any) -> set[str]:
    """The tenants that a statement names itself. To which the ORM's gate keeps it, all that share something, its `own` says."""
    rows = parameters if isinstance(parameters, list) else [parameters]
    named = [
        row if isinstance(row, tuple) else [row[name] for name in row if not _OF_GATE.fullmatch(name)] for row in rows
    ]
    return {each for each in _ID.findall(repr(named)) if each.startswith("tn_")}


def _bearer(answer: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {answer['access_token']}"}
