"""What a tensor of a source can be, beside a value of the draft."""

from __future__ import annotations

from dataclasses import dataclass

from cloister_privacy.architecture.importers.draft import Value

__all__ = ["MOVED", "Count", "Mask", "Masked", "Moved", "Origin", "Scores", "States", "Unread"]


@dataclass(frozen=True, slots=True)
class Mask:
    """Which positions of a column's tokens are 0, or which are not."""

    tokens: Value
    is_there: bool


@dataclass(frozen=True, slots=True)
class Masked:
    """A sequence with zeros where its tokens are 0, or the sum of it over its positions: on the way to a mean."""

    value: Value
    tokens: Value
    is_summed: bool = False


@dataclass(frozen=True, slots=True)
class Count:
    """How many of the tokens are not 0."""

    tokens: Value


@dataclass(frozen=True, slots=True)
class Moved:
    """A value whose examples are not the first dimension, but that one."""

    value: Value
    batch: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Products of the queries and keys of some heads, on the way to attention."""

    query: Value
    key: Value
    scale: float = 1.0
    is_causal: bool = False
    is_softmaxed: bool = False


@dataclass(frozen=True, slots=True)
class States:
    """The last states of a recurrent layer: of `count` layers and directions, or of the one that is `chosen`."""

    sequence: Value
    hidden: int
    count: int
    directions: int
    chosen: int | None = None


@dataclass(frozen=True, slots=True)
class Unread:
    """What the language does not give, and nothing may read; `what` is empty where that was said already."""

    what: str = ""


MOVED = "moves the examples from the first dimension; keep them there (batch_first=True)"
"""What is wrong with a layer that reads such a value."""

Origin = Value | Mask | Masked | Moved | Count | Scores | States | Unread
