"""Every refusal the server can speak, and the one shape it speaks them in; knows nothing of HTTP frameworks.

ServerError                500  internal, weights_differ: what is stored is not what its certificate is of
├── Unauthenticated        401  unauthenticated
├── Forbidden              403  forbidden: yours to see, not yours to do; admin_scope_needed, no_operator, first_admin_refused
│   └── TenantKeyRefused   403  tenant_key_refused: the tenant's key was disabled, withdrawn or destroyed
├── NotFound               404  not_found: not there and not yours are the same
├── BadRequest             400  bad_request, body_truncated, digest_mismatch
├── Invalid                422  invalid_request, rows_refused, batch_too_large, plan_impossible, unit_not_supported,
│                               sealed_part_refused, not_confirmed, roles_not_apart, role_expired, public_rows_needed, not_shared,
│                               expiry_past
│   └── IdempotencyMismatch 422 idempotency_mismatch
├── Conflict               409  conflict, dataset_not_ready, quota_exceeded, job_quota_exceeded, tenant_shredded, shredding_unfinished,
│                               not_deployed_privately, secret_already_shown, operators_tenant, last_operator, local_only
│   ├── BudgetExceeded     409  budget_exceeded
│   └── RevisionMoved      409  revision_moved
├── TooLarge               413  too_large
├── RateLimited            429  rate_limited, request_quota_exceeded: `retry_after_s` in its details is the Retry-After
├── Unavailable            503  unavailable, audit_unavailable, key_provider_busy, storage_full, storage_unavailable, storage_missing,
│   │                           storage_conflict, storage_foreign, private_deployment_busy
│   └── LedgerRolledBack   503  ledger_rolled_back: the database is older than its anchor; only reads go on
└── StartRefused           -    the process refuses to start (never sent over HTTP)
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "BadRequest",
    "BudgetExceeded",
    "Conflict",
    "Forbidden",
    "IdempotencyMismatch",
    "Invalid",
    "LedgerRolledBack",
    "NotFound",
    "RateLimited",
    "RevisionMoved",
    "ServerError",
    "StartRefused",
    "TenantKeyRefused",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
]


class ServerError(Exception):
    """A refusal with its HTTP status, its stable code and a sentence that says what, why and what next."""

    status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, code: str | None = None, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.details = details or {}
        self.cause = ""
        """What a store or a provider said, for whoever operates the deployment, and nobody else: it may name places."""


class Unauthenticated(ServerError):
    status = 401
    default_code = "unauthenticated"

    def __init__(self, message: str, *, challenge: str = "Bearer") -> None:
        super().__init__(message)
        self.challenge = challenge
        """What WWW-Authenticate says (RFC 9110, section 11.6.1)."""


class Forbidden(ServerError):
    status = 403
    default_code = "forbidden"


class TenantKeyRefused(Forbidden):
    """The tenant's key-encryption key is not to be had (any more), so that nothing of the tenant opens."""

    default_code = "tenant_key_refused"


class NotFound(ServerError):
    status = 404
    default_code = "not_found"

    def __init__(self, kind: str) -> None:
        super().__init__(f"no such {kind}, or it is not shared with you; check the id, or ask its owner for a grant")


class BadRequest(ServerError):
    status = 400
    default_code = "bad_request"


class Invalid(ServerError):
    status = 422
    default_code = "invalid_request"


class IdempotencyMismatch(Invalid):
    default_code = "idempotency_mismatch"


class Conflict(ServerError):
    status = 409
    default_code = "conflict"


class BudgetExceeded(Conflict):
    default_code = "budget_exceeded"


class RevisionMoved(Conflict):
    default_code = "revision_moved"


class TooLarge(ServerError):
    status = 413
    default_code = "too_large"


class RateLimited(ServerError):
    status = 429
    default_code = "rate_limited"


class Unavailable(ServerError):
    status = 503
    default_code = "unavailable"


class LedgerRolledBack(Unavailable):
    """A tenant's ledger does not go on from its anchor: nothing of the tenant is charged or audited before that is mended.

    The server's state and not the request is at fault, so it is no Conflict. Which tenant, and why, is the operator's to know.
    """

    default_code = "ledger_rolled_back"

    def __init__(self, tenant_id: str, why: str) -> None:
        super().__init__(
            "the privacy ledger is not the one that was last charged: an older database was restored. It can be read; nothing "
            "is charged or changed before the server's operator replays what is missing, or writes the budget off"
        )
        self.tenant_id, self.why = tenant_id, why


class StartRefused(ServerError):
    """The process cannot start safely; the message says why and what to do."""

    default_code = "start_refused"
