"""One step of DP-SGD on any torch module: padded micro-batches, clipped sums, one noise, one update. Knows no rows' meaning.

Guarantee of a step: the Gaussian mechanism on the sum of the drawn examples' gradients, each clipped; with none drawn it is pure
noise. Micro-batches are all of one size, filled up with examples that count for nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister.wire.plans import Clipping, Precision
from cloister_privacy.errors import TrainingError
from cloister_privacy.plan import DPPlan
from cloister_privacy.training.clipping import ClippedGradients, Losses
from cloister_privacy.training.compilation import compiled, is_recurrent, pays
from cloister_privacy.training.guard import GUARD_EXAMPLES, guard, require_exact_clipping
from cloister_privacy.training.native import kernels
from cloister_privacy.training.noise import NoiseDraws
from cloister_privacy.training.optimizer import NoisyOptimizer
from cloister_privacy.training.precision import full_float32
from cloister_privacy.training.reference import ReferenceGradients

__all__ = ["GUARD_EXAMPLES", "PrivateSteps"]

Engine = Literal["book_keeping", "opacus_hooks"]

_MICRO_BATCH_BYTES = 2**26
"""What one pass may take: little enough to stay in the last caches, and to be used again without asking the system for it."""

_LEAST_MICRO_BATCH = 2

_ROUNDING = 1e-2
"""How far a compiled sum may be from the one that was tried, relatively to the most it may be: bfloat16 and deep networks round."""


class PrivateSteps:
    """The steps of one run of `network`, under `plan`.

    `losses(network, batch)` gives each example's loss, [n]; `batch` in it is whatever `gather` of a step returns, and `synthetic`
    is one such batch of GUARD_EXAMPLES examples that no private row had a part in: the network is tried on it, and refused
    (ArchitectureRefused) where its gradients cannot be clipped by example. `optimizer` must hold the network's trained parameters, in
    any groups. The network is put into training mode, and no more steps are made than the plan has (TrainingError).

    A step always runs the plan's public number of slots, whatever was drawn, and more only where more were drawn. Without
    `has_constant_work` it runs what was drawn, so that its time tells how many rows there are: for benchmarks alone.
    `is_compiled` says whether the passes are compiled; left out, they are where the plan's steps pay for it. `engine` is who tells
    the examples' gradients apart: our rules, or the hooks of stock Opacus, slow and never compiled, as the reference to check them by.
    """

    @full_float32()
    def __init__(
        self,
        network: nn.Module,
        losses: Losses,
        *,
        plan: DPPlan,
        optimizer: torch.optim.Optimizer,
        synthetic: Any,
        clipping: Clipping = "flat",
        precision: Precision = "float32",
        engine: Engine = "book_keeping",
        has_constant_work: bool = True,
        is_compiled: bool | None = None,
    ) -> None:
        _require_known(clipping=(clipping, Clipping), precision=(precision, Precision), engine=(engine, Engine))
        guard(network)
        network.train()
        if engine == "book_keeping":
            gradients: type[ClippedGradients] = ClippedGradients
            require_exact_clipping(network, losses, synthetic)
        else:
            gradients = ReferenceGradients
            require_exact_clipping(network, losses, synthetic, gradients=ReferenceGradients)
        self._clipped = gradients(
            network, losses, clip=plan.row_clip, clipping=clipping, autocast=precision == "bfloat16"
        )
        self._plan, self._parameters = plan, self._clipped.parameters
        self._device = self._parameters[0].device
        self.optimizer = NoisyOptimizer(optimizer, plan=plan, noise=self._noise)
        self._places = _places(self._parameters, self.optimizer.params)
        self._steps = 0
        self._slots = plan.slots * plan.rows_per_unit if has_constant_work else 0
        self.micro_batch = self._micro_batch(synthetic)
        if engine == "opacus_hooks":
            is_compiled = False
        elif is_compiled is None:
            is_compiled = self._pays(synthetic)
        self._sums = self._compiled(synthetic) if is_compiled else self._clipped.sums
        count = sum(parameter.numel() for parameter in self._parameters)
        self._draws = NoiseDraws(
            count,
            std=plan.noise_std,
            device=self._device,
            is_ahead=self._device.type != "cpu",
            is_compiled=is_compiled,
        )

    @full_float32()
    def step(self, drawn: NDArray[np.intp], gather: Callable[[NDArray[np.intp]], Any]) -> None:
        """One step on the drawn examples; `gather(indices)` fetches them as a batch. It may be asked for index 0 as padding."""
        if self._steps == self._plan.steps:
            raise TrainingError(
                f"all {self._plan.steps} steps of the plan are done, and its epsilon covers no more; make a plan with more steps"
            )
        _require_drawn(drawn)
        self._steps += 1
        needed = max(self._slots, len(drawn), _LEAST_MICRO_BATCH)
        size = self.micro_batch if self._slots else _in_equal_parts(needed, self.micro_batch)
        count = -(-needed // size)
        indices = np.zeros(count * size, dtype=np.intp)
        indices[: len(drawn)] = drawn
        mask = torch.zeros(count * size)
        mask[: len(drawn)] = 1
        mask = mask.to(self._device)
        total: list[Tensor] = []
        for start in range(0, count * size, size):
            sums = self._sums(gather(indices[start : start + size]), mask[start : start + size])
            if total:
                torch._foreach_add_(total, sums)
            else:
                total = sums
        self.optimizer.step_on([total[place] for place in self._places])

    def __deepcopy__(self, memo: Any) -> Self:
        raise TrainingError("the steps of a run are not copied, or its noise and its budget would be; make new ones")

    def __reduce__(self) -> NoReturn:
        raise TrainingError("the steps of a run are not pickled; keep the network's and the optimizer's state")

    def _noise(self) -> Tensor:
        """A fresh draw for all coordinates; the draws are open from the first step on, for as long as these steps are in use."""
        if self._steps == 1:
            self._draws.__enter__()
            weakref.finalize(self, self._draws.close)
        return self._draws.take()

    def _pays(self, synthetic: Any) -> bool:
        passes = self._plan.steps * max(1, -(-self._slots // self.micro_batch))
        return pays(self._clipped.network, lambda: self._clipped.sums(*self._pass(synthetic)), passes=passes)

    def _compiled(self, synthetic: Any) -> Callable[[Any, Tensor], list[Tensor]]:
        """The passes, compiled; or as they were tried, should the compiled ones give other sums."""
        batch, mask = self._pass(synthetic)
        tried = self._clipped.sums(batch, mask)
        fast = self._clipped.sums
        if is_recurrent(self._clipped.network):
            self._clipped.use_kernels(kernels() if self._device.type == "cpu" else None)
        else:
            if not self._slots:
                _for_any_size((batch, mask))
            fast = compiled(self._clipped.sums, batch, mask)
        off = sum(float((a - b).norm()) ** 2 for a, b in zip(fast(batch, mask), tried, strict=True)) ** 0.5
        if off <= _ROUNDING * self._plan.row_clip * len(mask):
            return fast
        self._clipped.use_kernels(None)
        return self._clipped.sums

    def _pass(self, synthetic: Any) -> tuple[Any, Tensor]:
        expected = self._plan.batch_size * self._plan.rows_per_unit
        size = self.micro_batch if self._slots else max(_LEAST_MICRO_BATCH, min(self.micro_batch, expected))
        return _repeated(synthetic, size), torch.ones(size, device=self._device)

    def _micro_batch(self, synthetic: Any) -> int:
        """As many examples as fit the memory set aside for one pass; the slots, where there are any, in equal parts of them."""
        fits = max(1, _MICRO_BATCH_BYTES // self._clipped.bytes_per_example(synthetic))
        return _in_equal_parts(self._slots, fits) if self._slots else fits


def _require_known(**given: tuple[str, Any]) -> None:
    for name, (value, known) in given.items():
        if value not in get_args(known):
            raise TrainingError(f"there is no {name} {value!r}; give one of {', '.join(get_args(known))}")


def _require_drawn(drawn: NDArray[np.intp]) -> None:
    """An example that comes twice would count twice."""
    is_indices = drawn.ndim == 1 and np.issubdtype(drawn.dtype, np.integer)
    if is_indices and (not len(drawn) or (drawn[0] >= 0 and (drawn[1:] > drawn[:-1]).all())):
        return  # in order, as samplers of rows give them
    if not is_indices or drawn.min() < 0 or len(np.unique(drawn)) < len(drawn):
        raise TrainingError(
            "`drawn` must be indices [n], none negative and none twice, as a sampler of the plan gives them"
        )


def _places(trained: list[nn.Parameter], stepped: list[nn.Parameter]) -> list[int]:
    """Where the sum for each parameter that the optimizer steps on is. Raises TrainingError unless it steps on all of them."""
    places = {id(each): place for place, each in enumerate(trained)}
    if {id(each) for each in stepped} != set(places):
        raise TrainingError(
            "the optimizer must hold the network's trained parameters, all of them and no others; make it of "
            "[each for each in network.parameters() if each.requires_grad]"
        )
    return [places[id(each)] for each in stepped]


def _in_equal_parts(count: int, most: int) -> int:
    """The size of each of as few equal parts as can be, none above `most`."""
    return -(-count // -(-count // most))


def _for_any_size(batch: Any) -> None:
    """Tell the compiler that there may be any number of examples."""
    if isinstance(batch, Tensor):
        torch._dynamo.mark_dynamic(batch, 0)
    else:
        for each in batch.values() if isinstance(batch, Mapping) else batch:
            _for_any_size(each)


def _repeated(batch: Any, count: int) -> Any:
    """A batch of `count` examples, the given ones over and over."""
    if isinstance(batch, Tensor):
        return batch[torch.arange(count, device=batch.device) % len(batch)]
    if isinstance(batch, Mapping):
        return {name: _repeated(each, count) for name, each in batch.items()}
    return tuple(_repeated(each, count) for each in batch)
