"""An ONNX graph as a network of the language. The file is read, and nothing in it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloister_privacy.architecture.importers.draft import Draft, Place, Shape
from cloister_privacy.architecture.importers.finishing import drafted, finished, named
from cloister_privacy.architecture.importers.imported import Imported, ModelNotSupported
from cloister_privacy.architecture.importers.onnx_file import File, onnx, read
from cloister_privacy.architecture.importers.onnx_graph import Held, Walk
from cloister_privacy.architecture.importers.onnx_layers import LAYERS
from cloister_privacy.architecture.importers.onnx_operators import OPERATORS

__all__ = ["from_onnx"]

_EXAMPLES = 7919
"""Stands for the examples of a batch where a graph takes any number: a prime that no shape has."""

_NEAREST = {
    "Attention": "import it from torch or Keras",
    "HardSigmoid": "use Sigmoid",
    "HardSwish": "use Sigmoid and Mul (SiLU)",
    "Mish": "use Sigmoid and Mul (SiLU)",
    "PRelu": "use LeakyRelu",
    "Softplus": "use Elu",
    "Sqrt": "a norm that is spelt so exports as one with opset 17 or later",
    "ConvTranspose": "use Conv",
    "Resize": "use images of the size that the network needs",
    "If": "export the branch that is taken",
    "Loop": "export it unrolled",
    "Scan": "export it unrolled",
    "QLinearConv": "export it in float32",
    "DequantizeLinear": "export it in float32",
}


def from_onnx(source: str | Path | bytes) -> Imported:
    """The layers and weights of an ONNX file, or of its bytes, with one output and sizes that are fixed but for the examples'.

    Weights in files of their own are read from the model's folder only. Raises ModelNotSupported for a file that is damaged or
    hostile, and with every node that cannot be mapped.
    """
    file = read(source)
    inputs = [each for each in file.graph.input if each.name not in file.initializers]
    shapes, examples = _shapes(inputs)
    columns = named(shapes)
    given = {columns[name]: shape for name, shape in shapes.items()}
    return drafted(given, lambda draft: _written(draft, file, columns, examples=examples))


def _written(draft: Draft, file: File, columns: Mapping[str, str], *, examples: int) -> Imported:
    walk = Walk(draft, file, {**OPERATORS, **LAYERS}, _without_form)
    known = walk.along({name: Held(draft.column(column)) for name, column in columns.items()}, examples=examples)
    draft.place = Place("", "the graph")
    outputs = [each.name for each in file.graph.output]
    output = known.get(outputs[0]) if outputs else None
    if len(outputs) != 1 or not isinstance(output, Held) or output.batch:
        draft.refuse(f"gives {outputs}; let it give one tensor that depends on its inputs, the examples first")
        raise ModelNotSupported(tuple(draft.problems))
    return finished(draft, output.value)


def _without_form(operator: str) -> str:
    return f"{operator} has no form in the language; {_NEAREST.get(operator, 'use the layers that it has')}"


def _shapes(inputs: list[Any]) -> tuple[dict[str, Shape], int]:
    """The shape of one example of each input, and how many examples the graph takes."""
    kinds, shapes, batches, wrong = onnx().TensorProto, {}, set(), []
    bearable = {kinds.FLOAT, kinds.INT64, kinds.INT32, kinds.UINT8}
    for each in inputs:
        tensor = each.type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
        if not isinstance(each.name, str):
            wrong.append("an input has a name that is no text; the file is damaged")
        elif tensor.elem_type not in bearable:
            wrong.append(f"{each.name} (input): is neither float32 nor whole numbers; export the model in float32")
        elif not sizes or any(size is None or size < 1 for size in sizes[1:]):
            wrong.append(
                f"{each.name} (input): has sizes {sizes}; export it with all fixed but the first, the examples'"
            )
        else:
            shapes[each.name] = tuple(int(size) for size in sizes[1:] if size is not None)
            batches |= {sizes[0]} if sizes[0] is not None else set()
    if len(batches) > 1:
        wrong.append(f"the inputs take {sorted(batches)} examples; export the model for one number of them, or for any")
    if not inputs:
        wrong.append("the graph has no inputs; export the model with one at least")
    if wrong:
        raise ModelNotSupported(wrong)
    return shapes, int(batches.pop()) if batches else _EXAMPLES
