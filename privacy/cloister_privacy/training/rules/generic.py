"""Any other layer that owns parameters, one example at a time under vmap: right for all that torch can map, and never fast."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cloister_privacy.errors import UncoveredParameter
from cloister_privacy.training.rules.gradients import Dense
from cloister_privacy.training.rules.tape import Gradients, Tape, Use

__all__ = ["mapped"]


def mapped(module: nn.Module, tape: Tape, *inputs: Any, **options: Any) -> Tensor:
    """Run the module with its parameters as constants; its tensors must have the examples as their first dimension."""
    if any(each.requires_grad for child in module.children() for each in child.parameters()):
        names = ", ".join(name for name, each in module.named_parameters(recurse=False) if each.requires_grad)
        raise UncoveredParameter(
            f"{type(module).__name__} owns {names} beside other trained layers, so its gradient cannot be told from theirs; "
            "put what it owns into a module of its own"
        )
    module = _itself(module)
    own = dict(module.named_parameters(recurse=False))
    output = torch.func.functional_call(module, {name: each.detach() for name, each in own.items()}, inputs, options)
    if not isinstance(output, Tensor):
        raise UncoveredParameter(
            f"{type(module).__name__} answers with more than one tensor, so it is not clipped by example"
        )
    output = tape.tap(output)
    tape.uses.append(_MappedUse(output, module, inputs, options))
    return output


class _MappedUse(Use):
    def __init__(self, tap: Tensor, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__(tap)
        self._module, self._options = module, options
        self._inputs = tuple(each.detach() if isinstance(each, Tensor) else each for each in inputs)

    def gradients(self, back: Tensor) -> Gradients:
        own = {name: each for name, each in self._module.named_parameters(recurse=False) if each.requires_grad}

        def of_one(at_output: Tensor, *inputs: Any) -> dict[str, Tensor]:
            alone = [each.unsqueeze(0) if isinstance(each, Tensor) else each for each in inputs]

            def run(parameters: dict[str, Tensor]) -> Tensor:
                answer: Tensor = torch.func.functional_call(self._module, parameters, tuple(alone), self._options)
                return answer.squeeze(0)

            pull = torch.func.vjp(run, {name: each.detach() for name, each in own.items()})[1]
            (gradients,) = pull(at_output)
            return dict(gradients)

        where = tuple(0 if isinstance(each, Tensor) else None for each in self._inputs)
        try:
            found = torch.vmap(of_one, in_dims=(0, *where), randomness="error")(back.to(self.tap.dtype), *self._inputs)
        except RuntimeError as error:
            raise UncoveredParameter(
                f"{type(self._module).__name__} cannot be run one example at a time ({str(error).splitlines()[0]}); "
                "build it from the layers that have a rule"
            ) from None
        return [(own[name], Dense(gradients.float())) for name, gradients in found.items()]


def _itself(module: nn.Module) -> nn.Module:
    """The module as it is without the tape, which has put this rule in the place of its forward."""
    plain = copy.copy(module)
    plain.__dict__.pop("forward", None)
    return plain
