"""The recovery key of a local keystore: what it opens, for how long, however it is typed, and what it brings back: nothing."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister_privacy.sealing import (
    Context,
    KeyMissing,
    KeystoreDamaged,
    LocalKeyProvider,
    RecoveryKey,
    RootKeyRefused,
    WrongKey,
    new_key,
)

CONTEXT = Context(tenant="tn_1", kind="weights", object="obj_1")
PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "keystore"


@pytest.fixture
def keys(directory: Path, tmp_path: Path) -> LocalKeyProvider:
    keys = LocalKeyProvider.create(directory, key_file=tmp_path / "root.key")
    keys.create_key("tn_1.first")
    return keys


def test_a_lost_key_file_is_made_again_and_everything_opens(
    keys: LocalKeyProvider, directory: Path, tmp_path: Path
) -> None:
    secret, key = new_key(), keys.new_recovery_key()
    wrapped = keys.wrap("tn_1.first", secret, context=CONTEXT)
    (tmp_path / "root.key").unlink()
    LocalKeyProvider.recover(directory, RecoveryKey.parse(key.text()), key_file=tmp_path / "again.key")
    opened = LocalKeyProvider.open(directory, key_file=tmp_path / "again.key")
    assert opened.unwrap("tn_1.first", wrapped, context=CONTEXT) == secret
    assert (tmp_path / "again.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(RootKeyRefused, match="never overwritten"):
        LocalKeyProvider.recover(directory, key, key_file=tmp_path / "again.key")


def test_a_lost_passphrase_gives_way_to_a_new_one(directory: Path, tmp_path: Path) -> None:
    keys = LocalKeyProvider.create(directory, passphrase=PASSPHRASE)
    keys.create_key("system")
    key = keys.new_recovery_key()
    assert LocalKeyProvider.open(directory, passphrase=PASSPHRASE).has_key("system"), "a recovery key changes nothing"
    with pytest.raises(RootKeyRefused, match="under 12"):
        LocalKeyProvider.recover(directory, key, passphrase="short")
    LocalKeyProvider.recover(directory, key, passphrase="another horse battery staple")
    assert LocalKeyProvider.open(directory, passphrase="another horse battery staple").has_key("system")
    with pytest.raises(WrongKey, match="passphrase"):
        LocalKeyProvider.open(directory, passphrase=PASSPHRASE)
    LocalKeyProvider.recover(directory, key, key_file=tmp_path / "root.key")
    assert LocalKeyProvider.open(directory, key_file=tmp_path / "root.key").has_key("system")
    with pytest.raises(RootKeyRefused, match="key file"):
        LocalKeyProvider.open(directory, passphrase="another horse battery staple")


def test_a_renewed_recovery_key_opens_nothing_and_the_record_that_it_opened_is_zeroed(
    keys: LocalKeyProvider, directory: Path, tmp_path: Path
) -> None:
    old = keys.new_recovery_key()
    with (directory / "keystore.json").open("rb") as before:
        new = keys.new_recovery_key()
        assert not any(before.read())
    with pytest.raises(WrongKey, match="another was made since"):
        LocalKeyProvider.open_by_recovery(directory, old)
    assert LocalKeyProvider.open_by_recovery(directory, new).has_key("tn_1.first")
    assert LocalKeyProvider.open(directory, key_file=tmp_path / "root.key").has_key("tn_1.first")
    assert sorted(path.suffix for path in directory.iterdir()) == [".json", ".kek"], "no draft is left"


def test_a_destroyed_key_stays_destroyed(keys: LocalKeyProvider, directory: Path, tmp_path: Path) -> None:
    key = keys.new_recovery_key()
    wrapped = keys.wrap("tn_1.first", new_key(), context=CONTEXT)
    keys.destroy_key("tn_1.first")
    recovered = LocalKeyProvider.recover(directory, key, key_file=tmp_path / "again.key")
    assert not recovered.has_key("tn_1.first")
    with pytest.raises(KeyMissing):
        recovered.unwrap("tn_1.first", wrapped, context=CONTEXT)


def test_a_keystore_of_before_recovery_keys_has_none_until_one_is_made(
    keys: LocalKeyProvider, directory: Path, tmp_path: Path
) -> None:
    first = (directory / "keystore.json").read_bytes()
    assert b'"cloister.keystore/1"' in first and not keys.has_recovery_key
    with pytest.raises(RootKeyRefused, match="no recovery key"):
        LocalKeyProvider.recover(directory, RecoveryKey.fresh(), key_file=tmp_path / "again.key")
    assert not (tmp_path / "again.key").exists() and (directory / "keystore.json").read_bytes() == first
    keys.new_recovery_key()
    assert keys.has_recovery_key and b'"cloister.keystore/2"' in (directory / "keystore.json").read_bytes()


def test_another_keystores_recovery_key_and_a_changed_record_open_nothing(
    keys: LocalKeyProvider, directory: Path, tmp_path: Path
) -> None:
    other = LocalKeyProvider.create(tmp_path / "other", key_file=tmp_path / "other.key").new_recovery_key()
    key = keys.new_recovery_key()
    with pytest.raises(WrongKey):
        LocalKeyProvider.open_by_recovery(directory, other)
    record = directory / "keystore.json"
    whole = record.read_text()
    record.write_text(whole.replace("cloister.keystore/2", "cloister.keystore/1"))
    with pytest.raises(KeystoreDamaged):
        LocalKeyProvider.open_by_recovery(directory, key)
    last = whole.rindex('"\n')
    record.write_text(whole[: last - 1] + ("0" if whole[last - 1] != "0" else "1") + whole[last:])
    with pytest.raises(WrongKey):
        LocalKeyProvider.open_by_recovery(directory, key)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 58), st.sampled_from("0123456789ABCDEFGHJKMNPQRSTVWXYZU"))
def test_a_recovery_key_is_read_however_it_is_typed_and_never_with_a_character_wrong(
    secret: bytes, at: int, other: str
) -> None:
    key = RecoveryKey(secret)
    text = key.text()
    assert len(text) == 3 + 14 * 5 and secret.hex() not in repr(key)
    for typed in (text.lower(), text.replace("-", ""), f" {text.replace('-', ' ')}\n", text.replace("0", "o")):
        assert RecoveryKey.parse(typed) == key
    digits = text.replace("-", "")
    if digits[at] != other:
        wrong = digits[:at] + other + digits[at + 1 :]
        with pytest.raises(RootKeyRefused) as refusal:
            RecoveryKey.parse(wrong)
        assert wrong not in "".join(traceback.format_exception(refusal.value))


@pytest.mark.parametrize("typed", ["", "CR1", "CR2-" + "0000-" * 14, "1" * 4096, "\u0661" * 56])
def test_what_is_no_recovery_key_is_refused(typed: str) -> None:
    with pytest.raises(RootKeyRefused):
        RecoveryKey.parse(typed)
