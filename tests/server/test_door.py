"""The door of a party, on real sockets: what becomes of a request whose client is gone."""

from __future__ import annotations

import secrets
import socket
import ssl
import struct
import threading
import time
from pathlib import Path

import numpy as np
from joserfc import jwt
from joserfc.jwk import ECKey

from cloister.wire.private_requests import LENGTH, PERMISSION_TYPE, PrivateRequest, audience
from cloister.wire.shares import Shares, encode, split
from cloister_privacy.mpc import Party
from cloister_server.roles.door import Door
from cloister_server.roles.permissions import Permissions
from cloister_server.roles.waiting import Request
from mpc_groups import Group, free_port, small_network

ISSUER = "https://platform.example"
RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no time


def frames(group: Group, party: int, key: ECKey) -> bytes:
    """What a client sends that a party takes."""
    at, request, deployment = int(time.time()), secrets.token_bytes(16), group.deployment.id
    claims = {"iss": ISSUER, "sub": "app", "aud": audience(deployment, party), "iat": at, "exp": at + 60}
    permission = jwt.encode({"alg": "ES256", "typ": PERMISSION_TYPE, "kid": "k"}, claims, key)
    head = PrivateRequest(permission=permission, deployment=deployment, request=request.hex(), rows=1)
    shares = Shares(deployment, request, party, {"x": split(encode("x", np.zeros((1, 4, 4))))[party]})
    sent = (head.model_dump_json().encode(), shares.to_bytes())
    return b"".join(LENGTH.pack(len(each)) + each for each in sent)


def test_a_request_whose_client_is_gone_before_it_is_told_keeps_no_place(tmp_path: Path) -> None:
    group, key = Group.create(tmp_path, small_network()), ECKey.generate_key("P-256", {"kid": "k"})
    me, port, is_over = group.identities["party-1"], free_port(), threading.Event()
    party = Party(1, me, group.deployment, group.network, group.weights[1], tmp_path / "state")
    keys = {"k": key.as_dict(private=False)}
    taken: list[Request] = []

    def put(request: Request) -> None:
        taken.append(request)
        request.answer.add_done_callback(lambda _: is_over.set())
        client.close()  # so that whoever writes to it is told

    door = Door(
        me,
        party,
        group.network,
        deployment=group.deployment.id,
        permissions=Permissions(ISSUER, audience(group.deployment.id, 1), lambda: keys),
        put=put,
        host="127.0.0.1",
        port=port,
        answer_s=600,
    )
    try:
        context = ssl.create_default_context(cafile=me.certificate)
        context.check_hostname = False
        client = context.wrap_socket(socket.create_connection(("127.0.0.1", port)))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        client.sendall(frames(group, 1, key))
        assert is_over.wait(60), "it waits for somebody who is gone"
        assert taken[0].answer.cancelled()
    finally:
        door.close()
        party.close()
