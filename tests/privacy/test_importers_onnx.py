"""ONNX files as networks of the language: each operator with its options, exports of torch, hostile files, every refusal by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cloister_privacy.architecture.importers import Imported, ModelNotSupported, from_onnx, onnx_file
from cloister_privacy.training.examples import synthetic
from cloister_privacy.training.guard import GUARD_EXAMPLES, guard, require_exact_clipping
from importing import architecture_of, examples_of, network_of, require_equal

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'cloister[onnx]'")
helper, kinds_of = onnx.helper, onnx.TensorProto

few = settings(max_examples=8, deadline=None)
RANDOM = np.random.default_rng(5)


def array(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def model(
    nodes: list[Any],
    shape: tuple[Any, ...] | dict[str, tuple[Any, ...]],
    weights: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 21,
    kind: int = kinds_of.FLOAT,
) -> bytes:
    """A file with these nodes, the last of which gives the output."""
    shapes = shape if isinstance(shape, dict) else {"x": shape}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, each) for name, each in shapes.items()],
        [helper.make_tensor_value_info(nodes[-1].output[0], kinds_of.FLOAT, None)],
        [onnx.numpy_helper.from_array(each, name) for name, each in (weights or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    body: bytes = made.SerializeToString()
    return body


def node(operator: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(operator, inputs.split(" ") if inputs else [], output.split(" "), name=output, **attributes)


def ended(
    nodes: list[Any], shape: tuple[int, ...], width: int, weights: dict[str, np.ndarray], **options: Any
) -> bytes:
    """Nodes that give `y`, flattened, with a linear layer of 3 on it."""
    nodes = [*nodes, node("Flatten", "y", "flat"), node("Gemm", "flat head head_bias", "end")]
    return model(nodes, ("n", *shape), {**weights, "head": array(width, 3), "head_bias": array(3)}, **options)


def run(body: bytes | str | Path, inputs: list[np.ndarray]) -> np.ndarray:
    """What onnxruntime gives."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed, which this test compares with")
    session = runtime.InferenceSession(body, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    output: np.ndarray = session.run(None, dict(zip(names, inputs, strict=True)))[0]
    return output


def same(body: bytes | str | Path, *, width: int = 3, last: Any = None) -> Imported:
    """Import a file, and require that the network of it computes what onnxruntime does."""
    imported = from_onnx(body)
    network = network_of(imported, width=width)
    values = examples_of(network)
    expected = torch.from_numpy(run(body, [values[name].numpy() for name in imported.inputs]))
    if last is None:
        require_equal(network, values, expected)
    else:
        with torch.no_grad():
            torch.testing.assert_close(last(network(values)), expected, atol=1e-4, rtol=1e-4)
    return imported


def kinds(imported: Imported) -> list[str]:
    return [layer.type for layer in imported.layers]


def export(module: nn.Module, *examples: Tensor, opset: int = 20, names: tuple[str, ...] = ("x",)) -> bytes:
    """As torch's exporter without further libraries writes it."""
    file = io.BytesIO()
    axes = {name: {0: "n"} for name in names}
    torch.onnx.export(
        module.eval(), examples, file, dynamo=False, input_names=list(names), dynamic_axes=axes, opset_version=opset
    )
    return file.getvalue()


@few
@given(
    st.integers(1, 2), st.sampled_from([1, 3]), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.booleans()
)
def test_a_convolution_is_the_same(
    groups: int, kernel: int, stride: int, padding: int, dilation: int, bias: bool
) -> None:
    attributes = {"group": groups, "strides": [stride] * 2, "pads": [padding] * 4, "dilations": [dilation] * 2}
    nodes = [node("Conv", "x w b" if bias else "x w", "y", **attributes)]
    size = (9 + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    weights = {"w": array(4, 4 // groups, kernel, kernel), "b": array(4)}
    same(ended(nodes, (4, 9, 9), 4 * size * size, weights if bias else {"w": weights["w"]}))


@few
@given(st.sampled_from(["MaxPool", "AveragePool"]), st.integers(2, 3), st.integers(1, 2), st.integers(0, 1))
def test_a_pool_is_the_same(operator: str, kernel: int, stride: int, padding: int) -> None:
    attributes = {"kernel_shape": [kernel], "strides": [stride], "pads": [padding] * 2}
    attributes |= {"count_include_pad": 1} if operator == "AveragePool" else {}
    size = (8 + 2 * padding - kernel) // stride + 1
    same(ended([node(operator, "x", "y", **attributes)], (2, 8), 2 * size, {}))


@few
@given(st.booleans(), st.sampled_from([1.0, 0.5]), st.sampled_from([1.0, 2.0]), st.booleans())
def test_a_gemm_is_the_same(transposed: bool, alpha: float, beta: float, bias: bool) -> None:
    nodes = [node("Gemm", "x w b" if bias else "x w", "y", transB=int(transposed), alpha=alpha, beta=beta)]
    weights = {"w": array(3, 6) if transposed else array(6, 3), "b": array(3)}
    assert kinds(same(model(nodes, ("n", 6), weights if bias else {"w": weights["w"]}))) == ["linear"]


SHAPED: dict[str, tuple[list[Any], dict[str, np.ndarray], int]] = {
    **{
        name: ([node(name, "x", "y", **attributes)], {}, 24)
        for name, attributes in {
            "Relu": {},
            "LeakyRelu": {"alpha": 0.2},
            "Elu": {"alpha": 0.5},
            "Selu": {},
            "Gelu": {"approximate": "tanh"},
            "Sigmoid": {},
            "Tanh": {},
            "Softmax": {"axis": 1},
            "Neg": {},
            "Identity": {},
            "Transpose": {"perm": [0, 2, 1]},
            "Flatten": {},
        }.items()
    },
    "clip": ([node("Clip", "x zero", "y")], {"zero": np.float32([0]).reshape(())}, 24),
    "dropout": ([node("Dropout", "x ratio", "y")], {"ratio": np.float32(0.5)}, 24),
    "matmul and add": ([node("MatMul", "x w", "m"), node("Add", "m b", "y")], {"w": array(6, 5), "b": array(5)}, 20),
    "matmul and add, the other way": (
        [node("MatMul", "x w", "m"), node("Add", "b m", "y")],
        {"w": array(6, 5), "b": array(5)},
        20,
    ),
    "reshape": ([node("Reshape", "x to", "y")], {"to": whole(0, 3, -1)}, 24),
    "squeeze": ([node("Unsqueeze", "x at", "u"), node("Squeeze", "u at", "y")], {"at": whole(1)}, 24),
    "concat": ([node("Tanh", "x", "t"), node("Concat", "x t", "y", axis=-1)], {}, 48),
    "sub and mul": ([node("Tanh", "x", "t"), node("Sub", "x t", "s"), node("Mul", "s x", "y")], {}, 24),
    "sum": ([node("Tanh", "x", "t"), node("Sum", "x t x", "y")], {}, 24),
    "scale": (
        [node("Div", "x two", "d"), node("Sub", "d two", "s"), node("Mul", "two s", "y")],
        {"two": np.float32(2)},
        24,
    ),
    "normalise": (
        [node("Sub", "x mean", "s"), node("Div", "s std", "y")],
        {"mean": array(6), "std": 1 + array(6) ** 2},
        24,
    ),
    "square": ([node("Pow", "x two", "y")], {"two": np.float32(2)}, 24),
    "mean": ([node("ReduceMean", "x at", "y", keepdims=0)], {"at": whole(1)}, 6),
    "largest": ([node("ReduceMax", "x at", "y", keepdims=1)], {"at": whole(-1)}, 4),
    "sum over": ([node("ReduceSum", "x at", "s", keepdims=1), node("Mul", "s x", "y")], {"at": whole(2)}, 24),
    "slice": (
        [node("Slice", "x from to at by", "y")],
        {"from": whole(1), "to": whole(2**31), "at": whole(2), "by": whole(2)},
        12,
    ),
    "slice backwards": (
        [node("Slice", "x from to at by", "y")],
        {"from": whole(-1), "to": whole(-(2**40)), "at": whole(1), "by": whole(-1)},
        24,
    ),
    "split": (
        [node("Split", "x parts", "a b", axis=2), node("Concat", "b a", "y", axis=2)],
        {"parts": whole(2, 4)},
        24,
    ),
    "gather": ([node("Gather", "x at", "y", axis=1)], {"at": whole(2, 0)}, 12),
    "gather one": ([node("Gather", "x at", "y", axis=1)], {"at": np.array(3)}, 6),
    "layer norm": ([node("LayerNormalization", "x w b", "y", epsilon=1e-3)], {"w": array(6), "b": array(6)}, 24),
    "layer norm over two": ([node("LayerNormalization", "x w", "y", axis=1)], {"w": array(4, 6)}, 24),
    "group norm": ([node("GroupNormalization", "x w b", "y", num_groups=2)], {"w": array(4), "b": array(4)}, 24),
    "instance norm": ([node("InstanceNormalization", "x w b", "y")], {"w": array(4), "b": array(4)}, 24),
    "global pool": ([node("GlobalAveragePool", "x", "y")], {}, 4),
    "global largest": ([node("GlobalMaxPool", "x", "y")], {}, 4),
    "pad": (
        [node("Pad", "x by", "p"), node("Conv", "p w", "y")],
        {"by": whole(0, 0, 1, 0, 0, 1), "w": array(2, 4, 3)},
        12,
    ),
    "same pads": ([node("Conv", "x w", "y", auto_pad="SAME_UPPER")], {"w": array(2, 4, 3)}, 12),
    "erf": (
        [
            node("Div", "x root", "d"),
            node("Erf", "d", "e"),
            node("Add", "e one", "a"),
            node("Mul", "x a", "m"),
            node("Mul", "m half", "y"),
        ],
        {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)},
        24,
    ),
    "erf, halved first": (
        [
            node("Mul", "x root", "d"),
            node("Erf", "d", "e"),
            node("Add", "one e", "a"),
            node("Mul", "x half", "h"),
            node("Mul", "h a", "y"),
        ],
        {"root": np.float32(0.5**0.5), "one": np.float32(1), "half": np.float32(0.5)},
        24,
    ),
    "computed shape": (
        [
            node("Shape", "x", "s"),
            node("Slice", "s zero one", "n"),
            node("Slice", "s one three", "rest"),
            node("Gather", "rest last", "six"),
            node("Constant", "", "minus", value=onnx.numpy_helper.from_array(whole(-1))),
            node("Concat", "n six minus", "to", axis=0),
            node("Reshape", "x to", "y"),
        ],
        {"zero": whole(0), "one": whole(1), "three": whole(3), "last": whole(1)},
        24,
    ),
}


@pytest.mark.parametrize("name", SHAPED)
def test_an_operator_is_the_same(name: str) -> None:
    nodes, weights, width = SHAPED[name]
    imported = same(ended(nodes, (4, 6), width, weights))
    if name.startswith("erf"):
        assert kinds(imported) == ["gelu", "flatten", "linear"]
    if name.startswith("matmul"):
        assert kinds(imported) == ["linear", "flatten", "linear"] and imported.layers[0].bias


@pytest.mark.parametrize(("operator", "told"), [("Softmax", True), ("Sigmoid", True), ("LogSoftmax", False)])
def test_the_last_softmax_is_left_out(operator: str, told: bool) -> None:
    body = model([node("Gemm", "x w", "g"), node(operator, "g", "y")], ("n", 6), {"w": array(6, 3)})
    last = {"Softmax": lambda x: x.softmax(1), "Sigmoid": torch.sigmoid, "LogSoftmax": lambda x: x.log_softmax(1)}[
        operator
    ]
    imported = same(body, last=last)
    assert kinds(imported) == ["linear"]
    assert any("is left out" in each for each in imported.warnings) == told


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.gate, self.head = nn.Linear(8, 8), nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = functional.gelu(self.norm(x))
        x = x + y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        return self.head(functional.max_pool2d(x, 2).view(x.size(0), -1))  # type: ignore[no-any-return]


class Text(nn.Module):
    def __init__(self, kind: Any, way: str, *, bidirectional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(257, 6)
        self.layer = kind(6, 4, batch_first=True, num_layers=2, bidirectional=bidirectional)
        self.head, self.way = nn.Linear(8 if bidirectional else 4, 3), way

    def forward(self, x: Tensor) -> Tensor:
        outputs, states = self.layer(self.table(x))
        hidden = states[0] if isinstance(states, tuple) else states
        if self.way == "mean":
            return self.head(outputs.mean(1))  # type: ignore[no-any-return]
        last = torch.cat([hidden[-2], hidden[-1]], 1) if self.layer.bidirectional else hidden[-1]
        return self.head(last if self.way == "state" else outputs[:, -1])  # type: ignore[no-any-return]


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.look, self.ask, self.head = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Linear(8, 1)

    def forward(self, image: Tensor, facts: Tensor) -> Tensor:
        seen = self.look(image).amax((2, 3))
        return self.head(torch.cat([seen, self.ask(facts).relu()], 1)).squeeze(-1)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [17, 20])
def test_a_residual_network_exported_by_torch_is_the_same_and_can_be_trained_privately(opset: int) -> None:
    imported = same(export(Residual(), torch.randn(2, 3, 8, 8), opset=opset))
    assert {"group_norm", "gelu", "add"} <= set(kinds(imported))
    [norm] = [layer for layer in imported.layers if layer.type == "group_norm"]
    assert (norm.num_groups, norm.num_channels, norm.affine) == (2, 8, True)
    batch = synthetic(architecture_of(imported, width=3), GUARD_EXAMPLES, device="cpu")
    network = network_of(imported, width=3)
    guard(network)
    require_exact_clipping(network, lambda net, rows: net.losses(net(rows[0]), rows[1]), batch)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "way", "bidirectional"),
    [
        (nn.LSTM, "mean", True),
        (nn.LSTM, "state", False),
        (nn.GRU, "state", True),
        (nn.GRU, "last", False),
        (nn.RNN, "mean", False),
        (nn.RNN, "last", True),
    ],
)
def test_a_recurrent_text_model_exported_by_torch_is_the_same(kind: Any, way: str, bidirectional: bool) -> None:
    module = Text(kind, way, bidirectional=bidirectional).eval()
    imported = from_onnx(export(module, torch.ones(1, 7, dtype=torch.int64)))
    network = network_of(imported, width=3)
    values = examples_of(network)
    with torch.no_grad():
        require_equal(network, values, module(*values.values()))
    assert any("no tokenizer is imported" in each for each in imported.warnings)


@pytest.mark.filterwarnings("ignore")
def test_two_inputs_are_columns_by_their_names() -> None:
    body = export(Joined(), torch.randn(2, 3, 8, 8), torch.randn(2, 5), names=("image", "facts"))
    assert same(body, width=1).inputs == {"image": (3, 8, 8), "facts": (5,)}


def test_names_that_no_column_can_have_are_made_into_ones_that_can() -> None:
    body = model([node("Gemm", "onnx::Gemm.0 w", "y")], {"onnx::Gemm.0": ("n", 6)}, {"w": array(6, 3)})
    assert from_onnx(body).inputs == {"onnx-Gemm-0": (6,)}


def test_a_number_of_examples_that_is_fixed_is_kept_apart_from_the_shape() -> None:
    nodes = [node("Reshape", "x to", "r"), node("Gemm", "r w", "y")]
    imported = from_onnx(model(nodes, (1, 2, 3), {"to": whole(1, 6), "w": array(6, 3)}))
    assert imported.inputs == {"x": (2, 3)} and kinds(imported) == ["flatten", "linear"]


def test_weights_beside_the_model_are_read_and_those_elsewhere_are_not(tmp_path: Path) -> None:
    made = onnx.load_from_string(model([node("Gemm", "x w", "y")], ("n", 6), {"w": array(6, 3)}))
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(made, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    same(str(folder / "m.onnx"))

    (tmp_path / "secret.bin").write_bytes((folder / "w.bin").read_bytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    stored = onnx.load(folder / "m.onnx", load_external_data=False)
    for location in ("../secret.bin", str(tmp_path / "secret.bin"), "link.bin", "missing.bin", "."):
        next(each for each in stored.graph.initializer[0].external_data if each.key == "location").value = location
        (folder / "m.onnx").write_bytes(stored.SerializeToString())
        with pytest.raises(ModelNotSupported, match="is no file in the model's folder"):
            from_onnx(folder / "m.onnx")
    with pytest.raises(ModelNotSupported, match="lie in another file"):
        from_onnx(stored.SerializeToString())

    next(each for each in stored.graph.initializer[0].external_data if each.key == "location").value = "w.bin"
    stored.graph.initializer[0].dims[0] = 60
    (folder / "m.onnx").write_bytes(stored.SerializeToString())
    with pytest.raises(ModelNotSupported, match="reach beyond the end"):
        from_onnx(folder / "m.onnx")


def changed(**changes: Any) -> bytes:
    """A good file, made hostile."""
    made = onnx.load_from_string(
        model([node("Relu", "x", "r"), node("Gemm", "r w", "y")], ("n", 6), {"w": array(6, 3)})
    )
    changes["by"](made)
    body: bytes = made.SerializeToString()
    return body


def _cycle(made: Any) -> None:
    made.graph.node[0].input[0] = "y"


def _huge(made: Any) -> None:
    made.graph.initializer[0].dims[:] = [2**40, 2**20]


def _wrong_size(made: Any) -> None:
    made.graph.initializer[0].dims[:] = [6, 4]


def _negative(made: Any) -> None:
    made.graph.initializer[0].dims[:] = [-6, -3]


def _twice(made: Any) -> None:
    made.graph.initializer.append(made.graph.initializer[0])


def _again(made: Any) -> None:
    made.graph.node[1].output[0] = "r"


def _elsewhere(made: Any) -> None:
    made.graph.node[0].domain = "com.example"


def _functions(made: Any) -> None:
    made.functions.append(helper.make_function("d", "F", ["a"], ["b"], [node("Relu", "a", "b")], []))


def _empty(made: Any) -> None:
    del made.graph.node[:]


HOSTILE = [
    (_cycle, "reads 'y', which nothing before it gives; the graph has a cycle"),
    (_huge, "are over 100000000 numbers"),
    (_wrong_size, "cannot be read"),
    (_negative, "have a negative size"),
    (_twice, "come twice"),
    (_again, "which was given before"),
    (_elsewhere, "of the domain 'com.example'"),
    (_functions, "functions of its own"),
    (_empty, "holds no graph"),
]


@pytest.mark.parametrize(("by", "told"), HOSTILE, ids=lambda given: getattr(given, "__name__", ""))
def test_a_hostile_file_is_refused_by_name(by: Any, told: str) -> None:
    with pytest.raises(ModelNotSupported, match=told):
        from_onnx(changed(by=by))


def test_what_is_no_model_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotSupported, match="is no file"):
        from_onnx(tmp_path / "missing.onnx")
    with pytest.raises(ModelNotSupported, match="no ONNX model, or is damaged"):
        from_onnx(b"\xff" * 50)
    monkeypatch.setattr(onnx_file, "_BYTE_LIMIT", 10)
    with pytest.raises(ModelNotSupported, match="over 10; import a smaller model"):
        from_onnx(model([node("Gemm", "x w", "y")], ("n", 6), {"w": array(6, 3)}))


def test_a_constant_that_would_fill_the_memory_is_not_made() -> None:
    nodes = [node("ConstantOfShape", "size", "big"), node("Add", "x big", "y")]
    with pytest.raises(ModelNotSupported, match="makes a constant of shape"):
        from_onnx(ended(nodes, (4, 6), 24, {"size": whole(2**20, 2**20)}))


REFUSED: dict[str, tuple[list[Any], dict[str, np.ndarray], str]] = {
    "batch norm": (
        [node("BatchNormalization", "x a b c d", "y")],
        {name: np.ones(4, np.float32) for name in "abcd"},
        r"y \(BatchNormalization\): normalises over the examples.*use GroupNorm",
    ),
    "uneven pads": ([node("Conv", "x w", "y", pads=[0, 1])], {"w": array(2, 4, 3)}, "take an odd kernel"),
    "ceil": ([node("MaxPool", "x", "y", kernel_shape=[2], ceil_mode=1)], {}, "ceil_mode: export without it"),
    "uncounted pads": (
        [node("AveragePool", "x", "y", kernel_shape=[3], pads=[1, 1])],
        {},
        "count_include_pad=0 with pads",
    ),
    "shared": (
        [node("MatMul", "x w", "m"), node("MatMul", "m w", "y")],
        {"w": array(6, 6)},
        r"y \(MatMul\): shares w with m \(MatMul\)",
    ),
    "attention": (
        [node("Transpose", "x", "t", perm=[0, 2, 1]), node("MatMul", "x t", "y")],
        {},
        "import it from torch or Keras",
    ),
    "over the examples": ([node("ReduceMean", "x at", "y")], {"at": whole(0)}, "works across the examples"),
    "among the examples": ([node("Gather", "x at", "y")], {"at": whole(0)}, "works across the examples"),
    "mixed": ([node("Reshape", "x to", "y")], {"to": whole(-1, 6)}, "mixes the examples with another dimension"),
    "clipped": ([node("Clip", "x a b", "y")], {"a": np.float32(0), "b": np.float32(6)}, "the language has ReLU"),
    "power": ([node("Pow", "x p", "y")], {"p": np.float32(3)}, "opset 17 or later"),
    "unknown": ([node("HardSwish", "x", "y")], {}, "HardSwish has no form in the language; use Sigmoid and Mul"),
    "divided": ([node("Tanh", "x", "t"), node("Div", "x t", "y")], {}, "not a constant"),
    "double": ([node("MatMul", "x w", "y")], {"w": array(6, 6).astype(np.float64)}, "export the model in float32"),
    "computed weights": (
        [node("Mul", "w w", "v"), node("MatMul", "x v", "y")],
        {"w": array(6, 6)},
        "computes with weights alone by Mul",
    ),
    "gru": (
        [
            node("Transpose", "x", "t", perm=[1, 0, 2]),
            node("GRU", "t w r", "z h", hidden_size=2),
            node("Squeeze", "h at", "y"),
        ],
        {"w": array(1, 6, 6), "r": array(1, 6, 2), "at": whole(0)},
        "linear_before_reset=0",
    ),
    "lstm states": (
        [
            node("Transpose", "x", "t", perm=[1, 0, 2]),
            node("LSTM", "t w r   h h", "z h2", hidden_size=2),
            node("Squeeze", "h2 at", "y"),
        ],
        {"w": array(1, 8, 6), "r": array(1, 8, 2), "h": np.ones((1, 1, 2), np.float32), "at": whole(0)},
        "let it begin from zeros",
    ),
    "erf alone": ([node("Erf", "x", "y")], {}, "is an erf that is no part of a GELU"),
    "log softmax within": ([node("LogSoftmax", "x", "y")], {}, "log_softmax within the network"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_language_cannot_say_is_refused_by_name_and_with_the_cure(name: str) -> None:
    nodes, weights, told = REFUSED[name]
    with pytest.raises(ModelNotSupported, match=told):
        from_onnx(ended(nodes, (4, 6), 24, weights))


def test_a_refusal_lists_every_node_that_cannot_be_mapped() -> None:
    nodes = [node("HardSwish", "x", "one"), node("Mish", "one", "two"), node("Relu", "two", "y")]
    with pytest.raises(ModelNotSupported) as refused:
        from_onnx(ended(nodes, (4, 6), 24, {}))
    assert [each.split(":")[0] for each in refused.value.problems] == ["one (HardSwish)", "two (Mish)"]


def test_inputs_without_fixed_sizes_or_of_another_kind_are_refused() -> None:
    with pytest.raises(ModelNotSupported, match="export it with all fixed but the first"):
        from_onnx(model([node("Relu", "x", "y")], ("n", "length")))
    with pytest.raises(ModelNotSupported, match="export the model in float32"):
        from_onnx(model([node("Relu", "x", "y")], ("n", 3), kind=kinds_of.DOUBLE))


def test_a_branch_is_refused_by_name() -> None:
    then = helper.make_graph(
        [node("Relu", "x", "t")], "t", [], [helper.make_tensor_value_info("t", kinds_of.FLOAT, None)]
    )
    nodes = [node("ReduceMax", "x", "m", keepdims=0), node("If", "m", "y", then_branch=then, else_branch=then)]
    with pytest.raises(ModelNotSupported, match="across the examples") as refused:
        from_onnx(ended(nodes, (4, 6), 24, {}))
    assert any("export the branch that is taken" in each for each in refused.value.problems)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SHAPED)),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_damaged_file_is_imported_or_refused_and_nothing_else(name: str, changes: list[tuple[int, int]]) -> None:
    nodes, weights, width = SHAPED[name]
    body = bytearray(ended(nodes, (4, 6), width, weights))
    for place, byte in changes:
        body[place % len(body)] = byte
    try:
        from_onnx(bytes(body))
    except ModelNotSupported as refused:
        assert refused.problems
