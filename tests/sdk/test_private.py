"""The SDK's side of private inference against parties that lie, are late or leave: named errors, and never a number in the clear."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cloister
from certificates import KEY_ID as SIGNER
from certificates import KEYS, PRIVATE
from cloister._parties import Parties
from cloister.wire.layers import Linear
from cloister.wire.private_deployments import (
    PrivateDeployment,
    PrivateTerms,
    Role,
    network_digest,
    sign_private_deployment,
    verify_private_deployment,
)
from cloister.wire.private_requests import ANSWERED, HEAD_BYTES, REFUSED, TAKEN, PartyRefusal, PrivateRequest
from cloister.wire.shares import Shares, encode, join
from cloister_privacy.mpc import Identity, RequestDropped
from cloister_privacy.mpc.links import Deadline, Link, Listener
from mpc_groups import network_of
from ports import free_port

ID = "pd_" + "a" * 32
X = np.array([[1.5, -2.0], [0.25, 3.0]])
PERMISSIONS = ("first", "second")
SOON, LATE = 60.0, 0.3

Say = Callable[[Shares], list[bytes]]


class Party:
    """Takes shares as a party does, and says what a test wants."""

    def __init__(self, number: int, directory: Path, say: Say) -> None:
        self.number, self.say, self.seen = number, say, list[tuple[PrivateRequest, Shares]]()
        identity = Identity.create(directory, f"p{number}", days=1)
        port = free_port()
        self.role = Role(
            operator=f"operator {number}", host="127.0.0.1", port=port, client_port=port,
            certificate=identity.certificate.read_text(), seal_to="09" + "00" * 31,
        )  # fmt: skip
        self._listener = Listener(identity, None, "127.0.0.1", port, on_link=self._serve)

    def _serve(self, link: Link) -> None:
        deadline = Deadline.after(60)
        try:
            while True:
                head = PrivateRequest.model_validate_json(link.receive(HEAD_BYTES, deadline))
                shares = Shares.from_bytes(link.receive(2**20, deadline))
                self.seen.append((head, shares))
                for frame in self.say(shares):
                    link.send(frame, deadline)
        except RequestDropped:
            link.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[PrivateDeployment, list[Party]]]]:
    made: list[Party] = []

    def start(*says: Say) -> tuple[PrivateDeployment, list[Party]]:
        made.extend(Party(number, tmp_path, say) for number, say in enumerate(says))
        return deployment(made[0].role, made[1].role), made

    yield start
    for party in made:
        party.close()


def deployment(*roles: Role, **more: Any) -> PrivateDeployment:
    given: dict[str, Any] = {
        "id": ID, "tenant": "tn_" + "0" * 32, "model": "mdl_" + "0" * 32, "version": 1, "generation": 1,
        "certificate_digest": "0" * 64, "network_digest": "0" * 64, "fraction_bits": 20, "rows_at_once": 8, "rows_measured": 1,
        "share_digests": ("0" * 64, "0" * 64),
        "max_error": 0.0, "equal_argmax": 1.0, "parties": roles, "dealer": roles[0], "issuer": "https://x", "development": True,
        "server": "1", "since": datetime(2026, 1, 1, tzinfo=UTC), **more,
    }  # fmt: skip
    return PrivateDeployment(**given)


def answer(shares: Shares, **more: Any) -> list[bytes]:
    """The input itself as the output: both halves of it make it again."""
    given = {"deployment": shares.deployment, "request": shares.request, "party": shares.party} | more
    tensors = given.pop("tensors", {"outputs": shares.tensors["x"]})
    return [TAKEN, ANSWERED + Shares(given["deployment"], given["request"], given["party"], tensors).to_bytes()]


def refuse(code: str) -> list[bytes]:
    return [REFUSED + PartyRefusal(code=code, error="no").model_dump_json().encode()]


def ask(stated: PrivateDeployment, *, within_s: float = SOON) -> np.ndarray:
    with Parties(stated, outputs=2, until=time.monotonic() + within_s) as parties:
        return parties.ask({"x": X}, lambda: PERMISSIONS)


def test_each_party_gets_its_own_permission_and_a_share_that_tells_nothing(start: Any) -> None:
    stated, parties = start(answer, answer)
    assert np.array_equal(ask(stated), X)
    heads, shares = zip(*(party.seen[0] for party in parties), strict=True)
    assert [head.permission for head in heads] == list(PERMISSIONS)
    assert heads[0].request == heads[1].request and heads[0].deployment == ID
    assert np.array_equal(join([each.tensors["x"] for each in shares]), encode("x", X))
    assert not any(np.array_equal(each.tensors["x"], encode("x", X)) for each in shares)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("busy", cloister.PartyBusy),
        ("stale", cloister.StaleDeployment),
        ("not_permitted", cloister.PartyRefused),
        ("shares_refused", cloister.PartyRefused),
    ],
)
def test_what_a_party_refuses_is_told_by_name_and_not_asked_again(
    said: str, error: type[Exception], start: Any
) -> None:
    stated, parties = start(answer, lambda shares: refuse(said))
    with pytest.raises(error, match="no"):
        ask(stated)
    assert (len(parties[0].seen), len(parties[1].seen)) == (0, 1), "party 0 is sent nothing then"


@pytest.mark.parametrize(
    "garbage",
    [
        lambda shares: [b"\x09what"],
        lambda shares: [TAKEN, ANSWERED + b"no shares"],
        lambda shares: answer(shares, request=bytes(16)),
        lambda shares: answer(shares, deployment="pd_" + "b" * 32),
        lambda shares: answer(shares, party=1),
        lambda shares: answer(shares, tensors={"outputs": np.zeros((3, 2), np.uint64)}),
        lambda shares: answer(shares, tensors={"outputs": np.full((2, 2), 2**62, np.uint64)}),
        lambda shares: [TAKEN, ANSWERED + bytes(2**16)],
    ],
)
def test_garbage_is_no_answer(garbage: Say, start: Any) -> None:
    stated, _ = start(garbage, answer)
    with pytest.raises(cloister.PartyAnswerRefused):
        ask(stated)


def test_after_a_failure_it_is_asked_once_more_as_if_it_were_another_request(start: Any) -> None:
    tries: list[int] = []

    def at_first_dropped(shares: Shares) -> list[bytes]:
        tries.append(1)
        return [TAKEN, *refuse("dropped")] if len(tries) == 1 else answer(shares)

    stated, parties = start(at_first_dropped, answer)
    assert np.array_equal(ask(stated), X)
    for party in parties:
        (first, before), (second, after) = party.seen
        assert first.request != second.request
        assert not np.array_equal(before.tensors["x"], after.tensors["x"]), "fresh shares"
        assert len(before.to_bytes()) == len(after.to_bytes()) and first.rows == second.rows
    parties[0].say = lambda shares: [TAKEN, *refuse("dropped")]
    with pytest.raises(cloister.PartyUnavailable):
        ask(stated)
    assert [len(party.seen) for party in parties] == [4, 4], "and no third time"


def test_permissions_are_those_of_when_they_are_sent_and_not_of_when_it_began(start: Any) -> None:
    given: list[str] = []

    def permissions() -> tuple[str, str]:
        given.append(f"the {len(given)}th")
        return given[-1], given[-1]

    def dropped(shares: Shares) -> list[bytes]:
        return [TAKEN, *refuse("dropped")] if len(parties[0].seen) == 1 else answer(shares)

    stated, parties = start(dropped, answer)
    with Parties(stated, outputs=2, until=time.monotonic() + SOON) as links:
        assert np.array_equal(links.ask({"x": X}, permissions), X)
    told = [head.permission for pair in zip(*(party.seen for party in parties), strict=True) for head, _ in pair]
    assert sorted(told) == given and len(given) == 4


def test_whoever_does_not_answer_is_left_at_the_deadline(start: Any) -> None:
    stated, _ = start(lambda shares: [TAKEN], answer)
    with pytest.raises(cloister.PartyUnavailable):
        ask(stated, within_s=LATE)


def test_nothing_is_sent_to_whoever_shows_another_certificate(start: Any, tmp_path: Path) -> None:
    stated, parties = start(answer, answer)
    other = Identity.create(tmp_path, "other", days=1).certificate.read_text()
    pinned = stated.parties[1].model_copy(update={"certificate": other})
    with pytest.raises(cloister.PartyRefused, match="nothing was sent"):
        ask(stated.model_copy(update={"parties": (stated.parties[0], pinned)}))
    assert not any(party.seen for party in parties)


def test_what_cannot_be_shared_is_refused_before_anybody_is_called(start: Any) -> None:
    stated, parties = start(answer, answer)
    for wrong, error in ((np.full((1, 2), np.nan), "NaN"), (np.full((1, 2), 1e9), "beyond")):
        with (
            Parties(stated, outputs=2, until=time.monotonic() + SOON) as links,
            pytest.raises(cloister.InvalidArgument, match=error),
        ):
            links.ask({"x": wrong}, lambda: PERMISSIONS)
    assert not any(party.seen for party in parties)


def test_a_statement_is_whole_or_refused(start: Any) -> None:
    stated, _ = start(answer, answer)
    envelope = sign_private_deployment(stated, private_key=PRIVATE, key_id=SIGNER)
    assert verify_private_deployment(envelope, KEYS) == stated
    with pytest.raises(cloister.InvalidCertificate):
        verify_private_deployment({**envelope, "payload": envelope["payload"][:-8] + "AAAAAAA="}, KEYS)
    with pytest.raises(cloister.InvalidCertificate):
        verify_private_deployment(envelope, {})


def test_without_scales_of_layers_a_statement_is_of_the_network_that_it_always_was(start: Any) -> None:
    architecture = network_of((2,), Linear(in_features=2, out_features=10)).architecture
    before = hashlib.sha256(f"cloister.mpc/1 20 {architecture.model_dump_json()}".encode()).hexdigest()
    assert network_digest(architecture, 20) == network_digest(architecture, 20, ()) == before
    assert len({network_digest(architecture, 20, each) for each in ((), ((20, 20),), ((20, 8),))}) == 3
    stated, _ = start(answer, answer)
    predicate = json.loads(stated.model_dump_json())
    assert predicate.pop("layer_bits") == []
    assert PrivateDeployment.model_validate_json(json.dumps(predicate)) == stated
    assert stated.largest_output == 2.0**21
    assert deployment(*stated.parties, layer_bits=((20, 20), (20, 8))).largest_output == 2.0**33
    for wrong in (((20, 56),), ((-1, 20),), ((20,),)):
        with pytest.raises(ValueError, match="layer_bits"):
            deployment(*stated.parties, layer_bits=wrong)


def test_an_expired_certificate_is_told_before_anybody_is_asked(tmp_path: Path, start: Any) -> None:
    stated, parties = start(answer, answer)
    old = Identity.create(tmp_path, "old", days=-1).certificate.read_text()
    expired = stated.model_copy(update={"dealer": stated.dealer.model_copy(update={"certificate": old})})
    terms = PrivateTerms(
        statement={}, certificate={}, architecture=network_of((2,), Linear(in_features=2, out_features=10)).architecture
    )
    private = cloister.PrivateModel(None, None, terms, expired)  # type: ignore[arg-type]  # neither is to be asked
    with pytest.raises(cloister.PartyRefused, match="dealer expired"):
        private.predict(X)
    assert not any(party.seen for party in parties)
