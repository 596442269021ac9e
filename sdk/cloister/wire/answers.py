"""What noisy answers would cost, and the answers: queries on their way through the ledger."""

from __future__ import annotations

from pydantic import Field

from cloister.wire._model import Body, Identifier, Response
from cloister.wire.plans import Quote
from cloister.wire.queries import Noise, QueryEvent, QueryRequest, QueryResult

__all__ = ["Answer", "QueryPrice", "StartQuery"]


class QueryPrice(Response):
    """What a request would be charged and how noisy its answers would be. Free."""

    query: QueryRequest
    source: Identifier
    event: QueryEvent
    quote: Quote
    noise: tuple[tuple[Noise, ...], ...]
    """For each query that of each vector of integers that answers it."""


class StartQuery(Body):
    """Reserve what the answers cost, and queue the release. Refused, the ledger is unchanged."""

    query: QueryRequest
    require_revision: int | None = Field(default=None, ge=0)
    """Refuse if the source's ledger moved since this revision."""


class Answer(Response):
    """The answers to a request, one for each query, in their order."""

    job: Identifier
    dataset: Identifier
    epsilon: float
    """Of pure differential privacy, of all answers together."""
    results: tuple[QueryResult, ...]
