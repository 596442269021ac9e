"""The tables of other issuers: whose tokens are taken, by which rules, and whom of ours each of their subjects is.

An issuer is the deployment's. A subject's row is looked up before anybody is known: it names a principal alone, who is of one tenant.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import JSON, ColumnElement, Index, Select, String, delete, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from cloister_server.store.identities import User
from cloister_server.store.tables import App, Table, Tenant, now

__all__ = [
    "Issuer",
    "IssuerSubject",
    "forget_subjects_of",
    "forget_subjects_of_tenant",
    "issuer_of_url",
    "issuers",
    "standing_of_subject",
    "subject_of",
    "subjects_of",
    "tenants_of_subjects",
]

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
    """Whom of ours an issuer's subject is."""

    __tablename__ = "issuer_subjects"
    __table_args__ = (Index("ix_issuer_subjects_principal", "principal_id"),)
    issuer_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    subject: Mapped[str] = mapped_column(String(255), primary_key=True)
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
        .where(_is_of(tenant_id))
        .order_by(IssuerSubject.created, IssuerSubject.subject)
    )


def standing_of_subject(session: Session, issuer_id: str, subject: str) -> tuple[str, str] | None:
    """(tenant, principal) that an issuer's subject is; None where it is nobody, the issuer is removed, the principal is gone or
    disabled, or the tenant is not active."""
    row = session.execute(
        select(Tenant.id, IssuerSubject.principal_id)
        .select_from(IssuerSubject)
        .join(Issuer, Issuer.id == IssuerSubject.issuer_id)
        .outerjoin(User, (User.id == IssuerSubject.principal_id) & (User.status != "disabled"))
        .outerjoin(App, App.id == IssuerSubject.principal_id)
        .join(Tenant, or_(Tenant.id == User.tenant_id, Tenant.id == App.tenant_id))
        .where(
            IssuerSubject.issuer_id == issuer_id,
            IssuerSubject.subject == subject,
            Tenant.status == "active",
            Tenant.suspended.is_(None),
        )
    ).one_or_none()
    return None if row is None else (row.id, row.principal_id)


def tenants_of_subjects(session: Session, issuer_id: str) -> list[str]:
    """Whose principals come by this issuer."""
    people = select(User.tenant_id).join(IssuerSubject, IssuerSubject.principal_id == User.id)
    apps = select(App.tenant_id).join(IssuerSubject, IssuerSubject.principal_id == App.id)
    of_issuer = IssuerSubject.issuer_id == issuer_id
    return sorted({*session.scalars(people.where(of_issuer)), *session.scalars(apps.where(of_issuer))})


def subject_of(session: Session, tenant_id: str, issuer_id: str, subject: str) -> IssuerSubject | None:
    """The row of an issuer's subject, where it is somebody of this tenant."""
    of_issuer = (IssuerSubject.issuer_id == issuer_id, IssuerSubject.subject == subject)
    return session.scalars(select(IssuerSubject).where(*of_issuer, _is_of(tenant_id))).one_or_none()


def forget_subjects_of(session: Session, principal_id: str) -> None:
    session.execute(delete(IssuerSubject).where(IssuerSubject.principal_id == principal_id))


def forget_subjects_of_tenant(session: Session, tenant_id: str) -> None:
    """While its people and apps are there still."""
    session.execute(delete(IssuerSubject).where(_is_of(tenant_id)).execution_options(synchronize_session=False))


def _is_of(tenant_id: str) -> ColumnElement[bool]:
    people, apps = (select(each.id).where(each.tenant_id == tenant_id) for each in (User, App))
    return or_(IssuerSubject.principal_id.in_(people), IssuerSubject.principal_id.in_(apps))
