"""What is to be had of a private deployment: all memory and all files of its roles, and all that passes on every link."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import cloister
from cloister._parties import Parties
from cloister.wire.private_deployments import ROLES
from cloister.wire.shares import join
from cloister_privacy.mpc import open_role_file
from cloister_server.roles import identity
from harness import Deployment
from journeys import SQLITE
from mpc_processes import memory_of
from private_roles import LISTEN, PrivateRoles, is_answered, right_soon, trained
from recording_proxy import Way, recording, tls_payload
from uniformity import require_uniform

pytestmark = [pytest.mark.long, pytest.mark.parametrize("deployment", [SQLITE], indirect=True)]

REQUESTS = 100
_WINDOW = 16
"""Bytes: two numbers or four, one behind the other."""
_TOLD = 10
"""The digits of a number in a text, at least."""


def _planted(numbers: NDArray[Any]) -> list[bytes]:
    """The first numbers as any of us would keep them: floats, fixed point before and after a truncation, and words."""
    flat = np.asarray(numbers).reshape(-1)
    flat = flat[np.abs(flat) > 1e-3][:8]  # none that is short in words
    forms = [flat.astype(np.float32), flat.astype(np.float64)]
    forms += [np.rint(flat.astype(np.float64) * 2.0**bits).astype(np.int64) for bits in (20, 40)]
    words = [repr(float(each))[:_TOLD].encode() for each in (flat[0], flat.astype(np.float64)[1])]
    return [form.tobytes()[:_WINDOW] for form in forms] + words


def _weights(roles: PrivateRoles, keys: Mapping[str, Any]) -> tuple[dict[str, NDArray[np.float64]], list[bytes]]:
    """Of both shares together, as nobody has them; and some bytes of each party's share."""
    shares = []
    for role in ROLES[:2]:
        me = identity.read(roles.directory / role)
        body = (roles.directory / f"{role}.role").read_bytes()
        opened = open_role_file(body, me.opens, certificate_digest=me.record.digest, keys=keys)
        assert opened.weights is not None
        shares.append((opened.weights, opened.network.fraction_bits))
    (first, bits), (second, _) = shares
    joined = {name: join((first[name], second[name])).view(np.int64) / 2.0**bits for name in first}
    largest = max(first, key=lambda name: first[name].size)
    return joined, [share[largest].tobytes()[:_WINDOW] for share, _ in shares]


@pytest.fixture
def network(client: cloister.Cloister, digits: dict[str, np.ndarray]) -> cloister.Model:
    """With a comparison in it."""
    hidden = cloister.layers.Linear(in_features=64, out_features=16)
    return trained(client, digits, hidden, cloister.layers.ReLU(), features=16)


@contextlib.contextmanager
def _started(roles: PrivateRoles, model: cloister.Model, client: cloister.Cloister) -> Iterator[cloister.PrivateModel]:
    with roles:
        roles.deploy(model, np.random.default_rng(5).uniform(0, 16, (8, 8, 8)).astype(np.float32))
        roles.pin(client)
        roles.start()
        private = client.private("m")
        yield private


def _rows(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(1000 + number).uniform(0, 16, (2, 8, 8)).astype(np.float32)


def _asked(
    private: cloister.PrivateModel, model: cloister.Model, requests: int, monkeypatch: pytest.MonkeyPatch
) -> list[bytes]:
    """What must be nowhere: rows, as they are and as they are shared, and answers, of the first request and the last."""
    secrets: list[NDArray[Any]] = []
    ask = Parties.ask

    def noted(self: Parties, inputs: Mapping[str, NDArray[np.float64]], *more: Any) -> NDArray[np.float64]:
        found = ask(self, inputs, *more)
        secrets.extend((*inputs.values(), found))
        return found

    rows = [_rows(number) for number in range(requests)]
    clear = {number: model.predict_proba(rows[number]) for number in (0, requests - 1)}
    right_soon(private, clear[0], rows[0])
    with monkeypatch.context() as patched:
        patched.setattr(Parties, "ask", noted)
        for number, each in enumerate(rows):
            if number in clear:
                assert is_answered(private, clear[number], each)
                secrets += [each, clear[number]]
                continue
            private.predict(each)
    ends = [*secrets[:4], *secrets[-4:]]
    return [window for numbers in ends for window in _planted(numbers)]


def test_no_role_holds_a_number_in_the_clear_in_all_its_memory_and_files_after_a_hundred_requests(
    deployment: Deployment,
    client: cloister.Cloister,
    network: cloister.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each party's own share is found there, so what is looked for would be."""
    roles = PrivateRoles(deployment, tmp_path / "roles")
    with _started(roles, network, client) as private:
        planted = _asked(private, network, REQUESTS, monkeypatch)
        weights, own = _weights(roles, client.certificate_keys())
        planted += [window for each in weights.values() for window in _planted(each)]
        for role in ROLES:
            held, seen = set[bytes](), 0
            files = [roles.directory / f"{role}.log", roles.directory / f"{role}.role"]
            files += [path for path in (roles.directory / role).rglob("*") if path.is_file()]
            for image in (*memory_of(roles.running[role].pid), *(path.read_bytes() for path in files)):
                seen += len(image)
                held |= {each for each in (*planted, *own) if each in image}
            assert seen > 2**26, "a process that has loaded torch has much memory"
            assert held == ({own[ROLES.index(role)]} if role != "dealer" else set())


def test_every_link_carries_tls_1_3_alone_and_nothing_that_was_planted(
    deployment: Deployment,
    client: cloister.Cloister,
    network: cloister.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy stands before each port of each role, those for clients too: whoever comes, comes through it."""
    ways: list[Way] = []
    roles = PrivateRoles(deployment, tmp_path / "roles", is_behind=True)
    links = {("party-0", "party-1"): roles.records["party-0"].port, ("dealer", "parties"): roles.records["dealer"].port}
    links |= {(role, "clients"): roles.records[role].client_port or 0 for role in ROLES[:2]}
    with contextlib.ExitStack() as proxies:
        for (role, whose), port in links.items():
            listen, to = (roles.records[role].host, port), (LISTEN[role], port)
            proxies.enter_context(recording(listen, to, ways, link=f"{role} from {whose}"))
        with _started(roles, network, client) as private:
            planted = _asked(private, network, 10 if os.environ.get("SHORT") else REQUESTS, monkeypatch)
            weights, own = _weights(roles, client.certificate_keys())
            planted += [*own, *(window for each in weights.values() for window in _planted(each))]
            assert private._permissions is not None
            planted += [each.encode()[:64] for each in private._permissions.permissions]
            planted += [private.statement.id.encode(), b"generation", b"cloister."]
    assert not any(each in way.passed for way in ways for each in planted)
    for role, whose in links:
        there, back = (
            b"".join(
                tls_payload(way) for way in ways if (way.link, way.is_from_client) == (f"{role} from {whose}", each)
            )
            for each in (True, False)
        )
        assert there and back
        require_uniform(there + back)
