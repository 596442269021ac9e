"""What the policy says of who may do what, and why: `GET /v1/policy`."""

from __future__ import annotations

from datetime import datetime

from cloister.wire._model import Response

__all__ = ["Explanation", "GrantView", "Holder", "Holders"]


class GrantView(Response):
    """A grant: whom it lets do what to what, and how it is bound; None is without a bound."""

    id: str
    effect: str
    """'allow' or 'deny'."""
    to: str
    """The id of the app or group that holds it."""
    to_name: str | None = None
    """`TENANT/NAME` of another tenant's."""
    verb: str
    resource: str
    """An id, or '*' for any of the tenant's."""
    expires: datetime | None = None
    first_address: str | None = None
    last_address: str | None = None
    max_epsilon: float | None = None
    requests_per_minute: int | None = None
    outputs: str | None = None
    """'labels' alone, or 'rounded' to two digits: of a model's answers."""


class Explanation(Response):
    """Whether a principal may do a verb to a resource now, and which grant says so."""

    principal: str
    verb: str
    resource: str
    allowed: bool
    reason: str
    """In one sentence."""
    grant: GrantView | None = None
    """The one that decides; None where none matched, which denies."""
    others: tuple[GrantView, ...] = ()
    """The principal's other grants on this verb and resource: behind the one that decides, expired, or not for that address."""


class Holder(Response):
    """A principal that may."""

    principal: str
    name: str | None = None
    grant: GrantView


class Holders(Response):
    """All who may do a verb to a resource now."""

    verb: str
    resource: str
    holders: tuple[Holder, ...]
