"""Two operators for a tenant's end: what one asks, another does within a day, and neither does alone."""

from __future__ import annotations

import json
import os
import pwd
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from asked import asked_writing
from cloister_server import approvals, shredding, tenants
from cloister_server.cli.admin import cli
from cloister_server.errors import Conflict
from cloister_server.operations.definition import Acting
from cloister_server.operations.tenants import Approve, approve
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, Tenant, now


@pytest.fixture
def tenant_id(service: Service) -> str:
    with asked_writing(service) as session:
        made = tenants.create_tenant(session, service.keys, name="acme", request_id="r", two_person=True)
        return made.id


def operator(tenant_id: str, name: str) -> Principal:
    return Principal(tenant_id, name, "operator", f"request-of-{name}")


def set_two_persons(service: Service, who: Principal, *, required: bool) -> approvals.Approvals:
    with writing(service.engine) as session:
        return approvals.set_two_persons(session, who, required=required)


def told(service: Service, tenant_id: str) -> approvals.Approvals:
    with reading(service.engine) as session:
        return approvals.told(session.get_one(Tenant, tenant_id))


def require_refused(service: Service, who: Principal) -> None:
    with pytest.raises(Conflict) as refusal:
        shredding.shred(service, who)
    assert refusal.value.code == "needs_another_operator"
    with reading(service.engine) as session:
        assert session.get_one(Tenant, who.tenant_id).status == "active"


def test_what_one_operator_asks_another_does_and_the_log_names_both(service: Service, tenant_id: str) -> None:
    ada, bob = operator(tenant_id, "ada"), operator(tenant_id, "bob")
    require_refused(service, ada)
    first = shredding.ask(service, ada)
    assert first is not None and first.by == "ada" and first == shredding.ask(service, ada)
    require_refused(service, ada)
    assert told(service, tenant_id).requests == [first]
    assert shredding.ask(service, bob) is None
    receipt = shredding.shred(service, bob)
    assert shredding.ask(service, ada) is None and shredding.shred(service, ada) == receipt
    with reading(service.engine) as session:
        rows = session.execute(select(AuditRow.verb, AuditRow.principal_id, AuditRow.request_id)).all()
    acts = {tuple(row) for row in rows if row.verb.startswith("tenant.shred")}
    assert acts == {
        ("tenant.shred_ask", "ada", "request-of-ada"),
        ("tenant.shred_approve", "bob", "request-of-bob"),
        ("tenant.shred", "bob", "request-of-bob"),
        ("tenant.shredded", "bob", "request-of-bob"),
    }


def test_a_request_is_none_after_its_day_and_when_it_is_withdrawn(service: Service, tenant_id: str) -> None:
    ada, bob = operator(tenant_id, "ada"), operator(tenant_id, "bob")
    asked = shredding.ask(service, ada)
    assert asked is not None
    with writing(service.engine) as session:
        tenant = session.get_one(Tenant, tenant_id)
        past = (now() - timedelta(seconds=1)).isoformat()
        tenant.approvals = {"shred": {**tenant.approvals["shred"], "until": past}}  # type: ignore[index]  # it is there
    assert told(service, tenant_id).requests == []
    require_refused(service, bob)
    asked = shredding.ask(service, bob)
    assert asked is not None and asked.by == "bob"
    with writing(service.engine) as session:
        assert approvals.withdraw(session, ada).requests == []
    require_refused(service, ada)


def test_turning_it_off_takes_two_as_well_and_one_request_is_not_the_other(service: Service, tenant_id: str) -> None:
    ada, bob = operator(tenant_id, "ada"), operator(tenant_id, "bob")
    asked = set_two_persons(service, ada, required=False)
    assert asked.two_person and [(each.deed, each.by) for each in asked.requests] == [("one_person", "ada")]
    assert set_two_persons(service, ada, required=False) == asked
    require_refused(service, bob)
    done = set_two_persons(service, bob, required=False)
    assert (done.two_person, done.requests) == (False, [])
    assert set_two_persons(service, ada, required=True).two_person
    require_refused(service, ada)
    assert set_two_persons(service, bob, required=False).two_person, "what was asked before counts no more"


def test_the_end_of_a_tenant_that_takes_one_operator_is_not_asked_for(service: Service, tenant_id: str) -> None:
    ada, bob = operator(tenant_id, "ada"), operator(tenant_id, "bob")
    set_two_persons(service, ada, required=False)
    set_two_persons(service, bob, required=False)
    with pytest.raises(Conflict, match="takes one operator"), asked_writing(service) as session:
        approvals.ask_end(session, ada)


def test_the_commands_ask_show_and_do_it_for_the_users_of_the_machine(
    service: Service, tenant_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data_dir", "key_dir", "key_file"):
        monkeypatch.setenv(f"CLOISTER_{name.upper()}", str(getattr(service.settings, name)))

    def admin(*words: str) -> Any:
        done = CliRunner().invoke(cli, ["tenant", *words, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    me = f"local:{pwd.getpwuid(os.geteuid()).pw_name}"
    assert admin("shred", "acme", "--dry-run")["approvals"]["two_person"]
    asked = admin("shred", "acme", "--confirm", "acme")["request"]
    assert asked["by"] == me and admin("shred", "acme", "--confirm", "acme")["request"] == asked
    (listed,) = admin("list")
    assert listed["two_person"] and listed["requests"] == [asked] == admin("approvals", "acme")["requests"]
    assert admin("approvals", "acme", "--withdraw", "--dry-run")["requests"] == []
    until = datetime.fromisoformat(asked["until"])
    for shown in (["tenant", "list"], ["tenant", "approvals", "acme"]):
        told = CliRunner().invoke(cli, shown).output
        assert f"{asked['deed']} by {asked['by']} until {until:%Y-%m-%d %H:%M}" in told
        assert "asked_for" in told and "{" not in told and "requests" not in told
    assert admin("approvals", "acme", "--withdraw")["requests"] == []
    elsewhere = Acting("us_1", "request-of-a-test", is_local=False)
    with asked_writing(service) as session:
        asked = approve.work(session, service, elsewhere, Approve(tenant="acme", shred=True))
    assert [(each["deed"], each["by"]) for each in asked["requests"]] == [("shred", "us_1")]
    assert admin("shred", "acme", "--confirm", "acme")["payloadType"]
    assert admin("list")[0]["status"] == "shredded"
