"""What no line of the product does: unpickle, evaluate text, start a shell, read the environment where it should not."""

from __future__ import annotations

import ast
import base64
import decimal
import importlib
import json
import pickle
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister_server.work.worker import _JSON

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for part in ("sdk", "privacy", "server") for path in (ROOT / part).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
FORBIDDEN_IMPORTS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
READ_THE_ENVIRONMENT = {"server/cloister_server/settings.py", "sdk/cloister/_client.py"}


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in the file, and `module.name` for what is taken from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of names; the empty text for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _broken_laws(tree: ast.AST) -> Iterator[str]:
    for name in _imports(tree):
        if set(name.split(".")) & FORBIDDEN_IMPORTS:
            yield f"imports {name}"
        if name in ("torch.load", "torch.jit", "torch.hub", "os.system", "os.popen"):
            yield f"takes {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func)
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "builtins.eval"):
            yield f"calls {called}"
        if called == "torch.load" or called.endswith(".torch.load_model"):
            yield f"calls {called}"
        if any(word.arg in ("shell", "allow_pickle") and not _is_false(word.value) for word in node.keywords):
            yield f"{called} is told to use a shell or pickles"


def _is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _reads_environment(tree: ast.AST) -> bool:
    named = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
    return any(_dotted(node) in named for node in ast.walk(tree)) or bool(named & set(_imports(tree)))


def test_the_laws_are_asked_of_the_whole_product() -> None:
    assert {name.split("/")[1] for name in NAMES} == {"cloister", "cloister_privacy", "cloister_server"}
    assert len(NAMES) > 60


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path: Path) -> None:
    assert list(_broken_laws(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load(x)",
        "from torch import load",
        "eval(x)",
        "run(x, shell=True)",
        "numpy.load(x, allow_pickle=flag)",
    ],
)
def test_a_broken_law_is_seen(source: str) -> None:
    assert list(_broken_laws(ast.parse(source)))


def test_the_environment_is_read_in_two_places_alone() -> None:
    readers = {name for name, path in zip(NAMES, FILES, strict=True) if _reads_environment(ast.parse(path.read_text()))}
    assert readers == READ_THE_ENVIRONMENT


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_what_a_module_says_it_exports_is_there(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("")
    name = ".".join(part for part in relative.parts[1:] if part != "__init__")
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert [each for each in exported if not hasattr(module, each)] == []
    assert len(set(exported)) == len(exported)


@pytest.mark.parametrize("value", [b"x", {1, 2}, object(), decimal.Decimal(1), {"a": b"x"}, ValueError("x"), Path("x")])
def test_the_queue_writes_plain_json_and_refuses_the_rest(value: Any) -> None:
    with pytest.raises(TypeError):
        _JSON().serialize(value)


def test_the_queue_reads_back_what_it_wrote() -> None:
    value = {"args": ["tn_1", "job_1"], "kwargs": {}, "none": None, "number": 1}
    serialized = _JSON().serialize(value)
    assert json.loads(serialized) == value == _JSON().deserialize(serialized)


def test_the_server_is_kept_from_the_sdk_but_for_the_command_that_is_a_client() -> None:
    """The contract names its modules, since it leaves one out: a new one is to be on it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = next(set(each["source_modules"]) for each in contracts if each["name"].startswith("Server and privacy"))
    package = ROOT / "server" / "cloister_server"
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {f"cloister_server.{name}" for name in there - {"__init__", "cli"}} == named - {"cloister_privacy"}


class _Touches:
    """Runs code wherever it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self._path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_queue_never_unpickles(protocol: int, tmp_path: Path) -> None:
    planted = pickle.dumps(_Touches(str(tmp_path / "run")), protocol=protocol)
    for text in (planted.decode("latin-1"), base64.b64encode(planted).decode()):
        with pytest.raises(ValueError):
            _JSON().deserialize(text)
    assert not (tmp_path / "run").exists()
    pickle.loads(planted)  # noqa: S301 (shows that the plant would have run)
    assert (tmp_path / "run").exists()
