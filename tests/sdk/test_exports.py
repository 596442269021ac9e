"""What `import cloister` gives, and what it does not load."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import cloister
from cloister import _errors

HEAVY = (
    "torch",
    "opacus",
    "sqlalchemy",
    "fastapi",
    "httpx2",
    "numpy",
    "pydantic",
    "cryptography",
    "safetensors",
    "rich",
)
SERVER_ONLY = ("torch", "opacus", "sqlalchemy", "fastapi", "cloister_privacy", "cloister_server")
EXPORTED = set(cloister.__all__)


def test_everything_in_all_is_there_and_everything_there_is_in_all() -> None:
    assert sorted(EXPORTED) == cloister.__all__ == dir(cloister)
    for name in EXPORTED:
        assert getattr(cloister, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cloister.nothing  # noqa: B018 (reading it is the test)


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    source = Path(str(cloister.__file__)).read_text()
    for_checkers = {
        line.split(" as ")[1].split()[0] for line in source.splitlines() if line.startswith("    from cloister.")
    }
    assert for_checkers == EXPORTED


def test_every_error_of_the_sdk_is_exported_and_hangs_on_one_root() -> None:
    errors = {name for name, kind in vars(_errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    errors.discard("ValidationError")
    assert errors <= EXPORTED
    assert all(issubclass(getattr(cloister, name), cloister.CloisterError) for name in errors)
    tree = str(_errors.__doc__)
    assert all(name in tree for name in errors), "the tree in the docstring shows every one"


@pytest.mark.parametrize(
    "module",
    [
        "_auth", "_budgets", "_burn_down", "_client", "_convert", "_errors", "_handles", "_http", "_inputs", "_operations", "_plans",
        "_progress", "_resources", "_uploads", "wire._errors", "wire._model", "wire.architecture", "wire.certificate",
        "wire.columns", "wire.errors", "wire.jobs", "wire.ledger", "wire.oip", "wire.plans", "wire.rows", "wire.sources",
    ],
)  # fmt: skip
def test_each_module_names_what_is_public_in_it(module: str) -> None:
    found = import_module(f"cloister.{module}")
    ours = {
        name
        for name, value in vars(found).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == found.__name__
        and (inspect.isclass(value) or inspect.isfunction(value))
    }
    assert ours <= set(found.__all__)
    assert all(hasattr(found, name) for name in found.__all__)


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after the statement."""
    script = f"import sys, json; {statement}; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_cloister_loads_nothing_heavy() -> None:
    assert not loaded_by("import cloister").intersection(HEAVY)


def test_using_all_of_cloister_loads_no_torch_and_no_server() -> None:
    assert not loaded_by("import cloister; [getattr(cloister, name) for name in cloister.__all__]").intersection(
        SERVER_ONLY
    )


def test_no_type_of_the_http_library_is_in_a_public_signature() -> None:
    for name in EXPORTED:
        exported = getattr(cloister, name)
        members = [exported, *vars(exported).values()] if inspect.isclass(exported) else [exported]
        for member in filter(inspect.isfunction, members):
            assert "httpx" not in str(inspect.signature(member))
