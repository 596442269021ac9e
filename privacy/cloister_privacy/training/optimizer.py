"""Opacus' DP optimizer under a plan: our noise, our divisor. Knows clipped sums, never an example's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor

from cloister_privacy.errors import TrainingError
from cloister_privacy.plan import DPPlan

__all__ = ["NoisyOptimizer"]


class NoisyOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # Opacus has no types
    """Steps the optimizer within on the clipped sum of a whole step, with noise on every coordinate.

    Opacus does the bookkeeping that no sum is used twice, and runs its step hook; `noise` gives one fresh draw for all
    coordinates together, float32, of the plan's standard deviation. What `backward` leaves in `p.grad` is never used: it
    is not clipped.
    """

    def __init__(self, inner: torch.optim.Optimizer, *, plan: DPPlan, noise: Callable[[], Tensor]) -> None:
        super().__init__(
            inner,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.clip,
            expected_batch_size=plan.divisor,
            loss_reduction="mean",
        )
        self._noise = noise
        self._sums: Sequence[Tensor] | None = None

    def step_on(self, sums: Sequence[Tensor]) -> None:
        """One step on the clipped sums of one step, one for each parameter, which are overwritten."""
        self._sums = sums
        try:
            self.step()
        finally:
            self.zero_grad(set_to_none=True)  # no sum without noise is left behind, whatever failed

    def accumulate(self) -> None:
        """Take the sums over: they are whole, so nothing is copied or added. Raises TrainingError where there are none."""
        sums, self._sums = self._sums, None
        if sums is None:
            raise TrainingError(
                "there is no clipped sum to step on: gradients that backward() leaves are not clipped, and are never used; "
                "call PrivateSteps.step, which clips, adds noise and steps"
            )
        for parameter, each in zip(self.params, sums, strict=True):
            parameter.summed_grad = each

    def add_noise(self) -> None:
        """Put the noisy sum into every parameter's `grad`: one draw over all coordinates, cut into the parameters' shapes."""
        parameters: list[Any] = self.params  # Opacus hangs `summed_grad` on them
        for parameter in parameters:
            _check_processed_flag(parameter.summed_grad)
        sums = [parameter.summed_grad for parameter in parameters]
        pieces = torch.split(self._noise(), [each.numel() for each in sums])
        torch._foreach_add_(sums, [piece.view_as(each) for piece, each in zip(pieces, sums, strict=True)])
        for parameter, noisy in zip(parameters, sums, strict=True):
            _mark_as_processed(noisy)
            parameter.grad = noisy

    def scale_grad(self) -> None:
        """Divide by the plan's divisor, whatever was drawn."""
        torch._foreach_div_([parameter.grad for parameter in self.params], float(self.expected_batch_size))
