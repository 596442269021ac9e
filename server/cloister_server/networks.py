"""The opened models of one API process, each for as long as its tenant's key was lately to be had. Knows the vault; no HTTP.

A network is given out for at most `key_cache_s` after its key provider was last asked, and is then dropped: it is opened anew
for the next request. One that is in use is asked for again before, by nobody's request, from half of that time on.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cloister_privacy.sealing import Arena, ArenaFull, plaintext_length
from cloister_privacy.sealing.sources import Sealed
from cloister_server import models, vault
from cloister_server.errors import TenantKeyRefused, Unavailable
from cloister_server.service import Service
from cloister_server.store.acting import for_tenants
from cloister_server.store.session import reading
from cloister_server.store.tables import ModelVersion
from cloister_server.vault import DataKey

if TYPE_CHECKING:
    from cloister_privacy.architecture import Network

__all__ = ["Networks"]

log = logging.getLogger(__name__)

_MOST_KEPT = 256
_OPENINGS_AT_ONCE = 16
"""Of one tenant. Each is a thread that waits for the tenant's key provider, which may be the tenant's own."""


class _Place(NamedTuple):
    """Of what version, and of which of the objects that a row of it named: another row is another place."""

    tenant_id: str
    model_id: str
    version: int
    weights_id: str


@dataclass(slots=True)
class _Opened:
    network: Network
    ends: float
    """So long after the provider was asked, not after it answered: what it said then was true before."""
    renews: float


class Networks:
    """What is opened lies in one arena of `model_cache_bytes`; of what is asked for least recently the memory is taken back.

    Threads may share it. A model is opened once, however many ask for it at a time; and whoever waits for one tenant's key
    holds up nobody who asks for another's.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._kept_s = service, float(service.settings.key_cache_s)
        self._arena = Arena(service.settings.model_cache_bytes)
        self._changed = threading.Condition()
        self._opened: OrderedDict[_Place, _Opened] = OrderedDict()
        self._openings: dict[_Place, Future[Network]] = {}
        self._is_swept = False

    def get(self, version: ModelVersion) -> Network | Future[Network]:
        """The version's network, or where its key must be asked for first, what will be it: hold no thread and no session for that.

        That, and this, raise TenantKeyRefused, Unavailable, or whatever keeps the weights from being opened.
        """
        place, now = _Place(version.tenant_id, version.model_id, version.version, version.weights_id), time.monotonic()
        with self._changed:
            opened = self._opened.get(place)
            if opened is not None and now < opened.ends:
                self._opened.move_to_end(place)
                if now >= opened.renews and place not in self._openings and self._may_open(place):
                    opened.renews = now + self._kept_s / 8  # for the one after, should there be no answer
                    self._begin(place, version)
                return opened.network
            if place in self._openings:
                return self._openings[place]
            if not self._may_open(place):
                raise Unavailable("too many of the tenant's models are being opened at once; retry in a moment")
            return self._begin(place, version)

    def opened(self, *, tenant_id: str, model_id: str, version: int, weights_id: str) -> Network | None:
        """The version's network if it is open and need not be renewed; else `get` is to be asked."""
        place = _Place(tenant_id, model_id, version, weights_id)
        with self._changed:
            found = self._opened.get(place)
            if found is None or time.monotonic() >= min(found.renews, found.ends):
                return None
            self._opened.move_to_end(place)
            return found.network

    def _may_open(self, place: _Place) -> bool:
        return sum(each.tenant_id == place.tenant_id for each in self._openings) < _OPENINGS_AT_ONCE

    def _begin(self, place: _Place, version: ModelVersion) -> Future[Network]:
        """Ask for the key, and open what is not open, in a thread of its own. The lock is held here, so that it cannot end before."""
        opening: Future[Network] = Future()
        opening.set_running_or_notify_cancel()  # who stops waiting for it stops nobody else's
        threading.Thread(target=self._run, args=(place, version, opening), name="open-model", daemon=True).start()
        self._openings[place] = opening
        return opening

    def _run(self, place: _Place, version: ModelVersion, opening: Future[Network]) -> None:
        try:
            network = self._open(place, version)
        except BaseException as error:
            with self._changed:
                refused = self._opened.pop(place, None) if isinstance(error, TenantKeyRefused) else None
                del self._openings[place]
            del refused  # its memory is zeroed where nobody waits for the lock
            traceback.clear_frames(error.__traceback__)  # nor is any kept by what is told of it
            log.warning("model.not_opened", extra={**_told(place), "error": type(error).__name__})
            opening.set_exception(error)
        else:
            with self._changed:
                del self._openings[place]
            opening.set_result(network)

    def _open(self, place: _Place, version: ModelVersion) -> Network:
        asked = time.monotonic()
        key = self._ask(place)
        with self._changed:
            opened = self._opened.get(place)
            if opened is not None:
                opened.ends, opened.renews = asked + self._kept_s, asked + self._kept_s / 2
                self._changed.notify_all()
                return opened.network
        with reading(self._service.engine, for_tenants(place.tenant_id)) as session:
            certificate = models.certified(session, self._service.settings, version)
        sealed: Sealed = self._service.blobs.sealed(place.tenant_id, place.weights_id)
        self._require_bearable(sealed, place)
        while True:
            try:
                network = models.open_network(sealed, key, arena=self._arena, certificate=certificate)
                break
            except ArenaFull:
                if not self._evict():
                    raise _no_memory(place) from None
        if time.monotonic() - asked >= self._kept_s:  # it took longer to open than a key is trusted
            asked = time.monotonic()
            self._ask(place)
        self._keep(place, _Opened(network, ends=asked + self._kept_s, renews=asked + self._kept_s / 2))
        return network

    def _ask(self, place: _Place) -> DataKey:
        """The weights' data key, of the provider and not from memory. While that takes its time no connection is held."""
        with reading(self._service.engine, for_tenants(place.tenant_id)) as session:
            wrapped = vault.wrapped_key(session, tenant_id=place.tenant_id, object_id=place.weights_id)
        return vault.unwrapped(self._service.keys, wrapped)

    def _require_bearable(self, sealed: Sealed, place: _Place) -> None:
        """What never fits must not drive out all that does."""
        if plaintext_length(sealed) > self._service.settings.model_cache_bytes:
            raise _no_memory(place)

    def _evict(self) -> bool:
        """Let go of the network that was asked for least recently; False where there is none."""
        with self._changed:
            dropped = self._opened.popitem(last=False) if self._opened else None
        return dropped is not None

    def _keep(self, place: _Place, opened: _Opened) -> None:
        dropped = []
        with self._changed:
            self._opened[place] = opened
            while len(self._opened) > _MOST_KEPT:
                dropped.append(self._opened.popitem(last=False))
            if not self._is_swept:
                threading.Thread(target=self._sweep, name="sweep-models", daemon=True).start()
                self._is_swept = True
            self._changed.notify_all()
        del dropped  # not under the lock: to zero gigabytes takes a while

    def _sweep(self) -> None:
        """Drop each network at its end, so that no plaintext outlives its key where nobody asks. Runs while there are any."""
        while True:
            with self._changed:
                now = time.monotonic()
                dropped = [self._opened.pop(place) for place, each in list(self._opened.items()) if each.ends <= now]
                if not dropped and not self._opened:
                    self._is_swept = False
                    return
                if not dropped:
                    self._changed.wait(min(each.ends for each in self._opened.values()) - now)
            del dropped


def _no_memory(place: _Place) -> Unavailable:
    log.error("model.no_memory", extra=_told(place))
    return Unavailable(
        "there is no memory for this model beside those in use; retry in a moment, and if it never fits, the server's operator "
        "may raise CLOISTER_MODEL_CACHE_BYTES"
    )


def _told(place: _Place) -> dict[str, str | int]:
    return {"tenant_id": place.tenant_id, "model_id": place.model_id, "version": place.version}
