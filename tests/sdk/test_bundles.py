"""Bundles: every member comes back, whatever was changed is refused, and what was refused leaves nothing behind."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from certificates import KEY_ID, PRIVATE, RAW
from cloister.cli import main
from cloister.wire import bundles
from cloister.wire._errors import InvalidArgument
from cloister.wire.bundles import Contents, InvalidBundle
from cloister_server.store.tables import now

KEY = X25519PrivateKey.generate()
MEMBERS = [("tenant.json", b"{}"), ("models/a/1.safetensors", bytes(range(256)) * 9), ("empty", b"")]


def sealed(members: list[tuple[str, bytes]] = MEMBERS, key: X25519PrivateKey = KEY) -> bytes:
    return b"".join(bundles.seal_members(members, recipient=key.public_key()))


def opened(bundle: bytes, key: X25519PrivateKey = KEY) -> list[tuple[str, bytes]]:
    return list(bundles.open_members(io.BytesIO(bundle), private_key=key))


def starts(bundle: bytes) -> list[int]:
    """Where each sealed member begins, and the end."""
    found, at = [], 34
    while at < len(bundle):
        found.append(at)
        at += 8 + int.from_bytes(bundle[at : at + 8], "big")
    return [*found, at]


def test_every_member_comes_back_in_order() -> None:
    assert opened(sealed()) == MEMBERS
    assert sealed() != sealed()


def test_another_key_opens_nothing() -> None:
    with pytest.raises(InvalidBundle):
        opened(sealed(), X25519PrivateKey.generate())


@given(data=st.data())
def test_a_changed_bit_is_refused(data: st.DataObject) -> None:
    bundle = bytearray(sealed())
    at = data.draw(st.integers(0, len(bundle) - 1))
    bundle[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(InvalidBundle):
        opened(bytes(bundle))


@given(length=st.integers(0, len(sealed()) - 1))
def test_a_cut_bundle_is_refused(length: int) -> None:
    with pytest.raises(InvalidBundle):
        opened(sealed()[:length])


def test_members_cannot_be_left_out_swapped_repeated_or_taken_from_another_bundle() -> None:
    bundle, other = sealed(), sealed()
    a, b, c, end = starts(bundle)
    head, one, two, three = bundle[:a], bundle[a:b], bundle[b:c], bundle[c:end]
    for changed in (
        head + one + three, head + two + one + three, head + one + two, head + one + one + two + three,
        head + one + two + three + three, head + other[a:b] + two + three, head, bundle + b"\0" * 8,
    ):  # fmt: skip
        with pytest.raises(InvalidBundle):
            opened(changed)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../b", "", "a//b", ".hidden", "a b", "ä", "a\0"])
def test_a_name_that_leaves_its_directory_is_never_written(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        sealed([(name, b"")])


VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "bundle-1.json").read_text())


def test_a_reader_from_the_specification_alone_opens_the_vector() -> None:
    """RFC 9180 spelled out: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, base mode."""
    bundle = base64.b64decode(VECTORS["bundle"])
    raw = base64.urlsafe_b64decode(VECTORS["private_key"].removeprefix("cloister-bundle-key-1:"))[:32]
    key = X25519PrivateKey.from_private_bytes(raw)
    places = starts(bundle)
    bundle_id, found = bundle[18:34], []
    for index, (start, stop) in enumerate(pairwise(places)):
        body = bundle[start + 8 : stop]
        is_last = stop == len(bundle)
        info = b"cloister.bundle/1\n" + bundle_id + index.to_bytes(8, "big") + bytes([is_last])
        plain = hpke_open(key, body[:32], body[32:], info)
        size = int.from_bytes(plain[:2], "big")
        found.append((plain[2 : 2 + size].decode(), plain[2 + size :]))
    assert found == [(each["name"], base64.b64decode(each["content"])) for each in VECTORS["members"]]


def test_the_vector_opens_here_and_what_was_done_to_it_does_not() -> None:
    key = bundles.private_key_of(VECTORS["private_key"])
    assert bundles.public_line(key) == VECTORS["public_key"]
    members = [(each["name"], base64.b64decode(each["content"])) for each in VECTORS["members"]]
    assert opened(base64.b64decode(VECTORS["bundle"]), key) == members
    assert len(VECTORS["refused"]) == 12
    for each in VECTORS["refused"]:
        with pytest.raises(InvalidBundle):
            opened(base64.b64decode(each["bundle"]), key)
    for line in VECTORS["refused_public_keys"]:  # all zeros, and not below the prime
        with pytest.raises(InvalidArgument):
            bundles.public_key_of(line)


def hpke_open(key: X25519PrivateKey, enc: bytes, ciphertext: bytes, info: bytes) -> bytes:
    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x02"
    public = key.public_key().public_bytes_raw()
    shared = key.exchange(X25519PublicKey.from_public_bytes(enc))
    secret = expand(kem, extract(kem, b"", b"eae_prk", shared), b"shared_secret", enc + public, 32)
    context = b"\x00" + extract(suite, b"", b"psk_id_hash", b"") + extract(suite, b"", b"info_hash", info)
    base = extract(suite, secret, b"secret", b"")
    aead_key, nonce = (expand(suite, base, label, context, size) for label, size in ((b"key", 32), (b"base_nonce", 12)))
    return AESGCM(aead_key).decrypt(nonce, ciphertext, b"")


def extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, "sha256")


def expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return HKDFExpand(
        hashes.SHA256(), length=length, info=length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    ).derive(key)


def test_lines_of_keys_are_read_whole_or_not_at_all() -> None:
    private = bundles.new_private_key()
    public = bundles.public_line(bundles.private_key_of(private))
    assert bundles.public_line(bundles.public_key_of(public)) == public
    for line, read in ((private, bundles.private_key_of), (public, bundles.public_key_of)):
        for wrong in (
            line[:-1],
            line + "A",
            line.replace(":", ";"),
            line[:30] + ("A" if line[30] != "A" else "B") + line[31:],
        ):
            with pytest.raises(InvalidArgument) as refusal:
                read(wrong)
            assert wrong[-20:] not in str(refusal.value)
    with pytest.raises(InvalidArgument):
        bundles.public_key_of(private)


@pytest.fixture
def made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A directory with a key, its public line printed, the service's keys and a signed bundle."""
    assert main(["bundle", "key", "--to", str(tmp_path / "key")]) == 0
    write_bundle(tmp_path, capsys.readouterr().out.strip())
    (tmp_path / "keys.json").write_text(json.dumps({KEY_ID: RAW.hex()}))
    return tmp_path


def write_bundle(
    place: Path, line: str, *, told: str | None = None, members: list[tuple[str, bytes]] = MEMBERS
) -> None:
    digests = [(name, hashlib.sha256(content).hexdigest()) for name, content in MEMBERS]
    contents = Contents(
        tenant="tn_" + "1" * 32,
        tenant_name="acme",
        members=len(MEMBERS),
        contents_digest=bundles.contents_digest(digests),
        recipient=told or line,
        issued=now(),
    )
    envelope = bundles.sign_contents(contents, private_key=PRIVATE, key_id=KEY_ID)
    pieces = bundles.seal_members(
        [*members, ("contents.dsse.json", json.dumps(envelope).encode())], recipient=bundles.public_key_of(line)
    )
    (place / "bundle").write_bytes(b"".join(pieces))


def open_it(place: Path, to: str = "out") -> int:
    where = {name: str(place / name) for name in ("bundle", "key", "keys.json", to)}
    return main(
        ["bundle", "open", where["bundle"], "--key", where["key"], "--keys", where["keys.json"], "--to", where[to]]
    )


def test_the_command_opens_a_bundle_into_a_new_directory(made: Path) -> None:
    assert (made / "key").stat().st_mode & 0o777 == 0o600
    assert open_it(made) == 0
    assert {name: (made / "out" / name).read_bytes() for name, _ in MEMBERS} == dict(MEMBERS)
    assert open_it(made) == 1  # nothing is overwritten


def test_a_bundle_that_was_sealed_anew_or_holds_something_else_leaves_nothing(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = bundles.public_line(bundles.private_key_of((made / "key").read_text().strip()))
    other = bundles.public_line(X25519PrivateKey.generate())
    for changed in ({"told": other}, {"members": MEMBERS[:-1]}, {"members": [*MEMBERS[:-1], ("empty", b"x")]}):
        write_bundle(made, line, **changed)
        assert open_it(made) == 1
        assert "cloister bundle: " in capsys.readouterr().err
        assert sorted(path.name for path in made.iterdir()) == ["bundle", "key", "keys.json"]
