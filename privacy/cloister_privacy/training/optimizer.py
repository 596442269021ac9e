"""Opacus' DP optimizer under a plan: our noise, our divisor. Knows clipped sums, never an example's gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import nn

from cloister.wire.plans import SGD, Optimizer
from cloister_privacy.plan import DPPlan
from cloister_privacy.training.noise import gaussian_noise

__all__ = ["NoisyOptimizer"]


class NoisyOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # Opacus has no types
    """Takes clipped sums from `p.grad`, adds them up over the micro-batches of a step, and steps once with noise on every coordinate.

    Opacus does the accumulation (`signal_skip_step`), the scaling and the bookkeeping that no sum is used twice; the noise is
    drawn once per step, from the cryptographic generator, with the plan's standard deviation.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, optimizer: Optimizer, plan: DPPlan) -> None:
        super().__init__(
            _inner(parameters, optimizer),
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.clip,
            expected_batch_size=plan.divisor,
            loss_reduction="mean",
        )
        self._noise_std = plan.noise_std

    def add_noise(self) -> None:
        """Put the noisy sum into every parameter's `grad`."""
        for parameter in self.params:
            _check_processed_flag(parameter.summed_grad)
            noise = gaussian_noise(parameter.numel(), std=self._noise_std).to(parameter.device)
            parameter.grad = parameter.summed_grad + noise.view_as(parameter)
            _mark_as_processed(parameter.summed_grad)


def _inner(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> torch.optim.Optimizer:
    if isinstance(optimizer, SGD):
        return torch.optim.SGD(parameters, lr=optimizer.learning_rate, momentum=optimizer.momentum)
    return torch.optim.Adam(parameters, lr=optimizer.learning_rate)
