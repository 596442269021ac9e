"""docs/verify.py, the verifier without Cloister: it takes and refuses what the SDK takes and refuses."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certificates import CERTIFICATE, RAW, WEIGHTS, flipped, signed

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "verify.py"
VECTORS = json.loads((ROOT / "tests" / "vectors" / "certificate-1.json").read_text())

Verify = Callable[..., dict[str, Any]]


class Refused(Exception):
    """What the script says as it ends."""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Run the script in this process, on an envelope's bytes; the statement that it printed."""

    def run(envelope: bytes, key: str = RAW.hex(), *weights: str) -> dict[str, Any]:
        path = tmp_path / "certificate.json"
        path.write_bytes(envelope)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(path), key, *weights])
        try:
            runpy.run_path(str(SCRIPT))
        except SystemExit as end:
            assert capsys.readouterr().out == ""
            raise Refused(end.code) from None
        stated: dict[str, Any] = json.loads(capsys.readouterr().out)
        return stated

    return run


def test_it_needs_cryptography_and_nothing_else() -> None:
    tree = ast.parse(SCRIPT.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"cryptography"}


def test_it_prints_what_is_stated(script: Verify) -> None:
    assert script(json.dumps(signed()).encode())["predicate"] == CERTIFICATE.model_dump(mode="json")


@pytest.mark.parametrize("vector", VECTORS["good"], ids=[vector["name"] for vector in VECTORS["good"]])
def test_it_takes_a_good_vector(script: Verify, vector: dict[str, Any]) -> None:
    signer = json.loads(vector["envelope"])["signatures"][0]["keyid"]
    predicate = script(vector["envelope"].encode(), vector["keys"][signer])["predicate"]
    assert {name: predicate[name] for name in vector["certificate"]} == vector["certificate"]


@pytest.mark.parametrize("vector", VECTORS["corrupted"], ids=[vector["name"] for vector in VECTORS["corrupted"]])
def test_it_refuses_a_corrupted_vector_by_name(script: Verify, vector: dict[str, Any]) -> None:
    for key in vector["keys"].values() or ["00" * 32]:
        with pytest.raises(Refused, match="refused: "):
            script(vector["envelope"].encode(), key)


def test_it_refuses_a_flip_of_any_byte(script: Verify) -> None:
    file = json.dumps(signed(), indent=1).encode()
    for copy in list(flipped(file))[::33]:
        with pytest.raises(Refused, match="refused: "):
            script(copy)


def test_it_compares_the_weights(script: Verify, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(WEIGHTS)
    assert script(json.dumps(signed()).encode(), RAW.hex(), str(weights))
    weights.write_bytes(WEIGHTS + b"\n")
    with pytest.raises(Refused, match="the weights are others"):
        script(json.dumps(signed()).encode(), RAW.hex(), str(weights))
    with pytest.raises(Refused, match="No such file"):
        script(json.dumps(signed()).encode(), RAW.hex(), str(tmp_path / "missing"))


@pytest.mark.parametrize("key", ["", "00", "00" * 32, "no hexadecimal"])
def test_it_refuses_a_key_that_signed_nothing(script: Verify, key: str) -> None:
    with pytest.raises(Refused, match="refused: "):
        script(json.dumps(signed()).encode(), key)


def test_as_a_program_it_ends_with_a_status(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"

    def ended(envelope: bytes, *arguments: str) -> tuple[int, str]:
        path.write_bytes(envelope)
        done = subprocess.run([sys.executable, "-I", str(SCRIPT), *arguments], capture_output=True, text=True)
        assert bool(done.stdout) != bool(done.stderr)
        return done.returncode, done.stderr

    sound = json.dumps(signed()).encode()
    assert ended(sound, str(path), RAW.hex()) == (0, "")
    for copy in list(flipped(sound))[5::4001]:
        status, why = ended(copy, str(path), RAW.hex())
        assert status == 1 and why.startswith("refused: ") and "Traceback" not in why
    assert ended(sound)[0] == 1
