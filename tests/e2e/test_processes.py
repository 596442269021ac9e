"""What processes do to each other and to their operator: one server a directory, no secret in sight, one sentence for an error."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import cloister
from cloister_server.work.template import CHILD
from harness import BIN, Deployment
from journeys import upload

PROCESSES = {"api": "cloister_server.cli.api_process", "worker": "cloister_server.work.worker"}
TEMPLATE = "cloister_server.work.template"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One running deployment for all of these; its training steps are slow enough to be looked at."""
    root = tmp_path_factory.mktemp("processes")
    deployment = Deployment(root / "d")
    deployment.extra_env = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "tracing"), *sys.path]),
        "STEP_TRACE": str(root / "steps"),
        "STEP_SLEEP_S": "0.02",
    }
    deployment.init().start()
    try:
        yield deployment
    finally:
        deployment.kill()


def refusal(program: str, *arguments: str, env: dict[str, str]) -> str:
    """The one sentence with which a program of ours gives up."""
    done = subprocess.run([BIN / program, *arguments], env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith("{")]  # a server's log is JSON lines
    assert len(told) == 1 and told[0].startswith(f"{program}: "), done.stderr
    return told[0]


def test_a_second_server_of_a_directory_gives_up_and_the_first_goes_on(served: Deployment) -> None:
    told = refusal("cloister-server", "serve", env=served.env)
    assert str(served.data_dir) in told and "stop that one" in told
    served.wait_ready()


def test_a_server_on_a_taken_port_gives_up_and_names_it(served: Deployment, tmp_path: Path) -> None:
    other = Deployment(tmp_path / "d", port=served.port).init()
    told = refusal("cloister-server", "serve", env=other.env)
    assert str(served.port) in told and "CLOISTER_PORT" in told
    served.wait_ready()


def test_no_secret_stands_in_a_command_line_or_an_environment_and_the_queue_keeps_plain_json(
    served: Deployment, digits: dict[str, np.ndarray]
) -> None:
    app = served.app(served.tenant("acme"), "steward")
    key_file = served.root / "root.key"
    secrets = [app.client_secret.encode(), *(word for word in key_file.read_bytes().split() if len(word) > 20)]
    assert len(secrets) > 1
    with served.client(app) as client:
        data = upload(client, digits)
        privacy = cloister.DP(noise_multiplier=2.0)
        job = client.train(client.plan(data, target="digit", privacy=privacy, batch_size=100, epochs=4), model="m")
        seen = _told(_first(lambda: served.pids(CHILD)))  # at once: it is there for as long as the job takes
        assert served.process is not None
        modules = [*PROCESSES.values(), TEMPLATE]
        for pid in (served.process.pid, *(_first(lambda name=name: served.pids(name)) for name in modules)):
            seen += _told(pid)
        job.wait(timeout_s=300)
    assert not [secret for secret in secrets if secret in seen]
    assert b"root.key" in seen, "the search looked at the real thing"
    assert app.client_secret not in served.tail()
    _check_queue(served.data_dir / "workflows.db")


def test_a_job_outlives_the_template_that_it_was_forked_from_and_the_next_has_another(
    served: Deployment, digits: dict[str, np.ndarray]
) -> None:
    app = served.app(served.tenant("forked"), "steward")
    with served.client(app) as client:
        data = upload(client, digits)
        plan = client.plan(data, target="digit", privacy=cloister.DP(noise_multiplier=2.0), batch_size=100, epochs=4)
        first = client.train(plan, model="first")
        child, template = _first(lambda: served.pids(CHILD)), _first(lambda: served.pids(TEMPLATE))
        assert len(list(Path(f"/proc/{template}/task").iterdir())) == 1, "a fork has no other thread's locks"
        os.kill(template, signal.SIGKILL)
        second = client.train(plan, model="second")
        assert (first.wait(timeout_s=300).version, second.wait(timeout_s=300).version) == (1, 1)
    assert _first(lambda: served.pids(TEMPLATE)) != template
    assert child not in served.pids(CHILD)
    exits = [json.loads(line)["exit"] for line in served.log.read_text().splitlines() if '"attempt.ended"' in line]
    assert exits and set(exits) == {0}, "who forks a child is not its parent; the worker is"


def test_no_answer_was_given_without_its_row_in_the_audit_log_however_the_process_dies(served: Deployment) -> None:
    app = served.app(served.tenant("audited"), "steward")
    token, answered, stopping = served.token(app), list[str](), threading.Event()

    def ask(who: int) -> None:
        for number in itertools.count():
            if stopping.is_set():
                return
            request_id = f"asked-{who}-{number}"
            headers = {"Authorization": f"Bearer {token}", "X-Request-Id": request_id}
            asked = urllib.request.Request(f"{served.url}/v1/{'whoami' if who % 2 else 'sources'}", headers=headers)
            with contextlib.suppress(OSError, http.client.HTTPException):
                with urllib.request.urlopen(asked, timeout=10):
                    answered.append(request_id)
                continue
            stopping.wait(0.05)

    with ThreadPoolExecutor(8) as pool:
        for who in range(8):
            pool.submit(ask, who)
        for _ in range(2):
            before = len(answered)
            deadline = time.monotonic() + 60
            while len(answered) < before + 40 and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(_first(lambda: served.pids(PROCESSES["api"])), signal.SIGKILL)
        stopping.set()
    assert len(answered) >= 80, "it was killed while it answered"
    with contextlib.closing(sqlite3.connect(f"file:{served.data_dir / 'cloister.db'}?mode=ro", uri=True)) as database:
        told = Counter(row[0] for row in database.execute("SELECT request_id FROM audit WHERE verb = 'GET'"))
    assert [told[each] for each in answered] == [1] * len(answered)
    served.admin("audit", "verify", "--tenant", "audited")
    served.wait_ready()


def _told(pid: int) -> bytes:
    return b"".join(Path(f"/proc/{pid}/{what}").read_bytes() for what in ("cmdline", "environ"))


def _first(found: Callable[[], list[int]]) -> int:
    deadline = time.monotonic() + 120
    while not (pids := found()):
        assert time.monotonic() < deadline, "a process never came"
        time.sleep(0.02)
    return pids[0]


def _check_queue(path: Path) -> None:
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as queue:
        formats = {row[0] for row in queue.execute("SELECT serialization FROM workflow_status")}
        kept = b"\n".join(str(row).encode() for row in queue.execute("SELECT * FROM workflow_status"))
    queue.close()
    assert formats == {"cloister_json"}
    assert not any(mark in kept for mark in (b"py_pickle", b"gASV", b"gAS", b"\\x80\\x04"))


def _wrong_key(root: Path) -> None:
    Deployment(root / "other").init()
    shutil.copy(root / "other" / "root.key", root / "d" / "root.key")


def _expose(root: Path) -> None:
    os.chmod(root / "d" / "root.key", 0o644)  # noqa: PTH101 (as an operator does it)


def _age(root: Path) -> None:
    database = sqlite3.connect(root / "d" / "data" / "cloister.db")
    with database:
        database.execute("UPDATE alembic_version SET version_num = '0000'")
    database.close()


def _forget(root: Path) -> None:
    shutil.rmtree(root / "d" / "data")
    shutil.rmtree(root / "d" / "keystore")


@pytest.mark.parametrize(
    ("harm", "what", "next_step"),
    [
        (_wrong_key, "not the one", "find the one"),
        (_expose, "others have access", "chmod"),
        (_age, "migration 0000", "cloister-admin init"),
        (_forget, "not initialised", "cloister-admin init"),
    ],
)
def test_an_operators_error_is_one_sentence_that_says_what_and_what_next(
    harm: Callable[[Path], None], what: str, next_step: str, tmp_path: Path
) -> None:
    deployment = Deployment(tmp_path / "d").init()
    harm(tmp_path)
    for program, arguments in (("cloister-admin", ("tenant", "list")), ("cloister-server", ("serve",))):
        told = refusal(program, *arguments, env=deployment.env)
        assert what in told and next_step in told, told
