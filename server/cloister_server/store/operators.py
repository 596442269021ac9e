"""The tables of who may administer the deployment, and of the one token that makes the first of them."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKeyConstraint, LargeBinary, String, delete, exists, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from cloister_server.store.identities import User
from cloister_server.store.isolation import lifted
from cloister_server.store.tables import Owned, Table, Tenant, now

__all__ = ["FirstAdminToken", "Operator", "forget_first_tokens", "is_operator", "operators"]


class Operator(Owned, Table):
    """A person who may administer the whole deployment, by tokens of scope `admin`. Goes with the account."""

    __tablename__ = "operators"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "id"], ["users.tenant_id", "users.id"], ondelete="CASCADE"),)
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    """The person's."""
    created: Mapped[datetime] = mapped_column(default=now)


class FirstAdminToken(Table):
    """The token that makes the first operator, as a MAC: there is one at a time, and it is good once."""

    __tablename__ = "first_admin_tokens"
    mac: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    until: Mapped[datetime]


def is_operator(session: Session, user_id: str) -> bool:
    """Whether this person is one, and may act at all: asked of the database each time."""
    found = exists().where(
        Operator.id == user_id,
        User.tenant_id == Operator.tenant_id,
        User.id == Operator.id,
        User.status == "active",
        Tenant.id == Operator.tenant_id,
        Tenant.status == "active",
        Tenant.suspended.is_(None),
    )
    with lifted(session):
        return bool(session.scalar(select(found)))


def operators(session: Session) -> list[User]:
    """Every operator's account, whether or not it was taken up yet; oldest first."""
    of_operators = select(User).join(Operator, (Operator.tenant_id == User.tenant_id) & (Operator.id == User.id))
    return list(session.scalars(of_operators.order_by(Operator.created, User.id)))


def forget_first_tokens(session: Session) -> None:
    session.execute(delete(FirstAdminToken))
