"""Correlated randomness: what the dealer works out joins to what it should, is bound to one request, and is never used twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloister_privacy.mpc import (
    IndexBurned,
    MaterialExhausted,
    MaterialRefused,
    SharedNetwork,
    SharesOfAnother,
    open_shares,
    seal_shares,
    split_weights,
)
from cloister_privacy.mpc.keystream import Index, Keystream
from cloister_privacy.mpc.marks import Marks
from cloister_privacy.mpc.material import Generation, Material, corrections, deal, masks_of, open_material
from cloister_privacy.mpc.products import TIMES, Transposed
from cloister_privacy.mpc.spool import Spool
from cloister_privacy.mpc.tuples import Comparison, Triple, Truncation, Waves, WeightProduct
from mpc_groups import small_network

PROGRAM = [
    Triple(TIMES, (3, 2), (3, 1)),
    WeightProduct(Transposed(), "w", (4, 3), (2, 3)),
    Truncation(9, 20),
    Waves(5, 24, 3, 20),
    Comparison(11, 2, 20, True),
    Comparison(3, 1, 0, True),
    Comparison(8, 3, 0, False),
]
KEYS = os.urandom(32), os.urandom(32)
INDEX = Index(4, 7)
MASKS = masks_of(KEYS, {"w": (2, 3)})


def test_each_kind_of_tuple_joins_to_what_it_derives_from_what_both_drew() -> None:
    body = corrections(PROGRAM, index=INDEX, keys=KEYS, masks=MASKS)
    materials = [
        Material(Keystream.of(key, INDEX), corrections=each) for key, each in zip(KEYS, (body, None), strict=True)
    ]
    for kind in PROGRAM:
        shares = [material.take(kind) for material in materials]
        parts = (*kind.random, *kind.derived)
        joined = [part.join(first, second) for part, first, second in zip(parts, *shares, strict=True)]
        expected = kind.derive(joined[: len(kind.random)], MASKS)
        assert all(np.array_equal(a, b) for a, b in zip(joined[len(kind.random) :], expected, strict=True))
        assert len(expected) == len(kind.derived)


def test_the_mask_of_a_weight_is_one_in_a_generation_and_another_in_the_next() -> None:
    shapes = {"a": (3,), "b": (3,)}
    masks = masks_of(KEYS, shapes)
    assert not np.array_equal(masks["a"], masks["b"])
    halves = [masks_of([key], shapes)["a"] for key in KEYS]
    assert np.array_equal(halves[0] + halves[1], masks["a"])
    other = masks_of((os.urandom(32), os.urandom(32)), shapes)
    assert not np.array_equal(masks["a"], other["a"])


def test_each_request_draws_a_fresh_b_for_the_same_weight() -> None:
    kind = WeightProduct(Transposed(), "w", (4, 3), (2, 3))
    drawn = [
        Material(Keystream.of(KEYS[1], Index(4, count)), corrections=None).take(kind)[0].tobytes()
        for count in range(1, 9)
    ]
    assert len(set(drawn)) == 8


@pytest.fixture(scope="module")
def sealed() -> bytes:
    return deal(PROGRAM, generation="g1", index=INDEX, keys=KEYS, masks=MASKS)


def _open(sealed: bytes, **changes: Any) -> Material:
    given = {"program": PROGRAM, "generation": Generation("g1", KEYS[0]), "index": INDEX} | changes
    return open_material(sealed, given.pop("program"), **given)


def test_material_opens_for_its_own_request(sealed: bytes) -> None:
    material = _open(sealed)
    for kind in PROGRAM:
        material.take(kind)
    with pytest.raises(MaterialRefused, match="ends before the program"):
        material.take(Truncation(1, 20))


@pytest.mark.parametrize(
    "changes",
    [
        {"index": Index(4, 8)},
        {"index": Index(5, 7)},
        {"generation": Generation("g2", KEYS[0])},
        {"generation": Generation("g1", KEYS[1])},
        {"program": PROGRAM[:-1]},
        {"program": [*PROGRAM[:-1], Comparison(8, 3, 20, False)]},
    ],
)
def test_replayed_and_mismatched_material_is_refused(sealed: bytes, changes: dict[str, Any]) -> None:
    with pytest.raises(MaterialRefused, match="another generation, index or network"):
        _open(sealed, **changes)


def test_changed_or_shortened_material_is_refused(sealed: bytes) -> None:
    places = [*range(0, len(sealed), max(1, len(sealed) // 40)), len(sealed) - 1]
    for place in places:
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(MaterialRefused):
            _open(bytes(changed))
    for length in (0, 10, len(sealed) - 1):
        with pytest.raises(MaterialRefused):
            _open(sealed[:length])


def test_sealed_material_shows_none_of_its_corrections(sealed: bytes) -> None:
    body = corrections(PROGRAM, index=INDEX, keys=KEYS, masks=MASKS)
    assert all(body[at : at + 16] not in sealed for at in range(0, len(body) - 16, 16))


def test_an_index_is_burned_once(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "burned.json")
    marks.burn("g1", Index(1, 1))
    marks.burn("g1", Index(2, 1))
    marks.burn("g1", Index(1, 5))
    for used in (Index(1, 5), Index(1, 1), Index(1, 4), Index(2, 1)):
        with pytest.raises(IndexBurned, match="was used before"):
            marks.burn("g1", used)
    marks.burn("g2", Index(1, 1))


def test_what_may_have_been_used_before_a_crash_stays_burned(tmp_path: Path) -> None:
    path = tmp_path / "burned.json"
    for count in (1, 40, 64, 65, 200):
        Marks(path).burn("g1", Index(1, count)) if count == 1 else None
        written = json.loads(path.read_text())["marks"]["1"]
        after = Marks(path)  # as a process that starts anew
        with pytest.raises(IndexBurned):
            after.burn("g1", Index(1, min(count, written)))
        after.burn("g1", Index(1, written + count))


def test_the_mark_is_on_disk_before_the_index_counts_as_burned(tmp_path: Path) -> None:
    path = tmp_path / "burned.json"
    marks = Marks(path)
    for count in range(1, 300):
        marks.burn("g1", Index(1, count))
        assert json.loads(path.read_text())["marks"]["1"] >= count


def test_material_ahead_keeps_within_its_budget_and_goes_once(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "1-9.material").write_bytes(b"of an earlier generation")
    spool = Spool(tmp_path / "m", limit_bytes=100)
    assert list((tmp_path / "m").iterdir()) == []
    spool.put(Index(1, 1), bytes(40))
    spool.put(Index(1, 2), bytes(50))
    assert all(each.stat().st_mode & 0o077 == 0 for each in (tmp_path / "m").iterdir())
    with pytest.raises(MaterialExhausted, match="budget of 100"):
        spool.put(Index(1, 3), bytes(11))
    assert spool.take(2) is None
    assert spool.take(1) == (Index(1, 1), bytes(40))
    assert spool.take(1) == (Index(1, 2), bytes(50))
    assert spool.take(1) is None
    assert list((tmp_path / "m").iterdir()) == []


def test_a_share_of_the_weights_opens_for_its_party_alone() -> None:
    network = small_network()
    shared = SharedNetwork(network.architecture)
    shares = split_weights(shared, network.state_dict())[0]
    key, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    sealed = seal_shares(shares, key.public_key(), network=shared, deployment="dep_1", party=0)
    opened = open_shares(sealed, key, network=shared, deployment="dep_1", party=0)
    assert all(np.array_equal(opened[name], share) for name, share in shares.items())
    halved = SharedNetwork(network.architecture, fraction_bits=16)
    for arguments in (
        (sealed, other, shared, "dep_1", 0),
        (sealed, key, shared, "dep_2", 0),
        (sealed, key, shared, "dep_1", 1),
        (sealed, key, halved, "dep_1", 0),
        (sealed[:-1], key, shared, "dep_1", 0),
        (sealed.replace(b"weights/1", b"weights/2"), key, shared, "dep_1", 0),
    ):
        body, private, kind, deployment, party = arguments
        with pytest.raises(SharesOfAnother, match="does not open"):
            open_shares(body, private, network=kind, deployment=deployment, party=party)
