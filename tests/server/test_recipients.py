"""Sealed uploads at the server: they store what plain ones store, open for their own place alone, and end with their recipient."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import TypeAdapter
from sqlalchemy import func, select
from starlette.testclient import TestClient

import cloister
from asked import asked_reading
from cloister.wire.columns import Schema
from cloister.wire.recipients import SEALED_ROWS_TYPE, RecipientKey, padded_bytes, seal_part
from cloister.wire.rows import decode_rows, encode_rows
from cloister_server import keys, policy, recipients, tenants, vault
from cloister_server.errors import Invalid, TenantKeyRefused
from cloister_server.principal import Principal
from cloister_server.recipients import SealedPartRefused
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, Part, SealedObject, Tenant, TenantKey

COLUMNS: dict[str, Any] = {
    "note": {"type": "text", "max_length": 60_000},
    "x": {"type": "number", "low": 0, "high": 1e6},
}
SCHEMA = TypeAdapter(Schema).validate_python(COLUMNS)
CAPACITY = 100
"""Two parts: of 69 rows and of 31."""
PLANTED = b"planted-in-a-row-and-nowhere-else"


class Uploader:
    """One client's requests, as raw as they go over the wire."""

    def __init__(self, http: TestClient, bearer: dict[str, str]) -> None:
        self.http, self.bearer = http, bearer

    def declare(self, name: str) -> str:
        source = self.http.post(
            "/v1/sources", json={"name": f"of-{name}", "epsilon": 3, "delta": 1e-5}, headers=self.bearer
        )
        body = {"source": source.json()["id"], "name": name, "columns": COLUMNS, "nominal_size": 50, "capacity": 100}
        answer = self.http.post("/v1/datasets", json=body, headers=self.bearer)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def put(
        self, dataset: str, number: int, body: bytes, *, content_type: str | None = SEALED_ROWS_TYPE, key: str = ""
    ) -> Any:
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = {**self.bearer, "Content-Digest": f"sha-256=:{digest}:"}
        headers |= {"Content-Type": content_type} if content_type else {}
        headers |= {"Idempotency-Key": key} if key else {}
        return self.http.put(f"/v1/datasets/{dataset}/parts/{number}", content=body, headers=headers)


def body_of(count: int = 3, *, seed: int = 0) -> bytes:
    notes = np.zeros((count, 60_000), np.uint8)
    notes[:, : len(PLANTED)] = np.frombuffer(PLANTED, np.uint8)
    x = np.random.default_rng(seed).random(count, dtype=np.float32)
    lengths = np.full(count, len(PLANTED), np.int32)
    return encode_rows(SCHEMA, {"note": notes, "note.length": lengths, "x": x})


def sealed_for(line: str, dataset: str, number: int, body: bytes) -> bytes:
    size = padded_bytes(SCHEMA, capacity_rows=CAPACITY, part=number)
    return seal_part(RecipientKey.parse(line), body, dataset=dataset, part=number, padded_to=size)


def stored(service: Service, dataset: str, number: int) -> bytes:
    """What the stored part opens to."""
    with asked_reading(service) as session:
        part = session.scalars(select(Part).where(Part.dataset_id == dataset, Part.number == number)).one()
        place = {"tenant_id": part.tenant_id, "object_id": part.object_id}
        return vault.open_object(session, service.blobs, **place)


def operator_of(service: Service, name: str) -> Principal:
    return service.read(
        ALL_TENANTS,
        lambda session: tenants.operator_of(tenants.find_tenant(session, name), request_id="request-of-a-test"),
    )


def new_recipient(service: Service, name: str = "acme") -> str:
    return service.write(ALL_TENANTS, lambda session: recipients.create(session, operator_of(service, name), service))


def lines_of(service: Service, name: str = "acme") -> list[str]:
    return service.read(ALL_TENANTS, lambda session: recipients.listed(session, operator_of(service, name), service))


@pytest.fixture
def uploader(http: TestClient, bearer: dict[str, str]) -> Uploader:
    return Uploader(http, bearer)


@pytest.fixture
def line(service: Service, steward: Any) -> str:
    return new_recipient(service)


def test_a_sealed_part_stores_the_very_bytes_of_a_plain_one(uploader: Uploader, service: Service, line: str) -> None:
    plain, sealed, body = uploader.declare("plain"), uploader.declare("sealed"), body_of()
    assert uploader.put(plain, 0, body, content_type=None).status_code == 201
    sent = sealed_for(line, sealed, 0, body)
    assert uploader.put(sealed, 0, sent).json() == {"part": 0}
    assert stored(service, sealed, 0) == stored(service, plain, 0) and PLANTED in stored(service, plain, 0)
    again = uploader.put(sealed, 0, sealed_for(line, sealed, 0, body))
    assert again.json()["details"] == {"part_exists": True, "same_content": True}
    unsealed = uploader.put(sealed, 0, body, content_type="application/vnd.cloister.rows")
    assert unsealed.json()["details"] == {"part_exists": True, "same_content": True}
    other = uploader.put(sealed, 0, sealed_for(line, sealed, 0, body_of(seed=1)))
    assert other.json()["details"] == {"part_exists": True, "same_content": False}
    for each in (plain, sealed):
        assert uploader.http.post(f"/v1/datasets/{each}/complete", headers=uploader.bearer).status_code == 200


def test_a_retry_of_a_sealed_part_is_answered_by_its_bytes(uploader: Uploader, line: str) -> None:
    dataset, body = uploader.declare("d"), body_of()
    sent = sealed_for(line, dataset, 0, body)
    first, again = (uploader.put(dataset, 0, sent, key="the-same") for _ in range(2))
    assert first.status_code == again.status_code == 201 and again.headers["idempotency-replayed"] == "true"
    anew = uploader.put(dataset, 0, sealed_for(line, dataset, 0, body), key="the-same")
    assert anew.json()["code"] == "idempotency_mismatch"


@pytest.mark.parametrize(
    "content_type", [SEALED_ROWS_TYPE.upper(), f"{SEALED_ROWS_TYPE}; q=1", f" {SEALED_ROWS_TYPE} "]
)
def test_the_media_type_is_read_as_http_writes_it(uploader: Uploader, line: str, content_type: str) -> None:
    dataset = uploader.declare("d")
    answer = uploader.put(dataset, 0, sealed_for(line, dataset, 0, body_of()), content_type=content_type)
    assert answer.status_code == 201, answer.text


def test_a_body_is_what_its_type_says_and_nothing_else(uploader: Uploader, line: str) -> None:
    dataset = uploader.declare("d")
    assert uploader.put(dataset, 0, body_of()).json()["code"] == "sealed_part_refused"
    for content_type in (None, "application/vnd.cloister.rows"):
        sealed = uploader.put(dataset, 0, sealed_for(line, dataset, 0, body_of()), content_type=content_type)
        assert sealed.json()["code"] == "rows_refused"


def test_rows_are_not_believed_because_they_were_sealed(uploader: Uploader, line: str) -> None:
    dataset = uploader.declare("d")
    wrong = encode_rows(SCHEMA, {**decode_rows(SCHEMA, body_of()), "x": np.array([1, 2e6, 3], np.float32)})
    answer = uploader.put(dataset, 0, sealed_for(line, dataset, 0, wrong))
    assert answer.status_code == 422 and answer.json()["details"]["column"] == "x"


def test_whatever_does_not_open_is_refused_in_the_same_words(
    uploader: Uploader,
    service: Service,
    make_client: Callable[..., Any],
    line: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset, another, body = uploader.declare("d"), uploader.declare("another"), body_of()
    make_client("other")
    theirs, mine = RecipientKey.parse(new_recipient(service, "other")), RecipientKey.parse(line)
    sent = sealed_for(line, dataset, 0, body)
    flipped = bytearray(sent)
    flipped[-30] ^= 1
    unknown = RecipientKey(mine.tenant, "rcp_" + "0" * 32, mine.public)
    of_no_recipient = RecipientKey(
        mine.tenant, "rcp_" + "1" * 32, X25519PrivateKey.generate().public_key().public_bytes_raw()
    )
    with reading(service.engine) as session:
        other_kind = session.scalars(select(SealedObject.id).where(SealedObject.kind != "recipient")).all()
    assert not any(each.startswith("rcp_") for each in other_kind)
    wrong = {
        "another dataset": sealed_for(line, another, 0, body),
        "another part": sealed_for(line, dataset, 1, body),
        "another tenant's recipient": sealed_for(str(theirs), dataset, 0, body),
        "another tenant's key under our id": sealed_for(
            str(RecipientKey(mine.tenant, mine.id, theirs.public)), dataset, 0, body
        ),
        "our key for another tenant": sealed_for(
            str(RecipientKey(theirs.tenant, mine.id, mine.public)), dataset, 0, body
        ),
        "an unknown recipient with our key": sealed_for(str(unknown), dataset, 0, body),
        "an unknown recipient": sealed_for(str(of_no_recipient), dataset, 0, body),
        "a bit": bytes(flipped),
        "cut": sent[:-1],
        "the head alone": sent[:39],
        "nothing": b"",
        "another version": sent.replace(b"sealed/1", b"sealed/2", 1),
    }
    caplog.set_level(logging.DEBUG)
    told = {name: uploader.put(dataset, 0, each) for name, each in wrong.items()}
    for name, answer in told.items():
        assert answer.status_code == 422, name
        assert answer.json() | {"request_id": ""} == {
            "error": SealedPartRefused().message, "code": "sealed_part_refused", "request_id": "", "details": {},
        }, name  # fmt: skip
    assert "get the tenant's current recipient line from its operator" in SealedPartRefused().message
    assert PLANTED.decode() not in caplog.text
    with reading(service.engine) as session:
        assert session.scalar(select(func.count()).select_from(Part)) == 0
    assert uploader.put(dataset, 0, sent).status_code == 201


def test_only_who_may_upload_learns_whether_a_part_opens(
    uploader: Uploader, make_client: Callable[..., Any], bearer_of: Callable[[Any], dict[str, str]], line: str
) -> None:
    dataset = uploader.declare("d")
    sent = sealed_for(line, dataset, 0, body_of())
    for client, status in ((make_client(role="trainer"), 403), (make_client("other"), 404)):
        stranger = Uploader(uploader.http, bearer_of(client))
        answers = [stranger.put(dataset, 0, each) for each in (sent, sent[:-1])]
        assert [answer.status_code for answer in answers] == [status, status]


def test_a_removed_recipient_opens_nothing_and_the_others_go_on(
    uploader: Uploader, service: Service, line: str
) -> None:
    dataset, kept = uploader.declare("d"), new_recipient(service)
    assert lines_of(service) == [line, kept] and line != kept
    assert uploader.put(dataset, 0, sealed_for(line, dataset, 0, body_of())).status_code == 201
    operator, removed = operator_of(service, "acme"), RecipientKey.parse(line).id
    with writing(service.engine) as session:
        recipients.remove(session, operator, service, removed)
    assert lines_of(service) == [kept]
    late = uploader.put(dataset, 1, sealed_for(line, dataset, 1, body_of()))
    assert (late.status_code, late.json()["code"]) == (422, "sealed_part_refused")
    assert uploader.put(dataset, 1, sealed_for(kept, dataset, 1, body_of())).status_code == 201
    assert PLANTED in stored(service, dataset, 0)
    with reading(service.engine) as session:
        verbs = (AuditRow.verb == "recipient.create") | (AuditRow.verb == "recipient.remove")
        rows = session.scalars(select(AuditRow).where(verbs).order_by(AuditRow.time)).all()
    told = [(row.verb, row.resource_id, row.outcome, row.grant_id) for row in rows]
    assert told == [
        ("recipient.create", removed, "allowed", "operator"),
        ("recipient.create", RecipientKey.parse(kept).id, "allowed", "operator"),
        ("recipient.remove", removed, "allowed", "operator"),
    ]


def test_what_is_no_recipient_of_the_tenant_is_not_removed(
    uploader: Uploader, service: Service, make_client: Callable[..., Any], line: str
) -> None:
    dataset = uploader.declare("d")
    assert uploader.put(dataset, 0, body_of(), content_type=None).status_code == 201
    make_client("other")
    theirs = RecipientKey.parse(new_recipient(service, "other")).id
    with reading(service.engine) as session:
        part = session.scalars(select(Part.object_id)).one()
    for each in (part, theirs, "units", "rcp_" + "0" * 32):
        with writing(service.engine) as session, pytest.raises(Invalid, match="no recipient"):
            recipients.remove(session, operator_of(service, "acme"), service, each)
    assert PLANTED in stored(service, dataset, 0) and len(lines_of(service, "other")) == 1


def test_recipients_are_the_operators_alone(service: Service, steward: Any, line: str) -> None:
    for act in (
        lambda session: recipients.create(session, steward.principal, service),
        lambda session: recipients.listed(session, steward.principal, service),
        lambda session: recipients.remove(session, steward.principal, service, RecipientKey.parse(line).id),
    ):
        with pytest.raises(policy.Denied):
            service.read(ALL_TENANTS, act)
    assert lines_of(service) == [line]


def test_the_private_key_is_nowhere_and_the_line_is_the_same_at_every_look(service: Service, line: str) -> None:
    assert lines_of(service) == lines_of(service) == [line]
    named = RecipientKey.parse(line)
    with asked_reading(service) as session:
        row = session.get_one(SealedObject, (named.tenant, named.id))
        key = vault.data_key(session, tenant_id=named.tenant, object_id=named.id)
        assert (row.kind, key.context.kind) == ("recipient", "recipient")
    assert key.secret not in row.wrapped_key
    as_it_is = X25519PrivateKey.from_private_bytes(key.secret).public_key().public_bytes_raw()
    assert as_it_is != named.public, "the data key is not the private key itself: it derives it"


def test_a_recipient_outlives_a_change_of_its_tenants_key(uploader: Uploader, service: Service, line: str) -> None:
    dataset, tenant_id = uploader.declare("d"), RecipientKey.parse(line).tenant
    assert keys.rotate(service, tenant_id, request_id="request-of-a-test").rewrapped == 1
    keys.destroy(service, tenant_id, version=1, request_id="request-of-a-test")
    assert lines_of(service) == [line]
    assert uploader.put(dataset, 0, sealed_for(line, dataset, 0, body_of())).status_code == 201


def test_a_recipient_ends_with_its_tenants_key(uploader: Uploader, service: Service, line: str) -> None:
    dataset = uploader.declare("d")
    with writing(service.engine) as session:
        tenant_id = session.scalars(select(Tenant.id).where(Tenant.name == "acme")).one()
        key = session.scalars(select(TenantKey).where(TenantKey.tenant_id == tenant_id)).one()
    service.keys.of(key.provider).destroy_key(key.key_id)
    answer = uploader.put(dataset, 0, sealed_for(line, dataset, 0, body_of()))
    assert (answer.status_code, answer.json()["code"]) == (403, "tenant_key_refused")
    with pytest.raises(TenantKeyRefused):
        lines_of(service)


class Recorder(httpx2.BaseTransport):
    """Passes requests on, and keeps every byte of them."""

    def __init__(self, to: httpx2.BaseTransport) -> None:
        self.to, self.bytes = to, bytearray()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.bytes += f"{request.method} {request.url}\n".encode()
        self.bytes += b"".join(name + b": " + value + b"\n" for name, value in request.headers.raw) + request.read()
        return self.to.handle_request(request)


@pytest.mark.parametrize("is_sealed", [True, False])
def test_no_byte_that_the_client_sent_is_of_a_row(
    http: TestClient, service: Service, steward: Any, line: str, is_sealed: bool
) -> None:
    recorder = Recorder(http._transport)
    numbers = np.float32([12345.678, 54321.123])
    rows = {"note": [PLANTED.decode()] * 2, "x": numbers}
    with cloister.Cloister(
        "http://127.0.0.1",
        client_id=steward.id,
        client_secret=steward.secret,
        seal_to=line if is_sealed else None,
        _transport=recorder,
    ) as client:
        client.sources.create("people", epsilon=3, delta=1e-5)
        columns = {"note": cloister.Text(max_length=60_000), "x": cloister.Number(low=0, high=1e6)}
        made = client.datasets.upload("d", rows, source="people", columns=columns, nominal_size=50, capacity=CAPACITY)
    assert (PLANTED in recorder.bytes) == (numbers.tobytes() in recorder.bytes) == (not is_sealed)
    assert PLANTED in stored(service, made.id, 0) and numbers.tobytes() in stored(service, made.id, 0)


def test_the_description_of_the_api_names_both_media_types(http: TestClient) -> None:
    path = http.get("/openapi.json").json()["paths"]["/v1/datasets/{dataset}/parts/{number}"]
    assert set(path["put"]["requestBody"]["content"]) == {"application/vnd.cloister.rows", SEALED_ROWS_TYPE}
