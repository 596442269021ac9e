"""A version deployed privately: a real server, two parties and a dealer as their operators start them, and the SDK."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cloister
from cloister.wire.private_requests import LONGEST_PERMISSION_S
from harness import App, Deployment
from journeys import SQLITE
from private_roles import OPERATORS, PrivateRoles, right_soon, trained

pytestmark = pytest.mark.parametrize("deployment", [SQLITE], indirect=True)


@pytest.fixture
def model(client: cloister.Cloister, digits: dict[str, np.ndarray]) -> cloister.Model:
    return trained(client, digits)


@pytest.fixture
def roles(
    deployment: Deployment, client: cloister.Cloister, model: cloister.Model, tmp_path: Path
) -> Iterator[PrivateRoles]:
    """Deployed on rows of noise, and started."""
    with PrivateRoles(deployment, tmp_path / "roles") as roles:
        noise = np.random.default_rng(5).uniform(0, 16, (8, 8, 8)).astype(np.float32)
        roles.deploy(model, noise)
        roles.pin(client)
        roles.start()
        yield roles


def _forged(client: cloister.Cloister, model: cloister.Model) -> None:
    """A statement in which one letter of an operator's name was changed does not verify."""
    terms = client._sender.run(client._operations.private_terms(model.id, model.version))
    body = base64.b64decode(terms.statement["payload"]).replace(b"First Hospital", b"Worst Hospital")
    changed = {**terms.statement, "payload": base64.b64encode(body).decode()}
    operations = client._operations
    real, forged = operations.private_terms, terms.model_copy(update={"statement": changed})

    def answered(*_: object) -> Iterator[object]:
        return forged
        yield  # an operation that asks nothing

    operations.private_terms = answered  # type: ignore[method-assign]  # what a forger in between would answer
    try:
        with pytest.raises(cloister.InvalidCertificate, match="changed or forged"):
            client.private("m")
    finally:
        operations.private_terms = real  # type: ignore[method-assign]


def _join(app: App, deployment: Deployment, roles: PrivateRoles, rows: np.ndarray, clear: np.ndarray) -> None:
    """Eight clients ask for a row each at once, until some were computed as one; each gets its own answer."""
    credentials = {"client_id": app.client_id, "client_secret": app.client_secret}
    (marks,) = (roles.directory / "party-1").glob("*/burned.json")

    async def ask() -> None:
        async with contextlib.AsyncExitStack() as clients:
            private = []
            for _ in range(8):
                client = await clients.enter_async_context(cloister.AsyncCloister(deployment.url, **credentials))
                private.append(await client.private("m"))
            for _ in range(50):
                asked = (each.predict(rows[k : k + 1]) for k, each in enumerate(private))
                assert np.array_equal(np.concatenate(await asyncio.gather(*asked)), clear[:8])
                if {"2", "4", "8"} & json.loads(marks.read_text())["marks"].keys():
                    return
            raise AssertionError("nobody was joined")

    asyncio.run(ask())


def test_two_parties_answer_as_the_model_in_the_clear_and_come_back_after_a_kill(
    deployment: Deployment,
    app: App,
    client: cloister.Cloister,
    model: cloister.Model,
    roles: PrivateRoles,
    digits: dict[str, np.ndarray],
) -> None:
    rows = digits["scan"][:32]
    clear = model.predict_proba(rows)
    private = client.private("m")
    assert [party.operator for party in private.parties] == list(OPERATORS.values())[:2]
    assert private.dealer.operator == OPERATORS["dealer"]
    assert private.statement.max_error < 1e-4 and private.statement.rows_measured == 8
    right_soon(private, clear, rows)
    assert np.array_equal(private.predict(rows, decoded=True), model.predict(rows, decoded=True))

    async def asked() -> np.ndarray:
        credentials = {"client_id": app.client_id, "client_secret": app.client_secret}
        async with cloister.AsyncCloister(deployment.url, **credentials) as other:
            return await (await other.private("m")).predict(rows)

    assert np.array_equal(asyncio.run(asked()), model.predict(rows))
    _join(app, deployment, roles, rows, model.predict(rows))
    with pytest.raises(cloister.RowsNotFit, match="shape"):
        private.predict(rows[:, :4])
    with pytest.raises(cloister.InvalidArgument, match="beyond"):
        private.predict(np.full((1, 8, 8), 1e12, np.float32))

    stranger = deployment.app(app.tenant, "stranger", "none")
    with deployment.client(stranger) as other, pytest.raises(cloister.NotFound):
        other.private(model.id, version=model.version)
    _forged(client, model)

    # A party that dies: an error or a right answer, and then right answers again, the survivors as they were.
    survivors = {role: roles.running[role].pid for role in ("party-1", "dealer")}
    roles.kill("party-0")
    roles.start("party-0")
    right_soon(private, clear, rows)
    assert {role: roles.running[role].pid for role in survivors} == survivors
    assert all(roles.running[role].poll() is None for role in survivors)

    # A new generation: what the client holds is stale, and is told so before a share is sent.
    roles.records["dealer"] = roles.records["dealer"].model_copy(update={"operator": OPERATORS["party-0"]})
    with pytest.raises(cloister.InvalidRequest, match="share their operator"):
        roles.deploy(model, np.full((1, 8, 8), 3, np.float32))
    roles.deploy(model, np.full((1, 8, 8), 3, np.float32), development=True)
    with pytest.raises(cloister.PartiesNotApart, match="share their operator"):
        client.private("m")
    assert client.private("m", development=True).statement.generation == 2
    private._permissions = None  # a minute later
    with pytest.raises(cloister.StaleDeployment):
        private.predict(rows)
    model.end_private()
    with pytest.raises(cloister.Conflict, match="not deployed privately"):
        client.private("m")
    assert roles.kill("party-1", signal.SIGTERM) == 0
    assert roles.kill("dealer", signal.SIGTERM) == 0


@pytest.mark.long
@pytest.mark.parametrize("is_async", [False, True])
def test_a_client_that_waits_for_a_party_for_longer_than_a_permission_lasts_shows_it_a_fresh_one(
    is_async: bool,
    deployment: Deployment,
    app: App,
    client: cloister.Cloister,
    model: cloister.Model,
    roles: PrivateRoles,
    digits: dict[str, np.ndarray],
) -> None:
    rows = digits["scan"][:4]
    clear = model.predict(rows)
    right_soon(client.private("m"), model.predict_proba(rows), rows)
    party = roles.running["party-1"]
    going_on = threading.Timer(LONGEST_PERMISSION_S + 2, party.send_signal, (signal.SIGCONT,))

    def stand_still() -> None:
        party.send_signal(signal.SIGSTOP)
        going_on.start()

    async def asked() -> np.ndarray:
        credentials = {"client_id": app.client_id, "client_secret": app.client_secret}
        async with cloister.AsyncCloister(deployment.url, **credentials) as other:
            private = await other.private("m")
            await private.predict(rows)
            stand_still()
            return await private.predict(rows, timeout_s=300)

    try:
        if is_async:
            assert np.array_equal(asyncio.run(asked()), clear)
        else:
            private = client.private("m")
            private.predict(rows)
            stand_still()
            assert np.array_equal(private.predict(rows, timeout_s=300), clear)
    finally:
        going_on.cancel()
        party.send_signal(signal.SIGCONT)


@pytest.mark.long
def test_the_example_runs_three_roles_on_one_machine_and_says_that_nothing_is_private(
    deployment: Deployment, app: App, model: cloister.Model
) -> None:
    given = {"URL": deployment.url, "CLIENT_ID": app.client_id, "CLIENT_SECRET": app.client_secret}
    clean = {name: value for name, value in deployment.env.items() if not name.startswith("CLOISTER_")}
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[2] / "examples" / "private_inference.py", model.name],
        env=clean | {f"CLOISTER_{name}": value for name, value in given.items()},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["equal"] is True
