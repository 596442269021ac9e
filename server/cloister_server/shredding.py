"""The end of a tenant: its clients refused, its work stopped, its keys destroyed, what they sealed deleted; then a signed receipt.

Knows SQL, key providers and blobs; nothing of HTTP. Each step commits before the next begins, and is safe to do again: a
shredding that died, or that a provider held up, is finished by running it again. Until then the tenant stays closed.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from sqlalchemy import case, delete, func, or_, select, union_all, update
from sqlalchemy.orm import Session

from cloister.wire.jobs import FINAL
from cloister.wire.receipts import sign_receipt
from cloister_privacy.sealing import KeyMissing, KeyProvider, KeyProviderError, KeystoreDamaged
from cloister_server import approvals, audit, budgets, keys, marking, policy, processes, receipts, vault
from cloister_server.approvals import Request
from cloister_server.errors import Conflict, StartRefused
from cloister_server.oauth import verifier
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS, for_tenants
from cloister_server.store.identities import Authorization, BrowserSession, Login, User
from cloister_server.store.issuers import forget_subjects_of_tenant
from cloister_server.store.key_record import KeyRecord
from cloister_server.store.session import empty_log, reading, writing
from cloister_server.store.tables import (
    App,
    Grant,
    Group,
    IdempotencyKey,
    Job,
    KeystoreBackup,
    Member,
    Part,
    SealedObject,
    Table,
    Tenant,
    TenantKey,
    Unit,
    Weights,
    now,
)

__all__ = ["ask", "plan", "receipt", "shred"]

log = logging.getLogger(__name__)

_AT_ONCE = 500
"""Objects of one request to the store."""

_CHILD_S = 30.0
"""How long a training child may take to its next chunk boundary before the shredding gives up for this time."""

_DELETED: tuple[type[Table], ...] = (SealedObject, Part, Unit, Weights, IdempotencyKey)
"""The tables of which the tenant's rows go last, in the transaction that signs the receipt."""

_OF_ROWS = ("part", "units")
"""Kinds of sealed objects whose number tells how many rows or users there are: a receipt is shown around, and counts none."""


def plan(session: Session, principal: Principal) -> dict[str, Any]:
    """What shredding the operator's tenant would destroy and delete, and how far that has come. Changes nothing."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    of_tenant = select(TenantKey).where(TenantKey.tenant_id == tenant.id).order_by(TenantKey.version)
    versions = session.scalars(of_tenant).all()
    backups = session.scalars(select(KeystoreBackup)).all()
    return {
        "tenant": tenant.id,
        "name": tenant.name,
        "status": tenant.status,
        "approvals": asdict(approvals.told(tenant)),
        "keys": [{"version": key.version, "provider": key.provider, "state": key.state} for key in versions],
        "keystore_copies": [
            {"place": each.place, "created": each.created}
            for each in backups
            if any(receipts.may_hold(each, key.provider, key.created, key.destroyed) for key in versions)
        ],
        "jobs_under_way": _count(session, Job, Job.tenant_id == tenant.id, Job.status.not_in(FINAL)),
        "clients": _count(session, App, App.tenant_id == tenant.id),
        "accounts": _count(session, User, User.tenant_id == tenant.id),
        "grants": _count(session, Grant, _grants_of(tenant.id)),
        **_counted(session, tenant.id),
    }


def receipt(session: Session, principal: Principal) -> dict[str, Any]:
    """The signed receipt of the operator's tenant. Raises Conflict where the tenant is not shredded, or not yet."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    if tenant.status != "shredded" or tenant.receipt is None:
        done = "is not shredded" if tenant.status == "active" else "is not shredded yet"
        raise Conflict(f"tenant {tenant.name!r} {done}, so that there is no receipt; run `cloister-admin tenant shred`")
    return tenant.receipt


def ask(service: Service, principal: Principal) -> Request | None:
    """Ask for the end of a tenant that takes two operators: the request that stands now; None where `shred` will not want for one.

    Of a tenant that is closed already nobody asks again: whoever goes on with it finishes what two have begun.
    """
    with writing(service.engine, ALL_TENANTS) as session:
        if session.get_one(Tenant, principal.tenant_id).status != "active":
            return None
        return approvals.ask(session, policy.authorize_change(session, principal, "tenant.administer"), "shred")


def shred(service: Service, principal: Principal) -> dict[str, Any]:
    """Shred the operator's tenant, for good; its signed receipt, which is the same however often this is called.

    Raises Conflict `needs_another_operator` where it takes two, and no other asked for it; and `shredding_unfinished` where work does
    not end or a provider does not destroy a key: the tenant stays closed, and calling again goes on from there.
    """
    with keys.alone(service.settings):
        with reading(service.engine, for_tenants(principal.tenant_id)) as session:
            is_done = session.get_one(Tenant, principal.tenant_id).status == "shredded"
            if is_done:
                return receipt(session, principal)
        marking.require_ours(service)
        _close(service, principal)
        _end_work(service, principal.tenant_id)
        _list_recorded(service, principal.tenant_id)
        _destroy_keys(service, principal.tenant_id)
        _delete_blobs(service, principal.tenant_id)
        signed = _conclude(service, principal)
        if not empty_log(service.engine):
            log.warning("database.log_not_emptied")
    log.info("tenant.shredded", extra={"tenant_id": principal.tenant_id})
    return signed


def _close(service: Service, principal: Principal) -> None:
    """From the commit on nobody acts for the tenant or on what it has, and nothing is sealed for it.

    Locks are taken in the order in which others take them: jobs, keys, the tenant's row last. The change of a key waits for
    every transaction that is sealing under it, so that what these store is there when it is deleted.
    """
    tenant_id = principal.tenant_id
    with writing(service.engine, ALL_TENANTS) as session:
        tenant = session.get_one(Tenant, tenant_id)
        authorized = policy.authorize(session, principal, "tenant.administer", tenant)
        if tenant.status != "active":
            return
        _cancel_jobs(session, tenant_id)
        session.execute(
            update(TenantKey)
            .where(TenantKey.tenant_id == tenant_id, TenantKey.state.in_(("pre-active", "active")))
            .values(state="decrypt-only")
        )
        withdrawn = _withdraw(session, service, tenant_id)
        _note(session, tenant_id, begun=now().isoformat(), deleted=withdrawn, keys={}).status = "shredding"
        approvals.require(session, authorized, "shred")  # the row is locked, and as it is now
        audit.allowed(session, authorized, "tenant.shred", tenant_id)
    log.info("tenant.closed", extra={"tenant_id": tenant_id})


def _end_work(service: Service, tenant_id: str) -> None:
    """See every job over, as cancelled. Whoever holds a job's lock knows that no child of it lives."""
    with writing(service.engine, for_tenants(tenant_id)) as session:
        _cancel_jobs(session, tenant_id)  # those, too, that began while the keys were being closed
        unfinished = session.scalars(
            select(Job.id).where(Job.tenant_id == tenant_id, Job.status.not_in(FINAL)).order_by(Job.created, Job.id)
        ).all()
    for job_id in unfinished:
        path = service.settings.data_dir / "locks" / f"{job_id}.lock"
        try:
            with processes.locked(path, wait_s=_CHILD_S, what=f"job {job_id}"):
                with writing(service.engine, for_tenants(tenant_id)) as session:
                    job = session.get_one(Job, (tenant_id, job_id), with_for_update=True)
                    if job.status not in FINAL:
                        budgets.settle(session, job)
                        job.status = "cancelled"
                path.unlink(missing_ok=True)
        except StartRefused:
            raise _unfinished(
                f"job {job_id} was told to stop and has not come to the end of its chunk within {_CHILD_S:g} s"
            ) from None


def _list_recorded(service: Service, tenant_id: str) -> None:
    """Give those keys a row that the record names and no row does: an older database was restored after they were made."""
    recorded = KeyRecord(service.settings.key_record_dir).of(tenant_id)
    with writing(service.engine, for_tenants(tenant_id)) as session:
        rows = session.scalars(select(TenantKey).where(TenantKey.tenant_id == tenant_id)).all()
        listed, newest = {row.key_id for row in rows}, max(row.version for row in rows)
        for version, key in enumerate((each for each in recorded if each.key_id not in listed), newest + 1):
            session.add(
                TenantKey(
                    tenant_id=tenant_id,
                    version=version,
                    provider=key.provider,
                    key_id=key.key_id,
                    state="decrypt-only",
                    created=key.created,
                )
            )
            log.warning("key.recorded_alone", extra={"tenant_id": tenant_id, "key_id": key.key_id})


def _destroy_keys(service: Service, tenant_id: str) -> None:
    with reading(service.engine, for_tenants(tenant_id)) as session:
        left = session.scalars(
            select(TenantKey)
            .where(TenantKey.tenant_id == tenant_id, TenantKey.state != "destroyed")
            .order_by(TenantKey.version)
        ).all()
    for key in left:
        try:
            provider = service.keys.of(key.provider)
            if not _is_noted(service, key):
                _note_key(service, key, _told(key, provider))
            with suppress(KeyMissing):  # an earlier run came so far; where none did, that it was gone is written down
                provider.destroy_key(key.key_id)
        except KeyProviderError as error:
            if service.keys.is_customers(key.provider):
                _note_key(service, key, _unreached(error))
                log.warning("key.not_reached", extra={"tenant_id": tenant_id, "version": key.version})
                _end_key(service, key)
                continue
            raise _unfinished(
                f"version {key.version} of its key is not destroyed, since its provider {key.provider!r} refuses: {error}"
            ) from None
        _end_key(service, key)
        log.info("key.destroyed", extra={"tenant_id": tenant_id, "version": key.version, "provider": key.provider})


def _end_key(service: Service, key: TenantKey) -> None:
    with writing(service.engine, for_tenants(key.tenant_id)) as session:
        row = session.get_one(TenantKey, (key.tenant_id, key.version), with_for_update=True)
        row.state, row.destroyed = "destroyed", now()


def _is_noted(service: Service, key: TenantKey) -> bool:
    with reading(service.engine, for_tenants(key.tenant_id)) as session:
        return str(key.version) in _notes(session, key.tenant_id)["keys"]


def _note_key(service: Service, key: TenantKey, told: dict[str, Any]) -> None:
    """Write down what the receipt is to say of a key before it is destroyed: whether it was there, nobody can tell afterwards."""
    with writing(service.engine, for_tenants(key.tenant_id)) as session:
        noted = _notes(session, key.tenant_id)["keys"]
        _note(session, key.tenant_id, keys={**noted, str(key.version): told})


def _told(key: TenantKey, provider: KeyProvider) -> dict[str, Any]:
    destruction = provider.destruction
    if not destruction.is_ours:
        return {"outcome": "left", "claim": destruction.claim, "waiting_days": None}
    try:
        is_there = provider.has_key(key.key_id)
    except KeystoreDamaged:
        is_there = True  # its file is, and is destroyed like any other
    if not is_there:
        claim = "Its provider did not have the key when it was told to destroy it. What became of it is not known here."
        return {"outcome": "absent", "claim": claim, "waiting_days": None}
    return {"outcome": "destroyed", "claim": destruction.claim, "waiting_days": destruction.waiting_days}


def _unreached(error: KeyProviderError) -> dict[str, Any]:
    """Of a customer's provider that did not answer, or refused: the customer has withdrawn it, or it is away."""
    claim = (
        f"The key is with a provider that the customer holds, which could not be reached when it was to be destroyed "
        f"({type(error).__name__}). Whether it is still there is not known here, and its end is the customer's to see to: "
        "what was destroyed here are the wrapped data keys, and copies of those open while the key is there."
    )
    return {"outcome": "unreached", "claim": claim, "waiting_days": None}


def _delete_blobs(service: Service, tenant_id: str) -> None:
    """Delete every object of the tenant's, those too that no row names: nothing is sealed for it any more. The rows go last."""
    with reading(service.engine, for_tenants(tenant_id)) as session:
        named = session.scalars(select(SealedObject.id).where(SealedObject.tenant_id == tenant_id)).all()
    for first in range(0, len(named), _AT_ONCE):
        service.blobs.delete(tenant_id, *named[first : first + _AT_ONCE])
    for page in service.blobs.pages(tenant_id):
        service.blobs.delete(tenant_id, *(each.name for each in page))


def _conclude(service: Service, principal: Principal) -> dict[str, Any]:
    """Delete the rows and sign the receipt: there is one if, and only if, all of it is done."""
    tenant_id = principal.tenant_id

    def concluded(session: Session) -> dict[str, Any]:
        gone = _counted(session, tenant_id)
        for table in _DELETED:
            session.execute(delete(table).where(_of(table, tenant_id)))
        for name, count in _withdraw(
            session, service, tenant_id
        ).items():  # what came in at the very moment of the closing
            gone[name] = gone.get(name, 0) + count
        notes = _notes(session, tenant_id)
        for name, count in notes["deleted"].items():
            gone[name] = gone.get(name, 0) + count
        key_id, private_key = vault.certificate_signer(session, service.keys)
        tenant = session.get_one(Tenant, tenant_id, populate_existing=True, with_for_update=True)
        authorized = policy.authorize(session, principal, "tenant.administer", tenant)
        stated = receipts.stated(session, service, tenant, notes=notes, deleted=gone)
        tenant.receipt = sign_receipt(stated, private_key=private_key, key_id=key_id)
        tenant.status = "shredded"
        audit.allowed(session, authorized, "tenant.shredded", tenant_id)
        return tenant.receipt

    return service.write(ALL_TENANTS, concluded)


def _counted(session: Session, tenant_id: str) -> dict[str, int]:
    """What a receipt counts of what is sealed: nothing from which rows or users could be counted."""
    beside_rows = SealedObject.kind.not_in(_OF_ROWS)
    return {
        "wrapped_keys": _count(session, SealedObject, SealedObject.tenant_id == tenant_id, beside_rows),
        "uploaded_weights": _count(session, Weights, Weights.tenant_id == tenant_id),
    }


def _cancel_jobs(session: Session, tenant_id: str) -> None:
    session.execute(
        update(Job)
        .where(Job.tenant_id == tenant_id, Job.status.not_in(FINAL))
        .values(cancel_requested=True, status=case((Job.status == "running", "cancelling"), else_=Job.status))
    )


def _withdraw(session: Session, service: Service, tenant_id: str) -> dict[str, int]:
    """Delete the tenant's clients and accounts, all that they may do anywhere, and all that anybody may do here; how many of each.

    Their tokens are refused in this process from the next request on, elsewhere within a second.
    """
    verifier.forget_after(session, service)
    grants = _deleted(session, Grant, _grants_of(tenant_id))
    people = select(User.id).where(User.tenant_id == tenant_id)
    for of_a_person in (Login, BrowserSession, Authorization):
        session.execute(delete(of_a_person).where(of_a_person.user_id.in_(people)))
    forget_subjects_of_tenant(session, tenant_id)
    for table in (Member, Group):
        session.execute(delete(table).where(_of(table, tenant_id)))
    accounts = _deleted(session, User, User.tenant_id == tenant_id)
    return {"clients": _deleted(session, App, App.tenant_id == tenant_id), "grants": grants, "accounts": accounts}


def _grants_of(tenant_id: str) -> Any:
    holders = union_all(*(select(table.id).where(table.tenant_id == tenant_id) for table in (App, User, Group)))
    return or_(Grant.tenant_id == tenant_id, Grant.principal_id.in_(holders))


def _notes(session: Session, tenant_id: str) -> dict[str, Any]:
    notes = session.get_one(Tenant, tenant_id, populate_existing=True).receipt
    assert notes is not None  # noqa: S101 (closing the tenant wrote the first of them)
    return notes


def _note(session: Session, tenant_id: str, **more: Any) -> Tenant:
    """Add to what is written down of this shredding, under the lock of the tenant's row."""
    tenant = session.get_one(Tenant, tenant_id, populate_existing=True, with_for_update=True)
    tenant.receipt = {**(tenant.receipt or {}), **more}
    return tenant


def _count(session: Session, table: type[Table], *where: Any) -> int:
    return int(session.scalar(select(func.count()).select_from(table).where(*where)) or 0)


def _deleted(session: Session, table: type[Table], where: Any) -> int:
    count: int = session.execute(delete(table).where(where)).rowcount  # type: ignore[attr-defined]  # of a DELETE there is one
    return count


def _of(table: type[Table], tenant_id: str) -> Any:
    return table.__table__.c.tenant_id == tenant_id


def _unfinished(why: str) -> Conflict:
    return Conflict(
        f"the tenant is closed, and not shredded yet: {why}; see to that and run the command again, which goes on from there",
        code="shredding_unfinished",
    )
