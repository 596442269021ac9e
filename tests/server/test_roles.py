"""A role beside its arithmetic: its identity on disk, who waits in what order, and what a start is refused for."""

from __future__ import annotations

import json
import logging
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cloister.wire.private_requests import PERMISSION_TYPE
from cloister.wire.shares import Shares, decode, join
from cloister_privacy.mpc import RequestDropped
from cloister_privacy.mpc.keystream import Index
from cloister_privacy.mpc.marks import Marks
from cloister_server.cli.server import cli
from cloister_server.errors import StartRefused
from cloister_server.oauth.fetching import MOST_BYTES, NotFetched
from cloister_server.roles import identity, permissions, serving
from cloister_server.roles.permissions import NotPermitted, Permissions, fetched_keys
from cloister_server.roles.waiting import Busy, Held, Queue, Request
from issuers import be_patient, elsewhere, send_json
from keys_of_clients import Signer
from mpc_groups import Group, Running, shares_of, small_network


def request(caller: str, number: int = 0, *, rows: int = 1) -> Request:
    return Request(caller, Shares("dep", number.to_bytes(16), 0, {"x": np.zeros(rows, np.uint64)}))


def taken(queue: Queue, *, most_rows: int = 1) -> list[tuple[str, int]]:
    return [(each.caller, int.from_bytes(each.shares.request)) for each in queue.take(wait_s=0, most_rows=most_rows)]


def test_callers_take_turns_and_each_ones_requests_keep_their_order() -> None:
    queue = Queue(most=10, most_each=5)
    for caller, number in (("a", 1), ("a", 2), ("a", 3), ("b", 1), ("c", 1), ("b", 2)):
        queue.put(request(caller, number))
    assert [*taken(queue), *taken(queue)] == [("a", 1), ("b", 1)]
    assert taken(queue, most_rows=4) == [("c", 1), ("a", 2), ("b", 2), ("a", 3)]


class Turns:
    """Who comes when, if each is taken alone."""

    def __init__(self) -> None:
        self.of: dict[str, list[Request]] = {}

    def leave(self, gone: Request) -> None:
        self.of[gone.caller].remove(gone)
        if not self.of[gone.caller]:
            del self.of[gone.caller]

    def take(self) -> Request:
        caller = next(iter(self.of))
        first, *others = self.of.pop(caller)
        if others:
            self.of[caller] = others
        return first

    def order(self) -> list[Request]:
        copy = Turns()
        copy.of = {caller: list(requests) for caller, requests in self.of.items()}
        return [copy.take() for _ in range(sum(map(len, self.of.values())))]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.just("put"), st.sampled_from("abc"), st.sampled_from([1, 1, 1, 1, 2, 3, 4, 5, 8, 20]))
        | st.tuples(st.just("leave"), st.integers(0, 30), st.just(0))
        | st.tuples(st.just("take"), st.sampled_from([1, 2, 4, 8, 16]), st.just(0)),
        max_size=60,
    )
)
def test_those_next_in_turn_are_joined_to_the_most_rows_that_are_a_power_of_two(events: list[Any]) -> None:
    queue, turns = Queue(most=100, most_each=100), Turns()
    for number, (kind, which, rows) in enumerate([*events, *[("take", 4, 0)] * len(events)]):
        order = turns.order()
        if kind == "put":
            new = request(which, number, rows=rows)
            queue.put(new)
            turns.of.setdefault(which, []).append(new)
        elif kind == "leave" and order:
            gone = order[which % len(order)]
            assert gone.answer.cancel()
            turns.leave(gone)
        elif kind == "take":
            found = queue.take(wait_s=0, most_rows=which)
            assert [turns.take() for _ in found] == found == order[: len(found)]
            totals = [sum(each.rows for each in order[:count]) for count in range(1, len(order) + 1)]
            joined = [count for count, total in enumerate(totals, 1) if total in (1, 2, 4, 8, 16) and total <= which]
            assert len(found) == max(joined, default=min(1, len(order)))
    assert not turns.of and queue.left() == [], "each was taken or had left"


@pytest.mark.parametrize("place", [Queue, Held])
def test_whoever_comes_when_all_places_are_taken_is_told_so(place: Callable[..., Queue | Held]) -> None:
    waiting = place(most=3, most_each=2)
    first = request("a", 1)
    waiting.put(first)
    waiting.put(request("a", 2))
    with pytest.raises(Busy):
        waiting.put(request("a", 3))
    waiting.put(request("b", 4))
    with pytest.raises(Busy):
        waiting.put(request("c", 5))
    assert first.answer.cancel(), "who leaves makes room"
    waiting.put(request("c", 6))
    assert [each.caller for each in waiting.left()] == ["a", "b", "c"] and waiting.left() == []


def test_a_request_that_nobody_waits_for_is_not_taken() -> None:
    queue, held = Queue(most=3, most_each=3), Held(most=3, most_each=3)
    for waiting in (queue, held):
        gone = request("a", 1)
        waiting.put(gone)
        gone.answer.cancel()
    assert queue.take(wait_s=0, most_rows=8) == [] and held.take((1).to_bytes(16)) is None
    kept = request("a", 2)
    held.put(kept)
    with pytest.raises(Busy):
        held.put(request("b", 2))
    assert held.take((2).to_bytes(16)) is kept and held.take((2).to_bytes(16)) is None
    assert not kept.answer.cancel(), "what is being computed is answered"


def test_those_who_wait_are_answered_as_one_and_who_is_missing_at_a_party_alone_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small_network()
    group = Group.create(tmp_path, network)
    images = [np.random.default_rng(seed).uniform(0, 1, (1, 4, 4)).astype(np.float32) for seed in range(6)]
    queue, held = Queue(most=20, most_each=20), Held(most=20, most_each=20)
    led, burned = list[list[Request]](), list[int]()
    burn = Marks.burn

    def watched(marks: Marks, generation: str, index: Index) -> None:
        burned.append(index.rows)
        burn(marks, generation, index)

    monkeypatch.setattr(Marks, "burn", watched)
    monkeypatch.setattr(serving, "_WAIT_S", 60.0)
    with Running(group, tmp_path) as running, ThreadPoolExecutor(2) as pool:

        def compute() -> None:
            following = pool.submit(serving._follow, running.parties[1], held)
            serving._lead(running.parties[0], queue)
            following.result(timeout=60)

        for number, x in enumerate(images):
            both = [Request("abc"[number % 3], share) for share in shares_of(group, x)]
            for place, each in zip((queue, held), both, strict=True):
                place.put(each)
            led.append(both)
            if number == 0:
                compute()
        led[1][0].answer.cancel()  # a client left party 0, and one party 1
        led[3][1].answer.cancel()
        compute()
        for number in (0, 2, 4, 5):
            found = [each.answer.result(timeout=0) for each in led[number]]
            joined = join([each.tensors["outputs"] for each in found])
            clear = network({"x": torch.from_numpy(images[number])}).detach().numpy()
            assert np.abs(decode(joined, fraction_bits=found[0].fraction_bits) - clear).max() < 1e-5
        assert "no share" in str(led[3][0].answer.exception(timeout=0))
        assert burned == [1, 1, 4, 4] and not queue.left() and [each.caller for each in held.left()] == ["b"]


def test_a_fault_of_joined_requests_is_told_to_each(tmp_path: Path) -> None:
    group = Group.create(tmp_path, small_network())
    queue, waiting = Queue(most=20, most_each=20), [Request("a", share) for share in _many(group, 3)]
    with Running(group, tmp_path) as running:
        running.ask(np.zeros((1, 4, 4)))
        for each in waiting:
            queue.put(each)
        running.parties[1].close()
        for _ in range(3):  # two are joined, and one is left
            with suppress(RequestDropped):
                serving._lead(running.parties[0], queue)
        for each in waiting:
            assert isinstance(each.answer.exception(timeout=0), RequestDropped)


def _many(group: Group, count: int) -> list[Shares]:
    return [shares_of(group, np.zeros((1, 4, 4)))[0] for _ in range(count)]


def test_an_identity_is_made_once_with_keys_that_nobody_else_reads(tmp_path: Path) -> None:
    place = tmp_path / "role"
    given = [
        "identity",
        "--init",
        "--role",
        "party",
        "--operator",
        "A",
        "--host",
        "a.example",
        "--directory",
        str(place),
    ]
    made = CliRunner().invoke(cli, given)
    assert made.exit_code == 0, made.output
    printed = json.loads(made.stdout)
    assert printed["client_port"] == 9443 and "BEGIN CERTIFICATE" in printed["certificate"]
    for path in place.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    secrets = [(place / "role.key").read_text().splitlines()[1], (place / "role.open").read_bytes().hex()]
    assert not any(secret in made.output for secret in secrets)
    assert json.loads(CliRunner().invoke(cli, ["identity", "--directory", str(place)]).stdout) == printed
    assert CliRunner().invoke(cli, given).exit_code == 1, "there is one"
    (place / "role.open").chmod(0o644)
    with pytest.raises(StartRefused, match="mode 0644"):
        identity.read(place)


def test_an_identity_that_is_refused_leaves_nothing_and_no_directory_of_others_is_taken(tmp_path: Path) -> None:
    place = tmp_path / "role"
    with pytest.raises(StartRefused, match="host"):
        identity.create(place, operator="A", host="https://a.example", port=1, client_port=2)
    assert list(place.iterdir()) == []
    made = identity.create(place, operator="A", host="a.example", port=1, client_port=2)
    assert identity.read(place).record == made.record
    (place / "role.json").unlink()
    with pytest.raises(StartRefused, match="parts of an identity"):
        identity.create(place, operator="A", host="a.example", port=1, client_port=2)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    with pytest.raises(StartRefused, match="mode 0755"):
        identity.create(shared, operator="A", host="a.example", port=1, client_port=2)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755 and list(shared.iterdir()) == []


@pytest.fixture
def log() -> Iterator[None]:
    """A command sends the log to its own standard error: here that ends with the command."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("log")
def test_a_start_without_identity_file_or_keys_is_refused_by_name(tmp_path: Path) -> None:
    def told(*given: str) -> str:
        done = CliRunner().invoke(cli, ["party", *given, "--directory", str(tmp_path / "role")])
        assert done.exit_code == 1
        return done.stderr

    assert "CLOISTER_ROLE_FILE" in told()
    files = ("--file", str(tmp_path / "role-file"), "--certificate-keys", str(tmp_path / "keys"))
    assert "identity --init" in told(*files)
    identity.create(tmp_path / "role", operator="A", host="127.0.0.1", port=1, client_port=2)
    assert "cannot be read" in told(*files)
    (tmp_path / "role-file").write_bytes(b"cloister.role/2\n")
    assert "cannot be read" in told(*files)
    (tmp_path / "keys").write_text("no JSON")
    assert "no JSON" in told(*files)
    (tmp_path / "keys").write_text("{}")
    assert "another version than 1" in told(*files)


def test_the_platforms_keys_are_never_asked_for_in_the_clear_over_a_network() -> None:
    for issuer in ("http://platform.example", "ftp://127.0.0.1"):
        with pytest.raises(StartRefused, match="https"):
            fetched_keys(issuer)
    for issuer in ("https://platform.example", "http://127.0.0.1:8443", "http://localhost:1"):
        assert callable(fetched_keys(issuer))


def test_the_platforms_keys_are_those_of_es256_and_no_answer_of_any_size_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be_patient(monkeypatch)
    with elsewhere("party") as made:
        path = "/.well-known/jwks.json"
        fetch = fetched_keys(made.url)
        made.answers[path] = lambda to: send_json(to, {"keys": made.keys})
        assert list(fetch()) == ["k1"]
        made.answers[path] = lambda to: send_json(to, {"keys": made.keys, "more": "x" * MOST_BYTES})
        with pytest.raises(NotFetched, match="over"):
            fetch()


def test_whose_key_is_known_waits_for_no_platform_and_of_unknown_keys_few_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permissions, "_ASKED_APART_S", 0.0)
    monkeypatch.setattr(permissions, "_MOST_WAITING", 0)
    known, other = Signer(), Signer()
    is_asked, answers = threading.Event(), threading.Event()
    fetched: list[int] = []

    def fetch() -> dict[str, dict[str, str]]:
        fetched.append(len(fetched))
        if len(fetched) == 1:
            return {"k": known.jwk}
        is_asked.set()
        assert answers.wait(60)
        return {"k": known.jwk, "new": other.jwk}

    def permission(by: Signer, kid: str) -> str:
        at = int(time.time())
        claims = {"iss": "https://p", "aud": "party", "sub": "app", "iat": at, "exp": at + 60}
        return by.sign({"typ": PERMISSION_TYPE, "kid": kid}, claims)

    mine = Permissions("https://p", "party", fetch)
    with ThreadPoolExecutor(2) as pool:
        try:
            assert mine.subject(permission(known, "k")) == "app"
            waiting = pool.submit(mine.subject, permission(other, "new"))
            assert is_asked.wait(60)
            assert pool.submit(mine.subject, permission(known, "k")).result(timeout=60) == "app"
            with pytest.raises(NotPermitted, match="no permission"):
                pool.submit(mine.subject, permission(other, "nobodys")).result(timeout=60)
            assert not waiting.done() and fetched == [0, 1]
        finally:
            answers.set()
        assert waiting.result(timeout=60) == "app"
