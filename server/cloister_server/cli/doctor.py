"""What is sound about a deployment and what is not, as rows for `cloister-admin doctor`. Reads; changes and sends nothing."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypedDict

from cloister_server import deployment
from cloister_server.errors import ServerError
from cloister_server.settings import Settings, load_settings

__all__ = ["Row", "audited", "diagnosed"]

State = Literal["ok", "note", "FAULT"]

_LOSS = "steps run eagerly, which is slower and gives the same models"


class Row(TypedDict):
    """One thing that was looked at."""

    check: str
    state: State
    detail: str


def diagnosed() -> Iterator[Row]:
    """Settings, keys, database and what speeds training up. A fault says why, and what to do next."""
    try:
        settings = load_settings()
    except ServerError as refusal:
        yield _row("settings", "FAULT", refusal.message)
        return
    yield _row("settings", "ok", f"data in {settings.data_dir}, keys in {settings.key_dir}")
    try:
        deployment.open_service(settings).engine.dispose()
        yield _row("keys and database", "ok", "they open, belong together, and are at this release's migration")
    except ServerError as refusal:
        yield _row("keys and database", "FAULT", refusal.message)
    for name, place in (("data directory", settings.data_dir), ("keystore", settings.key_dir)):
        if place.is_dir():
            yield _private(name, place)
    yield _compiler()


def audited(settings: Settings) -> Iterator[Row]:
    """The training engine as it runs here, on synthetic rows: checks that find faults, and a one-run canary audit.

    A sound engine is called faulty once in 10,000 checks, and by the audit, whose confidence is 95 %, far less than once in 20.
    """
    from cloister_privacy.canaries import audit_run, check_engine  # and torch with it
    from cloister_server.work.child import device_of

    device = device_of(settings.device)
    report = check_engine(device=device)
    for finding in report.findings:
        yield _row(finding.name, "FAULT" if finding in report.faults else "ok", finding.figure)
    if report.faults:
        return  # the audit would run on an engine that is known to be broken, and might not end
    audit = audit_run(device=device)
    yield _row(
        "canary audit",
        "FAULT" if audit.contradicts_claim else "ok",
        f"epsilon at least {audit.epsilon_lower_bound:.2f}, {audit.claimed_epsilon:.2f} claimed; no guarantee",
    )


def _private(name: str, place: Path) -> Row:
    mode = stat.S_IMODE(place.stat().st_mode)
    if mode & 0o077:
        return _row(name, "FAULT", f"{place} has mode {mode:o}, so others can read it; run `chmod 700 {place}`")
    return _row(name, "ok", f"mode {mode:o}")


def _compiler() -> Row:
    if not os.access("/dev/shm", os.W_OK):  # noqa: S108 (looked at, not written to)
        return _row("compiled training", "note", f"no memory file system can be written to, so {_LOSS}")
    if not (shutil.which("g++") or shutil.which("clang++")):
        return _row("compiled training", "note", f"there is no C++ compiler, so {_LOSS}; install g++")
    return _row("compiled training", "ok", "long runs are compiled, in memory")


def _row(check: str, state: State, detail: str) -> Row:
    return {"check": check, "state": state, "detail": detail}
