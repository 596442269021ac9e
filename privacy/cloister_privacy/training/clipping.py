"""The sum of clipped per-example gradients, by one backward pass to the taps. Knows modules and losses; nothing of noise.

Book-keeping (Bu et al., ICML 2023): the network runs with its parameters as constants, is differentiated at the outputs of its
layers alone, and from what entered and what came back each layer's rule gives norms and clip-weighted sums.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cloister.wire.plans import Clipping
from cloister_privacy.errors import TrainingError, UncoveredParameter
from cloister_privacy.training.native import Kernels
from cloister_privacy.training.rules import PerExample, Tape, Use, rule_of

__all__ = ["ClippedGradients", "Losses"]

Losses = Callable[[nn.Module, Any], Tensor]
"""The loss of each example, [n], of a network on a batch whose tensors have the examples as their first dimension."""

_LEAST_SCALE = 1e-30
"""An example whose gradient would be scaled by less counts as zero: float32 would round subnormal numbers above the clip."""

_STABILISER = 0.01  # gamma of automatic clipping, section 4


class ClippedGradients:
    """Clips the gradients of one network's trainable parameters.

    Each example contributes a vector of norm at most `clip` (1 + 1e-5) over all parameters together, and the examples' vectors
    are independent of each other. A contribution that is not finite, or astronomically large, counts as zero, silently: an
    error would tell of the row.
    """

    def __init__(
        self, network: nn.Module, losses: Losses, *, clip: float, clipping: Clipping = "flat", autocast: bool = False
    ) -> None:
        self._losses, self._clip, self._clipping, self._autocast = losses, clip, clipping, autocast
        self.parameters = [each for each in network.parameters() if each.requires_grad]
        self._tape = Tape()
        self.network = self._taped(network)

    def sums(self, batch: Any, mask: Tensor) -> list[Tensor]:
        """The sum over the examples that `mask` [n] (float32, 1 or 0) keeps, float32, one tensor for each of `parameters`."""
        gradients = self._gradients(batch)
        scales = self._scales(gradients, mask)
        total = {}
        for (parameter, each), scale in zip(gradients, scales, strict=True):
            if id(parameter) in total:
                raise UncoveredParameter("a layer was used twice in one pass, so its gradients cannot be clipped apart")
            total[id(parameter)] = each.weighted_sum(scale).view(parameter.shape)
        if len(total) != len(self.parameters):
            raise UncoveredParameter("a layer took no part in the pass, so its gradient is unknown; leave it out")
        return [total[id(parameter)].detach() for parameter in self.parameters]

    def use_kernels(self, kernels: Kernels | None) -> None:
        """Run the compiled loops from now on where a rule has one, or none; the network is on the CPU."""
        self._tape.kernels = kernels

    def norms(self, batch: Any) -> Tensor:
        """Each example's gradient norm, float64 [n]: private, for tests and synthetic batches only."""
        norms: Tensor = torch.linalg.vector_norm(
            torch.stack([each.norms() for _, each in self._gradients(batch)]), dim=0
        )
        return norms

    def bytes_per_example(self, batch: Any) -> int:
        """About how much memory one example of such a batch takes while it is clipped."""
        numbers, n = 0, 1
        for use, back in self._passed(batch):
            n = len(use.tap)
            numbers += 4 * use.tap.numel()  # value, activation, what came back, and what a rule copies
            numbers += sum(each.numbers for _, each in use.gradients(back))
        return max(1, 4 * numbers // n)

    def _gradients(self, batch: Any) -> list[tuple[Tensor, PerExample]]:
        return [pair for use, back in self._passed(batch) for pair in use.gradients(back)]

    def _passed(self, batch: Any) -> list[tuple[Use, Tensor]]:
        """Forward and back: every use that took part in the loss, with the gradient at its tap."""
        self._tape.uses.clear()
        with torch.autocast(self.parameters[0].device.type, torch.bfloat16, enabled=self._autocast):
            losses = self._losses(self.network, batch)
        uses = list(self._tape.uses)
        self._tape.uses.clear()
        taps = list({id(use.tap): use.tap for use in uses}.values())
        backs = torch.autograd.grad(losses.float().sum(), taps, allow_unused=True)
        came_back = {id(tap): back.float() for tap, back in zip(taps, backs, strict=True) if back is not None}
        return [(use, came_back[id(use.tap)]) for use in uses if id(use.tap) in came_back]

    def _scales(self, gradients: list[tuple[Tensor, PerExample]], mask: Tensor) -> list[Tensor]:
        """What each example's gradient of each parameter is multiplied by."""
        found = [each.norms() for _, each in gradients]
        if any(len(each) != len(mask) for each in found):
            raise TrainingError(
                f"the batch does not hold the {len(mask)} examples that were asked for, each once and first in every tensor; "
                "gather must give one for each index"
            )
        norms = torch.stack(found)
        if self._clipping != "per_layer":
            return [self._scale(torch.linalg.vector_norm(norms, dim=0), mask, self._clip)] * len(gradients)
        # One bound for every parameter tensor: C / sqrt(m) each makes C together.
        share = self._clip / math.sqrt(len(gradients))
        return [self._scale(each, mask, share) for each in norms]

    def _scale(self, norms: Tensor, mask: Tensor, clip: float) -> Tensor:
        scale = clip / (norms + _STABILISER) if self._clipping == "automatic" else (clip / norms).clamp(max=1)
        is_sane = (scale >= _LEAST_SCALE) & norms.isfinite()  # False for what is not a number, too
        return torch.where(is_sane, scale, 0).to(torch.float32) * mask

    def _taped(self, network: nn.Module) -> nn.Module:
        """The network's twin, with the very same parameters, in which every layer that owns a trained one runs by its rule."""
        shared = {id(each): each for each in (*network.parameters(), *network.buffers())}
        twin = copy.deepcopy(network, memo=shared)
        for module in twin.modules():
            if any(each.requires_grad for each in module.parameters(recurse=False)):
                module.forward = partial(rule_of(module), module, self._tape)
        return twin
