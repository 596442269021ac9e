"""The local key provider: keys wrap, are destroyed for good, and open for nobody with another root."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloister_privacy.sealing import (
    Context,
    InvalidKeyId,
    InvalidWrap,
    KeyExists,
    KeyMissing,
    KeyProvider,
    KeyProviderError,
    KeystoreDamaged,
    LocalKeyProvider,
    new_key,
)

CONTEXT = Context(tenant="tn_" + "0" * 32, kind="weights", object="obj_" + "1" * 32)
KEY_ID = "tn_" + "0" * 32 + ".0123456789abcdef"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "root.key"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "keystore"


@pytest.fixture
def keys(directory: Path, key_file: Path) -> LocalKeyProvider:
    keys = LocalKeyProvider.create(directory, key_file=key_file)
    keys.create_key(KEY_ID)
    return keys


def kek_file(directory: Path) -> Path:
    (path,) = directory.glob("*.kek")
    return path


def test_a_wrapped_key_unwraps_after_the_keystore_is_opened_again(
    keys: KeyProvider, directory: Path, key_file: Path
) -> None:
    secret = new_key()
    wrapped = keys.wrap(KEY_ID, secret, context=CONTEXT)
    again = LocalKeyProvider.open(directory, key_file=key_file)
    assert again.unwrap(KEY_ID, wrapped, context=CONTEXT) == secret
    handed_down = LocalKeyProvider(directory, root_key=again.root_key)
    assert handed_down.unwrap(KEY_ID, wrapped, context=CONTEXT) == secret


@pytest.mark.parametrize("length", [1, 32, 138, 2**16])
def test_a_secret_of_any_bearable_length_wraps(keys: LocalKeyProvider, length: int) -> None:
    secret = os.urandom(length)
    assert keys.unwrap(KEY_ID, keys.wrap(KEY_ID, secret, context=CONTEXT), context=CONTEXT) == secret


@pytest.mark.parametrize("length", [0, 2**16 + 1])
def test_a_secret_of_an_unbearable_length_is_a_mistake_told_at_once(keys: LocalKeyProvider, length: int) -> None:
    with pytest.raises(ValueError, match="secret to wrap"):
        keys.wrap(KEY_ID, bytes(length), context=CONTEXT)


@pytest.mark.parametrize("field", ["tenant", "kind", "object"])
def test_a_wrapped_key_is_bound_to_its_context(keys: LocalKeyProvider, field: str) -> None:
    wrapped = keys.wrap(KEY_ID, new_key(), context=CONTEXT)
    with pytest.raises(InvalidWrap):
        keys.unwrap(KEY_ID, wrapped, context=replace(CONTEXT, **{field: "another"}))


def test_a_change_of_any_byte_or_a_cut_of_a_wrapped_key_is_refused(keys: LocalKeyProvider) -> None:
    wrapped = bytearray(keys.wrap(KEY_ID, new_key(), context=CONTEXT))
    for position in range(len(wrapped)):
        changed = wrapped.copy()
        changed[position] ^= 0x20
        for forged in (bytes(changed), bytes(wrapped[:position])):
            with pytest.raises(InvalidWrap):
                keys.unwrap(KEY_ID, forged, context=CONTEXT)


def test_a_key_wraps_for_itself_alone(keys: LocalKeyProvider) -> None:
    keys.create_key("system")
    wrapped = keys.wrap(KEY_ID, new_key(), context=CONTEXT)
    with pytest.raises(InvalidWrap):
        keys.unwrap("system", wrapped, context=CONTEXT)


def test_a_destroyed_key_is_gone_for_every_process(keys: LocalKeyProvider, directory: Path, key_file: Path) -> None:
    other_process = LocalKeyProvider.open(directory, key_file=key_file)
    wrapped = keys.wrap(KEY_ID, new_key(), context=CONTEXT)
    assert other_process.has_key(KEY_ID)
    keys.destroy_key(KEY_ID)
    assert not other_process.has_key(KEY_ID)
    with pytest.raises(KeyMissing):
        other_process.unwrap(KEY_ID, wrapped, context=CONTEXT)
    with pytest.raises(KeyMissing):
        other_process.wrap(KEY_ID, new_key(), context=CONTEXT)
    with pytest.raises(KeyMissing):
        keys.destroy_key(KEY_ID)
    assert [path.name for path in directory.iterdir()] == ["keystore.json"]


def test_a_key_made_anew_under_a_destroyed_id_opens_nothing_old(keys: LocalKeyProvider) -> None:
    wrapped = keys.wrap(KEY_ID, new_key(), context=CONTEXT)
    keys.destroy_key(KEY_ID)
    keys.create_key(KEY_ID)
    with pytest.raises(InvalidWrap):
        keys.unwrap(KEY_ID, wrapped, context=CONTEXT)


def test_destroying_overwrites_the_key_before_it_unlinks_it(
    keys: LocalKeyProvider, directory: Path, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    witness.hardlink_to(kek_file(directory))
    keys.destroy_key(KEY_ID)
    assert not any(witness.read_bytes())


def test_a_destruction_that_was_interrupted_is_a_destruction(
    keys: LocalKeyProvider, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        keys.destroy_key(KEY_ID)
    monkeypatch.undo()
    assert kek_file(directory).exists() and not keys.has_key(KEY_ID)
    keys.destroy_key(KEY_ID)
    assert not list(directory.glob("*.kek"))


def test_every_change_on_disk_is_synced_with_its_directory(
    keys: LocalKeyProvider, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append("directory" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")  # noqa: PTH112 (a descriptor)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    keys.create_key("system")
    keys.destroy_key("system")
    assert synced == ["file", "directory", "file", "directory"]


def test_a_key_id_is_used_once(keys: LocalKeyProvider, directory: Path) -> None:
    before = kek_file(directory).read_bytes()
    with pytest.raises(KeyExists):
        keys.create_key(KEY_ID)
    assert kek_file(directory).read_bytes() == before


def test_a_failed_write_leaves_no_key_and_no_draft(
    keys: LocalKeyProvider, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyProviderError, match="No space left on device"):
        keys.create_key("system")
    monkeypatch.undo()
    assert not keys.has_key("system") and len(list(directory.iterdir())) == 2


@pytest.mark.parametrize(
    "key_id", ["", "..", "../system", "a/b", "/etc/passwd", "A", "1a", "a..b", ".a", "a.", "a\n", "a\0", "é", "a" * 129]
)
def test_a_key_id_that_is_none_touches_no_file(keys: LocalKeyProvider, key_id: str) -> None:
    for refused in (
        lambda: keys.create_key(key_id),
        lambda: keys.has_key(key_id),
        lambda: keys.wrap(key_id, new_key(), context=CONTEXT),
        lambda: keys.unwrap(key_id, b"", context=CONTEXT),
        lambda: keys.destroy_key(key_id),
    ):
        with pytest.raises(InvalidKeyId):
            refused()


@pytest.mark.parametrize("key_id", ["system", "a", "tn_" + "f" * 32 + ".0123456789abcdef", "a" * 128])
def test_the_key_ids_in_use_are_taken(keys: LocalKeyProvider, key_id: str) -> None:
    keys.create_key(key_id)
    assert keys.has_key(key_id)


def test_a_listing_of_the_keystore_tells_no_tenant_and_its_files_no_key(
    keys: LocalKeyProvider, directory: Path
) -> None:
    on_disk = b"".join(path.name.encode() + path.read_bytes() for path in directory.iterdir())
    kek = keys._key(KEY_ID)
    for secret in (b"tn_", KEY_ID.encode(), kek, keys.root_key, kek.hex().encode(), keys.root_key.hex().encode()):
        assert secret not in on_disk
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_keys_file_in_another_keys_place_is_refused(keys: LocalKeyProvider, directory: Path) -> None:
    mine = kek_file(directory)
    stolen = mine.read_bytes()
    mine.unlink()
    keys.create_key("system")
    kek_file(directory).write_bytes(stolen)
    with pytest.raises(KeystoreDamaged, match="system"):
        keys.has_key("system")


@pytest.mark.parametrize("damage", [b"", b"x", None], ids=["empty", "rubbish", "one bit"])
def test_a_damaged_key_file_is_told_from_a_destroyed_one(
    keys: LocalKeyProvider, directory: Path, damage: bytes | None
) -> None:
    content = kek_file(directory).read_bytes()
    kek_file(directory).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage is None else damage)
    with pytest.raises(KeystoreDamaged):
        keys.has_key(KEY_ID)


def test_one_key_file_under_two_keystores_opens_neither_with_the_others_files(
    keys: LocalKeyProvider, directory: Path, key_file: Path, tmp_path: Path
) -> None:
    second = LocalKeyProvider.create(tmp_path / "second", key_file=key_file)
    second.create_key(KEY_ID)
    assert kek_file(directory).name != kek_file(tmp_path / "second").name
    kek_file(tmp_path / "second").write_bytes(kek_file(directory).read_bytes())
    with pytest.raises(KeystoreDamaged):
        second.has_key(KEY_ID)


def test_no_repr_and_no_traceback_shows_a_secret(keys: LocalKeyProvider, directory: Path) -> None:
    with pytest.raises(InvalidWrap) as refusal:
        keys.unwrap(KEY_ID, b"rubbish", context=CONTEXT)
    shown = repr(keys) + str(keys) + "".join(traceback.format_exception(refusal.value))
    for secret in (keys.root_key, keys._key(KEY_ID)):
        assert repr(secret) not in shown and secret.hex() not in shown


def test_two_processes_that_make_one_key_make_it_once(keys: LocalKeyProvider, directory: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from cloister_privacy.sealing import *\n"
        "keys = LocalKeyProvider(Path(sys.argv[1]), root_key=bytes.fromhex(sys.stdin.readline()))\n"
        "made = 0\n"
        "for n in range(50):\n"
        "    try:\n"
        "        keys.create_key(f'k{n}'); made += 1\n"
        "    except KeyExists:\n"
        "        pass\n"
        "print(made)"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdin is not None
        with racer.stdin as pipe:
            pipe.write(keys.root_key.hex() + "\n")
    made = []
    for racer in racers:
        assert racer.stdout is not None
        with racer.stdout as pipe:
            made.append(int(pipe.read()))
        assert racer.wait() == 0
    assert sum(made) == 50
    assert all(keys.has_key(f"k{n}") for n in range(50))
    assert not list(directory.glob(".new-*"))
