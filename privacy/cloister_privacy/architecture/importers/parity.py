"""Whether a draft computes what its source computes, tried on random examples. Trying finds mistakes; it proves nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers.draft import Draft, Place, Value

__all__ = ["require_same", "samples"]

_TOLERANCE = 1e-4
_EXAMPLES = 3


def require_same(draft: Draft, source: Callable[[dict[str, Tensor]], Tensor], output: Value) -> None:
    """Raise ModelNotSupported unless the draft computes what its source computes, on examples drawn at random."""
    draft.raise_problems()
    draft.place = Place("", "the network")
    if any(map(sum, output.pad)):
        draft.refuse("ends with a padding by zeros; only a convolution reads one")
        draft.raise_problems()
    examples = samples(draft, seed=0)
    expected, ours = source(examples).float(), draft.run(examples, output)
    off = float((expected - ours).abs().max()) if expected.shape == ours.shape else math.inf
    if not off <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        draft.refuse(
            f"computes otherwise than the layers that were read from it (by {off:.3g}): it may depend on the batch, on chance, "
            "or on what its inputs hold; write it without such choices"
        )
    draft.raise_problems()


def samples(draft: Draft, *, seed: int, count: int = _EXAMPLES) -> dict[str, Tensor]:
    """Random examples: numbers near 0, and tokens that every table has, ending in zeros."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, shape in draft.inputs.items():
        if name not in draft.tokens:
            found[name] = torch.randn((count, *shape), generator=generator)
            continue
        rows = [step.layer.num_embeddings for step in draft.steps if isinstance(step.layer, wire.Embedding)]
        tokens = torch.randint(1, max(2, min(rows, default=2)), (count, *shape), generator=generator)
        if shape:
            tokens[1:, (shape[-1] + 1) // 2 :] = 0
        found[name] = tokens.clamp_max(min(rows, default=1) - 1)
    return found
