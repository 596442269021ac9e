"""The Open Inference Protocol codec: arrays survive JSON, and tensors that contradict themselves do not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cloister.wire.oip import (
    InferRequest,
    InferResponse,
    MalformedTensor,
    decode_inputs,
    decode_outputs,
    encode_outputs,
    encode_request,
)


def decoded(datatype: str, shape: list[int], data: list[Any]) -> np.ndarray[Any, Any]:
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "data": data}
    return decode_inputs(InferRequest.model_validate_json(json.dumps({"inputs": [tensor]})))["x"]


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.bool_, np.uint8, np.int8, np.uint32, np.int64, np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0),
    ).filter(lambda array: bool(np.isfinite(array).all()))
)
def test_any_array_survives_the_journey(array: np.ndarray[Any, Any]) -> None:
    there = json.dumps(encode_request({"x": array}), allow_nan=False)
    back = decode_inputs(InferRequest.model_validate_json(there))["x"]
    assert back.dtype == array.dtype and back.shape == array.shape and np.array_equal(back, array)


def test_outputs_survive_the_journey() -> None:
    outputs = {"probabilities": np.array([[0.25, 0.75]], np.float32), "index": np.array([1], np.int64)}
    body = {"model_name": "m", "model_version": "1", "outputs": encode_outputs(outputs), "parameters": {"more": 1}}
    back = decode_outputs(InferResponse.model_validate(body))
    assert all(np.array_equal(back[name], output) for name, output in outputs.items())


def test_data_may_be_nested_row_by_row() -> None:
    assert decoded("FP32", [2, 2], [[1, 2], [3, 4.5]]).tolist() == [[1, 2], [3, 4.5]]


def test_texts_cross_as_they_are() -> None:
    texts = np.array([["a", ""], ["\u00e9\n", "x" * 1000]], dtype=object)
    body = json.loads(json.dumps(encode_request({"text": texts})))
    assert body["inputs"][0]["datatype"] == "BYTES"
    body["inputs"][0]["data"] = texts.tolist()  # nested is as good as flat
    for inputs in (encode_request({"text": texts}), body):
        assert (decode_inputs(InferRequest.model_validate(inputs))["text"] == texts).all()


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("BF16", [1], [1]),
        ("BYTES", [1], [1]),
        ("BYTES", [2], ["a"]),
        ("FP32", [1], ["a"]),
        ("UINT64", [2], [0, 2**63]),
        ("FP32", [2], [1]),
        ("FP32", [2, 2], [[1, 2, 3, 4]]),
        ("FP32", [2], [[1], [2, 3]]),
        ("FP32", [1], ["1"]),
        ("FP32", [1], [None]),
        ("FP32", [1], [{}]),
        ("FP32", [1], [True]),
        ("BOOL", [1], [1]),
        ("FP32", [1], [float("nan")]),
        ("FP32", [1], [float("inf")]),
        ("FP32", [1], [1e39]),
        ("FP16", [1], [70000]),
        ("INT64", [1], [1.5]),
        ("INT64", [1], [2**63]),
        ("INT64", [1], [10**400]),
        ("INT8", [1], [300]),
        ("UINT8", [1], [-1]),
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(datatype: str, shape: list[int], data: list[Any]) -> None:
    with pytest.raises(MalformedTensor, match="'x'"):
        decoded(datatype, shape, data)


@pytest.mark.parametrize("array", [np.array([np.nan], np.float32), np.array(["a"]), np.array([1 + 1j])])
def test_what_json_cannot_carry_is_refused_before_it_is_sent(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(MalformedTensor, match="'x'"):
        encode_request({"x": array})


def test_a_name_that_comes_twice_is_refused() -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    with pytest.raises(MalformedTensor, match="twice"):
        decode_inputs(InferRequest.model_validate({"inputs": [tensor, tensor]}))


@pytest.mark.parametrize("data", [["x" * 1_000_000, "y"], [[], []] * 1000, [1.0] * 1000, [[1.0], "x"], [None, 1.0]])
def test_data_that_is_not_the_shape_s_numbers_is_refused_before_memory_is_taken_for_it(data: list[object]) -> None:
    request = InferRequest.model_validate({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": data}]})
    with pytest.raises(MalformedTensor):
        decode_inputs(request)
