"""From noisy gradients to the weights that leave: optimizer, schedule and average. Post-processing: none of it costs epsilon."""

from __future__ import annotations

import copy
import math
from typing import assert_never

import torch

from cloister.wire.plans import EMA, SGD, Adam, AdamW, Schedule, Tail, TrainingSpec
from cloister_privacy.architecture.network import Network

__all__ = ["Updates"]


class Updates:
    """The updates of one run of `network`. What they do at a step is a function of the step, so a resumed run goes on alike."""

    def __init__(self, network: Network, spec: TrainingSpec) -> None:
        self._network, self._asked, self._steps = network, spec.optimizer, spec.steps
        self.optimizer = _optimizer(network, spec)
        self.model = copy.deepcopy(network) if self._asked.averaging is not None else network
        """What the run gives: the average where one is asked for, else the network itself."""

    def before(self, step: int) -> None:
        """Set the rate of step 0, 1, ..."""
        rate = self._asked.learning_rate * factor(self._asked.schedule, step, self._steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Take the weights after step 0, 1, ... into the average."""
        if self._asked.averaging is not None:
            share = newest_share(self._asked.averaging, step, self._steps)
            torch._foreach_lerp_(list(self.model.parameters()), list(self._network.parameters()), share)


def factor(schedule: Schedule | None, step: int, steps: int) -> float:
    """What the learning rate of step 0, ..., steps - 1 is multiplied by: never 0 before the end."""
    if schedule is None:
        return 1.0
    warmup = min(schedule.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    match schedule.shape:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - schedule.final) * done
        case "cosine":
            return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * done)) / 2
        case _:
            assert_never(schedule.shape)


def newest_share(averaging: EMA | Tail, step: int, steps: int) -> float:
    """How much of the average the weights after this step are; 1 starts it anew."""
    match averaging:
        case EMA():
            # The first averages are short, so that the initial weights are soon forgotten (arXiv 2204.13650).
            return 1 - min(averaging.decay, (1 + step) / (10 + step))
        case Tail():
            before = steps - math.ceil(averaging.share * steps)
            return 1 / max(1, step + 1 - before)
        case _:
            assert_never(averaging)


def _optimizer(network: Network, spec: TrainingSpec) -> torch.optim.Optimizer:
    asked, parameters = spec.optimizer, [each for each in network.parameters() if each.requires_grad]
    match asked:
        case SGD():
            return torch.optim.SGD(parameters, lr=asked.learning_rate, momentum=asked.momentum)
        case Adam():
            return torch.optim.Adam(parameters, lr=asked.learning_rate)
        case AdamW():
            return torch.optim.AdamW(parameters, lr=asked.learning_rate, weight_decay=asked.weight_decay)
        case _:
            assert_never(asked)
