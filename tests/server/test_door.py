"""The door of a party, on real sockets: what becomes of a request whose client is gone, or that is too large."""

from __future__ import annotations

import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from cloister.wire.private_requests import (
    LENGTH,
    PERMISSION_TYPE,
    REFUSED,
    TAKEN,
    PartyRefusal,
    PrivateRequest,
    audience,
)
from cloister.wire.shares import Shares, encode, split
from cloister_privacy.mpc import Limits, MaterialExhausted, Party, SharesOfAnother
from cloister_server.roles.door import Door
from cloister_server.roles.permissions import Permissions
from cloister_server.roles.waiting import Request
from mpc_groups import Group, small_network
from ports import free_port

ISSUER = "https://platform.example"
RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no time


def frames(group: Group, party: int, key: ECKey, *, rows: int = 1, caller: str = "app") -> tuple[bytes, bytes]:
    """What a client sends that a party takes: what goes before its share, and the share."""
    at, request, deployment = int(time.time()), secrets.token_bytes(16), group.deployment.id
    claims = {"iss": ISSUER, "sub": caller, "aud": audience(deployment, party), "iat": at, "exp": at + 60}
    permission = jwt.encode({"alg": "ES256", "typ": PERMISSION_TYPE, "kid": "k"}, claims, key)
    head = PrivateRequest(permission=permission, deployment=deployment, request=request.hex(), rows=rows)
    shares = Shares(deployment, request, party, {"x": split(encode("x", np.zeros((rows, 4, 4))))[party]})
    told, share = head.model_dump_json().encode(), shares.to_bytes()
    return LENGTH.pack(len(told)) + told, LENGTH.pack(len(share)) + share


@pytest.fixture
def key() -> ECKey:
    return ECKey.generate_key("P-256", {"kid": "k"})


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group.create(tmp_path, small_network())


@contextmanager
def door_of(
    group: Group, key: ECKey, directory: Path, put: Callable[[Request], None]
) -> Iterator[Callable[[], ssl.SSLSocket]]:
    """How clients come to the door of party 1, which takes three rows at once."""
    me, port, deployment = group.identities["party-1"], free_port(), group.deployment.id
    party = Party(1, me, group.deployment, group.network, group.weights[1], directory, limits=Limits(rows=3))
    keys = {"k": key.as_dict(private=False)}
    permissions = Permissions(ISSUER, audience(deployment, 1), lambda: keys)
    given = {"deployment": deployment, "permissions": permissions, "put": put, "answer_s": 600}
    door = Door(me, party, group.network, host="127.0.0.1", port=port, **given)
    context = ssl.create_default_context(cafile=me.certificate)
    context.check_hostname = False
    clients: list[ssl.SSLSocket] = []

    def come() -> ssl.SSLSocket:
        clients.append(context.wrap_socket(socket.create_connection(("127.0.0.1", port))))
        clients[-1].settimeout(60)
        return clients[-1]

    try:
        yield come
    finally:
        for client in clients:
            client.close()
        door.close()
        party.close()


@contextmanager
def client_of(group: Group, key: ECKey, directory: Path, put: Callable[[Request], None]) -> Iterator[ssl.SSLSocket]:
    """A client at that door."""
    with door_of(group, key, directory, put) as come:
        yield come()


def answered(client: ssl.SSLSocket, sent: bytes) -> bytes:
    """All that it is told for this, until the link ends."""
    found = bytearray()
    try:
        client.sendall(sent)
        while more := client.recv(2**16):
            found += more
    except OSError:  # reset: what was sent was not read
        pass
    return bytes(found)


def test_a_request_whose_client_is_gone_before_it_is_told_keeps_no_place(
    group: Group, key: ECKey, tmp_path: Path
) -> None:
    is_over, taken = threading.Event(), list[Request]()

    def put(request: Request) -> None:
        taken.append(request)
        request.answer.add_done_callback(lambda _: is_over.set())
        client.close()  # so that whoever writes to it is told

    with client_of(group, key, tmp_path / "state", put) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        client.sendall(b"".join(frames(group, 1, key)))
        assert is_over.wait(60), "it waits for somebody who is gone"
        assert taken[0].answer.cancelled()


def test_more_rows_than_a_party_takes_are_refused_before_their_share_is_read(
    group: Group, key: ECKey, tmp_path: Path
) -> None:
    taken: list[Request] = []
    with client_of(group, key, tmp_path / "state", taken.append) as client:
        client.settimeout(60)
        client.sendall(frames(group, 1, key, rows=4)[0])
        answer = client.makefile("rb").read()[LENGTH.size :]
    assert answer[:1] == REFUSED and taken == []
    assert "3 are the most" in PartyRefusal.model_validate_json(answer[1:]).error


def test_a_share_that_the_other_party_lost_is_told_as_a_fault_after_which_a_client_asks_again(
    group: Group, key: ECKey, tmp_path: Path
) -> None:
    def put(request: Request) -> None:
        request.answer.set_exception(SharesOfAnother("the other party: no share of this request came"))

    with client_of(group, key, tmp_path / "state", put) as client:
        client.sendall(b"".join(frames(group, 1, key)))
        told = client.makefile("rb")
        assert told.read(LENGTH.size + 1)[LENGTH.size :] == TAKEN
        (length,) = LENGTH.unpack(told.read(LENGTH.size))
        refusal = PartyRefusal.model_validate_json(told.read(length).removeprefix(REFUSED))
    assert refusal.code == "dropped" and "no share" in refusal.error


def test_whoever_shows_no_permission_makes_room_for_those_who_do(
    group: Group, key: ECKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister_server.roles.door._MOST_CLIENTS", 2)
    monkeypatch.setattr("cloister_server.roles.door._STEP_S", 600.0)
    with door_of(group, key, tmp_path / "state", list[Request]().append) as come:
        for _ in range(2):
            come()
        told = [answered(come(), frames(group, 1, key, rows=4)[0]) for _ in range(3)]
        # An idle one may come to its place late, and take another's; but once each.
        assert any(b"3 are the most" in each for each in told)


def test_whoever_showed_a_permission_keeps_its_place(
    group: Group, key: ECKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister_server.roles.door._MOST_CLIENTS", 1)
    taken: list[Request] = []
    with door_of(group, key, tmp_path / "state", taken.append) as come:
        client = come()
        client.sendall(b"".join(frames(group, 1, key)))
        assert client.recv(LENGTH.size + 1)[LENGTH.size :] == TAKEN
        assert answered(come(), b"".join(frames(group, 1, key))) == b"", "there is no room"
        taken[0].answer.set_exception(MaterialExhausted("none is left"))
        assert b"none is left" in client.recv(2**16)
    assert len(taken) == 1


def test_a_caller_keeps_so_many_places_and_leaves_the_others_to_others(
    group: Group, key: ECKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister_server.roles.door._MOST_EACH", 1)
    taken: list[Request] = []
    with door_of(group, key, tmp_path / "state", taken.append) as come:

        def asked(caller: str) -> ssl.SSLSocket:
            client = come()
            client.sendall(b"".join(frames(group, 1, key, caller=caller)))
            return client

        first = asked("app")
        assert first.recv(LENGTH.size + 1)[LENGTH.size :] == TAKEN
        refused = answered(come(), frames(group, 1, key)[0])[LENGTH.size :]
        assert PartyRefusal.model_validate_json(refused[1:]).code == "too_many_links"
        assert asked("another").recv(LENGTH.size + 1)[LENGTH.size :] == TAKEN
        for request in taken:
            request.answer.cancel()
