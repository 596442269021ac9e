"""Every table, in one place. `tenant_id` leads every primary and unique key of what a tenant owns."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from cloister_server.ids import random_hex

__all__ = [
    "SYSTEM",
    "App",
    "Attempt",
    "AuditRow",
    "Balance",
    "Block",
    "Count",
    "Dataset",
    "Grant",
    "GrantCount",
    "Group",
    "IdempotencyKey",
    "Job",
    "KeystoreBackup",
    "LedgerEntry",
    "Link",
    "Member",
    "Model",
    "ModelVersion",
    "Owned",
    "Part",
    "PolicyRevision",
    "PrivateDeployment",
    "RequestCount",
    "RevokedToken",
    "SealedObject",
    "SeenProof",
    "SigningKey",
    "Source",
    "Table",
    "Tenant",
    "TenantKey",
    "Unit",
    "Weights",
    "new_id",
    "now",
]


SYSTEM = "system"
"""Stands for a tenant where the keys are the service's own: its KEK wraps the signing keys."""


def new_id(prefix: str) -> str:
    """A fresh immutable id of 128 random bits, e.g. `ds_5f…`."""
    return f"{prefix}_{random_hex()}"


def now() -> datetime:
    return datetime.now(UTC)


class _UTC(TypeDecorator[datetime]):
    """An aware UTC time, on databases that forget time zones too."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class Table(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads it as a class attribute)
        str: String(512),
        datetime: _UTC,
        bytes: LargeBinary,
        dict[str, Any]: JSON,
    }


def _id(*, primary: bool = True) -> Mapped[str]:
    return mapped_column(String(40), primary_key=primary)


class Owned:
    """A table whose every row is some tenant's: the mixin by which the gates of `isolation` know it."""

    tenant_id: Mapped[str] = mapped_column(String(40), primary_key=True, sort_order=-1)


class Tenant(Table):
    __tablename__ = "tenants"
    id: Mapped[str] = _id()
    name: Mapped[str] = mapped_column(unique=True)
    created: Mapped[datetime] = mapped_column(default=now)
    status: Mapped[str] = mapped_column(default="active", server_default=text("'active'"))
    """'active'; 'shredding', from when its end was begun; or 'shredded': its keys are destroyed, and its receipt is signed."""
    suspended: Mapped[datetime | None]
    """Since when nobody acts for it or on what it has; null while it is not suspended."""
    quota_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """The most bytes that its sealed objects may take; null, here and of the other quotas, is without a bound."""
    quota_jobs: Mapped[int | None]
    """The most jobs that may be queued or running at once."""
    quota_requests: Mapped[int | None]
    """The most requests that its principals may send in a minute, all together."""
    two_person: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    """Whether one operator must ask for its end and another bring it about."""
    approvals: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """What an operator has asked for, by deed (`approvals`); kept past its day until something else is asked for."""
    receipt: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """What was signed of its shredding; while that is under way, what is to be said of the steps that are done."""


class Count:
    """A mixin: how many uses of a minute are taken by processes (`shares`)."""

    minute: Mapped[int]
    """The newest that any was taken of, by the clock: whole minutes since 1970."""
    taken: Mapped[int]


class RequestCount(Count, Owned, Table):
    """Of the requests of a tenant that has a quota of them or once had."""

    __tablename__ = "request_counts"


class TenantKey(Owned, Table):
    """One version of a key-encryption key (KEK), a tenant's or, as 'system', the service's: an id in a provider, never the key."""

    __tablename__ = "tenant_keys"
    version: Mapped[int] = mapped_column(primary_key=True)
    provider: Mapped[str] = mapped_column(String(64), default="local", server_default=text("'local'"))
    """Which of the deployment's key providers has it, by name."""
    key_id: Mapped[str]
    state: Mapped[str] = mapped_column(String(16), default="active", server_default=text("'active'"))
    """'pre-active': on its way into the provider; 'active': wraps and unwraps (one at a time); 'decrypt-only'; 'destroyed'."""
    created: Mapped[datetime] = mapped_column(default=now)
    destroyed: Mapped[datetime | None]


class App(Owned, Table):
    """An OAuth client of a tenant, with a secret, kept as an HMAC, or with a public key."""

    __tablename__ = "apps"
    __table_args__ = (UniqueConstraint("tenant_id", "name"), Index("ix_apps_id", "id"))
    id: Mapped[str] = _id()
    name: Mapped[str]
    secret_mac: Mapped[bytes]
    """Empty where it has a public key."""
    created: Mapped[datetime] = mapped_column(default=now)
    secret_since: Mapped[datetime | None]
    """When the secret or key was last changed; null where it is the first."""
    public_key: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """As a JWK, P-256 or Ed25519: its assertions are signed by the private half, which nobody else ever had."""
    dpop: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    """Whether it gets none but tokens that are bound to a key of its own."""
    public: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    """Whether it runs where it can keep no secret, and so has none: it acts for people alone."""
    redirect_uris: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    """Where it takes people back to; null where it takes them nowhere."""


class Grant(Owned, Table):
    """May (or may not: effect 'deny') a principal, or a group, do a verb to a resource of this tenant; `resource_id` '*' is any."""

    __tablename__ = "grants"
    __table_args__ = (Index("ix_grants_principal", "principal_id", "tenant_id", "verb"),)
    id: Mapped[str] = _id()
    principal_id: Mapped[str] = _id(primary=False)
    effect: Mapped[str]
    verb: Mapped[str]
    resource_id: Mapped[str]
    expires: Mapped[datetime | None]
    created: Mapped[datetime] = mapped_column(default=now)
    address_first: Mapped[str | None] = mapped_column(String(32))
    """It counts for requests from here to `address_last` (`conditions.address_key`) alone; null is from anywhere."""
    address_last: Mapped[str | None] = mapped_column(String(32))
    max_epsilon: Mapped[float | None]
    requests_per_minute: Mapped[int | None]
    outputs: Mapped[str | None] = mapped_column(String(16))
    """These three as in `conditions.Conditions`; null is without a bound."""


class GrantCount(Count, Owned, Table):
    """Of what is decided by a grant with `requests_per_minute`, once it was; it goes with the grant."""

    __tablename__ = "grant_counts"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "grant_id"], ["grants.tenant_id", "grants.id"], ondelete="CASCADE"),
    )
    grant_id: Mapped[str] = _id()


class Group(Owned, Table):
    """Principals of a tenant that grants are given to together, in that tenant or another."""

    __tablename__ = "groups"
    __table_args__ = (UniqueConstraint("tenant_id", "name"), Index("ix_groups_id", "id"))
    id: Mapped[str] = _id()
    name: Mapped[str]
    created: Mapped[datetime] = mapped_column(default=now)


class Member(Owned, Table):
    """A principal is in a group of its own tenant."""

    __tablename__ = "members"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "group_id"], ["groups.tenant_id", "groups.id"]),
        Index("ix_members_principal", "tenant_id", "principal_id"),
    )
    group_id: Mapped[str] = _id()
    principal_id: Mapped[str] = _id()
    created: Mapped[datetime] = mapped_column(default=now)


class PolicyRevision(Owned, Table):
    """Counts the changes of a tenant's grants, members and suspension: the database itself does, by triggers, as they commit."""

    __tablename__ = "policy_revisions"
    revision: Mapped[int] = mapped_column(BigInteger)


class Source(Owned, Table):
    """The people behind datasets. Only `epsilon` may ever change, and never below what is used."""

    __tablename__ = "sources"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)
    id: Mapped[str] = _id()
    name: Mapped[str]
    unit: Mapped[str]
    adjacency: Mapped[str]
    epsilon: Mapped[float]
    delta: Mapped[float]
    public: Mapped[bool]
    owner_id: Mapped[str] = _id(primary=False)
    created: Mapped[datetime] = mapped_column(default=now)


class Block(Owned, Table):
    """People who came to a source later than those of its earlier blocks, disjoint from them, with a budget of their own.

    Every source has a block 0 without a row here.
    """

    __tablename__ = "blocks"
    __table_args__ = (
        UniqueConstraint("tenant_id", "source_id", "name"),
        ForeignKeyConstraint(["tenant_id", "source_id"], ["sources.tenant_id", "sources.id"]),
    )
    source_id: Mapped[str] = _id()
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    created: Mapped[datetime] = mapped_column(default=now)


class LedgerEntry(Owned, Table):
    """One append-only row of a source's ledger; the database itself refuses to update or delete it.

    kind 'block': a block was opened, with the owner's reason;
    'freeze': what was declared of the source, and the filter's orders and weights (once a block, before its first event);
    'reserve': a job's event with its RDP vector per step, `steps` reserved (once a job and block), and as `overflow` what all
    of them may add to delta at the source's epsilon of that day, which stands in the event as `cap`;
    'chunk': steps [first_step, first_step + steps) of an attempt, written before their first read of data;
    'settle': the job is over, `steps` is what it is charged in the end (once a job);
    'budget': the source's epsilon from here on, with the owner's reason;
    'allowance': what one principal may use of it, until when, with the owner's reason; the newest one holds;
    'write_off': nothing more is ever admitted, since it is not known any more what was spent.
    """

    __tablename__ = "ledger"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "source_id"], ["sources.tenant_id", "sources.id"]),
        Index("ix_ledger_job", "tenant_id", "job_id"),
        Index("ix_ledger_kind", "tenant_id", "source_id", "kind", "block"),
        Index("ux_ledger_freeze", "tenant_id", "source_id", "block", unique=True,
              sqlite_where=text("kind = 'freeze'"), postgresql_where=text("kind = 'freeze'")),
        Index("ux_ledger_reserve", "tenant_id", "job_id", "block", unique=True,
              sqlite_where=text("kind = 'reserve'"), postgresql_where=text("kind = 'reserve'")),
        Index("ux_ledger_settle", "tenant_id", "job_id", unique=True,
              sqlite_where=text("kind = 'settle'"), postgresql_where=text("kind = 'settle'")),
        Index("ux_ledger_chunk", "tenant_id", "job_id", "attempt", "first_step", unique=True,
              sqlite_where=text("kind = 'chunk'"), postgresql_where=text("kind = 'chunk'")),
    )  # fmt: skip
    source_id: Mapped[str] = _id()
    revision: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    block: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Of 'freeze' and 'reserve'; the other kinds are about all blocks of the job or source, and say 0."""
    job_id: Mapped[str | None] = mapped_column(String(40))
    attempt: Mapped[int | None]
    first_step: Mapped[int | None]
    steps: Mapped[int] = mapped_column(default=0)
    overflow: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    principal_id: Mapped[str] = _id(primary=False)
    event: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created: Mapped[datetime] = mapped_column(default=now)


class Balance(Owned, Table):
    """What one holder, or '*' all together, has used of a block after a ledger row: append-only, and derived from the rows
    up to that one, so that admission reads one row however many there are."""

    __tablename__ = "balances"
    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant_id", "source_id", "revision"], ["ledger.tenant_id", "ledger.source_id", "ledger.revision"]
        ),
    )
    source_id: Mapped[str] = _id()
    block: Mapped[int] = mapped_column(primary_key=True)
    holder_id: Mapped[str] = _id()
    revision: Mapped[int] = mapped_column(primary_key=True)
    used: Mapped[dict[str, Any]]
    """`rho`, by order of the block's filter, and `overflow`, what overflowing steps may add to delta: whole numbers of small
    units (`ledger`), whose sums are exact in whatever order."""


class Link(Owned, Table):
    """One link of a tenant's chain: the digest of a ledger or audit row and of the link before. Append-only."""

    __tablename__ = "links"
    __table_args__ = (UniqueConstraint("tenant_id", "kind", "row_id"),)
    number: Mapped[int] = mapped_column(primary_key=True)
    """1, 2, 3, ... without a gap."""
    kind: Mapped[str]
    """'ledger' or 'audit'."""
    row_id: Mapped[str]
    """`SOURCE/REVISION`, or the audit row's id."""
    digest: Mapped[bytes]


class Unit(Owned, Table):
    """A user whose rows are in a dataset, as an HMAC under the tenant's key: tells in which source and block that user is."""

    __tablename__ = "units"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "dataset_id"], ["datasets.tenant_id", "datasets.id"]),
        Index("ix_units_dataset", "tenant_id", "dataset_id"),
    )
    mac: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    dataset_id: Mapped[str] = _id()
    source_id: Mapped[str] = _id(primary=False)
    block: Mapped[int]


class Dataset(Owned, Table):
    __tablename__ = "datasets"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        ForeignKeyConstraint(["tenant_id", "source_id"], ["sources.tenant_id", "sources.id"]),
    )
    id: Mapped[str] = _id()
    source_id: Mapped[str] = _id(primary=False)
    block: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    name: Mapped[str]
    columns: Mapped[dict[str, Any]] = mapped_column(JSON(none_as_null=True))
    nominal_size: Mapped[int] = mapped_column(BigInteger)
    capacity: Mapped[int] = mapped_column(BigInteger)
    capacity_rows: Mapped[int] = mapped_column(BigInteger)
    part_rows: Mapped[int]
    parts: Mapped[int]
    status: Mapped[str]
    manifest_id: Mapped[str | None] = mapped_column(String(40))
    created: Mapped[datetime] = mapped_column(default=now)


class Part(Owned, Table):
    """One uploaded part: a number and a sealed object. How many rows it holds is sealed inside."""

    __tablename__ = "parts"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "dataset_id"], ["datasets.tenant_id", "datasets.id"]),)
    dataset_id: Mapped[str] = _id()
    number: Mapped[int] = mapped_column(primary_key=True)
    object_id: Mapped[str] = _id(primary=False)
    uploader_id: Mapped[str | None] = mapped_column(String(40))
    content_mac: Mapped[bytes | None]
    """What was sealed, under a key of this part's alone: no two parts have a digest in common, empty ones neither."""


class SealedObject(Owned, Table):
    """A wrapped data key. What it sealed, if it came to that, lies in the blob store under the same id."""

    __tablename__ = "sealed_objects"
    __table_args__ = (Index("ix_sealed_objects_key", "tenant_id", "key_version"),)
    id: Mapped[str] = _id()
    kind: Mapped[str]
    key_version: Mapped[int]
    wrapped_key: Mapped[bytes]
    created: Mapped[datetime] = mapped_column(default=now)
    job_id: Mapped[str | None] = mapped_column(String(40))
    """The job whose attempt the key was made for ahead of time; null for what is stored with the row that names it."""
    attempt: Mapped[int | None]
    size: Mapped[int | None] = mapped_column(BigInteger)
    """Bytes that it takes sealed, where that is known."""


class Job(Owned, Table):
    """A training run, or a query on a dataset. Its spec (with the architecture) is sealed: `spec_id` names the object."""

    __tablename__ = "jobs"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "dataset_id"], ["datasets.tenant_id", "datasets.id"]),
        ForeignKeyConstraint(["tenant_id", "model_id"], ["models.tenant_id", "models.id"]),
        Index("ix_jobs_status", "status"),
    )
    id: Mapped[str] = _id()
    source_id: Mapped[str] = _id(primary=False)
    dataset_id: Mapped[str] = _id(primary=False)
    kind: Mapped[str] = mapped_column(default="train", server_default=text("'train'"))
    """'train' or 'query'."""
    model_id: Mapped[str | None] = mapped_column(String(40))
    """The model that a training run publishes to; null for a query."""
    principal_id: Mapped[str] = _id(primary=False)
    request_id: Mapped[str]
    spec_id: Mapped[str] = _id(primary=False)
    status: Mapped[str]
    steps: Mapped[int]
    epsilon: Mapped[float]
    delta: Mapped[float]
    steps_done: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    """The fencing number: only the newest attempt may write."""
    checkpoint_id: Mapped[str | None] = mapped_column(String(40))
    result_id: Mapped[str | None] = mapped_column(String(40))
    """The sealed answer of a query that is done."""
    reserved_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    """The most that it may come to store, which counts until it is over; 0 of jobs that are older than the column."""
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    version: Mapped[int | None]
    error_code: Mapped[str | None]
    created: Mapped[datetime] = mapped_column(default=now)


class Attempt(Owned, Table):
    """One start of a job's child process."""

    __tablename__ = "attempts"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),)
    job_id: Mapped[str] = _id()
    number: Mapped[int] = mapped_column(primary_key=True)
    started: Mapped[datetime] = mapped_column(default=now)
    from_step: Mapped[int]
    outcome: Mapped[str | None]
    """'trained', 'answered', 'paused', 'cancelled', 'budget', 'diverged' or 'internal', written by the attempt; null if it died."""
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """What 'trained' left: the weights' object id and the digests that the certificate states; of 'answered' the answer's id."""


class Model(Owned, Table):
    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("tenant_id", "name"), Index("ix_models_id", "id"))
    id: Mapped[str] = _id()
    name: Mapped[str]
    champion: Mapped[int]
    created: Mapped[datetime] = mapped_column(default=now)


class ModelVersion(Owned, Table):
    __tablename__ = "model_versions"
    __table_args__ = (
        UniqueConstraint("tenant_id", "job_id"),
        ForeignKeyConstraint(["tenant_id", "model_id"], ["models.tenant_id", "models.id"]),
    )
    model_id: Mapped[str] = _id()
    version: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str] = _id(primary=False)
    weights_id: Mapped[str] = _id(primary=False)
    certificate: Mapped[dict[str, Any]]
    created: Mapped[datetime] = mapped_column(default=now)


class PrivateDeployment(Owned, Table):
    """One time that a version's weights were shared between two parties; the newest that is not ended answers."""

    __tablename__ = "private_deployments"
    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant_id", "model_id", "version"],
            ["model_versions.tenant_id", "model_versions.model_id", "model_versions.version"],
        ),
    )
    model_id: Mapped[str] = _id()
    version: Mapped[int] = mapped_column(primary_key=True)
    generation: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = _id(primary=False)
    statement: Mapped[dict[str, Any]]
    """The signed envelope, which is public."""
    files_id: Mapped[str | None] = mapped_column(String(40))
    """The sealed object with what each role is given; null once the deployment is ended, or a newer one is there."""
    created: Mapped[datetime] = mapped_column(default=now)
    ended: Mapped[datetime | None]


class Weights(Owned, Table):
    """Uploaded weights to start training from: a sealed object and its digest."""

    __tablename__ = "weights"
    __table_args__ = (Index("ix_weights_id", "id"),)
    id: Mapped[str] = _id()
    object_id: Mapped[str] = _id(primary=False)
    digest: Mapped[str] = mapped_column(String(64))
    created: Mapped[datetime] = mapped_column(default=now)


class AuditRow(Owned, Table):
    """Who did what to what, allowed or denied and by which grant. Never a secret, never a row of data."""

    __tablename__ = "audit"
    id: Mapped[str] = _id()
    time: Mapped[datetime] = mapped_column(default=now)
    principal_id: Mapped[str] = _id(primary=False)
    verb: Mapped[str]
    resource_id: Mapped[str]
    outcome: Mapped[str]
    """'allowed', 'allowed: not done' where something else refused it, or 'denied: <reason>'."""
    grant_id: Mapped[str | None] = mapped_column(String(40))
    request_id: Mapped[str]


class IdempotencyKey(Owned, Table):
    """A write that was answered: the same key with the same body gets the same answer, from whom may still do it."""

    __tablename__ = "idempotency_keys"
    principal_id: Mapped[str] = _id()
    route: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(128), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[int]
    answer: Mapped[dict[str, Any]]
    proofs: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """What it was allowed by (`policy.proofs`); None of one that was answered before that was kept."""
    created: Mapped[datetime] = mapped_column(default=now)


class SigningKey(Table):
    """A key of the service itself: purpose 'token' (ES256), 'certificate' (Ed25519) or 'pepper' (HMAC); wrapped by the system key."""

    __tablename__ = "signing_keys"
    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    purpose: Mapped[str]
    public: Mapped[dict[str, Any]]
    wrapped: Mapped[bytes]
    key_version: Mapped[int] = mapped_column(default=1, server_default=text("1"))
    """Which version of the system's key wraps it."""
    created: Mapped[datetime] = mapped_column(default=now)
    state: Mapped[str] = mapped_column(String(16), default="active", server_default=text("'active'"))
    """Of purpose 'token': 'next', 'active', 'retiring' or 'revoked' (`oauth.signing_keys`); the others are all 'active'."""
    until: Mapped[datetime | None]
    """Of a retiring key: from when on nothing that it signed is valid any more."""


class RevokedToken(Table):
    """An access token that was revoked before it expired: refused by its id until it would have expired anyway."""

    __tablename__ = "revoked_tokens"
    jti: Mapped[str] = mapped_column(String(64), primary_key=True)
    until: Mapped[datetime] = mapped_column(index=True)


class SeenProof(Table):
    """A client's assertion or proof of possession that was shown, by digest: nobody may show it again."""

    __tablename__ = "seen_proofs"
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    until: Mapped[datetime] = mapped_column(index=True)


class KeystoreBackup(Table):
    """A copy of the local keystore that `cloister-admin key backup` made: a receipt of shredding must name it."""

    __tablename__ = "keystore_backups"
    id: Mapped[str] = _id()
    place: Mapped[str] = mapped_column(String(4096))
    created: Mapped[datetime] = mapped_column(default=now)
