"""The tables of people: who they are, their logins, what they are asked to allow. Secrets lie here as MACs or sealed."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Index, LargeBinary, Select, String, UniqueConstraint, delete, exists, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from cloister_server.store.isolation import lifted
from cloister_server.store.tables import Owned, RevokedToken, SigningKey, Table, Tenant, now

__all__ = [
    "Authorization",
    "BrowserSession",
    "Login",
    "SignInTry",
    "User",
    "forget_logins_by",
    "forget_old_logins",
    "login_of_handle",
    "login_of_id",
    "standing_of_login",
    "user_of_account",
    "user_of_id",
    "user_of_name",
    "users_of",
]

_ID = String(40)
_MAC = LargeBinary(32)


class User(Owned, Table):
    """A person with an account in a tenant: a principal of their own, who holds grants as apps do."""

    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("tenant_id", "name"), Index("ix_users_id", "id"))
    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    name: Mapped[str]
    status: Mapped[str] = mapped_column(String(16))
    """'invited': has yet to choose a passphrase; 'active'; or 'disabled'."""
    passphrase: Mapped[str | None]
    """Argon2id in PHC form, under the service's pepper."""
    totp_sealed: Mapped[bytes | None]
    """The second factor's secret, sealed under a key of the service."""
    totp_step: Mapped[int] = mapped_column(default=0)
    """The time step of the last code that was taken: none is taken twice, and none that is older."""
    invitation_mac: Mapped[bytes | None] = mapped_column(_MAC)
    invitation_until: Mapped[datetime | None]
    created: Mapped[datetime] = mapped_column(default=now)


class Login(Owned, Table):
    """One app that acts for one person, from their consent to its end: a family of refresh tokens (RFC 9700, section 4.14)."""

    __tablename__ = "logins"
    __table_args__ = (Index("ix_logins_id", "id"), Index("ix_logins_user", "tenant_id", "user_id"))
    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    """Stands in access tokens as `sid`, which every API that gets one can read: it opens and ends nothing."""
    handle: Mapped[str] = mapped_column(_ID, unique=True)
    """Stands in refresh tokens, beside a MAC."""
    user_id: Mapped[str] = mapped_column(_ID)
    client_id: Mapped[str] = mapped_column(_ID)
    generation: Mapped[int] = mapped_column(default=1)
    """Of the one refresh token that is good: an earlier one was used already."""
    jkt: Mapped[str | None] = mapped_column(String(64))
    """The key that a public client's refresh tokens are bound to (RFC 9449, section 5)."""
    created: Mapped[datetime] = mapped_column(default=now)
    used: Mapped[datetime] = mapped_column(default=now)
    until: Mapped[datetime] = mapped_column(index=True)


class Authorization(Table):
    """What a person was, or is to be, asked to allow: kind 'code' (RFC 6749, section 4.1) or 'device' (RFC 8628)."""

    __tablename__ = "authorizations"
    mac: Mapped[bytes] = mapped_column(_MAC, primary_key=True)
    """Of the authorization code or the device code."""
    kind: Mapped[str] = mapped_column(String(8))
    client_id: Mapped[str] = mapped_column(_ID)
    state: Mapped[str] = mapped_column(String(16))
    """'pending', 'allowed', 'denied' or 'used'."""
    user_code_mac: Mapped[bytes | None] = mapped_column(_MAC, unique=True)
    asked_from: Mapped[bytes | None] = mapped_column(_MAC)
    """The address that began a device's, as a MAC: what one may have open at once is bounded."""
    user_id: Mapped[str | None] = mapped_column(_ID)
    login_id: Mapped[str | None] = mapped_column(_ID)
    """Once it is used: what is ended where it is used again."""
    redirect_uri: Mapped[str | None] = mapped_column(String(2048))
    challenge: Mapped[str | None] = mapped_column(String(64))
    jkt: Mapped[str | None] = mapped_column(String(64))
    polled: Mapped[datetime | None]
    interval_s: Mapped[int] = mapped_column(default=0)
    until: Mapped[datetime] = mapped_column(index=True)


class BrowserSession(Table):
    """A browser in which somebody has signed in, by the MAC of its cookie."""

    __tablename__ = "browser_sessions"
    mac: Mapped[bytes] = mapped_column(_MAC, primary_key=True)
    user_id: Mapped[str] = mapped_column(_ID)
    until: Mapped[datetime] = mapped_column(index=True)


class SignInTry(Table):
    """How often somebody failed to sign in, by the MAC of an account and an address, real or not."""

    __tablename__ = "sign_in_tries"
    mac: Mapped[bytes] = mapped_column(_MAC, primary_key=True)
    failures: Mapped[int] = mapped_column(default=0)
    next_try: Mapped[datetime] = mapped_column(default=now)
    until: Mapped[datetime] = mapped_column(index=True)


def users_of(tenant_id: str) -> Select[User]:
    return select(User).where(User.tenant_id == tenant_id).order_by(User.created, User.id)


def user_of_id(session: Session, user_id: str) -> User | None:
    """The person of this id, in whatever tenant: who it is, not what they may."""
    with lifted(session):
        return session.scalars(select(User).where(User.id == user_id)).one_or_none()


def user_of_name(session: Session, tenant_id: str, name: str) -> User | None:
    return session.scalars(select(User).where(User.tenant_id == tenant_id, User.name == name)).one_or_none()


def user_of_account(session: Session, account: str) -> User | None:
    """The person of `TENANT/NAME`, in a tenant that is active and not suspended."""
    tenant, _, name = account.partition("/")
    return session.scalars(
        select(User)
        .join(Tenant, Tenant.id == User.tenant_id)
        .where(Tenant.name == tenant, Tenant.status == "active", Tenant.suspended.is_(None), User.name == name)
    ).one_or_none()


def login_of_id(session: Session, login_id: str | None) -> Login | None:
    """The login of this id, in whatever tenant."""
    return session.scalars(select(Login).where(Login.id == login_id)).one_or_none()


def login_of_handle(session: Session, handle: str, *, is_locked: bool = False) -> Login | None:
    """The login of a refresh token, in whatever tenant, unless it is over."""
    found = select(Login).where(Login.handle == handle, Login.until > now())
    return session.scalars(found.with_for_update() if is_locked else found).one_or_none()


def forget_old_logins(session: Session) -> None:
    session.execute(delete(Login).where(Login.until < now()))


def forget_logins_by(session: Session, client_id: str) -> None:
    """Those by one app, of whatever tenant's people."""
    session.execute(delete(Login).where(Login.client_id == client_id))


def standing_of_login(
    session: Session, login_id: str, *, user_id: str, client_id: str, key_id: str, jti: str
) -> str | None:
    """The tenant of a person whose token this is; None where the login is over, the person or their tenant is not active, or the
    token or the key that signed it is revoked."""
    is_revoked = exists().where(RevokedToken.jti == jti)
    is_believed = exists().where(
        SigningKey.id == key_id,
        SigningKey.purpose == "token",
        SigningKey.state.in_(("active", "retiring")),
        or_(SigningKey.until.is_(None), SigningKey.until > now()),
    )
    return session.scalar(
        select(Login.tenant_id)
        .join(User, (User.tenant_id == Login.tenant_id) & (User.id == Login.user_id))
        .join(Tenant, Tenant.id == Login.tenant_id)
        .where(
            Login.id == login_id,
            Login.client_id == client_id,
            Login.until > now(),
            User.id == user_id,
            User.status == "active",
            Tenant.status == "active",
            Tenant.suspended.is_(None),
            is_believed,
            ~is_revoked,
        )
    )
