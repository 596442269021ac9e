"""The layers whose gradients can be clipped by example, each with its rule; any other that owns parameters goes through vmap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from cloister_privacy.architecture.frontends.text import SparseLinear
from cloister_privacy.training.rules import layers
from cloister_privacy.training.rules.attention import attention
from cloister_privacy.training.rules.generic import mapped
from cloister_privacy.training.rules.gradients import PerExample
from cloister_privacy.training.rules.recurrent import recurrent
from cloister_privacy.training.rules.tape import Tape, Use

__all__ = ["PerExample", "Rule", "Tape", "Use", "rule_of"]

Rule = Callable[..., Any]
"""Runs a module with constant parameters: rule(module, tape, *inputs), and writes its uses on the tape."""

_RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: layers.linear,
    nn.Conv1d: layers.convolution,
    nn.Conv2d: layers.convolution,
    nn.Embedding: layers.embedding,
    nn.LayerNorm: layers.layer_norm,
    nn.RMSNorm: layers.rms_norm,
    nn.GroupNorm: layers.group_norm,
    nn.LSTM: recurrent,
    nn.GRU: recurrent,
    nn.RNN: recurrent,
    nn.MultiheadAttention: attention,
    SparseLinear: layers.sparse_linear,
}
"""By exactly these classes: a subclass may do anything."""


def rule_of(module: nn.Module) -> Rule:
    return _RULES.get(type(module), mapped)
