"""The tables of other issuers: whose tokens are taken, by which rules, and whom of ours each of their subjects is.

An issuer is the deployment's; who its subjects are is a tenant's, and one subject is one principal of one tenant.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import JSON, Index, Select, String, exists, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from cloister_server.store.identities import User
from cloister_server.store.tables import App, Table, Tenant, now

__all__ = ["Issuer", "IssuerSubject", "issuer_of_url", "issuers", "standing_of_subject", "subjects_of"]

_ID = String(40)


class Issuer(Table):
    """An authorization server of others, as its tokens must be."""

    __tablename__ = "issuers"
    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    """A fresh one each time that it is added: what was remembered of it before is of nobody."""
    url: Mapped[str] = mapped_column(unique=True)
    """Exactly the `iss` of its tokens."""
    jwks_uri: Mapped[str] = mapped_column(String(2048))
    """Where its keys are, as it said when it was added: a token never says."""
    audience: Mapped[str]
    algorithms: Mapped[list[str]] = mapped_column(JSON)
    typ: Mapped[str] = mapped_column(String(16))
    """In its tokens' headers: 'at+jwt' (RFC 9068) or 'JWT'."""
    network: Mapped[str] = mapped_column(String(16))
    """Where it may be: 'public', 'private' or 'loopback'."""
    created: Mapped[datetime] = mapped_column(default=now)


class IssuerSubject(Table):
    """Whom of a tenant's an issuer's subject is."""

    __tablename__ = "issuer_subjects"
    __table_args__ = (Index("ix_issuer_subjects_principal", "tenant_id", "principal_id"),)
    issuer_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    subject: Mapped[str] = mapped_column(String(255), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(_ID)
    principal_id: Mapped[str] = mapped_column(_ID)
    created: Mapped[datetime] = mapped_column(default=now)


def issuers() -> Select[Issuer]:
    """Every issuer whose tokens are taken, oldest first."""
    return select(Issuer).order_by(Issuer.created, Issuer.id)


def issuer_of_url(session: Session, url: str) -> Issuer | None:
    return session.scalars(select(Issuer).where(Issuer.url == url)).one_or_none()


def subjects_of(tenant_id: str) -> Select[IssuerSubject, Issuer]:
    """(subject, issuer) of every row of a tenant, oldest first."""
    return (
        select(IssuerSubject, Issuer)
        .join(Issuer, Issuer.id == IssuerSubject.issuer_id)
        .where(IssuerSubject.tenant_id == tenant_id)
        .order_by(IssuerSubject.created, IssuerSubject.subject)
    )


def standing_of_subject(session: Session, issuer_id: str, subject: str) -> tuple[str, str] | None:
    """(tenant, principal) that an issuer's subject is; None where it is nobody, the issuer is removed, the principal is gone or
    disabled, or the tenant is not active."""
    is_theirs = {
        table: (table.tenant_id == IssuerSubject.tenant_id) & (table.id == IssuerSubject.principal_id)
        for table in (User, App)
    }
    row = session.execute(
        select(IssuerSubject.tenant_id, IssuerSubject.principal_id)
        .join(Issuer, Issuer.id == IssuerSubject.issuer_id)
        .join(Tenant, Tenant.id == IssuerSubject.tenant_id)
        .where(
            IssuerSubject.issuer_id == issuer_id,
            IssuerSubject.subject == subject,
            Tenant.status == "active",
            Tenant.suspended.is_(None),
            or_(exists().where(is_theirs[User], User.status != "disabled"), exists().where(is_theirs[App])),
        )
    ).one_or_none()
    return None if row is None else (row.tenant_id, row.principal_id)
