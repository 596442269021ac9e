"""The key providers of a deployment, by name: its own keystore, and what its provider file names. Knows files; no SQL, no tenants.

A provider is opened when it is first asked for: one customer's KMS that is away keeps nobody else's data shut.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any, get_args

from cloister_privacy.sealing import (
    Context,
    Destruction,
    KeyProvider,
    KeyProviderError,
    LocalKeyProvider,
    ProviderKind,
    open_provider,
)
from cloister_privacy.sealing.files import read_private
from cloister_server.errors import Invalid, StartRefused, Unavailable
from cloister_server.store.key_record import KeyRecord
from cloister_server.store.session import in_transaction

__all__ = ["LOCAL", "AskedInTransaction", "KeyProviderBusy", "KeyRing", "read_provider_file"]

LOCAL = "local"
"""The name of the deployment's own keystore."""

_FORMAT = "cloister.key-providers/1"
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LARGEST_FILE = 2**20
_PATHS = {"directory", "library", "ca_file", "key_file"}
"""Settings of providers that are paths."""

_CUSTOMER = "customer"

_MOST_REMEMBERED = 64

_MOST_WAITING = 24
"""Threads of one process that wait for one provider. The API has 40, and others' requests to answer with them."""


class AskedInTransaction(RuntimeError):
    """A key provider was about to be asked while this thread has a transaction open: a fault of ours, whatever the provider."""


class KeyProviderBusy(Unavailable):
    """As many wait for this provider as may: another would only keep a thread from those whose keys are elsewhere."""

    default_code = "key_provider_busy"

    def __init__(self) -> None:
        super().__init__(
            "too many requests wait for the key provider of this tenant, which is slow; nothing was changed; retry in a moment"
        )


class _Turns:
    """Who may ask one provider now. The service's own keystore is in this process: nobody waits for it, and all may."""

    def __init__(self, most: int | None) -> None:
        self._free = None if most is None else BoundedSemaphore(most)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Raises AskedInTransaction, always, where this thread has a transaction open, and KeyProviderBusy at once."""
        if in_transaction():
            raise AskedInTransaction("a key provider is asked in no transaction: end it, ask, and begin another")
        if self._free is None:
            yield
            return
        if not self._free.acquire(blocking=False):
            raise KeyProviderBusy
        try:
            yield
        finally:
            self._free.release()


@dataclass(frozen=True, slots=True)
class _InTurn:
    """A provider whose every call is a turn, and whose every key is on record before it is made."""

    provider: KeyProvider
    turns: _Turns
    name: str
    record: KeyRecord

    @property
    def destruction(self) -> Destruction:
        return self.provider.destruction

    def create_key(self, key_id: str) -> None:
        with self.turns.one():
            self.record.note(key_id, provider=self.name)
            self.provider.create_key(key_id)

    def has_key(self, key_id: str) -> bool:
        with self.turns.one():
            return self.provider.has_key(key_id)

    def wrap(self, key_id: str, key: bytes, *, context: Context) -> bytes:
        with self.turns.one():
            return self.provider.wrap(key_id, key, context=context)

    def unwrap(self, key_id: str, wrapped: bytes, *, context: Context) -> bytes:
        with self.turns.one():
            return self.provider.unwrap(key_id, wrapped, context=context)

    def destroy_key(self, key_id: str) -> None:
        with self.turns.one():
            self.provider.destroy_key(key_id)


class KeyRing:
    """Named key providers, one of which takes new keys. What opens them is secret: there is no repr of it.

    None is ever asked, nor opened, by a thread that has a transaction open (AskedInTransaction), and at most 24 threads wait
    for one that is not the service's own keystore (KeyProviderBusy).
    """

    def __init__(
        self,
        default: str,
        providers: Mapping[str, Mapping[str, Any]],
        *,
        record: KeyRecord,
        file: Path | None = None,
        remembers_s: float = 60.0,
    ) -> None:
        """`providers`: name -> `kind` and the settings that `open_provider` takes. Opens none of them.

        `record`: where every key is written down before it is made.

        `file`: the provider file, which is read again when a name is asked for that was not in it: keys move to a new
        provider while processes run that were started before it.
        """
        self.default, self._file, self._record = default, file, record
        self._settings = {name: dict(each) for name, each in providers.items()}
        self._opened: dict[str, KeyProvider] = {}
        self._openings: dict[str, Lock] = {}
        self._turns: dict[str, _Turns] = {}
        self._remembers_s = remembers_s
        self._remembered: dict[tuple[str, str, bytes], tuple[float, bytes]] = {}
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self._settings)})"

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def require_known(self, name: str) -> None:
        """Raise Invalid where the deployment has no provider of this name."""
        if name not in self:
            raise Invalid(
                f"there is no key provider {name!r} here; name one of {', '.join(self)}, or put it into the file that "
                "CLOISTER_KEY_PROVIDERS names"
            )

    def of(self, name: str) -> KeyProvider:
        """The provider of this name. Raises KeyProviderError where it refuses, or the deployment has none of the name."""
        opened = self._opened.get(name)
        if opened is not None:
            return opened
        with self._lock:
            opening = self._openings.setdefault(name, Lock())
            turns = self._turns.setdefault(name, _Turns(None if name == LOCAL else _MOST_WAITING))
        with turns.one(), opening:  # of this name alone: to open a provider may take as long as its network does
            if name not in self._opened:
                self._opened[name] = _InTurn(self._open(name), turns, name, self._record)
            return self._opened[name]

    def own_keystore(self) -> LocalKeyProvider:
        """The deployment's own keystore, whose root key is known here. Only where there is one."""
        settings = self._settings[LOCAL]
        return LocalKeyProvider(settings["directory"], root_key=settings["root_key"])

    def kind_of(self, name: str) -> str | None:
        """Of which kind the provider of this name is; None where the deployment has none of the name."""
        kind: str | None = self._settings.get(name, {}).get("kind")
        return kind

    def is_customers(self, name: str) -> bool:
        """Whether the provider file says that a customer holds this provider, and may have taken it away."""
        return self._settings.get(name, {}).get("holder") == _CUSTOMER

    def _open(self, name: str) -> KeyProvider:
        if name not in self._settings and self._file is not None:
            try:
                self._settings = {**read_provider_file(self._file)[1], **self._settings}
            except StartRefused as refusal:
                raise KeyProviderError(str(refusal)) from None
        if name not in self._settings:
            raise KeyProviderError(
                f"this deployment has no key provider {name!r}, under which keys were made; put it back into "
                "the file that CLOISTER_KEY_PROVIDERS names"
            )
        try:
            return open_provider(**{key: value for key, value in self._settings[name].items() if key != "holder"})
        except (TypeError, ValueError):
            raise KeyProviderError(
                f"key provider {name!r} lacks a setting, or has one that cannot be; see docs/keys.md, and mend the file that "
                "CLOISTER_KEY_PROVIDERS names"
            ) from None

    def remembered(self, name: str, key_id: str, wrapped: bytes) -> bytes | None:
        """What `unwrap_often` got lately; None where the provider must be asked."""
        known = self._remembered.get((name, key_id, wrapped))
        return known[1] if known is not None and time.monotonic() - known[0] < self._remembers_s else None

    def unwrap_often(self, name: str, key_id: str, wrapped: bytes, *, context: Context) -> bytes:
        """A secret of the service itself that every request needs: asked of the provider once in a while."""
        place, now = (name, key_id, wrapped), time.monotonic()
        known = self.remembered(name, key_id, wrapped)
        if known is not None:
            return known
        secret = self.of(name).unwrap(key_id, wrapped, context=context)
        self._remembered[place] = (now, secret)
        while len(self._remembered) > _MOST_REMEMBERED:
            self._remembered.pop(next(iter(self._remembered)), None)
        return secret

    def to_message(self) -> dict[str, Any]:
        """For the pipe of a process of the service, and nowhere else."""
        return {
            "default": self.default,
            "file": None if self._file is None else str(self._file),
            "record": str(self._record.directory),
            "remembers_s": self._remembers_s,
            "providers": {
                name: {key: _told(value) for key, value in each.items()} for name, each in self._settings.items()
            },
        }

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> KeyRing:
        providers = {name: _heard(each) for name, each in message["providers"].items()}
        file = None if message["file"] is None else Path(message["file"])
        record = KeyRecord(Path(message["record"]))
        return cls(message["default"], providers, record=record, file=file, remembers_s=message["remembers_s"])


def read_provider_file(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The default's name and the providers of a provider file, mode 0600. Raises StartRefused, and quotes nothing of it."""
    try:
        content = json.loads(read_private(path, limit=_LARGEST_FILE))
    except KeyProviderError as error:
        raise StartRefused(str(error)) from None
    except FileNotFoundError:
        raise StartRefused(
            f"there is no key provider file at {path}; make it, or unset CLOISTER_KEY_PROVIDERS"
        ) from None
    except (OSError, ValueError, RecursionError):
        raise _refused(path, "it cannot be read as JSON") from None
    if not isinstance(content, dict) or content.keys() != {"format", "default", "providers"}:
        raise _refused(path, "it has not exactly the fields format, default and providers")
    if content["format"] != _FORMAT:
        raise _refused(path, f"its format is not {_FORMAT}")
    default, providers = content["default"], content["providers"]
    if (
        not isinstance(default, str)
        or not isinstance(providers, dict)
        or not all(isinstance(each, dict) for each in providers.values())
    ):
        raise _refused(path, "its default is not a name, or its providers are not objects by name")
    for name, each in providers.items():
        if not _NAME.fullmatch(name) or name == LOCAL:
            raise _refused(
                path, f"{name[:64]!r} is no name for a provider ({LOCAL!r} is the deployment's own keystore)"
            )
        if each.get("kind") not in get_args(ProviderKind) or "root_key" in each:
            raise _refused(path, f"provider {name!r} is of no kind there is: {', '.join(get_args(ProviderKind))}")
        if each.get("holder", _CUSTOMER) != _CUSTOMER:
            raise _refused(
                path,
                f"the holder of provider {name!r} is not {_CUSTOMER!r}; leave it out where it is the service's own",
            )
    if default != LOCAL and default not in providers:
        raise _refused(path, "its default names none of its providers")
    return default, {name: _heard(each) for name, each in providers.items()}


def _refused(path: Path, problem: str) -> StartRefused:
    return StartRefused(f"the key provider file {path} does not hold: {problem}; see docs/keys.md")


def _told(value: Any) -> Any:
    return (
        base64.b64encode(value).decode()
        if isinstance(value, bytes)
        else str(value)
        if isinstance(value, Path)
        else value
    )


def _heard(settings: Mapping[str, Any]) -> dict[str, Any]:
    heard = {key: Path(value) if key in _PATHS and isinstance(value, str) else value for key, value in settings.items()}
    if "root_key" in settings:
        heard["root_key"] = base64.b64decode(settings["root_key"])
    return heard
