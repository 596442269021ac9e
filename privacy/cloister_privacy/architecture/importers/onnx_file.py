"""An ONNX file as a graph that can be walked: bounded in size, in order, and with no data from outside its folder.

A file may come from anyone, so nothing in it is trusted: what is too large, out of order or elsewhere is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_privacy.architecture.importers.imported import ModelNotSupported
from cloister_privacy.architecture.shapes import PARAMETER_LIMIT

__all__ = ["File", "array_of", "onnx", "read"]

_BYTE_LIMIT = 2**31
_NODE_LIMIT = 50_000
_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class File:
    """A graph whose nodes are in order."""

    graph: Any
    opset: int
    initializers: dict[str, NDArray[Any]]


def onnx() -> Any:
    """The library. Raises ModelNotSupported where it is not installed."""
    try:
        return import_module("onnx")
    except ImportError:
        raise ModelNotSupported(('onnx is not installed; pip install "cloister[onnx]"',)) from None


def read(source: str | Path | bytes) -> File:
    """The graph in a file, or in its bytes. Raises ModelNotSupported for one that is damaged, too large or hostile."""
    library = onnx()
    folder = None if isinstance(source, bytes) else Path(source).resolve().parent
    model, body = library.ModelProto(), _bytes(source)
    try:
        model.ParseFromString(body)
    except Exception as exc:  # protobuf's errors are of several families
        raise _refused(f"the file is no ONNX model, or is damaged ({type(exc).__name__}); export it anew") from None
    if not model.graph.node:
        raise _refused("the file holds no graph; export the model anew")
    if len(model.graph.node) > _NODE_LIMIT:
        raise _refused(f"the graph has {len(model.graph.node)} nodes, over {_NODE_LIMIT}; import a smaller one")
    if model.functions:
        raise _refused("the model defines functions of its own; export it with them inlined (onnx.inliner)")
    if model.graph.sparse_initializer:
        raise _refused("the graph has sparse weights; export it with dense ones")
    initializers = _initializers(model.graph, folder)
    _require_order(model.graph)
    opset = max((each.version for each in model.opset_import if each.domain in _DOMAINS), default=1)
    return File(model.graph, opset, initializers)


def _refused(problem: str) -> ModelNotSupported:
    return ModelNotSupported((problem,))


def _bytes(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        size = len(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise _refused(f"{path} is no file; give the path of an .onnx file, or its bytes")
        size = path.stat().st_size
    if size > _BYTE_LIMIT:
        raise _refused(f"the file has {size} bytes, over {_BYTE_LIMIT}; import a smaller model")
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _initializers(graph: Any, folder: Path | None) -> dict[str, NDArray[Any]]:
    total, found = 0, {}
    for tensor in graph.initializer:
        if not isinstance(tensor.name, str):
            raise _refused("weights have a name that is no text; the file is damaged")
        if any(size < 0 for size in tensor.dims):
            raise _refused(f"weights {tensor.name!r} have a negative size; the file is damaged")
        total += math.prod(tensor.dims)
        if total > PARAMETER_LIMIT:
            raise _refused(
                f"the weights up to {tensor.name!r} are over {PARAMETER_LIMIT} numbers; import a smaller model"
            )
        if tensor.name in found:
            raise _refused(f"weights {tensor.name!r} come twice; the file is damaged")
        found[tensor.name] = array_of(tensor, folder)
    return found


def array_of(tensor: Any, folder: Path | None = None) -> NDArray[Any]:
    """A tensor's numbers. Raises ModelNotSupported where they are not of its shape, or not beside the model."""
    library = onnx()
    try:
        if tensor.data_location == library.TensorProto.EXTERNAL:
            dtype = np.dtype(library.helper.tensor_dtype_to_np_dtype(tensor.data_type)).newbyteorder("<")
            return np.frombuffer(_external(tensor, folder, dtype.itemsize), dtype).reshape(tuple(tensor.dims)).copy()
        if math.prod(tensor.dims) > PARAMETER_LIMIT:
            raise _refused(f"weights {tensor.name!r} are over {PARAMETER_LIMIT} numbers; import a smaller model")
        array: NDArray[Any] = library.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as exc:
        raise _refused(
            f"weights {tensor.name!r} cannot be read ({str(exc).splitlines()[0]}); the file is damaged"
        ) from None
    return array


def _external(tensor: Any, folder: Path | None, item_bytes: int) -> bytes:
    told = {each.key: each.value for each in tensor.external_data}
    if folder is None:
        raise _refused(
            f"weights {tensor.name!r} lie in another file, {told.get('location')!r}; give the path of the model"
        )
    path = (folder / told.get("location", "")).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise _refused(
            f"weights {tensor.name!r} lie at {told.get('location')!r}, which is no file in the model's folder"
        )
    offset, length = int(told.get("offset", 0)), math.prod(tensor.dims) * item_bytes
    if offset < 0 or offset + length > path.stat().st_size or length > _BYTE_LIMIT:
        raise _refused(f"weights {tensor.name!r} reach beyond the end of {path.name!r}; the file is damaged")
    with path.open("rb") as file:
        file.seek(offset)
        body: bytes = file.read(length)
    return body


def _require_order(graph: Any) -> None:
    """Each name is given once, before it is read: so there is no cycle."""
    known = {"", *(each.name for each in graph.input), *(each.name for each in graph.initializer)}
    for node in graph.node:
        named = (
            node.name,
            node.op_type,
            node.domain,
            *node.input,
            *node.output,
            *(each.name for each in node.attribute),
        )
        if not all(isinstance(name, str) for name in named) or not any(node.output):
            raise _refused("a node has names that are no text, or gives nothing; the file is damaged")
        where = f"{node.name or next(iter(node.output), '')} ({node.op_type})"
        if node.domain not in _DOMAINS:
            raise _refused(
                f"{where} is of the domain {node.domain!r}; export the model with the operators of ONNX only"
            )
        missing = [name for name in node.input if name not in known]
        if missing:
            raise _refused(
                f"{where} reads {missing[0]!r}, which nothing before it gives; the graph has a cycle, or is damaged"
            )
        twice = [name for name in _given(node) if name in known]
        if twice:
            raise _refused(f"{where} gives {twice[0]!r}, which was given before; the file is damaged")
        known.update(_given(node))


def _given(node: Any) -> Iterator[str]:
    return (name for name in node.output if name)
