"""The sum of clipped per-example gradients, without ever holding one gradient per example. Knows modules; nothing of noise.

A linear layer's gradient for one example is the outer product of what went in and what came back, so its norm is the product
of theirs, and the clipped sum is one matrix product (book-keeping: Bu et al., ICML 2023). Opacus' hooks catch both factors.
"""

from __future__ import annotations

from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from cloister_privacy.errors import UncoveredParameter
from cloister_privacy.training.guard import guard

__all__ = ["ClippedGradients"]


_LARGEST_INPUT, _LEAST_FACTOR = 1e15, 1e-30
"""An example counts as zero where what enters a layer is larger than this, or its gradient would be scaled by less."""


class ClippedGradients(GradSampleModule):  # type: ignore[misc]  # Opacus has no types
    """Wraps a network: after the backward pass of a summed loss, `write(clip)` puts the clipped sum into every `p.grad`.

    Each example contributes a vector of norm at most `clip` (1 + 1e-5) over all parameters together. A contribution that is
    not finite, or astronomically large, counts as zero, silently: an error would tell of the row.
    """

    def __init__(self, network: nn.Module) -> None:
        guard(network)
        super().__init__(network, loss_reduction="sum")
        self._factors: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

    def capture_backprops_hook(
        self, module: nn.Linear, _forward_input: Any, forward_output: Any, loss_reduction: str, batch_first: bool
    ) -> None:
        """Called by Opacus when the gradient reaches `module`: keeps the factors instead of multiplying them out."""
        if module in self._factors:
            raise UncoveredParameter("a layer was used twice in one pass, so its gradients cannot be clipped apart")
        (inputs,) = module.activations.pop()  # type: ignore[operator,union-attr]  # Opacus hangs a list on the module
        self._factors[module] = (inputs, forward_output[0].detach())

    def write(self, clip: float) -> None:
        """Put the sum of the examples' gradients, each clipped to norm `clip`, into every parameter's `grad`."""
        factors, self._factors = self._factors, {}
        if sum(len(list(layer.parameters())) for layer in factors) != len(list(self.parameters())):
            raise UncoveredParameter("a layer took no part in the pass, so its gradient is unknown; leave it out")
        # In float64: squares of float32 numbers neither overflow nor vanish.
        entering = torch.stack(
            [_norms(inputs, has_one=layer.bias is not None) for layer, (inputs, _) in factors.items()]
        )
        coming_back = torch.stack([_norms(backs) for _, backs in factors.values()])
        norms = (entering * coming_back).norm(dim=0)
        factor = (clip / norms).clamp(max=1)
        # Beyond these limits float32 would round subnormal numbers above the clip. False for what is not finite, too.
        is_sane = (entering <= _LARGEST_INPUT).all(dim=0) & (factor >= _LEAST_FACTOR) & norms.isfinite()
        scales = torch.where(is_sane, factor, 0).to(torch.float32).unsqueeze(1)
        for layer, (inputs, backs) in factors.items():
            clipped = torch.where(is_sane.unsqueeze(1), backs, 0) * scales
            layer.weight.grad = clipped.T @ torch.where(is_sane.unsqueeze(1), inputs, 0)
            if layer.bias is not None:
                layer.bias.grad = clipped.sum(0)


def _norms(rows: Tensor, *, has_one: bool = False) -> Tensor:
    """The norm of each row, with a 1 appended where a bias reads one."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return (norms.square() + 1).sqrt() if has_one else norms
