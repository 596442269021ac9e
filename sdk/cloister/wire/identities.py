"""Who asks, as the server knows them."""

from __future__ import annotations

from typing import Literal

from cloister.wire._model import Response

__all__ = ["Identity"]


class Identity(Response):
    """A principal: an app or a person of a tenant."""

    id: str
    kind: Literal["app", "user"] | str
    name: str
    tenant: str
    """Its name."""
