"""States of the keys that sign access tokens, tokens that were revoked before they expired, public keys of clients.

Locks: on PostgreSQL `signing_keys` and `apps`, exclusively but for milliseconds; constant defaults rewrite no row. On SQLite the
database, as long. Way back: `downgrade` drops the tables and columns; with them every signing key but the active one goes,
clients with a public key need a secret (`client rotate`), and revoked tokens
are believed again until they expire, ten minutes at most.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "signing_keys", sa.Column("state", sa.String(length=16), nullable=False, server_default=sa.text("'active'"))
    )
    op.add_column("signing_keys", sa.Column("until", sa.DateTime(), nullable=True))
    op.create_table(
        "revoked_tokens",
        sa.Column("jti", sa.String(length=64), primary_key=True),
        sa.Column("until", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_revoked_tokens_until", "revoked_tokens", ["until"])
    op.add_column("apps", sa.Column("public_key", sa.JSON(), nullable=True))
    op.add_column("apps", sa.Column("dpop", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.create_table(
        "seen_proofs",
        sa.Column("digest", sa.LargeBinary(length=32), primary_key=True),
        sa.Column("until", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_seen_proofs_until", "seen_proofs", ["until"])


def downgrade() -> None:
    op.drop_table("seen_proofs")
    for column in ("dpop", "public_key"):
        op.drop_column("apps", column)
    op.drop_table("revoked_tokens")
    op.execute("DELETE FROM signing_keys WHERE state <> 'active'")
    for column in ("until", "state"):
        op.drop_column("signing_keys", column)
