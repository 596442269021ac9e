"""Who asks. Knows nothing else: what may be asked is the policy's to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Principal"]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: an app or a person of a tenant, or the operator at the deployment itself, who has no token and never comes by HTTP."""

    tenant_id: str
    id: str
    kind: Literal["app", "user", "operator"]
    request_id: str
    address: str | None = None
    """Where its connection comes from; None where there is none."""

    @classmethod
    def operator(cls, tenant_id: str, *, request_id: str) -> Principal:
        """The operator, acting in one tenant. For the administrator's CLI alone."""
        return cls(tenant_id=tenant_id, id="operator", kind="operator", request_id=request_id)
