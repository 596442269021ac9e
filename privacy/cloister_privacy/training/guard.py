"""Refuses, before any data is read, a network whose gradients cannot be clipped by example. Knows modules, not data."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cloister_privacy.errors import CrossExampleLayer, UncoveredParameter

__all__ = ["guard"]

_COVERED = (nn.Linear,)
"""The layers whose gradients the engine clips by example: exactly these classes, for a subclass may do anything."""


def guard(network: nn.Module) -> None:
    """Raise CrossExampleLayer for batch statistics, UncoveredParameter for a parameter that no covered layer owns alone."""
    owners: dict[int, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, _NormBase) and not isinstance(module, nn.modules.instancenorm._InstanceNorm):
            raise CrossExampleLayer(
                f"{name} ({type(module).__name__}) mixes the examples of a batch; use GroupNorm instead"
            )
        for parameter_name, parameter in module.named_parameters(recurse=False):
            path = f"{name}.{parameter_name}"
            if not parameter.requires_grad:
                raise UncoveredParameter(f"{path} is frozen, but the engine trains whole networks; leave its layer out")
            if type(module) not in _COVERED:
                raise UncoveredParameter(
                    f"{path} belongs to {type(module).__name__}, whose gradients are not clipped by example; "
                    f"use {', '.join(layer.__name__ for layer in _COVERED)}"
                )
            if id(parameter) in owners:
                raise UncoveredParameter(
                    f"{path} is the same parameter as {owners[id(parameter)]}; its two gradients cannot be clipped apart, "
                    "so give each layer its own"
                )
            owners[id(parameter)] = path
    if not owners:
        raise UncoveredParameter("the network has no parameter; add a linear layer")
