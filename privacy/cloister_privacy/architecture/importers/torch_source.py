"""A torch module as a network of the language: run once on a small random batch, and what it did to it written down."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cloister_privacy.architecture.importers.draft import Draft, Place, Shape, TokensFound, Value
from cloister_privacy.architecture.importers.finishing import drafted, finished, named
from cloister_privacy.architecture.importers.imported import Imported, ModelNotSupported
from cloister_privacy.architecture.importers.parity import require_same, samples
from cloister_privacy.architecture.importers.torch_arithmetic import ARITHMETIC
from cloister_privacy.architecture.importers.torch_attention import ATTENTION
from cloister_privacy.architecture.importers.torch_layers import LAYERS
from cloister_privacy.architecture.importers.torch_modules import MODULES
from cloister_privacy.architecture.importers.torch_recording import Recorder
from cloister_privacy.architecture.importers.torch_shapes import SHAPES

__all__ = ["from_torch"]

_NEAREST = {
    "einsum": "write it with linear layers and permute",
    "baddbmm": "for attention use torch.nn.MultiheadAttention(batch_first=True)",
    "lstm_cell": "use torch.nn.LSTM(batch_first=True)",
    "gru_cell": "use torch.nn.GRU(batch_first=True)",
    "rnn_tanh_cell": "use torch.nn.RNN(batch_first=True)",
    "hardtanh": "use torch.nn.Tanh or torch.nn.ReLU",
    "relu6": "use torch.nn.ReLU",
    "hardswish": "use torch.nn.SiLU",
    "hardsigmoid": "use torch.nn.Sigmoid",
    "mish": "use torch.nn.SiLU",
    "softplus": "use torch.nn.ELU",
    "prelu": "use torch.nn.LeakyReLU",
    "celu": "use torch.nn.ELU",
    "interpolate": "use images of the size that the network needs",
    "normalize": "use torch.nn.RMSNorm or LayerNorm",
    "conv3d": "use torch.nn.Conv2d",
    "embedding_bag": "use torch.nn.Embedding and a mean over its positions",
}


def from_torch(module: nn.Module, inputs: Mapping[str, Shape] | Shape) -> Imported:
    """The layers and weights of a module, as it computes in eval mode.

    `inputs` has, by the names of forward's arguments, the shape of one example (tokens: (length,)), or is that of the only one. The
    module runs here, on random examples; it is left as it was. Raises ModelNotSupported with every layer that cannot be mapped.
    """
    while isinstance(module, nn.DataParallel) or hasattr(module, "_orig_mod"):
        inner = module.module if isinstance(module, nn.DataParallel) else module._orig_mod
        module = inner if isinstance(inner, nn.Module) else module
    if any(each.device.type not in ("cpu", "meta") for each in (*module.parameters(), *module.buffers())):
        module = copy.deepcopy(module).cpu()  # an accelerator's arithmetic is not to the last digit that of the CPU
    _require_float32(module)
    given = _arguments(module, inputs)
    columns = named(given)
    shapes = {columns[name]: shape for name, shape in given.items()}
    with _evaluated(module):
        return drafted(shapes, lambda draft: _written(draft, module, columns))


def _written(draft: Draft, module: nn.Module, columns: Mapping[str, str]) -> Imported:
    def called(values: Mapping[str, Tensor]) -> Any:
        return module(**{argument: values[column] for argument, column in columns.items()})

    examples = samples(draft, seed=1, count=2)
    recorder = Recorder(
        draft, module, functions={**ARITHMETIC, **SHAPES, **LAYERS, **ATTENTION}, modules=MODULES, unknown=_without_form
    )
    try:
        output = recorder.record(examples, columns)
    except (ModelNotSupported, TokensFound):
        raise
    except Exception as exc:  # whatever the module's own code raises
        draft.place = Place("", type(module).__name__)
        told = f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
        draft.refuse(f"does not run on inputs of {draft.inputs} ({told}); give the shapes of one example that it takes")
        raise ModelNotSupported(tuple(draft.problems)) from exc
    draft.place = Place("", type(module).__name__)
    if not isinstance(output, Value):
        draft.refuse("gives something else than one tensor that depends on its inputs; return the output alone")
        raise ModelNotSupported(tuple(draft.problems))
    require_same(draft, called, output)
    for name in recorder.untaken():
        draft.warnings[f"{name}: takes no part in the output, so it is left out"] = None
    return finished(draft, output)


def _without_form(name: str) -> str:
    return f"{name} has no form in the language; {_NEAREST.get(name, 'use the layers that it has')}"


def _arguments(module: nn.Module, inputs: Mapping[str, Shape] | Shape) -> dict[str, Shape]:
    """The shape for each of forward's arguments that is given."""
    parameters = inspect.signature(module.forward).parameters
    if not isinstance(inputs, Mapping):
        inputs = {next(iter(parameters), "input"): tuple(inputs)}
    place = Place("", type(module).__name__)
    wrong = [
        f"{place}: forward takes no {name!r}; it takes {', '.join(parameters)}"
        for name in inputs
        if name not in parameters
    ]
    wrong += [
        f"{place}: forward needs {name!r}; give the shape of one example for it"
        for name, each in parameters.items()
        if each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and name not in inputs
    ]
    if not inputs:
        wrong.append(f"{place}: no inputs are given; give the shape of one example")
    if wrong:
        raise ModelNotSupported(wrong)
    return {name: tuple(shape) for name, shape in inputs.items()}


def _require_float32(module: nn.Module) -> None:
    wrong = []
    for path, part in module.named_modules():
        place = Place(path, type(part).__name__)
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelNotSupported(
                (f"{place}: is TorchScript, which cannot be looked into; import the module it was made from",)
            )
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                wrong.append(f"{place}: {name} has no shape yet; run the module once")
            elif parameter.is_meta:
                wrong.append(f"{place}: {name} holds no numbers (it is on the device meta); load them first")
            elif parameter.dtype != torch.float32:
                wrong.append(
                    f"{place}: {name} is {parameter.dtype}, and weights are float32; call module.float() first"
                )
    if wrong:
        raise ModelNotSupported(wrong)


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients, and by the arithmetic that training uses too; afterwards as before."""
    training = {part: part.training for part in module.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the module's own, which its owner has seen
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, was in training.items():
            part.training = was
