"""The local key provider: a directory of keys, each sealed under one root key. Knows files; nothing of SQL or tenants."""

from __future__ import annotations

from pathlib import Path

from cloister_privacy.sealing.context import Context, length_prefixed
from cloister_privacy.sealing.derivation import KEY_BYTES
from cloister_privacy.sealing.errors import (
    InvalidWrap,
    KeyExists,
    KeyMissing,
    KeystoreDamaged,
    KeystoreExists,
    KeystoreMissing,
    RootKeyRefused,
)
from cloister_privacy.sealing.files import (
    check_private,
    make_directory,
    overwrite_and_remove,
    read_private,
    replace,
    write_new,
)
from cloister_privacy.sealing.keystore import KeystoreRecord
from cloister_privacy.sealing.provider import Destruction, check_key_id
from cloister_privacy.sealing.recovery import RecoveryKey
from cloister_privacy.sealing.root import Stretching, check_passphrase, new_key_file, read_key_file, write_key_file
from cloister_privacy.sealing.sealed import new_key
from cloister_privacy.sealing.wrapping import unwrap_secret, wrap_secret

__all__ = ["LocalKeyProvider"]

_RECORD = "keystore.json"
_KEK_LINE = b"cloister.kek/1\n"
_WRAPPED_LINE = b"cloister.wrapped/1\n"
_FILE_LIMIT = 4096
_DESTRUCTION = Destruction(
    waiting_days=0,
    claim="The file of the key was overwritten with zeros and removed from the live keystore. Copies of the keystore, "
    "and what flash or a copying file system keeps of the file, are not reached by that.",
)


class LocalKeyProvider:
    """A KeyProvider over a keystore directory that only its owner can enter.

    Keys are read from disk at every use and never cached, so a key destroyed by one process is gone for all.
    """

    __slots__ = ("_directory", "_record", "_root_key")

    def __init__(self, directory: Path, *, root_key: bytes) -> None:
        """Open a keystore with the root key itself, as a parent process hands it down.

        Raises KeystoreMissing, KeyFileExposed, KeystoreDamaged, or WrongKey: at once and not at the first use.
        """
        if len(root_key) != KEY_BYTES:
            raise ValueError(f"a root key has {KEY_BYTES} bytes, not {len(root_key)}")
        self._directory, self._root_key = directory, root_key
        self._record = _read_record(directory)
        self._record.check_root(root_key)

    @classmethod
    def create(
        cls, directory: Path, *, key_file: Path | None = None, passphrase: str | None = None
    ) -> LocalKeyProvider:
        """Make an empty keystore under a key file (made too, where it is absent) or a passphrase; exactly one.

        Create-only and durable. Raises KeystoreExists, KeyFileExposed or RootKeyRefused; no keystore is left then.
        """
        _check_one_root(key_file, passphrase)
        if passphrase is not None:
            check_passphrase(passphrase)
        try:
            make_directory(directory)
        except FileExistsError:
            raise KeystoreExists(f"{directory} is not a directory; name another place for the keystore") from None
        check_private(directory)
        if (directory / _RECORD).exists():
            raise _keystore_exists(directory)
        stretching, root_key = _new_root(key_file, passphrase)
        try:
            write_new(directory / _RECORD, KeystoreRecord.fresh(root_key, stretching).to_bytes())
        except FileExistsError:
            raise _keystore_exists(directory) from None
        return cls(directory, root_key=root_key)

    @classmethod
    def open(cls, directory: Path, *, key_file: Path | None = None, passphrase: str | None = None) -> LocalKeyProvider:
        """Open a keystore with what it was made with. Raises WrongKey, and all that building it raises.

        Raises RootKeyRefused where the keystore wants the other kind of root, or the key file is absent or malformed.
        """
        _check_one_root(key_file, passphrase)
        record = _read_record(directory)
        if record.stretching is not None:
            if passphrase is None:
                raise RootKeyRefused("this keystore is opened by its passphrase, not by a key file; give that")
            return cls(directory, root_key=record.root_of_passphrase(passphrase))
        if key_file is None:
            raise RootKeyRefused("this keystore is opened by its key file, not by a passphrase; give the file's path")
        return cls(directory, root_key=read_key_file(key_file))

    @classmethod
    def recover(
        cls, directory: Path, key: RecoveryKey, *, key_file: Path | None = None, passphrase: str | None = None
    ) -> LocalKeyProvider:
        """Open a keystore by its recovery key, and let a new key file (made here), or a new passphrase, open it from now on.

        A passphrase from before opens it no more; keys that were destroyed stay so. Raises RootKeyRefused or WrongKey, and then
        nothing is changed, or KeyProviderError.
        """
        _check_one_root(key_file, passphrase)
        if passphrase is not None:
            check_passphrase(passphrase)
        opened = cls.open_by_recovery(directory, key)
        if key_file is not None:
            write_key_file(key_file, opened._root_key)
            opened._change(opened._record.with_key_file())
        elif passphrase is not None:
            opened._change(opened._record.with_passphrase(opened._root_key, passphrase))
        return opened

    @classmethod
    def open_by_recovery(cls, directory: Path, key: RecoveryKey) -> LocalKeyProvider:
        """Open a keystore by its recovery key; what opens it otherwise stays as it is. Raises RootKeyRefused or WrongKey."""
        return cls(directory, root_key=_read_record(directory).root_of_recovery(key))

    @property
    def has_recovery_key(self) -> bool:
        return _read_record(self._directory).by_recovery is not None

    def new_recovery_key(self) -> RecoveryKey:
        """Make a recovery key, which is nowhere but in this answer. The one from before opens nothing here any more."""
        key = RecoveryKey.fresh()
        self._record = _read_record(self._directory)
        self._change(self._record.with_recovery(self._root_key, key))
        return key

    @property
    def root_key(self) -> bytes:
        """For the pipe to a child process, and nowhere else."""
        return self._root_key

    @property
    def destruction(self) -> Destruction:
        return _DESTRUCTION

    def __repr__(self) -> str:
        return f"LocalKeyProvider({str(self._directory)!r})"

    def create_key(self, key_id: str) -> None:
        """Make a fresh key, durable before the return. Raises KeyExists."""
        path = self._path(key_id)
        sealed = wrap_secret(new_key(), key=self._root_key, line=_KEK_LINE, binding=self._binding(key_id))
        try:
            write_new(path, sealed)
        except FileExistsError:
            raise KeyExists(
                f"the keystore has a key {key_id!r} already, and nothing replaces a key; take another id"
            ) from None

    def has_key(self, key_id: str) -> bool:
        """Whether the key is here and not destroyed. Raises KeystoreDamaged where its file is not what was written."""
        try:
            self._key(key_id)
        except KeyMissing:
            return False
        return True

    def wrap(self, key_id: str, key: bytes, *, context: Context) -> bytes:
        """Encrypt a secret of up to 64 KiB under the named key, bound to its context."""
        return wrap_secret(key, key=self._key(key_id), line=_WRAPPED_LINE, binding=context.to_bytes())

    def unwrap(self, key_id: str, wrapped: bytes, *, context: Context) -> bytes:
        """The secret that was wrapped. Raises InvalidWrap or KeyMissing."""
        return unwrap_secret(wrapped, key=self._key(key_id), line=_WRAPPED_LINE, binding=context.to_bytes())

    def destroy_key(self, key_id: str) -> None:
        """Overwrite the key's file, remove it and sync the directory. Raises KeyMissing.

        A damaged key's file goes the same way. Copies of the file elsewhere, and flash, may still hold it.
        """
        try:
            overwrite_and_remove(self._path(key_id))
        except FileNotFoundError:
            raise _key_missing(key_id) from None

    def _change(self, record: KeystoreRecord) -> None:
        if record != self._record:
            replace(self._directory / _RECORD, record.to_bytes())
            self._record = record

    def _path(self, key_id: str) -> Path:
        check_key_id(key_id)
        return self._directory / self._record.file_name(self._root_key, key_id)

    def _key(self, key_id: str) -> bytes:
        try:
            content = read_private(self._path(key_id), limit=_FILE_LIMIT)
        except FileNotFoundError:
            raise _key_missing(key_id) from None
        if content and not any(content):  # zeroed, and then the process died: destroyed all the same
            raise _key_missing(key_id)
        try:
            return unwrap_secret(content, key=self._root_key, line=_KEK_LINE, binding=self._binding(key_id))
        except InvalidWrap:
            raise KeystoreDamaged(
                f"the file of key {key_id!r} is damaged; restore the keystore from its backup"
            ) from None

    def _binding(self, key_id: str) -> bytes:
        return length_prefixed(self._record.id, key_id)


def _read_record(directory: Path) -> KeystoreRecord:
    try:
        check_private(directory)
        return KeystoreRecord.from_bytes(read_private(directory / _RECORD, limit=_FILE_LIMIT))
    except (FileNotFoundError, NotADirectoryError):
        raise KeystoreMissing(
            f"there is no keystore in {directory}; run `cloister-admin init`, or restore it from its backup"
        ) from None


def _check_one_root(key_file: Path | None, passphrase: str | None) -> None:
    if (key_file is None) == (passphrase is None):
        raise ValueError("give exactly one of key_file and passphrase")


def _new_root(key_file: Path | None, passphrase: str | None) -> tuple[Stretching | None, bytes]:
    if passphrase is not None:
        stretching = Stretching.fresh()
        return stretching, stretching.root_key(passphrase)
    assert key_file is not None  # noqa: S101 (exactly one was given)
    return None, read_key_file(key_file) if key_file.exists() else new_key_file(key_file)


def _keystore_exists(directory: Path) -> KeystoreExists:
    return KeystoreExists(f"{directory} holds a keystore, and its keys are not overwritten; open it or name another")


def _key_missing(key_id: str) -> KeyMissing:
    return KeyMissing(f"there is no key {key_id!r} in the keystore: it was destroyed, or this is another keystore")
