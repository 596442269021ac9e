"""The seed's Keras CNN imports under TensorFlow too, which `make test-long` puts into an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-tensorflow" / "bin" / "python"


@pytest.mark.long
def test_the_seed_model_under_tensorflow_is_the_network_that_it_imports_as() -> None:
    if not PYTHON.exists():
        pytest.skip("there is no environment with tensorflow-cpu; `make test-long` makes one")
    script = ROOT / "tests" / "tensorflow_seed.py"
    done = subprocess.run([PYTHON, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["largest_difference"] <= 1e-4
