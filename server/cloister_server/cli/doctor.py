"""What is sound about a deployment and what is not, as rows for `cloister-admin doctor`. Reads; changes and sends nothing."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypedDict

from cloister_privacy.sealing import KeyProviderError
from cloister_server import deployment, marking, recovery
from cloister_server.cli.terminal import settings_here
from cloister_server.errors import ServerError
from cloister_server.keyring import LOCAL
from cloister_server.operations.audit import HOW_TO_MEND
from cloister_server.service import Service
from cloister_server.settings import Settings

__all__ = ["Row", "audited", "diagnosed"]

State = Literal["ok", "note", "FAULT"]

_LOSS = "steps run eagerly, which is slower and gives the same models"


class Row(TypedDict):
    """One thing that was looked at."""

    check: str
    state: State
    detail: str


def diagnosed() -> Iterator[Row]:
    """Settings, keys, database, device and what speeds training up. A fault says why, and what to do next."""
    try:
        settings = settings_here()
    except ServerError as refusal:
        yield _row("settings", "FAULT", refusal.message)
        return
    yield _row("settings", "ok", f"data in {settings.data_dir}, keys in {settings.key_dir}")
    try:
        yield from _opened(settings)
        for name, place in (("data directory", settings.data_dir), ("keystore", settings.key_dir)):
            if place.is_dir():
                yield _private(name, place)
    except OSError as error:
        told = f"{error.filename}: {error.strerror}; correct the path, or run this as the user who runs the service"
        yield _row("files", "FAULT", told)
    yield _device(settings)
    yield _compiler()


def audited(settings: Settings) -> Iterator[Row]:
    """The training engine as it runs here, on synthetic rows: checks that find faults, and a one-run canary audit.

    A sound engine is called faulty once in 10,000 checks, and by the audit, whose confidence is 95 %, far less than once in 20.
    """
    from cloister_privacy.canaries import audit_run, check_engine  # and torch with it
    from cloister_server.work.child import device_of

    try:
        device = device_of(settings.device)
        report = check_engine(device=device)
        for finding in report.findings:
            yield _row(finding.name, "FAULT" if finding in report.faults else "ok", finding.figure)
        if report.faults:
            return  # the audit would run on an engine that is known to be broken, and might not end
        audit = audit_run(device=device)
    except Exception as error:  # an engine that stops is at fault, whatever stopped it; the rows are synthetic
        told = f"the engine stopped ({type(error).__name__}: {error}); train nothing here before that is mended"
        yield _row("training engine", "FAULT", told)
        return
    yield _row(
        "canary audit",
        "FAULT" if audit.contradicts_claim else "ok",
        f"epsilon at least {audit.epsilon_lower_bound:.2f}, {audit.claimed_epsilon:.2f} claimed; no guarantee",
    )


def _opened(settings: Settings) -> Iterator[Row]:
    try:
        deployment.check_initialised(settings)
        objects = settings.data_dir / "objects"
        if not settings.blob_url and not objects.is_dir():  # to open the service would make an empty one
            told = f"{objects} is gone, and every sealed row and weight with it; restore it from the database's backup"
            yield _row("sealed objects", "FAULT", told)
            return
        service = deployment.open_service(settings)
    except ServerError as refusal:
        yield _row("keys and database", "FAULT", refusal.message)
        return
    yield _row("keys and database", "ok", "they open, belong together, and are at this release's migration")
    yield from (_provider(service, name) for name in service.keys)
    yield _store(service)
    behind = deployment.rolled_back(service)
    service.engine.dispose()
    for each in behind:
        yield _row("ledger", "FAULT", f"tenant {each.tenant_id}: {each.why}; {HOW_TO_MEND}")
    if not behind:
        yield _row(
            "ledger", "ok", "every tenant's goes on from its anchor; `cloister-admin audit verify` reads them whole"
        )


def _provider(service: Service, name: str) -> Row:
    """Asked for a key that it does not have: it is there, lets us in, and answers."""
    check = f"key provider {name}"
    try:
        service.keys.of(name).has_key("doctor.asks")
    except (KeyProviderError, ServerError) as refusal:
        return _row(check, "FAULT", f"{refusal}; what its tenants sealed does not open until that is mended")
    if name == LOCAL and not recovery.has_key(service):
        return _row(
            check,
            "ok",
            "it answers; it has no recovery key: `cloister-admin key recovery-renew` makes one for when its root is lost",
        )
    return _row(check, "ok", "it answers")


def _store(service: Service) -> Row:
    try:
        marking.require_ours(service)
    except ServerError as refusal:
        told = f"{refusal.message} (it was told: {refusal.cause})" if refusal.cause else refusal.message
        return _row("sealed objects", "FAULT", told)
    return _row("sealed objects", "ok", f"{marking.place_of(service)} answers, and is this deployment's")


def _private(name: str, place: Path) -> Row:
    mode = stat.S_IMODE(place.stat().st_mode)
    if mode & 0o077:
        return _row(name, "FAULT", f"{place} has mode {mode:o}, so others can read it; run `chmod 700 {place}`")
    return _row(name, "ok", f"mode {mode:o}")


def _device(settings: Settings) -> Row:
    if settings.device == "cpu":
        return _row("device", "ok", "cpu, as CLOISTER_DEVICE asks")
    why = _no_cuda()
    if why is None:
        return _row("device", "ok", "cuda")
    if settings.device == "cuda":
        return _row("device", "FAULT", f"CLOISTER_DEVICE asks for cuda, but {why}; mend that, or set it to auto")
    return _row("device", "ok", f"cpu: {why}")


def _no_cuda() -> str | None:
    """Why nothing can be trained on CUDA, as far as can be told without torch, which takes long to import."""
    if version("torch").endswith("+cpu"):
        return "the torch that is installed is built for the CPU alone"
    found = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        is_there = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(found)) == 0 and found.value > 0
    except (OSError, AttributeError):
        return "there is no CUDA driver"
    return None if is_there else "the CUDA driver finds no device"


def _compiler() -> Row:
    if not os.access("/dev/shm", os.W_OK):  # noqa: S108 (looked at, not written to)
        return _row("compiled training", "note", f"no memory file system can be written to, so {_LOSS}")
    if not (shutil.which("g++") or shutil.which("clang++")):
        return _row("compiled training", "note", f"there is no C++ compiler, so {_LOSS}; install g++")
    return _row("compiled training", "ok", "long runs are compiled, in memory")


def _row(check: str, state: State, detail: str) -> Row:
    return {"check": check, "state": state, "detail": detail}
