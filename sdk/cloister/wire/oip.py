"""The Open Inference Protocol v2 over JSON: tensors by name, shape and datatype. Trusts no shape that the data does not fill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from cloister.wire._model import Response

__all__ = [
    "InferRequest",
    "InferResponse",
    "MalformedTensor",
    "OutputRequest",
    "TensorJSON",
    "decode_inputs",
    "decode_outputs",
    "encode_outputs",
    "encode_request",
]

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TEXT = "BYTES"
"""In JSON its elements are strings."""
_ACCEPTED = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}
"""Kind of a datatype -> the kinds of JSON data that may fill it."""


class MalformedTensor(Exception):
    """A tensor whose datatype, shape and data do not agree, or whose numbers are not finite."""


class TensorJSON(Response):
    """One tensor; `data` flat or nested, row by row."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=2**31)], ...], Field(max_length=8)]
    datatype: str
    data: list[Any]


class OutputRequest(Response):
    """An output that the caller asks for by name."""

    name: str


class InferRequest(Response):
    """A request for predictions. Fields that other servers know (parameters) are ignored, as the protocol allows."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Annotated[str, Field(max_length=128)] | None = None
    inputs: Annotated[list[TensorJSON], Field(min_length=1, max_length=1024)]
    outputs: list[OutputRequest] | None = None


class InferResponse(Response):
    model_name: str
    model_version: str | None = None
    id: str | None = None
    outputs: list[TensorJSON]


def encode_request(inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The body of a request for these inputs."""
    return {"inputs": [_encode(name, array) for name, array in inputs.items()]}


def encode_outputs(outputs: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """The `outputs` of a response."""
    return [_encode(name, array) for name, array in outputs.items()]


def decode_inputs(request: InferRequest) -> dict[str, NDArray[Any]]:
    """Name -> array. Raises MalformedTensor, also where a name comes twice."""
    return _decode_all(request.inputs)


def decode_outputs(response: InferResponse) -> dict[str, NDArray[Any]]:
    """Name -> array. Raises MalformedTensor."""
    return _decode_all(response.outputs)


def _encode(name: str, array: NDArray[Any]) -> dict[str, Any]:
    if array.dtype == object:
        return {"name": name, "shape": list(array.shape), "datatype": _TEXT, "data": array.ravel().tolist()}
    if array.dtype not in _NAMES:
        raise MalformedTensor(f"tensor {name!r} is {array.dtype}, which the protocol cannot carry; convert it first")
    _check_finite(name, array)
    return {"name": name, "shape": list(array.shape), "datatype": _NAMES[array.dtype], "data": array.ravel().tolist()}


def _decode_all(tensors: list[TensorJSON]) -> dict[str, NDArray[Any]]:
    arrays = {tensor.name: _decode(tensor) for tensor in tensors}
    if len(arrays) != len(tensors):
        raise MalformedTensor("a tensor's name comes twice; send each once")
    return arrays


def _decode(tensor: TensorJSON) -> NDArray[Any]:
    if tensor.datatype == _TEXT:
        _check_leaves(tensor, (str,))
        texts = np.array(tensor.data, dtype=object)
        if texts.size != math.prod(tensor.shape):
            raise MalformedTensor(f"tensor {tensor.name!r} holds lists of several lengths")
        return texts.reshape(tensor.shape)
    dtype = _DTYPES.get(tensor.datatype)
    if dtype is None:
        raise MalformedTensor(
            f"tensor {tensor.name!r} has datatype {tensor.datatype!r}; known here: {', '.join((*_DTYPES, _TEXT))}"
        )
    _check_leaves(tensor, (int, float, bool))
    try:
        array = np.asarray(tensor.data)
    except (ValueError, OverflowError):
        raise MalformedTensor(f"tensor {tensor.name!r} is nested unevenly; send its data flat, or row by row") from None
    if array.size != math.prod(tensor.shape) or (array.ndim != 1 and array.shape != tensor.shape):
        raise MalformedTensor(
            f"tensor {tensor.name!r} holds {array.size} elements in the shape {list(array.shape)}, and says {list(tensor.shape)}"
        )
    with np.errstate(over="ignore"):
        converted = array.astype(dtype) if array.dtype.kind in _ACCEPTED[dtype.kind] or not array.size else None
    if converted is None or (dtype.kind in "iu" and not np.array_equal(converted, array)):
        raise MalformedTensor(f"tensor {tensor.name!r} holds data that is not {tensor.datatype}")
    _check_finite(tensor.name, converted)
    return converted.reshape(tensor.shape)


def _check_leaves(tensor: TensorJSON, kinds: tuple[type, ...]) -> None:
    """Of these kinds, and as many as the shape says, before numpy takes memory for whatever it is that was sent."""
    wanted, found = math.prod(tensor.shape), 0
    waiting = [tensor.data]
    while waiting:
        items = waiting.pop()
        for item in items:
            if isinstance(item, list):
                waiting.append(item)
            elif type(item) in kinds:
                found += 1
            else:
                raise MalformedTensor(f"tensor {tensor.name!r} holds data that is not {tensor.datatype}")
        if found > wanted or len(waiting) > wanted:
            break
    if found != wanted:
        raise MalformedTensor(
            f"tensor {tensor.name!r} holds {'more' if found > wanted else 'fewer'} elements than the {wanted} of its shape"
        )


def _check_finite(name: str, array: NDArray[Any]) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise MalformedTensor(f"tensor {name!r} holds NaN or infinity, which JSON cannot carry; remove those rows")
