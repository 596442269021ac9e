"""The life of key-encryption keys: listed, rotated, moved to another provider, destroyed. Knows SQL and providers; no data.

A key is pre-active, active, decrypt-only and destroyed, in that order. A change of key rewraps data keys, and touches nothing
that they sealed. Every step is committed before the next begins, so that a process killed at any instant leaves all that can
be opened openable, and the same call again finishes what it began.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cloister_privacy.sealing import (
    Context,
    KeyMissing,
    KeyProvider,
    KeyProviderError,
    new_key,
)
from cloister_server import audit, policy, processes, vault
from cloister_server.errors import Conflict, Invalid, LedgerRolledBack, ServerError
from cloister_server.keyring import LOCAL, KeyRing
from cloister_server.principal import Principal
from cloister_server.rewrapping import Wraps, rewrap
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import SealedObject, SigningKey, Tenant, TenantKey, now

__all__ = [
    "Destroyed",
    "KeyView",
    "NotRotated",
    "Outcome",
    "Plan",
    "Rotation",
    "Step",
    "alone",
    "destroy",
    "listed",
    "migrate",
    "plan_destruction",
    "plan_migration",
    "plan_rotation",
    "rotate",
    "rotate_all",
]

log = logging.getLogger(__name__)

Step = Literal["begun", "made", "active", "rewrapped"]
"""What was just committed of a rotation: its row, its key in the provider, the change of states, some more rewrapped keys."""

OnProgress = Callable[[str, Step, int], None]
"""Is told the tenant's id, the step and how many data keys are rewrapped by now."""


@dataclass(frozen=True, slots=True)
class KeyView:
    """One version of a tenant's key, or of the system's, and how many keys it wraps."""

    tenant: str
    tenant_name: str
    version: int
    provider: str
    state: str
    wraps: int
    created: datetime
    destroyed: datetime | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rotation would do: make a new version, or finish one that was begun; and how many data keys it would rewrap."""

    tenant: str
    tenant_name: str
    act: Literal["rotate", "finish"]
    provider: str
    to_provider: str
    rewraps: int


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation that is over. `unopened`: data keys that their own version does not open; they are left as they are."""

    tenant: str
    tenant_name: str
    version: int
    provider: str
    is_new: bool
    """False where nothing was left to do but to rewrap for a version that an earlier call had made active."""
    rewrapped: int
    unopened: list[str]


@dataclass(frozen=True, slots=True)
class NotRotated:
    """A tenant whose key stays where it is, and why."""

    tenant: str
    tenant_name: str
    why: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of many rotations: done, left alone on purpose, and refused; one that is refused stops no other."""

    rotated: list[Rotation]
    left: list[NotRotated]
    refused: list[NotRotated]


@dataclass(frozen=True, slots=True)
class Destroyed:
    """A version that is no more, and what its provider may claim of that."""

    tenant: str
    tenant_name: str
    version: int
    provider: str
    claim: str
    waiting_days: int | None
    """None where nothing is claimed."""


def listed(session: Session) -> list[KeyView]:
    """Every key of the deployment, the service's own first: for the operator's CLI alone."""
    wraps = {
        (tenant_id, version): count
        for tenant_id, version, count in session.execute(
            select(SealedObject.tenant_id, SealedObject.key_version, func.count()).group_by(
                SealedObject.tenant_id, SealedObject.key_version
            )
        )
    }
    for version, count in session.execute(
        select(SigningKey.key_version, func.count()).group_by(SigningKey.key_version)
    ):
        wraps[vault.SYSTEM, version] = count
    names = {each.id: each.name for each in session.scalars(select(Tenant))}
    rows = session.scalars(
        select(TenantKey).order_by(TenantKey.tenant_id != vault.SYSTEM, TenantKey.tenant_id, TenantKey.version)
    )
    return [
        KeyView(
            tenant=row.tenant_id,
            tenant_name=names.get(row.tenant_id, row.tenant_id),
            version=row.version,
            provider=row.provider,
            state=row.state,
            wraps=wraps.get((row.tenant_id, row.version), 0),
            created=row.created,
            destroyed=row.destroyed,
        )
        for row in rows
    ]


def plan_rotation(session: Session, keys: KeyRing, tenant_id: str | None) -> list[Plan]:
    """What `rotate`, or `rotate_all` for None, would do. Raises Conflict and Invalid as they do."""
    return [_plan(_aim(session, keys, each, None)) for each in ([tenant_id] if tenant_id else _everyone(session))]


def plan_migration(
    session: Session, keys: KeyRing, *, to: str, tenant_id: str | None = None
) -> tuple[list[Plan], list[NotRotated]]:
    """What `migrate` would do, and which tenants it would leave where they are, because their key is with a provider of their own.

    Raises Conflict and Invalid as it does.
    """
    keys.require_known(to)
    plans, left = [], []
    for each in [tenant_id] if tenant_id else _everyone(session):
        active = _active(session, each)
        is_own = each != vault.SYSTEM and active.provider not in {to, LOCAL, keys.default}
        if is_own and tenant_id is None:
            why = f"its key is with {active.provider!r}, a provider of its own; name the tenant to move it all the same"
            left.append(NotRotated(each, _name(session, each), why))
            continue
        aim = _aim(session, keys, each, to)
        if active.provider != to or aim.pending is not None or aim.older:
            plans.append(_plan(aim))
    return plans, left


def rotate(
    service: Service,
    tenant_id: str,
    *,
    request_id: str,
    by: str = "operator",
    on_progress: OnProgress | None = None,
) -> Rotation:
    """Give a tenant, or the system, a new key where the old one is, and rewrap every data key for it.

    Commits several times, and all stays readable and writable meanwhile. A rotation that was cut short is
    finished, and no further version is made. Raises Conflict where the tenant has no active key (any more), or where a
    key was begun in another provider; KeyProviderError where a provider refuses: what was committed until then stands.
    """
    with alone(service.settings):
        return _rotate(service, tenant_id, None, (request_id, by), on_progress or _untold)


def rotate_all(
    service: Service, *, request_id: str, by: str = "operator", on_progress: OnProgress | None = None
) -> Outcome:
    """`rotate` for the system and every tenant, each where its key is, one after the other; others may have a turn in between."""
    with reading(service.engine, ALL_TENANTS) as session:
        everyone = _everyone(session)
    return _rotate_each(service, everyone, None, (request_id, by), on_progress or _untold, [])


def migrate(
    service: Service,
    *,
    to: str,
    tenant_id: str | None = None,
    request_id: str,
    by: str = "operator",
    on_progress: OnProgress | None = None,
) -> Outcome:
    """`rotate` into the provider `to`, for the system and every tenant, or for one, whose key is elsewhere or not all there yet.

    Tenants with a key in a provider of their own (neither `local` nor the default) are left, unless it is the one that is named.
    What a keystore or a token held is there until each old version is destroyed. Raises Invalid where there is no such provider.
    """
    with reading(service.engine, ALL_TENANTS) as session:
        plans, left = plan_migration(session, service.keys, to=to, tenant_id=tenant_id)
    return _rotate_each(service, [each.tenant for each in plans], to, (request_id, by), on_progress or _untold, left)


def plan_destruction(session: Session, tenant_id: str, *, version: int) -> KeyView:
    """The key that `destroy` would destroy. Raises Conflict and Invalid as it does."""
    _require_destroyable(session, session.get(TenantKey, (tenant_id, version)), version)
    return next(each for each in listed(session) if (each.tenant, each.version) == (tenant_id, version))


def destroy(service: Service, tenant_id: str, *, version: int, request_id: str, by: str = "operator") -> Destroyed:
    """Destroy a version that wraps nothing any more, in its provider, for good.

    A copy of the database from before the rotation is full of keys that only this version opens: it is of no use from now on.
    Commits twice; a process killed in between leaves a key that is gone and named decrypt-only, and the same call again finishes.
    Raises Conflict where the version is active or still wraps something, Invalid where there is none.
    """
    with alone(service.settings):
        with writing(service.engine, ALL_TENANTS) as session:
            # Whoever still writes under this version holds its row.
            key = session.get(TenantKey, (tenant_id, version), with_for_update=True)
            key = _require_destroyable(session, key, version)
            name = _tell(session, tenant_id, "key.destroy", key.key_id, (request_id, by))
        keeper = service.keys.of(key.provider)
        try:
            keeper.destroy_key(key.key_id)
            claim, days = keeper.destruction.claim, keeper.destruction.waiting_days
        except KeyMissing:
            days, claim = (
                None,
                (
                    "Its provider did not have the key: an earlier call destroyed it, it was never made, or somebody took it away. "
                    "Nothing is claimed of it."
                ),
            )
        with writing(service.engine, ALL_TENANTS) as session:
            key = session.get_one(TenantKey, (tenant_id, version))
            key.state, key.destroyed = "destroyed", now()
    return Destroyed(tenant_id, name, version, key.provider, claim, days)


_Who = tuple[str, str]
"""For which request a key's life changes, and by which operator."""


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """While no other process makes, moves or destroys keys. Raises StartRefused where one still does after a moment."""
    lock = settings.data_dir / "locks" / "keys.lock"
    with processes.locked(lock, wait_s=5, what="the life of the keys"):
        yield


@dataclass(frozen=True, slots=True)
class _Aim:
    """From which key to which provider: the active one, the one that an earlier call began, and what is left of older ones."""

    tenant_id: str
    name: str
    active: TenantKey
    pending: TenantKey | None
    to: str
    older: int
    """Data keys that are wrapped by versions before the active one."""
    wraps: int


def _rotate_each(
    service: Service,
    tenant_ids: Iterable[str],
    provider: str | None,
    who: _Who,
    tell: OnProgress,
    left: list[NotRotated],
) -> Outcome:
    """The lock is held for one tenant at a time, so that a shredding waits for one at most."""
    outcome = Outcome([], left, [])
    for each in tenant_ids:
        try:
            with alone(service.settings):
                outcome.rotated.append(_rotate(service, each, provider, who, tell))
        except (ServerError, KeyProviderError) as error:
            why = f"{error.why}; mend its ledger first" if isinstance(error, LedgerRolledBack) else str(error)
            with reading(service.engine, ALL_TENANTS) as session:
                tenant = session.get(Tenant, each)
                is_ended = (
                    tenant is not None and tenant.status != "active"
                )  # since this began: there is nothing to rotate
                (outcome.left if is_ended else outcome.refused).append(NotRotated(each, _name(session, each), why))
    return outcome


def _rotate(service: Service, tenant_id: str, provider: str | None, who: _Who, tell: OnProgress) -> Rotation:
    with reading(service.engine, ALL_TENANTS) as session:
        aim = _aim(session, service.keys, tenant_id, provider)
    if aim.pending is None and aim.older and aim.active.provider == aim.to:
        finished = _rewrapped(service, aim, aim.active, tell, is_new=False)
        if finished.rewrapped:
            return finished
    key = aim.pending or _begin(service, aim, who)
    tell(tenant_id, "begun", 0)
    _make(service.keys.of(key.provider), key)
    tell(tenant_id, "made", 0)
    _activate(service, key)
    tell(tenant_id, "active", 0)
    return _rewrapped(service, aim, key, tell, is_new=True)


def _begin(service: Service, aim: _Aim, who: _Who) -> TenantKey:
    """The row of a key that is not made yet: whatever comes into the provider is known here before."""
    key_id = f"{aim.tenant_id}.{secrets.token_hex(8)}"
    service.keys.of(aim.to).has_key(key_id)  # a provider that is away refuses here, and leaves no row
    if aim.wraps and not service.keys.of(aim.active.provider).has_key(aim.active.key_id):
        raise KeyMissing(
            f"the key that {aim.name!r} has now is not to be had of {aim.active.provider!r}, so that nothing could be rewrapped; "
            "its holder must give it back first"
        )
    with writing(service.engine, ALL_TENANTS) as session:
        newest = session.scalars(select(func.max(TenantKey.version)).where(TenantKey.tenant_id == aim.tenant_id)).one()
        key = TenantKey(tenant_id=aim.tenant_id, version=newest + 1, provider=aim.to, key_id=key_id, state="pre-active")
        session.add(key)
        _tell(session, aim.tenant_id, "key.rotate", key_id, who)
    return key


def _make(keeper: KeyProvider, key: TenantKey) -> None:
    """The key in its provider, seen to wrap and to unwrap: one that cannot never becomes the active one."""
    if not keeper.has_key(key.key_id):
        keeper.create_key(key.key_id)
    secret, context = new_key(), Context(tenant=key.tenant_id, kind="trial", object=key.key_id)
    wrapped = keeper.wrap(key.key_id, secret, context=context)
    if not secrets.compare_digest(keeper.unwrap(key.key_id, wrapped, context=context), secret):
        raise KeyProviderError(
            f"the provider {key.provider!r} does not unwrap what it wrapped; the old key stays active"
        )


def _activate(service: Service, key: TenantKey) -> None:
    """From one instant to the next what is new is wrapped by this key.

    No audit row is written here: that would lock the tenant's row before the keys' are free, and others take it last.
    """
    with writing(service.engine, ALL_TENANTS) as session:
        held = session.scalars(
            select(TenantKey)
            .where(TenantKey.tenant_id == key.tenant_id, TenantKey.state.in_(("active", "pre-active")))
            .order_by(TenantKey.version)
            .with_for_update()
        ).all()
        tenant = session.get(Tenant, key.tenant_id)
        if [each.state for each in held] != ["active", "pre-active"] or (tenant and tenant.status != "active"):
            raise Conflict("the tenant's keys were destroyed while this one was made; see `cloister-admin key list`")
        old, new = held
        old.state, new.state = "decrypt-only", "active"
    log.info("key.active", extra={"tenant_id": key.tenant_id, "version": key.version, "provider": key.provider})


def _rewrapped(service: Service, aim: _Aim, key: TenantKey, tell: OnProgress, *, is_new: bool) -> Rotation:
    count, unopened = rewrap(service, key, on_page=lambda done: tell(aim.tenant_id, "rewrapped", done))
    return Rotation(aim.tenant_id, aim.name, key.version, key.provider, is_new, count, unopened)


def _aim(session: Session, keys: KeyRing, tenant_id: str, provider: str | None) -> _Aim:
    active, name = _active(session, tenant_id), _name(session, tenant_id)
    to = provider or active.provider
    keys.require_known(to)
    pending = session.scalars(
        select(TenantKey).where(TenantKey.tenant_id == tenant_id, TenantKey.state == "pre-active")
    ).one_or_none()
    if pending is not None and pending.provider != to:
        what = "--system" if tenant_id == vault.SYSTEM else f"--tenant {name}"
        raise Conflict(
            f"a rotation of {name!r} into {pending.provider!r} was begun and not finished; finish it with `cloister-admin key "
            f"migrate --to {pending.provider}`, or discard it with `cloister-admin key destroy {what} --version {pending.version}`"
        )
    wraps = Wraps.of(tenant_id)
    older, newer = (wraps.count(session, version) for version in (active.version, active.version + 1))
    return _Aim(tenant_id, name, active, pending, to, older, newer)


def _plan(aim: _Aim) -> Plan:
    is_begun = aim.pending is not None or (aim.older > 0 and aim.active.provider == aim.to)
    rewraps = aim.older if is_begun and aim.pending is None else aim.wraps
    return Plan(aim.tenant_id, aim.name, "finish" if is_begun else "rotate", aim.active.provider, aim.to, rewraps)


def _active(session: Session, tenant_id: str) -> TenantKey:
    """The active key, whose row is not held. Raises Conflict where there is none."""
    tenant = session.get(Tenant, tenant_id)
    active = session.scalars(
        select(TenantKey).where(TenantKey.tenant_id == tenant_id, TenantKey.state == "active")
    ).one_or_none()
    if active is None or (tenant is not None and tenant.status != "active"):
        raise Conflict(
            f"{_name(session, tenant_id)!r} has no active key: its keys are destroyed, or on their way to it"
        )
    return active


def _everyone(session: Session) -> list[str]:
    """The system and all tenants that have an active key, oldest first."""
    tenants = select(Tenant.id).where(Tenant.status == "active").order_by(Tenant.created, Tenant.id)
    return [vault.SYSTEM, *session.scalars(tenants)]


def _name(session: Session, tenant_id: str) -> str:
    tenant = session.get(Tenant, tenant_id)
    return tenant_id if tenant is None else tenant.name


def _require_destroyable(session: Session, key: TenantKey | None, version: int) -> TenantKey:
    if key is None or key.state == "destroyed":
        raise Invalid(f"there is no version {version} to destroy, or it is destroyed; see `cloister-admin key list`")
    if key.state == "active":
        raise Conflict(
            f"version {version} is the active one, under which everything new is sealed; `cloister-admin key rotate` first, or "
            "`cloister-admin tenant shred` to end the tenant"
        )
    wraps = Wraps.of(key.tenant_id)
    still = wraps.count(session, version + 1) - wraps.count(session, version)
    if still:
        raise Conflict(
            f"version {version} still wraps {still} data keys, which would never open again; `cloister-admin key rotate` rewraps "
            "them, and names those that do not open"
        )
    return key


def _tell(session: Session, tenant_id: str, verb: str, key_id: str, who: _Who) -> str:
    """Into the tenant's audit log, in the transaction that does it; the tenant's name.

    The system has no chain: of its keys their rows tell, and this line of log.
    """
    request_id, by = who
    log.info(verb, extra={"tenant_id": tenant_id, "key_id": key_id, "request_id": request_id})
    if tenant_id == vault.SYSTEM:
        return tenant_id
    tenant = session.get_one(Tenant, tenant_id)
    operator = Principal.operator(tenant_id, request_id=request_id, by=by)
    audit.allowed(session, policy.authorize(session, operator, "tenant.administer", tenant), verb, key_id)
    return tenant.name


def _untold(tenant_id: str, step: Step, rewrapped: int) -> None:
    pass
