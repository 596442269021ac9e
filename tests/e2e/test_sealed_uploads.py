"""Uploads sealed on the client, over a proxy that keeps every byte: it sees no row, and what it cuts short is taken up again."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

import cloister
from cloister.wire.recipients import RecipientKey
from cloister.wire.rows import Rows, open_form
from cloister_server import recipients, tenants, vault
from cloister_server.store.tables import Dataset, Part
from harness import App, Deployment
from journeys import SQLITE

pytestmark = pytest.mark.parametrize("deployment", [SQLITE], indirect=True)

COLUMNS: dict[str, Any] = {"note": cloister.Text(max_length=60_000), "x": cloister.Number(low=0, high=1e6)}
"""69 rows a part."""
PUBLIC: dict[str, Any] = {"columns": COLUMNS, "nominal_size": 100, "capacity": 200}
COUNT = 150
AMID_THE_SECOND_PART = 6 * 2**20
"""Sealed parts are as long as full ones: 4.1 MB each."""


@dataclass
class Wire:
    """A plain TCP proxy before the server: keeps what passes, both ways, and hangs up behind so many bytes of the client's."""

    port_behind: int
    kept: bytearray = field(default_factory=bytearray)
    hang_up_behind: int | None = None
    sent: int = 0
    listening: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}"

    def serve(self) -> None:
        with contextlib.suppress(OSError):  # closed at the test's end
            while True:
                here, _ = self.listening.accept()
                there = socket.create_connection(("127.0.0.1", self.port_behind))
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=(source, sink, source is here), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_client: bool) -> None:
        with contextlib.suppress(OSError):
            while some := source.recv(2**16):
                self.kept += some
                self.sent += len(some) if is_client else 0
                if is_client and self.hang_up_behind is not None and self.sent > self.hang_up_behind:
                    break
                sink.sendall(some)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def wire(deployment: Deployment) -> Iterator[Wire]:
    made = Wire(deployment.port)
    threading.Thread(target=made.serve, daemon=True).start()
    yield made
    made.listening.shutdown(socket.SHUT_RDWR)
    made.listening.close()


@pytest.fixture
def line(deployment: Deployment, app: App) -> str:
    """A recipient's line, as the operator hands it out."""
    with deployment._operating() as (service, session):
        operator = tenants.operator_of(tenants.find_tenant(session, app.tenant), request_id="harness")
        return recipients.create(session, operator, service)


@dataclass(frozen=True)
class Planted:
    """Rows of which each holds a text that stands nowhere else."""

    notes: list[str]
    x: np.ndarray[Any, np.dtype[np.float32]]

    @classmethod
    def fresh(cls) -> Planted:
        rng = np.random.default_rng(secrets.randbits(64))
        return cls(
            [f"planted-{secrets.token_hex(12)}" for _ in range(COUNT)], rng.uniform(1e5, 1e6, COUNT).astype("f4")
        )

    @property
    def data(self) -> dict[str, Any]:
        return {"note": self.notes, "x": self.x}

    def seen_in(self, kept: bytes | bytearray) -> int:
        """How many values of these rows are among the bytes."""
        return sum(note.encode() in kept for note in self.notes) + sum(
            self.x[at : at + 4].tobytes() in kept for at in range(0, COUNT, 4)
        )

    def is_stored(self, deployment: Deployment, dataset: cloister.Dataset) -> bool:
        parts = stored_rows(deployment, dataset.id)
        notes = [
            bytes(note[:length]).decode()
            for part in parts
            for note, length in zip(part["note"], part["note.length"], strict=True)
        ]
        return notes == self.notes and np.array_equal(np.concatenate([part["x"] for part in parts]), self.x)


def stored_rows(deployment: Deployment, dataset_id: str) -> list[Rows]:
    with deployment._operating() as (service, session):
        columns = dict(COLUMNS)
        assert session.scalars(select(Dataset.status).where(Dataset.id == dataset_id)).one() == "ready"
        parts = session.scalars(select(Part).where(Part.dataset_id == dataset_id).order_by(Part.number))
        return [
            open_form(
                columns,
                vault.open_object(session, service.blobs, tenant_id=part.tenant_id, object_id=part.object_id),
            )
            for part in parts
        ]


def test_a_proxy_sees_the_rows_of_a_plain_upload_and_none_of_a_sealed_one(
    deployment: Deployment, app: App, wire: Wire, line: str
) -> None:
    seen, unseen = Planted.fresh(), Planted.fresh()
    given = {"client_id": app.client_id, "client_secret": app.client_secret}
    with cloister.Cloister(wire.url, **given) as client:
        client.sources.create("people", epsilon=3, delta=1e-5)
        plain = client.datasets.upload("plain", seen.data, source="people", **PUBLIC)
        sealed = client.datasets.upload("sealed", unseen.data, source="people", seal_to=line, **PUBLIC)
    assert seen.seen_in(wire.kept) > COUNT and unseen.seen_in(wire.kept) == 0
    assert bytes.fromhex(RecipientKey.parse(line).id[4:]) in wire.kept, "the sealed parts went through this proxy"
    assert seen.is_stored(deployment, plain) and unseen.is_stored(deployment, sealed)


def test_a_sealed_upload_that_was_cut_short_is_taken_up_in_a_block_of_its_own(
    deployment: Deployment, app: App, wire: Wire, line: str
) -> None:
    rows, given = Planted.fresh(), {"client_id": app.client_id, "client_secret": app.client_secret}
    with cloister.Cloister(wire.url, **given, seal_to=line, max_retries=0) as client:
        client.sources.create("people", epsilon=3, delta=1e-5)
        client.sources.open_block("people", "later", reason="of a test")
        place: dict[str, Any] = {"source": "people", "block": "later", **PUBLIC}
        wire.hang_up_behind = AMID_THE_SECOND_PART
        with pytest.raises(cloister.ConnectionFailed):
            client.datasets.upload("d", rows.data, **place)
        wire.hang_up_behind = None
        assert client.datasets.get("d").status == "uploading"
        with pytest.raises(cloister.UploadDiffers):
            client.datasets.upload("d", Planted.fresh().data, **place)
        made = client.datasets.upload("d", rows.data, **place)
    assert (made.status, made.block) == ("ready", 1)
    assert rows.seen_in(wire.kept) == 0 and rows.is_stored(deployment, made)


def test_the_async_client_seals_and_takes_up_alike(deployment: Deployment, app: App, wire: Wire, line: str) -> None:
    rows, given = Planted.fresh(), {"client_id": app.client_id, "client_secret": app.client_secret}

    async def journey() -> cloister.Dataset:
        async with cloister.AsyncCloister(wire.url, **given, seal_to=line, max_retries=0) as client:
            await client.sources.create("people", epsilon=3, delta=1e-5)
            wire.hang_up_behind = AMID_THE_SECOND_PART
            with pytest.raises(cloister.ConnectionFailed):
                await client.datasets.upload("d", rows.data, source="people", **PUBLIC)
            wire.hang_up_behind = None
            return await client.datasets.upload("d", rows.data, source="people", **PUBLIC)

    made = asyncio.run(journey())
    assert rows.seen_in(wire.kept) == 0 and rows.is_stored(deployment, made)


def test_a_recipient_of_another_tenant_is_refused_by_name(deployment: Deployment, app: App, wire: Wire) -> None:
    elsewhere = deployment.tenant(f"t{secrets.token_hex(6)}")
    with deployment._operating() as (service, session):
        operator = tenants.operator_of(tenants.find_tenant(session, elsewhere), request_id="harness")
        theirs = recipients.create(session, operator, service)
    rows = Planted.fresh()
    with cloister.Cloister(wire.url, client_id=app.client_id, client_secret=app.client_secret) as client:
        client.sources.create("people", epsilon=3, delta=1e-5)
        with pytest.raises(cloister.InvalidRequest, match="current recipient line from its operator") as told:
            client.datasets.upload("d", rows.data, source="people", seal_to=theirs, **PUBLIC)
    assert told.value.code == "sealed_part_refused" and rows.seen_in(wire.kept) == 0
