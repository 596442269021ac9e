"""What docs/architecture-language.md shows runs as it stands, and what it says of layers, columns and limits is the code's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest

from cloister.wire.architecture import LAYER_LIMIT, Architecture, Loss
from cloister.wire.columns import InputColumn
from cloister.wire.layers import Layer
from cloister_privacy.architecture import PARAMETER_LIMIT, build

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "architecture-language.md").read_text()
BLOCKS = dict(re.findall(r"^#+ ([^\n]+)\n(?:(?!^#)[^\n]*\n)*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
LAYERS = get_args(get_args(Layer)[0])
PLACE = ("type", "name", "reads", "frozen")


def fields_of(kind: Any) -> str:
    """The fields as a row of the page tells them."""
    told = []
    for name, field in kind.model_fields.items():
        default = field.get_default()
        words = f'"{default}"' if isinstance(default, str) else repr(default)
        if name not in PLACE:
            told.append(f"`{name}`" if field.is_required() else f"`{name}={words}`")
    return ", ".join(told)


def row_of(name: str) -> list[str]:
    (row,) = re.findall(rf"^\| `{name}` \|.*\|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_every_block_of_the_page_is_run() -> None:
    assert len(BLOCKS) == PAGE.count("```python") == 11


@pytest.mark.parametrize("title", list(BLOCKS))
def test_an_example_runs_alone_and_torch_makes_as_many_parameters_as_it_says(
    title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[title], "docs/architecture-language.md", "exec"), names)  # noqa: S102 (that is the test)
    (told,) = re.findall(r"^assert check\(architecture\) == ([\d_]+)", BLOCKS[title], re.MULTILINE)
    assert sum(each.numel() for each in build(names["architecture"]).parameters()) == int(told)


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_the_table_has_every_layer_with_its_fields_and_their_defaults(kind: Any) -> None:
    mark = " *" if "frozen" in kind.model_fields else ""
    _, told, fields, shapes = row_of(kind.__name__)
    assert (told, fields) == (f"`{kind.model_fields['type'].default}`{mark}", fields_of(kind))
    assert shapes


@pytest.mark.parametrize("kind", get_args(get_args(InputColumn)[0]), ids=lambda kind: kind.__name__)
def test_the_table_has_every_column_with_its_fields(kind: Any) -> None:
    _, told, fields, *_ = row_of(kind.__name__.removesuffix("Column"))
    assert told == f"`{kind.model_fields['type'].default}`"
    assert {f"`{name}`" for name in kind.model_fields if name != "type"} <= set(re.findall(r"`\w+`", fields))


def test_the_losses_and_limits_are_the_code_s() -> None:
    assert all(row_of(loss) for loss in get_args(Loss))
    assert f"| layers, inputs | {LAYER_LIMIT:,} each |" in PAGE
    assert PARAMETER_LIMIT == 10**8 and "| parameters | 10^8 |" in PAGE
    assert f"`{Architecture.model_fields['format'].default}`" in PAGE


def test_the_schema_is_what_the_page_s_command_makes(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"```sh\n(.*)\n```", PAGE)
    python, option, code, arrow, path = shlex.split(command)
    assert (python, option, arrow, path) == (".venv/bin/python", "-c", ">", "docs/architecture-1.schema.json")
    exec(compile(code, "docs/architecture-language.md", "exec"), {})  # noqa: S102 (that is the test)
    kept = (DOCS / "architecture-1.schema.json").read_text()
    assert kept == capsys.readouterr().out, f"the schema is old; run {command}"
    assert json.loads(kept)["additionalProperties"] is False
