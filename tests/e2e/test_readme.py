"""What the README claims is run: its code as it stands, and its commands as an operator types them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import cloister
from harness import App, Deployment
from journeys import SQLITE

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("deployment", [SQLITE], indirect=True)
def test_the_first_example_runs_as_it_stands(
    deployment: Deployment, app: App, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    amount = rng.uniform(0, 1000, 2000).astype(np.float32)
    with deployment.client(app) as client:
        client.datasets.upload(
            "claims",
            {"amount": amount, "fraud": (amount > 700).astype(np.int32)},
            source=client.sources.create("insured", epsilon=6, delta=1e-5),
            columns={"amount": cloister.Number(low=0, high=1000), "fraud": cloister.Category(values=("no", "yes"))},
            nominal_size=2000,
            capacity=3000,
        )
    for name, value in {"URL": deployment.url, "CLIENT_ID": app.client_id, "CLIENT_SECRET": app.client_secret}.items():
        monkeypatch.setenv(f"CLOISTER_{name}", value)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    new_claims = np.array([10.0, 990.0], np.float32)
    exec(compile(example, "README.md", "exec"), {"new_claims": new_claims})  # noqa: S102 (that is the test)
    printed = capsys.readouterr().out
    assert "A plan spends nothing" in printed
    assert "[0 1]" in printed, printed


def test_every_command_and_setting_that_the_docs_name_exists() -> None:
    from typer.main import get_command

    from cloister_server.cli.admin import cli
    from cloister_server.settings import Settings

    docs = README + (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    known = get_command(cli)
    for line in re.findall(r"cloister-admin ([a-z][a-z-]*(?: [a-z-]+)?)", docs):
        first, _, second = line.partition(" ")
        command = known.commands[first]  # type: ignore[attr-defined]
        assert not hasattr(command, "commands") or not second or second in command.commands, line
    for variable in set(re.findall(r"CLOISTER_([A-Z_]+)", docs)) - {"URL", "CLIENT_ID", "CLIENT_SECRET", "PROFILE"}:
        assert variable.lower() in Settings.model_fields, variable
    targets = set(re.findall(r"^([a-z-]+):", (Path(__file__).parents[2] / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", docs)) <= targets


def test_no_figure_of_the_readme_is_left_blank() -> None:
    assert "RESULT_" not in README
