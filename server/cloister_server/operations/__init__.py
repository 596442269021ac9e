"""The operator's operations, one definition each: run by `cloister-admin` at the deployment itself, and by the API for operators."""

from __future__ import annotations

from cloister_server.operations import audit, clients, issuers, people, policy, running, sources, tenants, tokens
from cloister_server.operations.definition import OPERATIONS, Acting, Asked, Operation, plain

__all__ = [
    "OPERATIONS",
    "Acting",
    "Asked",
    "Operation",
    "audit",
    "clients",
    "issuers",
    "people",
    "plain",
    "policy",
    "running",
    "sources",
    "tenants",
    "tokens",
]
