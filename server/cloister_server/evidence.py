"""Evidence that nothing was tampered with: a tenant's chain verified, its head signed, and compared with one signed earlier.

Knows SQL and the chain; nothing of HTTP. The operator's alone: whoever holds the deployment runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AwareDatetime, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister.wire._model import Identifier, Response
from cloister.wire.dsse import Digest, Envelope, InvalidCertificate, sign_statement, verify_statement
from cloister_server import ledger, policy, vault
from cloister_server.errors import Invalid
from cloister_server.keyring import KeyRing
from cloister_server.principal import Principal
from cloister_server.store import chain
from cloister_server.store.chain import GENESIS, ChainBroken, Head
from cloister_server.store.queries import blocks_of, public_keys
from cloister_server.store.tables import Balance, LedgerEntry, Link, Source, Tenant, now

__all__ = ["HEAD_TYPE", "ChainHead", "Comparison", "compare", "opened_head", "signed_head", "sources_of", "verify"]

HEAD_TYPE = "urn:cloister:chain-head:1"
_PAGE = 500
_TERMS = {
    "freeze": ("unit", "adjacency", "epsilon", "delta", "public", "owner_id"),
    "budget": ("epsilon",),
}
"""What the kinds of row say of their source."""


class ChainHead(Response):
    """How far a tenant's chain had come: every later state of the same ledger has this link."""

    tenant: Identifier
    count: Annotated[int, Field(ge=0)]
    head: Digest
    time: AwareDatetime


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a chain is to a head that was signed earlier: `problem` is None where it goes on from it."""

    tenant_id: str
    then: int
    now: int
    problem: str | None


def verify(session: Session, principal: Principal) -> Head:
    """Walk the tenant's chain, then see that balances and budgets follow from it. Raises ChainBroken at the first fault.

    For a snapshot: a balance is compared with the row that it follows from.
    """
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    head = chain.verify(session, tenant.id)
    for source in sources_of(session, tenant.id):
        _require_derived(session, source)
    return head


def signed_head(session: Session, principal: Principal, keys: KeyRing) -> dict[str, Any]:
    """The chain's newest link in a DSSE envelope, to be kept elsewhere: by it a later state is told from a forged one."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    newest = chain.head(session, tenant.id)
    key_id, private_key = vault.certificate_signer(session, keys)
    head = ChainHead(tenant=tenant.id, count=newest.count, head=newest.digest.hex(), time=now())
    return sign_statement(head, _subject(head), predicate_type=HEAD_TYPE, private_key=private_key, key_id=key_id)


def opened_head(session: Session, envelope: Envelope) -> ChainHead:
    """The head in an envelope that this service signed. Raises Invalid where it did not."""
    keys = public_keys(session, "certificate")
    try:
        return verify_statement(envelope, keys, kind=ChainHead, predicate_type=HEAD_TYPE, subject=_subject)
    except InvalidCertificate as refusal:
        raise Invalid(f"this is no chain head of this service ({refusal}); give what `audit head` printed") from None


def compare(session: Session, principal: Principal, then: ChainHead) -> Comparison:
    """Whether the tenant's present chain goes on from that head."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    newest = chain.head(session, tenant.id).count
    link = session.get(Link, (tenant.id, then.count))
    there = GENESIS if then.count == 0 else None if link is None else link.digest
    problem = None
    if newest < then.count:
        problem = (
            f"links {newest + 1} to {then.count} are missing: an older database was restored, or they were removed"
        )
    elif there is None or there.hex() != then.head:
        problem = (
            f"link {then.count} is another now: a database of another past was restored, or the chain was rewritten"
        )
    return Comparison(tenant.id, then.count, newest, problem)


def sources_of(session: Session, tenant_id: str) -> list[Source]:
    """Every source of a tenant, by id: for the operator, who may see that each is there."""
    return list(session.scalars(select(Source).where(Source.tenant_id == tenant_id).order_by(Source.id)))


def _subject(head: ChainHead) -> dict[str, Any]:
    return {"name": head.tenant, "digest": {"sha256": head.head}}


def _require_derived(session: Session, source: Source) -> None:
    """Raise ChainBroken unless the source's balances, epsilon and delta are what its ledger makes of them: none is linked itself."""
    books, with_balances, terms, blocks = ledger.Books(), set[int](), dict[str, Any](), set[tuple[int, str]]()
    for row, written in _entries(session, source):
        place = f"ledger {source.id}/{row.revision}"
        changed = _entered(books, row)
        for (block, holder_id), used in written.items():
            derived = books.of_block(block).get(holder_id)
            if derived is None or derived.to_json() != used:
                raise ChainBroken(
                    f"the balance of {holder_id} in block {block} does not follow from the rows", row=place
                )
            with_balances.add(block)
        for block, holder_id in changed:
            if block in with_balances and (block, holder_id) not in written:
                raise ChainBroken(f"the balance of {holder_id} in block {block} is missing", row=place)
        if row.kind in _TERMS:
            terms |= {name: row.event[name] for name in _TERMS[row.kind] if name in row.event}
        if row.kind == "block":
            blocks.add((row.block, row.event["name"]))
    for name, value in terms.items():
        if getattr(source, name) != value:
            raise ChainBroken(
                f"{name} is {_shown(getattr(source, name))}, and the ledger says {_shown(value)}",
                row=f"source {source.id}",
            )
    if set(blocks_of(session, source)[1:]) != blocks:
        raise ChainBroken("its blocks are not those that the ledger says were opened", row=f"source {source.id}")


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _entered(books: ledger.Books, row: LedgerEntry) -> dict[tuple[int, str], ledger.Used]:
    try:
        return books.enter(row)
    except (KeyError, TypeError, ValueError):
        raise ChainBroken("no balance follows from this row", row=f"ledger {row.source_id}/{row.revision}") from None


def _entries(session: Session, source: Source) -> Iterator[tuple[LedgerEntry, dict[tuple[int, str], Any]]]:
    """The source's rows in order, each with the balances that were written down with it, by block and holder."""
    rows = select(LedgerEntry).where(LedgerEntry.tenant_id == source.tenant_id, LedgerEntry.source_id == source.id)
    balances = select(Balance).where(Balance.tenant_id == source.tenant_id, Balance.source_id == source.id)
    after = 0
    while page := session.scalars(
        rows.where(LedgerEntry.revision > after).order_by(LedgerEntry.revision).limit(_PAGE)
    ).all():
        written: dict[int, dict[tuple[int, str], Any]] = {}
        for each in session.scalars(balances.where(Balance.revision.between(page[0].revision, page[-1].revision))):
            written.setdefault(each.revision, {})[each.block, each.holder_id] = each.used
        yield from ((row, written.get(row.revision, {})) for row in page)
        after = page[-1].revision
