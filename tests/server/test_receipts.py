"""The receipt of a shredding: what it counts, what it says of each key and copy, and the command that prints it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cloister.cli import main
from cloister_server import deployment, keys, keystore_backups, shredding
from cloister_server.cli.admin import cli
from cloister_server.service import Service
from cloister_server.store.queries import public_keys
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import (
    AuditRow,
    Dataset,
    KeystoreBackup,
    LedgerEntry,
    Model,
    ModelVersion,
    TenantKey,
    new_id,
)
from houses import House, assert_nothing_is_left, count, counted, second_keystore, shred
from key_providers import ACCOUNT, kms_client

pytest_plugins = ("key_providers", "houses")
pytestmark = pytest.mark.xdist_group("key-providers")


def test_the_receipt_counts_what_was_deleted_and_what_stays_is_there(
    service: Service, furnish: Callable[[str], House]
) -> None:
    house = furnish("acme")
    objects = counted(service, house)
    kept = {
        table: count(service, table, table.tenant_id == house.id)
        for table in (Dataset, Model, ModelVersion, LedgerEntry)
    }
    rows = count(service, AuditRow, AuditRow.tenant_id == house.id)
    with reading(service.engine) as session:
        planned = shredding.plan(session, house.operator)
    receipt = shred(service, house)
    assert receipt.deleted == {
        "wrapped_keys": objects, "uploaded_weights": 1, "clients": 1, "accounts": 0, "grants": planned["grants"],
    }  # fmt: skip
    assert all(planned[name] == many for name, many in receipt.deleted.items() if name in planned)
    assert {table: count(service, table, table.tenant_id == house.id) for table in kept} == kept
    assert count(service, AuditRow, AuditRow.tenant_id == house.id) == rows + 2
    assert receipt.tenant == house.id and receipt.begun <= receipt.keys[0].destroyed <= receipt.issued
    assert {"keystore_copies", "flash", "providers", "database", "memory", "clients", "exports", "recordings"} <= set(
        receipt.not_covered
    )
    assert str(service.settings.key_cache_s) in receipt.not_covered["memory"]
    with reading(service.engine) as session:
        assert shredding.receipt(session, house.operator) == shredding.shred(service, house.operator)


def test_a_provider_that_its_customer_took_away_holds_up_no_shredding_and_the_receipt_says_so(
    service: Service, furnish: Callable[[str], House], with_providers: Callable[..., Service], tmp_path: Path
) -> None:
    house = furnish("acme")
    both = with_providers(second={**second_keystore(tmp_path), "holder": "customer"})
    keys.migrate(both, to="second", tenant_id=house.id, request_id="request-of-a-test")
    (tmp_path / "second").rename(tmp_path / "withdrawn")
    without = deployment.open_service(both.settings)
    local, withdrawn = shred(without, house).keys
    without.engine.dispose()
    assert (local.outcome, withdrawn.outcome, withdrawn.waiting_days, withdrawn.gone) == (
        "destroyed", "unreached", None, None,
    )  # fmt: skip
    assert "could not be reached" in withdrawn.claim and "the customer's to see to" in withdrawn.claim
    assert list((tmp_path / "withdrawn").glob("*.kek")), "nothing is claimed that was not done"
    assert_nothing_is_left(service, house)


def test_a_key_that_was_gone_before_is_not_said_to_have_been_destroyed(
    service: Service, furnish: Callable[[str], House]
) -> None:
    house = furnish("acme")
    with reading(service.engine) as session:
        key_id = session.get_one(TenantKey, (house.id, 1)).key_id
    service.keys.of("local").destroy_key(key_id)
    (key,) = shred(service, house).keys
    assert (key.outcome, key.waiting_days, key.gone) == ("absent", None, None)
    assert "not known" in key.claim


def test_a_customers_own_key_is_left_to_the_customer_even_where_it_is_disabled(
    service: Service, furnish: Callable[[str], House], with_providers: Callable[..., Service], kms: str
) -> None:
    house, customer = furnish("acme"), kms_client(kms)
    made = customer.create_key(KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]
    credentials = {name: ACCOUNT[name] for name in ("access_key_id", "secret_access_key")}
    held = {"kind": "aws_kms_held", "key_arn": made["Arn"], "endpoint_url": kms, **credentials}
    both = with_providers(acme=held)
    keys.migrate(both, to="acme", tenant_id=house.id, request_id="request-of-a-test")
    customer.disable_key(KeyId=made["KeyId"])
    receipt = shred(both, house)
    assert [(key.provider, key.outcome) for key in receipt.keys] == [("local", "destroyed"), ("acme", "left")]
    assert receipt.keys[1].kind == "aws_kms_held" and receipt.keys[1].gone is None
    assert customer.describe_key(KeyId=made["KeyId"])["KeyMetadata"]["KeyState"] == "Disabled"
    assert_nothing_is_left(service, house)


def test_the_receipt_names_the_backups_of_the_keystore_that_may_hold_the_keys(
    service: Service, furnish: Callable[[str], House], tmp_path: Path
) -> None:
    house = furnish("acme")
    made = keystore_backups.backup(service, tmp_path / "keystore.tar")
    with writing(service.engine) as session:
        first = session.get_one(TenantKey, (house.id, 1)).created
        session.add(KeystoreBackup(id=new_id("kb"), place="/older", created=first - timedelta(days=1)))
    keys.rotate(service, house.id, request_id="request-of-a-test")
    keys.destroy(service, house.id, version=1, request_id="request-of-a-test")
    with writing(service.engine) as session:  # it was long ago
        session.get_one(KeystoreBackup, made.id).created -= timedelta(minutes=20)
        session.get_one(TenantKey, (house.id, 1)).created -= timedelta(minutes=30)
    (copy,) = shred(service, house).keystore_copies
    assert (copy.id, copy.place, copy.keys) == (made.id, str(tmp_path / "keystore.tar"), (1,))


def test_the_command_asks_for_the_name_shows_a_plan_and_prints_a_receipt_that_verifies(
    service: Service, furnish: Callable[[str], House], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    house = furnish("acme")
    settings = service.settings
    given = {"DATA_DIR": settings.data_dir, "KEY_DIR": settings.key_dir, "KEY_FILE": settings.key_file}
    for name, value in {**given, "DATABASE_URL": settings.database_url.get_secret_value()}.items():
        monkeypatch.setenv(f"CLOISTER_{name}", str(value))
    run = CliRunner().invoke
    plan = json.loads(run(cli, ["tenant", "shred", "acme", "--dry-run"]).stdout)
    assert (plan["status"], plan["clients"], plan["uploaded_weights"]) == ("active", 1, 1) and "users" not in plan
    assert plan["keys"] == [{"version": 1, "provider": "local", "state": "active"}]
    for confirm in (["--confirm", "acne"], ["--confirm", ""], []):
        refused = run(cli, ["tenant", "shred", "acme", *confirm, "--json"])
        assert (refused.exit_code, refused.stdout, json.loads(refused.stderr)["code"]) == (1, "", "not_confirmed")
    assert json.loads(run(cli, ["tenant", "shred", "acme", "--dry-run"]).stdout) == plan
    refused = run(cli, ["tenant", "receipt", "acme"])
    assert refused.exit_code == 1 and "is not shredded" in refused.stderr and house.predict().status_code == 200

    done = run(cli, ["tenant", "shred", "acme", "--confirm", "acme", "--json"])
    assert done.exit_code == 0, (done.stderr, done.exception)
    again = run(cli, ["tenant", "shred", "acme", "--confirm", "acme", "--json"])
    assert json.loads(done.stdout) == json.loads(again.stdout)
    printed = run(cli, ["tenant", "receipt", house.id])
    assert json.loads(printed.stdout) == json.loads(done.stdout)
    (tmp_path / "receipt.json").write_text(printed.stdout)
    with reading(service.engine) as session:
        (tmp_path / "keys.json").write_text(json.dumps(public_keys(session, "certificate")))
    verify = ["verify", str(tmp_path / "receipt.json"), "--keys", str(tmp_path / "keys.json")]
    assert main(verify) == 0 and "tenant acme was shredded" in capsys.readouterr().out
    assert run(cli, ["tenant", "shred", "nobody", "--confirm", "nobody"]).exit_code == 1
    listed = json.loads(run(cli, ["tenant", "list", "--json"]).stdout)
    assert [(each["name"], each["status"]) for each in listed] == [("acme", "shredded")]
