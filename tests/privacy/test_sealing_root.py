"""The root of a keystore: key files, passphrases and the record, and every way in which they are the wrong ones."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

import pytest

from cloister_privacy.sealing import (
    KeyFileExposed,
    KeyProviderError,
    KeystoreDamaged,
    KeystoreExists,
    KeystoreMissing,
    LocalKeyProvider,
    RootKeyRefused,
    WrongKey,
    new_key,
    new_key_file,
    read_key_file,
)

KEY_ID = "tn_" + "0" * 32 + ".0123456789abcdef"
PASSPHRASE = "correct horse battery staple"


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


def test_another_key_file_is_the_wrong_key_at_once(keys: LocalKeyProvider, directory: Path, tmp_path: Path) -> None:
    new_key_file(tmp_path / "other.key")
    with pytest.raises(WrongKey):
        LocalKeyProvider.open(directory, key_file=tmp_path / "other.key")
    with pytest.raises(WrongKey):
        LocalKeyProvider(directory, root_key=new_key())


def test_another_passphrase_is_the_wrong_key_at_once(directory: Path) -> None:
    LocalKeyProvider.create(directory, passphrase=PASSPHRASE).create_key("system")
    assert LocalKeyProvider.open(directory, passphrase=PASSPHRASE).has_key("system")
    for wrong in (PASSPHRASE + " ", "short", ""):
        with pytest.raises(WrongKey):
            LocalKeyProvider.open(directory, passphrase=wrong)


def test_a_passphrase_opens_however_its_accents_are_typed(directory: Path) -> None:
    LocalKeyProvider.create(directory, passphrase="caf\u00e9 au lait s'il vous pla\u00eet")
    LocalKeyProvider.open(directory, passphrase="cafe\u0301 au lait s'il vous plai\u0302t")


@pytest.mark.parametrize("passphrase", ["", "elevenchars", "correct horse battery \udcff staple"])
def test_a_weak_or_broken_passphrase_makes_no_keystore(directory: Path, passphrase: str) -> None:
    with pytest.raises(RootKeyRefused) as refusal:
        LocalKeyProvider.create(directory, passphrase=passphrase)
    assert not directory.exists()
    assert not passphrase or passphrase not in "".join(traceback.format_exception(refusal.value))


def test_the_other_kind_of_root_is_refused_by_name(keys: LocalKeyProvider, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(RootKeyRefused, match="key file"):
        LocalKeyProvider.open(directory, passphrase=PASSPHRASE)
    LocalKeyProvider.create(tmp_path / "second", passphrase=PASSPHRASE)
    with pytest.raises(RootKeyRefused, match="passphrase"):
        LocalKeyProvider.open(tmp_path / "second", key_file=tmp_path / "any.key")


def test_exactly_one_root_is_asked_for(directory: Path, key_file: Path) -> None:
    for call in (LocalKeyProvider.create, LocalKeyProvider.open):
        with pytest.raises(ValueError, match="exactly one"):
            call(directory)
        with pytest.raises(ValueError, match="exactly one"):
            call(directory, key_file=key_file, passphrase=PASSPHRASE)


def test_a_keystore_is_never_made_over_another(keys: LocalKeyProvider, directory: Path, key_file: Path) -> None:
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(KeystoreExists):
        LocalKeyProvider.create(directory, key_file=key_file)
    with pytest.raises(KeystoreExists):
        LocalKeyProvider.create(directory, passphrase=PASSPHRASE)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_a_key_file_that_is_there_is_taken_and_never_overwritten(directory: Path, key_file: Path) -> None:
    root_key = new_key_file(key_file)
    assert LocalKeyProvider.create(directory, key_file=key_file).root_key == root_key
    with pytest.raises(RootKeyRefused, match="never overwritten"):
        new_key_file(key_file)
    assert read_key_file(key_file) == root_key


def test_no_keystore_is_told_as_that(directory: Path, key_file: Path) -> None:
    new_key_file(key_file)
    with pytest.raises(KeystoreMissing):
        LocalKeyProvider.open(directory, key_file=key_file)
    directory.mkdir(mode=0o700)
    with pytest.raises(KeystoreMissing):
        LocalKeyProvider.open(directory, key_file=key_file)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o644])
def test_a_key_file_that_others_can_reach_is_refused(
    keys: LocalKeyProvider, directory: Path, key_file: Path, mode: int
) -> None:
    key_file.chmod(mode)
    with pytest.raises(KeyFileExposed, match="0600"):
        LocalKeyProvider.open(directory, key_file=key_file)


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_keystore_that_others_can_enter_is_refused(
    keys: LocalKeyProvider, directory: Path, key_file: Path, mode: int
) -> None:
    directory.chmod(mode)
    with pytest.raises(KeyFileExposed, match="0700"):
        LocalKeyProvider.open(directory, key_file=key_file)


def test_a_keystore_is_not_made_in_a_directory_that_others_can_enter(directory: Path, key_file: Path) -> None:
    directory.mkdir()
    directory.chmod(0o755)
    with pytest.raises(KeyFileExposed):
        LocalKeyProvider.create(directory, key_file=key_file)
    assert not list(directory.iterdir()) and not key_file.exists()


def test_a_key_file_of_another_user_is_refused(
    keys: LocalKeyProvider, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = key_file.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    with pytest.raises(KeyFileExposed, match="another user"):
        read_key_file(key_file)


def test_a_read_only_key_file_and_a_link_to_one_are_taken(key_file: Path, tmp_path: Path) -> None:
    root_key = new_key_file(key_file)
    key_file.chmod(0o400)
    (tmp_path / "mounted").symlink_to(key_file)
    assert read_key_file(tmp_path / "mounted") == root_key


def test_every_mistyped_key_file_is_refused_without_quoting_it(key_file: Path) -> None:
    new_key_file(key_file)
    line = key_file.read_text()
    spoiled = [line[:at] + ("B" if line[at] == "A" else "A") + line[at + 1 :] for at in range(len(line) - 1)]
    for text in (*spoiled, line[:-2], line + line, line + "\n", " " + line, line.strip() + "\r\n", "", "x" * 32):
        key_file.write_text(text)
        with pytest.raises(RootKeyRefused) as refusal:
            read_key_file(key_file)
        assert not text.strip() or text.strip() not in str(refusal.value)


def test_a_key_file_that_is_absent_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RootKeyRefused, match="no key file"):
        read_key_file(tmp_path / "absent")
    with pytest.raises(RootKeyRefused):
        read_key_file(tmp_path / "absent" / "further")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(KeyProviderError, match="regular file"):
            read_key_file(path)


def change(record: str, **changes: Any) -> str:
    fields = json.loads(record)
    for name, value in changes.items():
        (fields["root"] if name in fields["root"] else fields)[name] = value
    return json.dumps(fields, indent=2) + "\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "cloister.keystore/2"},
        {"id": "00" * 15},
        {"id": "AB" * 16},
        {"check": "00" * 31},
        {"check": None},
        {"salt": "00" * 15},
        {"memory_kib": 1024},
        {"memory_kib": 2**30},
        {"memory_kib": 65536.0},
        {"iterations": 1},
        {"iterations": True},
        {"lanes": 10**6},
        {"type": "yubikey"},
        {"root": []},
        {"more": 1},
    ],
    ids=str,
)
def test_a_record_of_any_other_spelling_is_damaged(directory: Path, changes: dict[str, Any]) -> None:
    LocalKeyProvider.create(directory, passphrase=PASSPHRASE)
    record = directory / "keystore.json"
    record.write_text(change(record.read_text(), **changes))
    with pytest.raises(KeystoreDamaged):
        LocalKeyProvider.open(directory, passphrase=PASSPHRASE)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 4096, b'{"a": 1, "a": 1}'])
def test_a_record_that_is_no_record_is_damaged(keys: LocalKeyProvider, directory: Path, content: bytes) -> None:
    (directory / "keystore.json").write_bytes(content)
    with pytest.raises(KeystoreDamaged):
        LocalKeyProvider(directory, root_key=keys.root_key)


def test_a_changed_id_check_or_salt_makes_every_root_the_wrong_key(directory: Path) -> None:
    LocalKeyProvider.create(directory, passphrase=PASSPHRASE)
    record = directory / "keystore.json"
    original = record.read_text()
    for changes in ({"id": "00" * 16}, {"check": "00" * 32}, {"salt": "00" * 16}, {"iterations": 4}):
        record.write_text(change(original, **changes))
        with pytest.raises(WrongKey):
            LocalKeyProvider.open(directory, passphrase=PASSPHRASE)
