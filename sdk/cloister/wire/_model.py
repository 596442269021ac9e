"""The two kinds of wire model, and the names and numbers that all of them use."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

__all__ = ["Count", "Identifier", "Name", "PositiveFloat", "Probability", "Request", "Response"]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}$")]
"""A name that people give: a letter first, then letters, digits, `_` and `-`; at most 63 characters."""

Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,4}_[0-9a-f]{32}$")]
"""An immutable id that the server gives, `ds_5f…`: its prefix tells the kind of thing."""

Count = Annotated[int, Field(ge=1, le=2**40)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class Request(BaseModel):
    """What a caller sends: frozen, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Response(BaseModel):
    """What a server answers: frozen, and an unknown field is ignored, so that old clients survive new servers."""

    model_config = ConfigDict(extra="ignore", frozen=True)
