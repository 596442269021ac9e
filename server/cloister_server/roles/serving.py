"""A party or a dealer from its role file to its end by SIGTERM. It forms the group anew by itself, whatever broke it.

Holds a share of the weights and shares of numbers, and never a number. Knows settings, files and threads; no SQL.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from cloister.wire._errors import InvalidArgument
from cloister.wire.private_deployments import ROLES, PrivateDeployment
from cloister.wire.private_requests import audience
from cloister.wire.shares import Shares
from cloister_privacy.mpc import (
    Dealer,
    Limits,
    OpenedRole,
    Party,
    PrivateInferenceError,
    RequestDropped,
    open_role_file,
)
from cloister_server import processes
from cloister_server.errors import StartRefused
from cloister_server.roles import identity
from cloister_server.roles.door import Door
from cloister_server.roles.permissions import Permissions, fetched_keys
from cloister_server.roles.waiting import Held, Queue, Request
from cloister_server.settings import RoleSettings

__all__ = ["limits_of", "run"]

log = logging.getLogger(__name__)

_MOST_WAITING, _MOST_WAITING_EACH = 256, 32
_WAIT_S = 0.2
_AGAIN_S = 0.2
"""The pause before the group is formed again, where that failed at once."""
_LONGEST_PAUSE_S = 1.0
_GRACE_S = 8.0


def run(settings: RoleSettings, kind: Literal["party", "dealer"]) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartRefused."""
    stopping = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stopping.set())
    directory = settings.directory
    # One process has the directory: two would burn the same randomness.
    with processes.locked(directory / "role.lock", wait_s=5, what=f"the role's directory {directory}"):
        me = identity.read(directory)
        opened = _opened(settings, me)
        if (opened.name == "dealer") != (kind == "dealer"):
            raise StartRefused(f"the role file is the {opened.name}'s; run it where that role is to run")
        try:
            if opened.name == "dealer":
                _deal(settings, me, opened, stopping)
            else:
                _serve(settings, me, opened, stopping)
        except OSError as error:
            raise StartRefused(f"the role cannot listen ({error.strerror}); see to its host and ports") from None


def _opened(settings: RoleSettings, me: identity.RoleIdentity) -> OpenedRole:
    try:
        body, keys = settings.file.read_bytes(), _keys(settings.certificate_keys)
        return open_role_file(body, me.opens, certificate_digest=me.record.digest, keys=keys)
    except OSError as error:
        raise StartRefused(f"{error.filename} cannot be read ({error.strerror}); name the file itself") from None
    except (PrivateInferenceError, InvalidArgument) as error:
        raise StartRefused(str(error)) from None


def _keys(path: Path) -> Any:
    try:
        found: Any = json.loads(path.read_bytes())
    except ValueError:
        raise StartRefused(f"{path} is no JSON; save /.well-known/cloister-certificate-keys of the platform") from None
    return found


def _deal(settings: RoleSettings, me: identity.RoleIdentity, opened: OpenedRole, stopping: threading.Event) -> None:
    dealer = Dealer(
        me.tls, opened.deployment(listen=settings.listen), opened.network, limits=limits_of(settings, opened.statement)
    )
    log.info("role.ready", extra=_told(opened))
    stopping.wait()
    dealer.close()


def _serve(settings: RoleSettings, me: identity.RoleIdentity, opened: OpenedRole, stopping: threading.Event) -> None:
    number, stated = ROLES.index(opened.name), opened.statement
    permissions = Permissions(stated.issuer, audience(stated.id, number), fetched_keys(stated.issuer))
    assert opened.weights is not None  # noqa: S101 (a party's file has its share)
    deployment, limits = opened.deployment(listen=settings.listen), limits_of(settings, stated)
    state = settings.directory / stated.id
    party = Party(number, me.tls, deployment, opened.network, opened.weights, state, limits=limits)
    queue = Queue(most=_MOST_WAITING, most_each=_MOST_WAITING_EACH)
    held = Held(most=_MOST_WAITING, most_each=_MOST_WAITING_EACH)
    waiting: Queue | Held = queue if number == 0 else held
    work: Callable[[], None] = (lambda: _lead(party, queue)) if number == 0 else (lambda: _follow(party, held))
    worker = threading.Thread(target=_supervise, args=(party, work, stopping), name="party", daemon=True)
    door = Door(
        me.tls,
        party,
        opened.network,
        deployment=stated.id,
        permissions=permissions,
        put=waiting.put,
        host=settings.listen or opened.record.host,
        port=opened.record.client_port or 0,
        answer_s=2 * limits.request_s,
    )
    worker.start()
    log.info("role.ready", extra=_told(opened))
    stopping.wait()
    door.close()
    worker.join(_GRACE_S)  # what is being computed is answered still
    for request in waiting.left():
        request.answer.set_exception(_gone())
    door.drain(_GRACE_S)


def _supervise(party: Party, work: Callable[[], None], stopping: threading.Event) -> None:
    """Form the group whenever there is none, and work in it: whatever breaks it, the next generation begins here."""
    pause_s = _AGAIN_S
    while not stopping.is_set():
        try:
            if not party.is_formed:
                log.info("party.formed", extra={"generation": party.form()})
                pause_s = _AGAIN_S
            work()
        except Exception as error:
            # No other words than ours: an error of somebody else's may hold numbers.
            why = str(error) if isinstance(error, PrivateInferenceError) else ""
            log.warning("party.dropped", extra={"error": type(error).__name__, "why": why})
            stopping.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _lead(party: Party, queue: Queue) -> None:
    """Answer the next requests, if there are any, as one."""
    requests = queue.take(wait_s=_WAIT_S, most_rows=party.most_joined)
    if not requests:
        return
    try:
        answers = party.lead([request.shares for request in requests])
    except BaseException as error:
        for request in requests:
            request.answer.set_exception(error if isinstance(error, PrivateInferenceError) else _gone())
        if not isinstance(error, PrivateInferenceError) or isinstance(error, RequestDropped):
            raise
        return
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, Shares):
            request.answer.set_result(answer)
        else:
            request.answer.set_exception(answer)


def _follow(party: Party, held: Held) -> None:
    """Answer what the other party announces next, if it announces anything."""
    found: list[Request] = []

    def find(request: bytes) -> Shares | None:
        taken = held.take(request)
        if taken is None:
            return None
        found.append(taken)
        return taken.shares

    answers: dict[bytes, Shares] = {}
    try:
        answers = {each.request: each for each in party.follow(find, wait_s=_WAIT_S)}
    finally:
        for request in found:
            if (answer := answers.get(request.shares.request)) is None:
                request.answer.set_exception(_gone())
            else:
                request.answer.set_result(answer)


def _gone() -> RequestDropped:
    return RequestDropped("the request is gone with its randomness; ask again")


def limits_of(settings: RoleSettings, stated: PrivateDeployment) -> Limits:
    """Those of the settings, and no more rows at once than is stated: what more would take is memory of all three roles."""
    return Limits(
        form_s=settings.form_s,
        request_s=settings.request_s,
        disk_bytes=settings.disk_bytes,
        rows=stated.rows_at_once,
    )


def _told(opened: OpenedRole) -> dict[str, str]:
    return {"role": opened.name, "deployment": opened.statement.id}
