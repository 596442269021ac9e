"""Whose weights a tensor is made of, and that no two layers take the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_privacy.architecture.importers.draft import Draft, NotMapped

__all__ = ["Learned", "Owners"]

_REARRANGES = re.compile(
    "view|reshape|view_as|reshape_as|expand|expand_as|broadcast_to|getitem|transpose|permute|t|T|mT|movedim|unsqueeze|squeeze|flatten|"
    "unflatten|contiguous|to|float|cpu|cuda|clone|detach|data|alias|embedding|select|narrow|chunk|split|unbind|repeat|tile|type_as|"
    "type|requires_grad"
)
"""What only lays numbers in another order, or repeats them."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A tensor made of weights, and of no input."""

    tensor: Tensor
    owners: frozenset[str]
    is_plain: bool = True
    """Each of its numbers is one of the weights."""

    def after(self, name: str, tensor: Tensor) -> Learned:
        """What a function of that name made of it."""
        return replace(self, tensor=tensor, is_plain=self.is_plain and _REARRANGES.fullmatch(name) is not None)

    @classmethod
    def computed(cls, parts: Sequence[Learned], tensor: Tensor) -> Learned:
        """What was computed of several."""
        return cls(tensor, frozenset().union(*(each.owners for each in parts)), is_plain=False)


class Owners:
    """The parameters of a module and who took them."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters())
        self._names = {id(each): name for name, each in self._parameters.items()}
        self._taken: dict[str, str] = {}

    def of(self, parameter: Tensor) -> Learned:
        """A parameter itself."""
        return Learned(parameter, frozenset({self._names[id(parameter)]}))

    def take(self, draft: Draft, given: Learned | Tensor) -> NDArray[np.float32]:
        """The numbers, for the layer that is being mapped. Raises NotMapped where another layer has them already."""
        if isinstance(given, Tensor):
            return _array(given)
        if not given.is_plain:
            raise NotMapped(
                f"computes its weights from {', '.join(sorted(given.owners))}; make them weights of their own (as "
                "torch.nn.utils.parametrize.remove_parametrizations does)"
            )
        for owner in sorted(given.owners):
            if owner in self._taken:
                raise NotMapped(
                    f"shares {owner} with {self._taken[owner]}; a layer is used once, so give each its own weights"
                )
            self._taken[owner] = str(draft.place)
        return _array(given.tensor)

    def is_frozen(self, draft: Draft, *given: Learned | Tensor | None) -> bool:
        """Whether none of these is trained. Layers are frozen as a whole."""
        trained = [
            self._parameters[owner].requires_grad
            for each in given
            if isinstance(each, Learned)
            for owner in each.owners
        ]
        if any(trained) and not all(trained):
            draft.warn("is frozen in part; here a layer is trained as a whole or not at all, so it is trained")
        return not any(trained)

    def untaken(self) -> list[str]:
        """Parameters that no layer took."""
        return [name for name in self._parameters if name not in self._taken]


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().cpu().float().numpy()
    return array
