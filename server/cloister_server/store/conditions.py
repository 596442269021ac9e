"""What a grant is bound to, and addresses as numbers that both databases compare. Knows no principal and decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, case, or_

__all__ = ["UNBOUND", "Conditions", "Outputs", "address_key", "address_range", "is_from", "restrictions"]

Outputs = Literal["labels", "rounded"]

_V4 = 0xFFFF << 32  # an IPv4 address within IPv6 (RFC 4291, section 2.5.5.2)


@dataclass(frozen=True, slots=True)
class Conditions:
    """How whoever is allowed by a grant may use it; None is without a bound."""

    max_epsilon: float | None = None
    """Of one job."""
    requests_per_minute: int | None = None
    outputs: str | None = None
    """'labels' alone, or 'rounded' figures: of a model's answers, against its extraction."""


UNBOUND = Conditions()


@lru_cache(maxsize=4096)
def address_key(address: str | None) -> str | None:
    """An address as 32 hexadecimal digits, an IPv4 one within IPv6; None of what is no address."""
    try:
        return None if address is None else _digits(ip_address(address))
    except ValueError:
        return None


def address_range(network: str) -> tuple[str, str]:
    """The first and the last address of a network ('10.0.0.0/8', '2001:db8::/32', or one address). Raises ValueError."""
    of = ip_network(network)
    return _digits(of.network_address), _digits(of.broadcast_address)


def is_from(grant: Any, key: Any) -> ColumnElement[bool]:
    """Whether a grant counts for a request from the address of this key. From nobody knows where, which is None, an allow that
    names a network does not, and a deny does."""
    first, last = grant.address_first, grant.address_last
    if key is None:
        return or_(first.is_(None), grant.effect != "allow")
    return or_(first.is_(None), and_(first <= key, last >= key))


def restrictions(grant: Any) -> tuple[Any, ...]:
    """By what of several grants one decides: a deny, then the allow that is bound least: by outputs, epsilon, rate, and its id."""
    return (
        case((grant.effect == "allow", 1), else_=0),
        case((grant.outputs.is_(None), 0), (grant.outputs == "rounded", 1), else_=2),
        case((grant.max_epsilon.is_(None), 0), else_=1),
        grant.max_epsilon.desc(),
        case((grant.requests_per_minute.is_(None), 0), else_=1),
        grant.requests_per_minute.desc(),
        grant.id,
    )


def _digits(address: IPv4Address | IPv6Address) -> str:
    return f"{int(address) | (_V4 if address.version == 4 else 0):032x}"
