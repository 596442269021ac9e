"""The audit log as it is read: tailed, followed, and exported as JSON lines and syslog, with nothing in it that is secret."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from accounts import Person
from cloister.wire.columns import Schema
from cloister.wire.rows import encode_rows
from cloister_server import audit, operators, tenants
from cloister_server.audit_lines import syslog_line
from cloister_server.cli.admin import cli
from cloister_server.service import Service
from cloister_server.store.audit_log import Entry
from cloister_server.store.session import writing

_SYSLOG = re.compile(
    r"<(?P<pri>10[89])>1 (?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) - cloister - (?P<msgid>[!-~]{1,32}) "
    r'\[cloister@32473(?P<params>(?: [!-<>-~]{1,32}="(?:[^"\\\]]|\\["\\\]])*")*)\] (?P<message>.*)'
)
"""RFC 5424, section 6, as far as we use it."""


@pytest.fixture
def admin(service: Service, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    for name in ("data_dir", "key_dir", "key_file"):
        monkeypatch.setenv(f"CLOISTER_{name.upper()}", str(getattr(service.settings, name)))
    return lambda *words: CliRunner().invoke(cli, list(words))


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout.splitlines()


@pytest.fixture
def deeds(http: TestClient, make_client: Callable[..., Any], bearer_of: Callable[..., Any]) -> tuple[list[str], Any]:
    """What a tenant did and was denied, rows and secrets included; what must be in no line about it."""
    ours, theirs = make_client("acme"), make_client("other")
    person, stranger = Person(http, ours, bearer_of(ours)), Person(http, theirs, bearer_of(theirs))
    source = person.source(unit="user")
    columns: dict[str, Any] = {"x": {"type": "number", "low": 0, "high": 1e9}, "who": {"type": "unit"}}
    body = {"source": source, "name": "rows", "columns": columns, "nominal_size": 10, "capacity": 20}
    dataset = person.told("POST", "/datasets", body | {"capacity_rows": 40})["id"]
    schema = TypeAdapter(Schema).validate_python(columns)
    who = np.frombuffer(b"secret-person-7".ljust(64, b"\0"), np.uint8)[None]
    lengths = np.array([15], np.int32)
    rows = encode_rows(schema, {"x": np.array([123456789], np.float32), "who": who, "who.length": lengths})
    digest = base64.b64encode(hashlib.sha256(rows).digest()).decode()
    sent = http.put(
        f"/v1/datasets/{dataset}/parts/0",
        content=rows,
        headers={**person.bearer, "Content-Digest": f"sha-256=:{digest}:"},
    )
    assert sent.is_success, sent.text
    assert stranger.ask("GET", f"/sources/{source}").status_code == 404
    assert person.ask("GET", f"/sources/{ours.secret}").status_code == 404
    tokens = [each.bearer["Authorization"].removeprefix("Bearer ") for each in (person, stranger)]
    return [ours.secret, theirs.secret, *tokens, "secret-person-7", "123456789", digest], (ours, theirs, source)


@pytest.mark.parametrize("kind", ["jsonl", "syslog"])
def test_an_export_tells_every_deed_and_denial_with_its_reason_and_no_secret_or_row(
    admin: Callable[..., Result], deeds: Any, tmp_path: Path, kind: str
) -> None:
    hidden, (ours, theirs, source) = deeds
    told = lines(admin("audit", "export", "--format", kind))
    assert not [secret for secret in hidden if secret in "\n".join(told)]
    to = tmp_path / "audit.log"
    done = admin("audit", "export", "--format", kind, "--to", str(to), "--json")
    assert done.exit_code == 0, done.stderr
    assert to.read_text().splitlines() == told and stat.S_IMODE(to.stat().st_mode) == 0o600
    assert "nothing is overwritten" in admin("audit", "export", "--to", str(to)).stderr
    of_theirs = lines(admin("audit", "export", "--format", kind, "--tenant", "other"))
    assert of_theirs == [line for line in told if theirs.tenant_id in line] and 0 < len(of_theirs) < len(told)
    denials = [line for line in told if "denied" in line]
    assert [theirs.id in line and source in line and "not visible" in line for line in denials] == [True, False]
    assert ours.id in denials[1] and "(neither an id nor a name)" in denials[1]
    assert lines(admin("audit", "export", "--format", kind, "--since", "2100-01-01")) == []
    assert lines(admin("audit", "export", "--format", kind, "--since", "2020-01-01")) == told


def test_the_lines_are_json_objects_with_their_links_and_syslog_messages(
    admin: Callable[..., Result], deeds: Any
) -> None:
    ours = deeds[1][0]
    read = [json.loads(line) for line in lines(admin("audit", "export"))]
    assert [each["time"] for each in read] == sorted(each["time"] for each in read)
    links = [each["link"] for each in read if each["tenant"] == ours.tenant_id]
    assert all(links) and len(set(links)) == len(links)
    assert {(each["outcome"], each["reason"] is None) for each in read} == {("allowed", True), ("denied", False)}
    for line, each in zip(lines(admin("audit", "export", "--format", "syslog")), read, strict=True):
        message = _SYSLOG.fullmatch(line)
        assert message is not None, line
        assert message["pri"] == ("109" if each["outcome"] == "allowed" else "108") and message["msgid"] == each["verb"]
        params = dict(re.findall(r' (\S+?)="((?:[^"\\\]]|\\.)*)"', message["params"]))
        assert params == {name: str(value) for name, value in each.items() if value is not None}


def test_what_would_end_a_syslog_message_or_its_data_is_escaped() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)
    entry = Entry(moment, "tn", 'a"b', "p]", "verb", "r\\e\ns", "denied: \x1b[2Jno", None, "r", "aud", None)
    line = syslog_line(entry)
    assert _SYSLOG.fullmatch(line) and line.isprintable()
    assert 'tenant_name="a\\"b"' in line and 'principal="p\\]"' in line and 'resource="r\\\\e s"' in line


def test_the_tail_is_the_newest_rows_and_follows_with_each_one_once(
    admin: Callable[..., Result], deeds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = lines(admin("audit", "export"))

    def as_exported(*arguments: str) -> list[str]:
        rows = [json.loads(line) for line in lines(admin("audit", "tail", "--json", *arguments))]
        assert {row.pop("principal_name") for row in rows} == {None}, "none of them is an operator's by a login"
        return [json.dumps(row) for row in rows]

    assert as_exported("-n", "5") == exported[-5:]
    assert as_exported("--tenant", "other", "-n", "1") == [[line for line in exported if '"other"' in line][-1]]
    acts = [
        ("tenant", "suspend", "acme"),
        ("tenant", "create", "new"),
        ("tenant", "list"),
        ("tenant", "resume", "acme"),
    ]

    def meanwhile(_: float) -> None:
        if not acts:
            raise KeyboardInterrupt
        assert CliRunner().invoke(cli, acts.pop(0)).exit_code == 0

    monkeypatch.setattr("cloister_server.cli.audit.time.sleep", meanwhile)
    followed = [json.loads(line) for line in lines(admin("audit", "tail", "--json", "--follow", "-n", "2"))]
    assert [each["verb"] for each in followed[2:]] == ["tenant.suspend", "tenant.create", "tenant.resume"]
    assert [json.dumps(each) for each in followed] == lines(admin("audit", "tail", "--json", "-n", "5"))
    told = lines(admin("audit", "tail", "-n", "1"))[0]
    assert "acme  local:" in told and "  tenant.resume  " in told and "allowed  by operator  (cli_" in told


def test_an_operators_rows_are_shown_with_the_account_beside_the_id(
    admin: Callable[..., Result], service: Service
) -> None:
    token = operators.first_admin_token(service)
    assert token is not None
    ada = operators.redeem(service, token.get_secret_value(), name="ada", request_id="request-of-a-test").user_id
    with writing(service.engine) as session:
        own = tenants.find_tenant(session, "operators")
        by_ada = tenants.operator_of(own, request_id="request-of-a-test", by=ada)
        audit.told(session, by_ada, "something", "x")
    before, last = lines(admin("audit", "tail", "-n", "2"))
    assert f"  operators  {ada} (operators/ada)  something  x  " in last
    assert "  operators  first-admin  operator.add  " in before
