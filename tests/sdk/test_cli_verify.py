"""`cloister verify`: what it prints, what it refuses and how, on files as a recipient has them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certificates import CERTIFICATE, JWK, KEY_ID, RAW, WEIGHTS, dsse, flipped, signed, statement
from cloister.cli import main
from cloister.wire import page
from cloister.wire.certificate import Certificate, digest_of, verify
from cloister_privacy.plan import DPPlan

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command beside a certificate, its keys and its weights; the status, and what was printed where."""
    monkeypatch.chdir(tmp_path)
    Path("certificate.json").write_text(json.dumps(signed(), indent=1))
    Path("keys.json").write_text(json.dumps({KEY_ID: RAW.hex()}))
    Path("weights.safetensors").write_bytes(WEIGHTS)

    def command(*options: str, certificate: str = "certificate.json", keys: str = "keys.json") -> tuple[int, str, str]:
        status = main(["verify", certificate, "--keys", keys, *options])
        return status, *capsys.readouterr()

    return command


def refused(answer: tuple[int, str, str]) -> str:
    """The one sentence of a refusal."""
    status, out, err = answer
    assert (status, out) == (1, "")
    (sentence,) = err.splitlines()
    assert sentence.startswith("cloister verify: ")
    return sentence.removeprefix("cloister verify: ")


def test_a_sound_certificate_is_told_in_full_figures(run: Run) -> None:
    status, out, err = run()
    assert (status, err) == (0, "")
    assert "digits, version 3" in out and "epsilon 1.25 at delta 1e-06, by rdp" in re.sub(r"epsilon +", "epsilon ", out)
    assert "sigma 1.1, clip 1.0" in out and "q 0.0042, 2344 steps" in out
    for told in (CERTIFICATE.weights_digest, digest_of(signed()), KEY_ID, CERTIFICATE.source, "not compared"):
        assert told in out


def test_the_weights_at_hand_are_compared(run: Run) -> None:
    status, out, _ = run("--weights", "weights.safetensors")
    assert status == 0 and "those in weights.safetensors" in out and "not compared" not in out
    Path("weights.safetensors").write_bytes(WEIGHTS + b"\0")
    sentence = refused(run("--weights", "weights.safetensors"))
    assert sentence.startswith("weights.safetensors holds other weights") and CERTIFICATE.weights_digest in sentence


def test_json_is_for_programs(run: Run) -> None:
    told = json.loads(run("--json", "--weights", "weights.safetensors")[1])
    assert Certificate.model_validate(told["certificate"]) == CERTIFICATE
    assert (told["digest"], told["signer"], told["weights_compared"]) == (digest_of(signed()), KEY_ID, True)
    assert not json.loads(run("--json")[1])["weights_compared"]


def test_the_page_is_written_for_a_sound_certificate_alone(run: Run) -> None:
    Path("forged.json").write_text(json.dumps({**signed(), "payload": "AAAA"}))
    refused(run("--html", "page.html", certificate="forged.json"))
    refused(run("--html", "page.html", "--weights", "certificate.json"))
    assert not Path("page.html").exists()
    assert run("--html", "page.html")[0] == 0
    assert Path("page.html").read_text() == page.html(CERTIFICATE, digest=digest_of(signed()), signer=KEY_ID)


@pytest.mark.parametrize(
    "keys",
    [
        {KEY_ID: RAW.hex()},
        [JWK],
        {"keys": [JWK]},
        {KEY_ID: JWK},
        {"data_dir": "/srv/cloister", "key_dir": "/srv/keys", "certificate_keys": [JWK]},
    ],
    ids=["hexadecimal", "list", "set", "by id", "cloister-admin init --json"],
)
def test_keys_are_read_in_every_form_in_which_they_are_given_out(run: Run, keys: object) -> None:
    Path("keys.json").write_text(json.dumps(keys))
    assert run()[0] == 0


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ("{}", "is not among the 0 given"),
        (json.dumps({KEY_ID: "00" * 32}), "has another id"),
        (json.dumps({KEY_ID: "00"}), "no Ed25519 public key"),
        (json.dumps({KEY_ID: "no hexadecimal"}), "no hexadecimal; give"),
        ("3", "no form of keys; give"),
        ("ed25519", "keys.json is not JSON; give"),
        ("[" * 100_000, "keys.json is not JSON; give"),
        ("\udcff", "keys.json is not JSON; give"),
    ],
    ids=["none", "another", "short", "text", "number", "no JSON", "deep", "no UTF-8"],
)
def test_keys_that_prove_nothing_are_refused_by_name(run: Run, keys: str, why: str) -> None:
    Path("keys.json").write_bytes(keys.encode(errors="surrogateescape"))
    assert why in refused(run())


@pytest.mark.parametrize(
    ("envelope", "why"),
    [
        ({**signed(), "payload": signed()["payload"][:-8] + "AAAAAAAA"}, "changed or forged"),
        (dsse(statement(predicateType="urn:cloister:deployment:1")), "predicate's type is not"),
        (dsse(statement(predicate={**statement()["predicate"], "engine": {"a\n\x1b[2J": 1}})), r"engine.a\n\x1b[2J"),
        ({"signatures": [], **dsse(statement(), payload_type="text/plain")}, "payloadType is not"),
        ([], "not a JSON object"),
    ],
    ids=["forged", "deployment", "terminal codes", "type", "list"],
)
def test_a_certificate_that_proves_nothing_is_refused_in_one_sentence(run: Run, envelope: object, why: str) -> None:
    Path("other.json").write_text(json.dumps(envelope))
    assert why in refused(run(certificate="other.json"))


def test_a_file_that_cannot_be_read_or_written_is_named(run: Run) -> None:
    assert "missing.json cannot be used: No such file" in refused(run(certificate="missing.json"))
    assert "missing.json cannot be used: No such file" in refused(run(keys="missing.json"))
    assert "missing.safetensors cannot be used: No such file" in refused(run("--weights", "missing.safetensors"))
    assert "missing/page.html cannot be used: No such file" in refused(run("--html", "missing/page.html"))
    assert "cannot be used: Is a directory" in refused(run(certificate="."))
    assert "not JSON" in refused(run(certificate="weights.safetensors"))


def test_a_flip_of_any_byte_is_refused_by_the_command_too(run: Run) -> None:
    sound = Path("certificate.json").read_bytes()
    for copy in list(flipped(sound))[:: 8 * 61 + 1]:
        Path("certificate.json").write_bytes(copy)
        refused(run("--json"))


@pytest.mark.parametrize("arguments", [[], ["verify"], ["verify", "certificate.json"], ["forge"]], ids=str)
def test_another_use_than_the_usage_is_exit_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: cloister" in capsys.readouterr().err


def test_what_a_terminal_could_not_show_is_written_out(run: Run) -> None:
    told = CERTIFICATE.model_copy(update={"accountant": "rdp\x1b]0;\u202e"})
    Path("certificate.json").write_text(json.dumps(signed(told)))
    status, out, _ = run()
    assert status == 0 and "\x1b" not in out and r"by rdp\x1b]0;\u202e" in out


def test_the_module_runs_as_the_command_does(tmp_path: Path) -> None:
    certificate, keys = tmp_path / "certificate.json", tmp_path / "keys.json"
    certificate.write_text(json.dumps(signed()))
    keys.write_text(json.dumps([JWK]))
    command = [sys.executable, "-m", "cloister.cli", "verify", str(certificate), "--keys", str(keys)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["signer"] == KEY_ID
    certificate.write_text(json.dumps(dsse(statement(subject=[]))))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (1, "") and "subject" in done.stderr
    assert subprocess.run(command[:4], capture_output=True).returncode == 2


def test_the_command_needs_no_server_and_no_http() -> None:
    script = "import sys, cloister.cli; print([name for name in sys.modules if name.split('.')[0] in sys.argv[1:]])"
    heavy = ["httpx2", "numpy", "torch", "cloister_server", "cloister_privacy"]
    done = subprocess.run([sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    done = subprocess.run(
        [sys.executable, "-c", script.replace("cloister.cli", "cloister"), "argparse", "pydantic"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


DOCS = (Path(__file__).parents[2] / "docs" / "certificates.md").read_text()


def test_the_certificate_that_the_docs_show_is_a_whole_statement_and_a_true_one() -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL)
    stated: dict[str, Any] = json.loads(shown)
    certificate = verify(dsse(stated), {KEY_ID: RAW})
    assert stated["predicate"].keys() == Certificate.model_fields.keys() and None not in stated["predicate"].values()
    plan = DPPlan(
        nominal_size=certificate.nominal_size,
        capacity=certificate.capacity or 0,
        batch_size=256,
        steps=certificate.event.steps,
        noise_multiplier=certificate.event.noise_multiplier,
        clip=certificate.clip,
        delta=certificate.delta,
    )
    assert certificate.epsilon == pytest.approx(plan.epsilon())
    assert certificate.event.model_dump() == pytest.approx(plan.event().model_dump())


def test_the_commands_of_the_docs_run_as_they_stand(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)
    script = Path(__file__).parents[2] / "docs" / "verify.py"
    ran = set()
    for line in shown.splitlines():
        command, *arguments = line.partition("  #")[0].split()
        if command == "cloister":
            assert main(arguments) == 0, capsys.readouterr().err
        else:
            assert (command, arguments[0]) == ("python", "docs/verify.py")
            given = [RAW.hex() if each == "PUBLIC_KEY_IN_HEX" else each for each in arguments[1:]]
            subprocess.run([sys.executable, str(script), *given], capture_output=True, check=True)
        ran.add(command)
    assert ran == {"cloister", "python"}
