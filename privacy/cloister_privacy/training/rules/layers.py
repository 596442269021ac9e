"""Feed-forward layers: how each runs with constant parameters, and what it writes down. Exactly these classes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloister_privacy.architecture.frontends.text import SparseLinear, places_and_values
from cloister_privacy.errors import UncoveredParameter
from cloister_privacy.training.rules.gradients import Dense, PerExample, SparseOuter
from cloister_privacy.training.rules.tape import Gradients, Tape, Use, constant, trainable

__all__ = ["convolution", "embedding", "group_norm", "layer_norm", "linear", "rms_norm", "sparse_linear"]

_Convolution = nn.Conv1d | nn.Conv2d


def linear(module: nn.Linear, tape: Tape, inputs: Tensor) -> Tensor:
    return tape.linear(inputs, module.weight, module.bias)


def sparse_linear(module: SparseLinear, tape: Tape, sparse: Tensor) -> Tensor:
    places, values = places_and_values(sparse)
    output = tape.tap(SparseLinear.apply_to(places, values, module.weight.detach(), constant(module.bias)))

    def gradients(back: Tensor) -> Gradients:
        return trainable(
            (module.weight, lambda: SparseOuter(back, places, values, module.weight.shape[1])),
            (module.bias, lambda: Dense(back)),
        )

    tape.uses.append(_GradientsUse(output, gradients))
    return output


def convolution(module: _Convolution, tape: Tape, inputs: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        inputs = _channels_last(inputs)
    output = tape.tap(module._conv_forward(inputs, module.weight.detach(), constant(module.bias)))
    tape.uses.append(_ConvolutionUse(output, module, inputs))
    return output


def _channels_last(images: Tensor) -> Tensor:
    """The same images [n, c, h, w], a position's channels side by side: what follows, pooling above all, is faster on them."""
    n, c, h, w = images.shape
    # Of one channel both layouts are the same numbers, and only the strides tell torch which one is meant.
    return images.contiguous(memory_format=torch.channels_last).as_strided((n, c, h, w), (c * h * w, 1, c * w, c))


class _ConvolutionUse(Use):
    """Each output position is a linear layer on its patch: unfold, then one batched product (arXiv 1912.06015)."""

    def __init__(self, tap: Tensor, module: _Convolution, entering: Tensor) -> None:
        super().__init__(tap)
        self._module, self._entering = module, entering

    def gradients(self, back: Tensor) -> Gradients:
        back = back.movedim(1, -1).flatten(1, -2)  # [n, positions, out]
        last_to_second = (0, self._module.weight.ndim - 1, *range(1, self._module.weight.ndim - 1))
        return trainable(
            (self._module.weight, lambda: Dense(self._of_weight(back), axes=last_to_second)),
            (self._module.bias, lambda: Dense(back.sum(1))),
        )

    def _of_weight(self, back: Tensor) -> Tensor:
        """[n, out, *kernel, in / groups]."""
        module, n = self._module, len(back)
        patches = self._patches()  # [n, groups, positions, kernel * in / groups]
        per_group = back.reshape(*back.shape[:2], module.groups, -1).permute(0, 2, 3, 1) @ patches
        return per_group.reshape(n, module.out_channels, *module.kernel_size, -1)

    def _patches(self) -> Tensor:
        """What each output position saw, [n, groups, positions, kernel * in / groups], copied from a strided view."""
        module, entering = self._module, self._entering.detach().float()
        around = module._reversed_padding_repeated_twice
        if any(around):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            entering = functional.pad(entering, around, mode=mode)
        entering = entering.movedim(1, -1).contiguous()
        entering = entering.view(*entering.shape[:-1], module.groups, -1)  # [n, *image, groups, channels]
        of_row, *of_image, of_group, of_channel = entering.stride()
        view = entering.as_strided(
            (len(entering), module.groups, *self.tap.shape[2:], *module.kernel_size, entering.shape[-1]),
            (
                of_row,
                of_group,
                *(apart * step for apart, step in zip(module.stride, of_image, strict=True)),
                *(apart * step for apart, step in zip(module.dilation, of_image, strict=True)),
                of_channel,
            ),
        )
        return view.reshape(len(entering), module.groups, math.prod(self.tap.shape[2:]), -1)


def embedding(module: nn.Embedding, tape: Tape, indices: Tensor) -> Tensor:
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise UncoveredParameter(
            "an Embedding with max_norm or scale_grad_by_freq changes with the batch; make it without them"
        )
    output = tape.tap(functional.embedding(indices, module.weight.detach(), module.padding_idx))
    tape.uses.append(_EmbeddingUse(output, module, indices))
    return output


class _EmbeddingUse(Use):
    def __init__(self, tap: Tensor, module: nn.Embedding, indices: Tensor) -> None:
        super().__init__(tap)
        self._module, self._indices = module, indices

    def gradients(self, back: Tensor) -> Gradients:
        def of_table() -> PerExample:
            indices = self._indices.reshape(len(back), -1)
            return _Rows(back.reshape(*indices.shape, -1), indices, self._module)

        return trainable((self._module.weight, of_table))


class _Rows:
    """Gradients of a table of which each example touches few rows: never written out over the whole table."""

    def __init__(self, back: Tensor, indices: Tensor, module: nn.Embedding) -> None:
        """back [n, T, d] came back to the rows indices [n, T]."""
        self._table, self._indices = module.weight, indices
        same = indices.unsqueeze(1) == indices.unsqueeze(2)  # [n, T, T]
        is_first = ~torch.tril(same, diagonal=-1).any(dim=2)
        if module.padding_idx is not None:
            is_first &= indices != module.padding_idx
        # What came back to every use of a row, added up where the row is used first: the gradient itself, without zeros.
        self._gradients = (same.to(back.dtype) @ back) * is_first.unsqueeze(2)

    @property
    def numbers(self) -> int:
        return self._gradients.numel() + self._indices.numel() * self._indices.shape[1]

    def norms(self) -> Tensor:
        return Dense(self._gradients).norms()

    def weighted_sum(self, scales: Tensor) -> Tensor:
        rows = torch.where(scales.view(-1, 1, 1) > 0, self._gradients, 0) * scales.view(-1, 1, 1)
        table = torch.zeros_like(self._table, dtype=torch.float32)
        return table.index_add_(0, self._indices.flatten(), rows.flatten(0, 1))


def layer_norm(module: nn.LayerNorm, tape: Tape, inputs: Tensor) -> Tensor:
    def standardised(values: Tensor) -> Tensor:
        return functional.layer_norm(values, module.normalized_shape, eps=module.eps)

    return _scaled_norm(module, tape, inputs, standardised, dimensions=len(module.normalized_shape))


def rms_norm(module: nn.RMSNorm, tape: Tape, inputs: Tensor) -> Tensor:
    def standardised(values: Tensor) -> Tensor:
        return functional.rms_norm(values, module.normalized_shape, eps=module.eps)

    return _scaled_norm(module, tape, inputs, standardised, dimensions=len(module.normalized_shape))


def group_norm(module: nn.GroupNorm, tape: Tape, inputs: Tensor) -> Tensor:
    output = tape.tap(
        functional.group_norm(inputs, module.num_groups, constant(module.weight), constant(module.bias), module.eps)
    )

    def gradients(back: Tensor) -> Gradients:
        back, entering = back.flatten(2), inputs.detach().float()
        standard = functional.group_norm(entering, module.num_groups, eps=module.eps).flatten(2)
        return trainable(
            (module.weight, lambda: Dense((back * standard).sum(2))), (module.bias, lambda: Dense(back.sum(2)))
        )

    tape.uses.append(_GradientsUse(output, gradients))
    return output


class _GradientsUse(Use):
    def __init__(self, tap: Tensor, gradients: Callable[[Tensor], Gradients]) -> None:
        super().__init__(tap)
        self._gradients = gradients

    def gradients(self, back: Tensor) -> Gradients:
        return self._gradients(back)


def _scaled_norm(
    module: nn.LayerNorm | nn.RMSNorm,
    tape: Tape,
    inputs: Tensor,
    standardised: Callable[[Tensor], Tensor],
    *,
    dimensions: int,
) -> Tensor:
    """standardised(inputs) * weight + bias, with both over the last dimensions."""
    output = standardised(inputs)
    if module.weight is not None:
        output = output * module.weight.detach()
    bias = getattr(module, "bias", None)
    if bias is not None:
        output = output + bias.detach()
    output = tape.tap(output)

    def gradients(back: Tensor) -> Gradients:
        def over_positions(values: Tensor) -> Dense:
            shape = values.shape[values.ndim - dimensions :]
            return Dense(values.reshape(len(values), -1, *shape).sum(1))

        return trainable(
            (module.weight, lambda: over_positions(back * standardised(inputs.detach().float()))),
            (bias, lambda: over_positions(back)),
        )

    tape.uses.append(_GradientsUse(output, gradients))
    return output
