"""People: accounts, logins, what they are asked to allow, browsers they are signed in with, and tries to sign in.

Locks: on PostgreSQL `apps`, exclusively but for milliseconds; a constant default rewrites no row. On SQLite the database, as long.
Way back: `downgrade` drops the tables and columns: people and their tokens are gone, and public clients with them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from cloister_server.store.row_security import secured

revision = "0010"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("apps", sa.Column("public", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.add_column("apps", sa.Column("redirect_uris", sa.JSON(), nullable=True))
    op.create_table(
        "users",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("id", sa.String(length=40), primary_key=True),
        sa.Column("name", sa.String(length=512), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("passphrase", sa.String(length=512), nullable=True),
        sa.Column("totp_sealed", sa.LargeBinary(), nullable=True),
        sa.Column("totp_step", sa.Integer(), nullable=False),
        sa.Column("invitation_mac", sa.LargeBinary(length=32), nullable=True),
        sa.Column("invitation_until", sa.DateTime(), nullable=True),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.UniqueConstraint("tenant_id", "name"),
    )
    op.create_index("ix_users_id", "users", ["id"])
    op.create_table(
        "logins",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("id", sa.String(length=40), primary_key=True),
        sa.Column("handle", sa.String(length=40), nullable=False, unique=True),
        sa.Column("user_id", sa.String(length=40), nullable=False),
        sa.Column("client_id", sa.String(length=40), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("jkt", sa.String(length=64), nullable=True),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.Column("used", sa.DateTime(), nullable=False),
        sa.Column("until", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_logins_id", "logins", ["id"])
    op.create_index("ix_logins_user", "logins", ["tenant_id", "user_id"])
    op.create_index("ix_logins_until", "logins", ["until"])
    op.create_table(
        "authorizations",
        sa.Column("mac", sa.LargeBinary(length=32), primary_key=True),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("client_id", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("user_code_mac", sa.LargeBinary(length=32), nullable=True, unique=True),
        sa.Column("asked_from", sa.LargeBinary(length=32), nullable=True),
        sa.Column("user_id", sa.String(length=40), nullable=True),
        sa.Column("login_id", sa.String(length=40), nullable=True),
        sa.Column("redirect_uri", sa.String(length=2048), nullable=True),
        sa.Column("challenge", sa.String(length=64), nullable=True),
        sa.Column("jkt", sa.String(length=64), nullable=True),
        sa.Column("polled", sa.DateTime(), nullable=True),
        sa.Column("interval_s", sa.Integer(), nullable=False),
        sa.Column("until", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_authorizations_until", "authorizations", ["until"])
    op.create_table(
        "browser_sessions",
        sa.Column("mac", sa.LargeBinary(length=32), primary_key=True),
        sa.Column("user_id", sa.String(length=40), nullable=False),
        sa.Column("until", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_browser_sessions_until", "browser_sessions", ["until"])
    op.create_table(
        "sign_in_tries",
        sa.Column("mac", sa.LargeBinary(length=32), primary_key=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("next_try", sa.DateTime(), nullable=False),
        sa.Column("until", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_sign_in_tries_until", "sign_in_tries", ["until"])
    if op.get_bind().dialect.name != "sqlite":
        for statement in (*secured("users"), *secured("logins")):
            op.execute(statement)


def downgrade() -> None:
    for table in ("sign_in_tries", "browser_sessions", "authorizations", "logins", "users"):
        op.drop_table(table)
    op.execute("DELETE FROM apps WHERE public")
    for column in ("redirect_uris", "public"):
        op.drop_column("apps", column)
