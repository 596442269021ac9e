"""Who asks. Knows nothing else: what may be asked is the policy's to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Principal"]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: an app or a person of a tenant, or an operator at work in one, whom only `cloister_server.operations` lets be that."""

    tenant_id: str
    id: str
    kind: Literal["app", "user", "operator"]
    request_id: str
    address: str | None = None
    """Where its connection comes from; None where there is none."""
    may_administer: bool = False
    """Whether its token has the scope `admin`: it may ask for the operators' operations, and no more of anything else."""

    @classmethod
    def operator(cls, tenant_id: str, *, request_id: str, by: str = "operator") -> Principal:
        """An operator, acting in one tenant; `by` is who that is: a person's id, or a user of the machine."""
        return cls(tenant_id=tenant_id, id=by, kind="operator", request_id=request_id)
