"""What a forward pass leaves behind for clipping: where parameters were used, on what, and at which tensor to differentiate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from cloister_privacy.training.native import Kernels
from cloister_privacy.training.rules.gradients import Dense, PerExample, of_linear

__all__ = ["LinearUse", "Tape", "Use", "constant", "of_bias", "trainable"]

Gradients = list[tuple[Tensor, PerExample]]


class Use(ABC):
    """One use of some parameters in a pass over n examples, which are the first dimension of `tap`.

    `tap` is the tensor whose gradient, with what the use keeps, gives each example's gradient of the parameters.
    """

    def __init__(self, tap: Tensor) -> None:
        self.tap = tap

    @abstractmethod
    def gradients(self, back: Tensor) -> Gradients:
        """Each trained parameter of the use with its gradients, from the gradient that came back to the tap, float32."""


class LinearUse(Use):
    """tap = entering @ weight.T + bias, over the last dimension."""

    def __init__(self, tap: Tensor, entering: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(tap)
        self._entering, self._weight, self._bias = entering, weight, bias

    def gradients(self, back: Tensor) -> Gradients:
        return trainable(
            (self._weight, lambda: of_linear(back, self._entering.detach().float())),
            (self._bias, lambda: of_bias(back)),
        )


class Tape:
    """The uses of one pass, in order, and the compiled loops that rules may run, where there are any."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.kernels: Kernels | None = None

    def tap(self, tensor: Tensor) -> Tensor:
        """The tensor itself, ready to be differentiated at."""
        return tensor if tensor.requires_grad else tensor.requires_grad_()

    def linear(self, entering: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """entering @ weight.T + bias, written down."""
        output = self.tap(nn.functional.linear(entering, weight.detach(), constant(bias)))
        self.uses.append(LinearUse(output, entering, weight, bias))
        return output


def constant(parameter: Tensor | None) -> Tensor | None:
    """A parameter's value: in a taped pass no parameter is differentiated at, only taps are."""
    return None if parameter is None else parameter.detach()


def trainable(*candidates: tuple[Tensor | None, Callable[[], PerExample]]) -> Gradients:
    """Those candidates that are there and are trained, with their gradients: a frozen parameter costs nothing."""
    return [(each, make()) for each, make in candidates if each is not None and each.requires_grad]


def of_bias(back: Tensor) -> Dense:
    """The gradients of what is added along the last dimension of `back` [n, ..., p]."""
    return Dense(back if back.ndim == 2 else back.flatten(1, -2).sum(1))
