"""Issuers of others whose tokens are taken, and whom of ours each of their subjects is.

Locks: none on what is there. Way back: `downgrade` drops both tables: nobody is let in by another's token any more.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "issuers",
        sa.Column("id", sa.String(length=40), primary_key=True),
        sa.Column("url", sa.String(length=512), nullable=False, unique=True),
        sa.Column("jwks_uri", sa.String(length=2048), nullable=False),
        sa.Column("audience", sa.String(length=512), nullable=False),
        sa.Column("algorithms", sa.JSON(), nullable=False),
        sa.Column("typ", sa.String(length=16), nullable=False),
        sa.Column("network", sa.String(length=16), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
    )
    op.create_table(
        "issuer_subjects",
        sa.Column("issuer_id", sa.String(length=40), primary_key=True),
        sa.Column("subject", sa.String(length=255), primary_key=True),
        sa.Column("principal_id", sa.String(length=40), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_issuer_subjects_principal", "issuer_subjects", ["principal_id"])


def downgrade() -> None:
    op.drop_table("issuer_subjects")
    op.drop_table("issuers")
