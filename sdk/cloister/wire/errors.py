"""The one shape of an error: `error` is the sentence (as the Open Inference Protocol has it), `code` the stable name."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cloister.wire._model import Response

__all__ = ["ErrorBody"]


class ErrorBody(Response):
    error: str
    """What, why, and what to do next."""
    code: str
    request_id: str
    details: dict[str, Any] = Field(default_factory=dict)
