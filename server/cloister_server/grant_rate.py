"""How often in a minute something is decided by a grant that is bound to a rate, all processes together. Decides nothing itself.

Whoever decides is in a transaction: what this process has taken already is spent there. Where that is used up the transaction ends,
a share is taken in one of its own, and it runs again, as with what a key provider is asked for (`asking`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from cloister_server import asking
from cloister_server.keyring import KeyRing
from cloister_server.store import shares
from cloister_server.store.acting import for_tenants
from cloister_server.store.session import writing
from cloister_server.store.shares import Share, shares_of
from cloister_server.store.tables import Grant, GrantCount

__all__ = ["use"]

_USES = "grant_uses"


def use(session: Session, *, tenant_id: str, grant_id: str) -> int:
    """Count a use of the grant, once, however often the transaction runs: 0, or the seconds to wait, and then none is counted.

    Raises AskedInTransaction in one that `asking.run` did not begin.
    """
    uses: Counter[str] = session.info.setdefault(_USES, Counter())
    uses[grant_id] += 1
    engine: Engine = session.get_bind().engine
    question = _Use(tenant_id, grant_id, uses[grant_id], engine)
    if not asking.is_answered(session, question) and (spent := shares_of(engine).spend(grant_id)) is not None:
        asking.note(session, question, spent)
    (wait_s,) = asking.answered(session, question)
    return wait_s


@dataclass(frozen=True, slots=True)
class _Use:
    tenant_id: str
    grant_id: str
    number: int
    """Which of the transaction's uses of the grant."""
    engine: Engine = field(compare=False, repr=False)

    def ask(self, _: KeyRing) -> int:
        return shares_of(self.engine).use(self.grant_id, self._taken)

    def _taken(self, at: float) -> Share:
        with writing(self.engine, for_tenants(self.tenant_id)) as session:
            grant = session.get(Grant, (self.tenant_id, self.grant_id), with_for_update=True)
            if grant is None or grant.requests_per_minute is None:  # it was removed: another decides
                return shares.unbounded(at)
            count = session.get(GrantCount, (self.tenant_id, self.grant_id))
            if count is None:
                count = GrantCount(tenant_id=self.tenant_id, grant_id=self.grant_id, minute=0, taken=0)
                session.add(count)
            return shares.take(count, grant.requests_per_minute, at=at)
