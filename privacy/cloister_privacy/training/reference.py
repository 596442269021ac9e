"""The same clipped sums by stock Opacus: slow, and another hand's arithmetic to check ours against. Knows nothing of noise.

Opacus 1.6 writes every example's gradient out, by a hook on each layer. Where it would do so wrongly without a word, or cannot,
the network is refused.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any, NoReturn

import torch
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cloister_privacy.errors import UncoveredParameter
from cloister_privacy.training.clipping import ClippedGradients
from cloister_privacy.training.rules.gradients import Dense, PerExample

__all__ = ["ReferenceGradients"]


class ReferenceGradients(ClippedGradients):
    """What ClippedGradients promises, with the gradients of `opacus.grad_sample.GradSampleModule`.

    Raises UncoveredParameter for what Opacus does not take: nn.LSTM, GRU, RNN and MultiheadAttention, trained layers with buffers,
    convolutions padded by anything but zeros, and embeddings with padding_idx. Some of it shows only at the first pass. Every
    pass runs on a copy of its own, whose parameters are the network's in memory: nothing of Opacus stays on the network.
    """

    def bytes_per_example(self, batch: Any) -> int:
        gradients, entered = self._hooked(batch)
        numbers = 6 * entered + 3 * sum(each.numbers for _, each in gradients)
        return max(1, 4 * numbers // len(gradients[0][1].norms()))

    def _gradients(self, batch: Any) -> list[tuple[Tensor, PerExample]]:
        return self._hooked(batch)[0]

    def _hooked(self, batch: Any) -> tuple[list[tuple[Tensor, PerExample]], int]:
        """Each parameter with its gradients, [n, numel], and how many numbers entered the layers."""
        twin = _alias(self.network)
        trained = [each for each in twin.parameters() if each.requires_grad]
        stock = GradSampleModule(twin, loss_reduction="sum")
        entered: list[int] = []
        for layer in stock.iterate_submodules(twin):
            layer.register_forward_pre_hook(partial(_one_tensor, entered), with_kwargs=True)
        try:
            with torch.autocast(trained[0].device.type, torch.bfloat16, enabled=self._autocast):
                losses = self._losses(twin, batch)
            _backward(losses, trained)
            samples = [each.grad_sample for each in trained]  # type: ignore[attr-defined]  # hung there by Opacus
        finally:
            stock.cleanup()
        n = len(losses)
        if any(not isinstance(each, Tensor) or len(each) != n for each in samples):
            _refuse("a layer took no part in the pass, or ran on something that has not the examples first")
        rows = [
            Dense(each.reshape(n, parameter.numel()).float()) for parameter, each in zip(trained, samples, strict=True)
        ]
        return list(zip(self.parameters, rows, strict=True)), sum(entered)

    def _taped(self, network: nn.Module) -> nn.Module:
        """The network itself, once it is known that Opacus takes it."""
        for name, module in network.named_modules():
            if any(each.requires_grad for each in module.parameters()):
                _require_supported(name, module)
        try:
            GradSampleModule(_alias(network), loss_reduction="sum")
        except NotImplementedError as error:
            _refuse(str(error).splitlines()[0])
        return network


def _refuse(why: str) -> NoReturn:
    raise UncoveredParameter(
        f"Opacus cannot tell the examples' gradients apart: {why}; train with book_keeping"
    ) from None


def _require_supported(name: str, module: nn.Module) -> None:
    what = f"{name or 'the network'} ({type(module).__name__})"
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        _refuse(f"{what} has no hook, only Opacus' own layers in its place do")
    if isinstance(module, DPMultiheadAttention) and not module.batch_first:
        _refuse(f"{what} has not the examples first; make it with batch_first=True")
    if isinstance(module, _ConvNd) and module.padding_mode != "zeros":
        _refuse(f"{what} is padded by {module.padding_mode!r}, and the hook takes it for zeros")
    if isinstance(module, nn.Embedding) and (
        module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq
    ):
        _refuse(f"{what} has padding_idx, max_norm or scale_grad_by_freq, which the hook overlooks")


def _alias(network: nn.Module) -> nn.Module:
    """A copy whose parameters are other objects on the same memory."""
    shared: dict[int, Any] = {
        id(each): nn.Parameter(each.detach(), each.requires_grad) for each in network.parameters()
    }
    return copy.deepcopy(network, memo=shared | {id(each): each for each in network.buffers()})


def _one_tensor(entered: list[int], layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Before a hooked layer: Opacus keeps one positional tensor, in training alone, and reads images by their default strides."""
    if len(inputs) != 1 or options or not isinstance(inputs[0], Tensor):
        _refuse(f"{type(layer).__name__} takes more than one tensor")
    if not layer.training:
        _refuse(f"{type(layer).__name__} is not in training mode")
    entered.append(inputs[0].numel())
    return (inputs[0].contiguous(),), options


def _backward(losses: Tensor, trained: list[nn.Parameter]) -> None:
    """Let the hooks run; what autograd itself finds goes nowhere."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        try:
            torch.autograd.grad(losses.float().sum(), trained, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: the hooks take layers for what they are not
            _refuse(f"a hook failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
