"""The schema of a dataset: named, typed columns with public bounds. Declared by the owner, never fitted on rows."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cloister.wire._model import Name, Request

__all__ = [
    "UNIT_ID_BYTES",
    "AudioColumn",
    "CategoryColumn",
    "Column",
    "InputColumn",
    "NumberColumn",
    "OutputColumn",
    "Schema",
    "TensorColumn",
    "TextColumn",
    "UnitColumn",
]

UNIT_ID_BYTES = 64
"""The longest user id, in bytes of UTF-8."""

_Bound = Annotated[float, Field(allow_inf_nan=False, ge=-3.4e38, le=3.4e38)]


class _Bounded(Request):
    low: _Bound
    high: _Bound

    @model_validator(mode="after")
    def _low_is_below_high(self) -> _Bounded:
        if not self.low < self.high:
            raise ValueError(
                f"low ({self.low}) must be below high ({self.high}); declare the public range of the column"
            )
        return self


class TensorColumn(_Bounded):
    """A dense array of one shape per row, every element in [low, high]."""

    type: Literal["tensor"] = "tensor"
    shape: Annotated[
        tuple[Annotated[int, Field(ge=1, le=2**20)], ...], Field(min_length=1, max_length=4, fail_fast=True)
    ]
    dtype: Literal["float32", "uint8"] = "float32"

    @model_validator(mode="after")
    def _is_of_bearable_size(self) -> TensorColumn:
        if math.prod(self.shape) > 2**22:
            raise ValueError(f"a row of shape {self.shape} has over {2**22} elements; send smaller tensors")
        return self


class NumberColumn(_Bounded):
    """One real number per row in [low, high], kept as float32."""

    type: Literal["number"] = "number"


class CategoryColumn(Request):
    """One of the named values per row; rows carry the value's index as int32."""

    type: Literal["category"] = "category"
    values: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
        Field(min_length=2, max_length=65_536, fail_fast=True),
    ]

    @model_validator(mode="after")
    def _values_are_distinct(self) -> CategoryColumn:
        if len(set(self.values)) != len(self.values):
            raise ValueError("category values must be distinct; remove the repeated ones")
        return self


class TextColumn(Request):
    """A text per row, at most `max_length` bytes of UTF-8."""

    type: Literal["text"] = "text"
    max_length: Annotated[int, Field(ge=1, le=2**22)]


class AudioColumn(Request):
    """A recording per row: one channel of 16-bit samples, `rate` a second and at most `max_samples` of them."""

    type: Literal["audio"] = "audio"
    rate: Annotated[int, Field(ge=1, le=192_000)]
    max_samples: Annotated[int, Field(ge=1, le=2**21)]


class UnitColumn(Request):
    """Who the row belongs to, where the source's unit is a user: an opaque id of 1 to 64 bytes."""

    type: Literal["unit"] = "unit"


Column = Annotated[
    TensorColumn | NumberColumn | CategoryColumn | TextColumn | AudioColumn | UnitColumn, Field(discriminator="type")
]
InputColumn = Annotated[
    TensorColumn | NumberColumn | CategoryColumn | TextColumn | AudioColumn, Field(discriminator="type")
]
"""A column that a network can read."""

OutputColumn = Annotated[NumberColumn | CategoryColumn, Field(discriminator="type")]
"""A column that a network can predict."""

Schema = Annotated[dict[Name, Column], Field(min_length=1, max_length=1024)]
"""Column name -> column, in the order in which a row carries them."""
