"""Two parties and a dealer over TLS on loopback: answers, refusals, faults. Threads here; processes in test_mpc_processes."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cloister.wire.shares import Shares
from cloister_privacy.architecture import Network
from cloister_privacy.mpc import (
    CoLocated,
    Deployment,
    Identity,
    Limits,
    MaterialExhausted,
    MaterialRefused,
    Party,
    PeerRefused,
    RequestDropped,
    SharesOfAnother,
    choose_scale,
    split_weights,
)
from cloister_privacy.mpc.dealer import CONTROL_BYTES
from cloister_privacy.mpc.joined import Announcement, Asked, most_joined, refusals_of
from cloister_privacy.mpc.links import Deadline, Link, Listener, connect
from cloister_privacy.mpc.places import Places
from mpc_groups import Group, Running, shares_of, small_network
from ports import free_port
from recording_proxy import Way, recording, tls_payload
from uniformity import deviation_of, require_uniform

NETWORK = small_network()


def _clear(network: Network, x: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.no_grad():
        return network({"x": torch.from_numpy(x)}).numpy().astype(np.float64)


def _images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(count).uniform(0, 1, (count, 4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    return Group.create(tmp_path_factory.mktemp("identities"), NETWORK)


@pytest.fixture
def running(group: Group, tmp_path: Path) -> Iterator[Running]:
    with Running(group, tmp_path) as started:
        yield started


def test_outputs_are_those_in_the_clear(running: Running) -> None:
    for rows in (1, 2, 1, 5, 2, 1):
        x = _images(rows)
        assert np.abs(running.ask(x) - _clear(NETWORK, x)).max() < 1e-5


def test_a_scale_for_each_layer_is_everybodys(tmp_path: Path) -> None:
    network, x = small_network(), _images(3)
    with torch.no_grad():
        for position, factor in ((1, 1e6), (3, 1e-6)):
            network.layers[position].weight.mul_(factor)
    bits, layer_bits = choose_scale(network, {"x": x})
    assert bits == 20 and layer_bits[3][1] > 30
    with Running(Group.create(tmp_path, network, layer_bits=layer_bits), tmp_path) as running:
        assert np.abs(running.ask(x) - _clear(network, x)).max() < 1e-4


def test_nothing_is_spent_on_shares_that_do_not_fit(running: Running) -> None:
    right, _ = shares_of(running.group, _images(1))
    for change, words in (
        ({"deployment": "dep_1"}, "another deployment"),
        ({"party": 1}, "another party"),
        ({"fraction_bits": 16}, "another fraction bits"),
        ({"tensors": {"x": np.zeros((1, 4, 5), np.uint64)}}, r"takes x \[rows, 4, 4\]"),
        ({"tensors": {"x": np.zeros((257, 4, 4), np.uint64)}}, "256 are the most"),
    ):
        with pytest.raises(SharesOfAnother, match=words):
            running.parties[0].lead([replace(right, **change)])
    assert not (running.directory / "party-0" / "burned.json").exists()
    assert running.parties[0].is_formed


def test_a_request_that_party_1_has_no_share_of_is_refused_and_the_group_goes_on(running: Running) -> None:
    generation = running.parties[0]._group.generation.id
    with pytest.raises(SharesOfAnother, match="no share of this request came"):
        running.answer(shares_of(running.group, _images(1)), at_party_1=shares_of(running.group, _images(1))[1])
    first, second = shares_of(running.group, _images(2))
    fewer = replace(second, tensors={"x": second.tensors["x"][:1]})
    with pytest.raises(SharesOfAnother, match="different numbers of rows"):
        running.answer((first, second), at_party_1=fewer)
    running.ask(_images(1))
    assert running.parties[0]._group.generation.id == generation


# Joined requests.


def _shared(group: Group, counts: list[int]) -> tuple[list[NDArray[np.float32]], list[Shares], dict[bytes, Shares]]:
    """Rows of so many requests, and their shares: in order for party 0, by their ids for party 1."""
    images = [np.random.default_rng(seed).uniform(0, 1, (n, 4, 4)).astype(np.float32) for seed, n in enumerate(counts)]
    shares = [shares_of(group, x) for x in images]
    return images, [first for first, _ in shares], {second.request: second for _, second in shares}


def test_joined_requests_have_each_its_own_rows_and_burn_one_index(running: Running) -> None:
    images, led, followed = _shared(running.group, [1, 4, 2, 1])
    for x, answer in zip(images, running.answers(led, followed.get), strict=True):
        assert np.abs(answer - _clear(NETWORK, x)).max() < 1e-5
    burned = [json.loads((running.directory / f"party-{k}" / "burned.json").read_text())["marks"] for k in (0, 1)]
    assert [list(marks) for marks in burned] == [["8"], ["8"]]


def test_no_caller_makes_the_request_of_another_fail_or_changes_its_answer(running: Running) -> None:
    """One sends nothing to party 1, one fewer rows, one what no client would encode, one the same id again."""
    generation = running.parties[0]._group.generation.id
    images, led, followed = _shared(running.group, [1, 1, 2, 1, 1, 2])
    del followed[led[1].request]
    fewer = followed[led[2].request]
    followed[led[2].request] = replace(fewer, tensors={"x": fewer.tensors["x"][:1]})
    noise = np.frombuffer(np.random.default_rng(1).bytes(128), np.uint64).reshape(1, 4, 4)
    followed[led[3].request] = replace(followed[led[3].request], tensors={"x": noise})
    led.append(led[0])
    answers = running.answers(led, lambda request: followed.pop(request, None))
    for number in (0, 4, 5):
        assert np.abs(answers[number] - _clear(NETWORK, images[number])).max() < 1e-5
    refused = {number: str(each) for number, each in enumerate(answers) if isinstance(each, SharesOfAnother)}
    assert refused.keys() == {1, 2, 6} and "different numbers of rows" in refused[2]
    assert "no share of this request" in refused[1] and refused[1] == refused[6]
    assert running.parties[0]._group.generation.id == generation


def test_where_party_1_has_no_share_of_any_nothing_is_opened(running: Running) -> None:
    running.ask(_images(1))
    _, led, _ = _shared(running.group, [1, 1])
    before = running.parties[0].bytes_sent
    assert all(isinstance(each, SharesOfAnother) for each in running.answers(led, lambda request: None))
    assert running.parties[0].bytes_sent - before < 200, "an announcement"
    assert running.parties[0].most_joined == 16, "others are joined as before"


def test_a_fault_in_the_middle_ends_all_that_were_joined_and_the_next_goes_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert running.parties[0].most_joined == 1, "it is not known yet how long a row takes"
    running.ask(_images(1))
    assert running.parties[0].most_joined == 16
    _, led, followed = _shared(running.group, [1, 1])
    compute = Party._computed

    def computed(party: Party, *given: Any) -> Any:
        if party.number == 1:
            raise ValueError("a number that is nobody's business")
        return compute(party, *given)

    monkeypatch.setattr(Party, "_computed", computed)
    with pytest.raises(RequestDropped, match="try again"):
        running.answers(led, followed.get)
    monkeypatch.undo()
    assert running.parties[0].most_joined == 1
    running.form()
    running.ask(_images(1))
    assert running.parties[0].most_joined == 16


def test_rows_are_joined_as_far_as_they_pay_and_time_and_disk_are_enough() -> None:
    limits, row = Limits(), 2**20
    assert [most_joined(1, limits, in_time=s) for s in (0, 1, 2, 3.9, 1e9)] == [1, 1, 2, 2, limits.joined]
    assert [most_joined(1, Limits(rows=rows), in_time=1e9) for rows in (1, 3, 5, 256)] == [1, 2, 4, limits.joined]
    for most in (1, 2, 4, 8):
        needed = 2 * (2 * most - 1) * row * limits.ahead
        assert most_joined(row, Limits(disk_bytes=needed), in_time=1e9) == most
        assert most_joined(row, Limits(disk_bytes=needed - 1), in_time=1e9) == max(1, most // 2)


def test_material_of_all_that_is_joined_is_kept_ahead_within_the_budget(group: Group, tmp_path: Path) -> None:
    row = group.network.material_bytes(1)
    limits = Limits(disk_bytes=50 * row, ahead=1)
    with Running(group, tmp_path, limits=limits) as running:
        for rows in (1, 2, 4, 8, *range(1, 13), 8, 4, 2, 1):
            _, led, followed = _shared(group, [1] * rows)
            running.answers(led, followed.get)
            sizes = [path.stat().st_size for path in _ready(running)]
            assert sum(sizes) <= limits.disk_bytes and len(sizes) <= 9, (
                "of eight numbers of rows, and what was on its way"
            )
        assert running.parties[0].most_joined == 8
        _until(lambda: {path.name.split("-")[0] for path in _ready(running)} >= {"1", "2", "4", "8"})


ID = "00" * 16


@pytest.mark.parametrize(
    "told",
    [
        b"no JSON", b"[]", {"count": 1}, {"count": 1, "requests": []}, {"count": 1, "requests": [["00", 1]]},
        {"count": 1, "requests": [[ID, 0]]}, {"count": 1, "requests": [[ID, 2], [ID, -1]]}, {"count": None, "requests": [[ID, 1]]},
        {"count": 1, "requests": [[ID, 9]]}, {"count": 1, "requests": [[ID, 4], [ID, 5]]}, {"count": 1, "requests": [ID]},
        {"request": ID, "rows": 1, "count": 1},
    ],
)  # fmt: skip
def test_what_is_no_announcement_is_refused(told: Any) -> None:
    frame = told if isinstance(told, bytes) else json.dumps(told).encode()
    with pytest.raises(RequestDropped, match="no announcement"):
        Announcement.from_bytes(frame, most_rows=8)


def test_an_announcement_of_the_most_requests_is_a_control_frame_and_what_is_no_answer_to_it_is_refused() -> None:
    asked = tuple(Asked(bytes([number] * 16), 1) for number in range(Limits().joined))
    frame = Announcement(2**20, asked).to_bytes()
    assert len(frame) <= CONTROL_BYTES
    assert Announcement.from_bytes(frame, most_rows=len(asked)) == Announcement(2**20, asked)
    assert refusals_of(bytes(len(asked)), len(asked)) == [None] * len(asked)
    for answer in (b"", bytes(len(asked) - 1), bytes([*bytes(len(asked) - 1), 4])):
        with pytest.raises(RequestDropped, match="no answer"):
            refusals_of(answer, len(asked))


def test_material_that_was_changed_on_disk_is_refused_and_the_next_is_taken(running: Running) -> None:
    running.ask(_images(1))
    _until(lambda: len(_ready(running)) >= 2)
    first = min(_ready(running), key=lambda path: int(path.name.split("-")[1].split(".")[0]))
    body = bytearray(first.read_bytes())
    body[-1] ^= 1
    first.write_bytes(body)
    with pytest.raises(MaterialRefused, match="was changed"):
        running.parties[0].lead([shares_of(running.group, _images(1))[0]])
    assert not first.exists()
    running.ask(_images(1))


def test_material_is_dealt_ahead_up_to_its_number(running: Running) -> None:
    _until(lambda: len(_ready(running)) == Limits().ahead)
    running.ask(_images(1))
    _until(lambda: len(_ready(running)) == Limits().ahead)
    assert sorted(path.name for path in _ready(running)) == [f"1-{count}.material" for count in range(2, 6)]


def _ready(running: Running) -> list[Path]:
    return list((running.directory / "party-0" / "material").glob("*.material"))


def _until(condition: Any) -> None:
    waiting = threading.Event()
    for _ in range(1200):
        if condition():
            return
        waiting.wait(0.05)
    raise AssertionError("this did not come about")


@pytest.mark.parametrize(
    ("limits", "words"),
    [(Limits(rows=1), "1 are the most"), (Limits(disk_bytes=100), "budget of 100")],
)
def test_exhausted_material_refuses_by_name(group: Group, tmp_path: Path, limits: Limits, words: str) -> None:
    with (
        Running(group, tmp_path, limits=limits) as running,
        pytest.raises((MaterialExhausted, SharesOfAnother), match=words),
    ):
        running.parties[0].lead([shares_of(group, _images(2 if limits.rows == 1 else 1))[0]])


def test_a_generation_whose_material_is_at_its_end_is_over_and_another_is_formed(group: Group, tmp_path: Path) -> None:
    x = _images(1)
    with Running(group, tmp_path, limits=Limits(requests=3, ahead=1)) as running:
        before = running.parties[0]._group.generation.id
        for _ in range(4):
            with suppress(RequestDropped):
                running.ask(x)
        _until(lambda: not any(party.is_formed for party in running.parties))
        assert running.form() != before
        assert np.abs(running.ask(x) - _clear(NETWORK, x)).max() < 1e-5


def test_material_beyond_the_budget_is_refused_before_it_is_dealt_and_the_group_goes_on(
    group: Group, tmp_path: Path
) -> None:
    row = group.network.material_bytes(1)
    few = Limits(disk_bytes=3 * row)
    assert group.network.material_bytes(64) > few.disk_bytes + 2**14, "over any frame of that budget"
    with Running(group, tmp_path, limits=few) as running:
        generation = running.parties[0]._group.generation.id
        for _ in range(2):
            with pytest.raises(MaterialExhausted, match=f"{group.network.material_bytes(64)} bytes"):
                running.parties[0].lead([shares_of(group, _images(64))[0]])
        x = _images(1)
        assert np.abs(running.ask(x) - _clear(NETWORK, x)).max() < 1e-5
        assert running.parties[0]._group.generation.id == generation


def test_a_dealer_that_went_is_told_and_the_group_forms_anew_in_another_generation(running: Running) -> None:
    before = running.parties[0]._group.generation.id
    running.ask(_images(1))
    running.restart_dealer()
    _until(lambda: running.parties[0]._group.is_over)
    with pytest.raises(RequestDropped, match="form"):
        running.parties[0].lead([shares_of(running.group, _images(1))[0]])
    after = running.form()
    assert after != before
    x = _images(3)
    assert np.abs(running.ask(x) - _clear(NETWORK, x)).max() < 1e-5


def test_a_party_that_went_in_the_middle_is_told_and_its_material_is_gone(running: Running) -> None:
    def gone(request: bytes) -> None:
        running.parties[1]._group.other.close()

    follower = threading.Thread(target=_swallow, args=(lambda: running.parties[1].follow(gone, wait_s=120),))
    follower.start()
    with pytest.raises(RequestDropped, match="try again"):
        running.parties[0].lead([shares_of(running.group, _images(1))[0]])
    follower.join()
    assert not running.parties[0].is_formed
    with pytest.raises(RequestDropped, match="not formed"):
        running.parties[0].lead([shares_of(running.group, _images(1))[0]])
    assert _ready(running) == []
    running.form()
    running.ask(_images(1))


def _swallow(act: Any) -> None:
    try:
        act()
    except RequestDropped:
        return


def test_a_group_without_its_dealer_does_not_form_and_does_not_hang(group: Group, tmp_path: Path) -> None:
    party = Party(
        1,
        group.identities["party-1"],
        group.deployment,
        group.network,
        group.weights[1],
        tmp_path,
        limits=Limits(form_s=0.3),
    )
    with pytest.raises(RequestDropped, match="does not listen"):
        party.form()
    with pytest.raises(RequestDropped, match="not formed"):
        party.follow(lambda request: None, wait_s=0)


def test_a_party_of_another_network_or_deployment_is_refused_by_the_dealer(group: Group, tmp_path: Path) -> None:
    other = replace(group.deployment, id="dep_other")
    with Running(group, tmp_path / "running"):
        party = Party(1, group.identities["party-1"], other, group.network, group.weights[1], tmp_path / "other")
        with pytest.raises(PeerRefused, match="another deployment"):
            party.form()


@pytest.mark.parametrize("role", ["party", "dealer"])
def test_a_role_of_another_version_is_refused_by_name(
    role: str, group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"cloister_privacy.mpc.{role}.VERSION", "cloister.mpc/1")
    running = Running(group, tmp_path)
    with closing(running.dealer), pytest.raises(PeerRefused, match="another version; use one version of Cloister"):
        running.parties[1].form()
    for party in running.parties:
        party.close()


# Links.


@contextmanager
def _listening(identity: Identity, peers: Any, host: str = "127.0.0.1") -> Iterator[tuple[int, list[Link]]]:
    links: list[Link] = []
    listener = Listener(identity, peers, host, 0, on_link=links.append)
    try:
        yield listener.port, links
    finally:
        listener.close()
        for link in links:
            link.close()


def _deadline() -> Deadline:
    return Deadline.after(120)


def test_frames_go_both_ways_at_once_however_large(group: Group) -> None:
    one, two = group.identities["party-0"], group.identities["party-1"]
    with _listening(one, [group.deployment.parties[1]]) as (port, links):
        link = connect(two, replace(group.deployment.parties[0], port=port), _deadline())
        _until(lambda: links)
        mine, theirs = bytes(2**23), b"\x01" * 2**23
        answers: list[bytes] = []
        other = threading.Thread(target=lambda: answers.append(links[0].exchange(theirs, _deadline())))
        other.start()
        assert link.exchange(mine, _deadline()) == theirs
        other.join()
        assert answers == [mine]
        link.send(b"long", _deadline())
        with pytest.raises(RequestDropped, match="4 bytes where 3"):
            links[0].receive(3, _deadline())
        link.close()


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_a_role_listens_at_its_host_whichever_kind_of_address_that_is(group: Group, host: str) -> None:
    one, two = group.identities["party-0"], group.identities["party-1"]
    with _listening(one, [group.deployment.parties[1]], host) as (port, links):
        link = connect(two, replace(group.deployment.parties[0], host=host, port=port), _deadline())
        _until(lambda: links)
        link.send(b"here", _deadline())
        assert links[0].receive(4, _deadline()) == b"here"
        link.close()


def _pairs(count: int) -> list[tuple[socket.socket, socket.socket]]:
    return [socket.socketpair() for _ in range(count)]


def test_the_oldest_connection_that_nobody_vouches_for_makes_room_and_where_all_are_vouched_for_none_does() -> None:
    places, pairs = Places(2), _pairs(5)
    for _, far in pairs:
        far.setblocking(False)
    first, second, third, fourth, fifth = (near for near, _ in pairs)
    kept, passing = places.take(first.fileno()), places.take(second.fileno())
    assert kept is not None and passing is not None
    places.keep(kept, "a")
    taken = places.take(third.fileno())
    assert taken is not None and pairs[1][1].recv(1) == b"", "the second made room"
    places.keep(passing, "a")  # too late: it has ended
    for _, far in (pairs[0], pairs[2]):
        with pytest.raises(BlockingIOError):
            far.recv(1)
    places.keep(taken, "b")
    assert places.take(fourth.fileno()) is None
    assert second.fileno() >= 0, "whoever has it closes it, and nobody else"
    places.leave(passing)
    assert places.take(fourth.fileno()) is None, "it had no place any more"
    places.leave(kept)
    last = places.take(fifth.fileno())
    assert last is not None
    for handle in (taken, last):
        places.leave(handle)
    for near, far in pairs:
        near.close()
        far.close()


def test_a_certificate_that_is_not_pinned_is_refused_at_either_end(group: Group, tmp_path: Path) -> None:
    stranger = Identity.create(tmp_path, "party-1")
    one, pinned = group.identities["party-0"], group.deployment.parties
    with _listening(one, [pinned[1]]) as (port, links):
        here = replace(pinned[0], port=port)
        with pytest.raises(PeerRefused, match="pinned"), closing(connect(stranger, here, _deadline())) as link:
            link.receive(10, _deadline())
        with pytest.raises(PeerRefused, match="not the pinned one"):
            connect(group.identities["party-1"], stranger.peer("party-0", "127.0.0.1", port), _deadline())
        assert links == []


def test_an_expired_certificate_is_refused_by_name(tmp_path: Path) -> None:
    expired, mine = Identity.create(tmp_path, "old", days=-1), Identity.create(tmp_path, "new")
    with (
        _listening(expired, [mine.peer("new", "", 0)]) as (port, _),
        pytest.raises(PeerRefused, match=r"no longer valid .*expired"),
    ):
        connect(mine, expired.peer("old", "127.0.0.1", port), _deadline())


def test_whoever_speaks_no_tls_or_nothing_at_all_holds_nobody_up(group: Group) -> None:
    one, two = group.identities["party-0"], group.identities["party-1"]
    with _listening(one, [group.deployment.parties[1]]) as (port, links):
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        silent[0].sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        connect(two, replace(group.deployment.parties[0], port=port), _deadline()).close()
        _until(lambda: links)
        for each in silent:
            each.close()


def test_a_link_that_another_thread_closes_speaks_tls_until_its_connection_is_over(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = group.identities["party-0"], group.identities["party-1"]
    speaks_tls: list[bool] = []
    close = ssl.SSLSocket.close

    def note(sock: ssl.SSLSocket) -> None:
        speaks_tls.append(sock._sslobj is not None)
        with pytest.raises(OSError):  # nothing can be sent any more
            sock.send(b"later")
        close(sock)

    with _listening(one, [group.deployment.parties[1]]) as (port, links):
        link = connect(two, replace(group.deployment.parties[0], port=port), _deadline())
        _until(lambda: links)
        with monkeypatch.context() as patched:
            patched.setattr(ssl.SSLSocket, "close", note)
            link.close()
    assert speaks_tls == [True]


def test_a_peer_that_accepts_and_never_answers_is_left_at_the_deadline(group: Group) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = replace(group.deployment.parties[0], port=server.getsockname()[1])
        with pytest.raises(RequestDropped, match="broke the handshake off"):
            connect(group.identities["party-1"], peer, Deadline.after(0.2))


@pytest.mark.parametrize("number", [0, 1])
def test_all_that_a_party_holds_and_is_sent_is_uniform(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows and weights that are all alike: its shares of both and of the outputs, and all that the other party opens to it."""
    network = small_network()
    for weight in network.parameters():
        torch.nn.init.constant_(weight, 0.5)
    alike = Group.create(tmp_path, network)
    x = np.full((256, 4, 4), 0.625, np.float32)
    inputs, outputs, sent = list[bytes](), list[bytes](), list[bytes]()
    exchange, compute = Link.exchange, Party._computed

    def exchanged(link: Link, payload: bytes, deadline: Deadline) -> bytes:
        found = exchange(link, payload, deadline)
        if link.peer == f"party-{1 - number}":
            sent.append(found)
        return found

    def computed(party: Party, group: Any, material: Any, given: dict[str, Any], deadline: Deadline) -> Any:
        answered = compute(party, group, material, given, deadline)
        if party.number == number:
            inputs.append(given["x"].tobytes())
            outputs.append(answered.share.tobytes())
        return answered

    monkeypatch.setattr(Link, "exchange", exchanged)
    monkeypatch.setattr(Party, "_computed", computed)
    with Running(alike, tmp_path) as running:
        found = running.ask(x)
    assert np.abs(found - _clear(network, x)).max() < 1e-4
    assert deviation_of(found.tobytes()) > 1e3, "in the clear they are all alike"
    _, *opened = sent  # the first tells which generation
    weights = [split_weights(alike.network, network.state_dict())[number] for _ in range(8)]
    for held in (inputs, outputs, opened, [each.tobytes() for share in weights for each in share.values()]):
        require_uniform(b"".join(held))


def test_a_wire_between_the_roles_carries_tls_alone(group: Group, tmp_path: Path) -> None:
    """A proxy before the dealer and one before party 0 record everything that passes, of many requests."""
    ways: list[Way] = []
    ports = [free_port(), free_port()]
    first, dealer = group.deployment.parties[0], group.deployment.dealer
    here = first.host
    with (
        recording((here, ports[0]), (here, first.port), ways, link="party 0"),
        recording((here, ports[1]), (here, dealer.port), ways, link="dealer"),
    ):
        seen = Deployment(
            group.deployment.id,
            (replace(first, port=ports[0]), group.deployment.parties[1]),
            replace(dealer, port=ports[1]),
        )
        with Running(group, tmp_path) as running:
            running.parties[0]._deployment = replace(seen, parties=group.deployment.parties)
            running.parties[1]._deployment = seen
            running.form()
            x = np.full((8, 4, 4), 0.625, np.float32)
            shares = shares_of(group, x)
            running.answer(shares)
    wire = b"".join(way.passed for way in ways)
    planted = [
        x.tobytes(),
        shares[0].tensors["x"].tobytes(),
        group.weights[0]["layers.1.weight"].tobytes(),
        b"cloister.mpc",
        b"generation",
    ]
    assert len(wire) > 5_000, "one request and its randomness; more was dealt ahead where there was time"
    assert all(each[:16] not in wire for each in planted)
    assert {way.link for way in ways} == {"party 0", "dealer"}
    require_uniform(b"".join(tls_payload(way) for way in ways))


def test_roles_that_share_an_operator_a_host_or_a_certificate_are_refused(group: Group) -> None:
    with pytest.raises(CoLocated, match="development=True"):
        group.deployment.check_apart()
    group.deployment.check_apart(development=True)
    (one, two), dealer = group.deployment.parties, group.deployment.dealer
    apart = [
        replace(each, host=f"{name}.example", operator=name) for name, each in (("a", one), ("b", two), ("c", dealer))
    ]
    replace(group.deployment, parties=(apart[0], apart[1]), dealer=apart[2]).check_apart()
    for same in ({"host": "b.example"}, {"operator": "b"}, {"certificate": two.certificate}):
        with pytest.raises(CoLocated, match=next(iter(same))):
            replace(group.deployment, parties=(apart[0], apart[1]), dealer=replace(apart[2], **same)).check_apart()
