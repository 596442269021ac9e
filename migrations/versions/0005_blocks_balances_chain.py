"""Budgets by block with running balances, a hash chain over ledger and audit, users by HMAC, queries as jobs.

Locks: on PostgreSQL `ledger`, `datasets` and `jobs`, exclusively but for milliseconds: constant defaults rewrite no row; four
indexes of the ledger are built, seconds for a million rows. On SQLite the database, as long, and `jobs` is copied.
Rows from before are linked into the chain by `cloister-admin init`, and have no balances: those are derived from the rows once.
Way back: `downgrade` drops the new tables and columns, refused by the unique indexes where a job was charged to two blocks.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_APPEND_ONLY = ("balances", "links")


def upgrade() -> None:
    op.create_table(
        "blocks",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("source_id", sa.String(length=40), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(length=512), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.UniqueConstraint("tenant_id", "source_id", "name"),
        sa.ForeignKeyConstraint(["tenant_id", "source_id"], ["sources.tenant_id", "sources.id"]),
    )
    op.add_column("ledger", sa.Column("block", sa.Integer(), nullable=False, server_default=sa.text("0")))
    _index_ledger(freeze=("tenant_id", "source_id", "block"), reserve=("tenant_id", "job_id", "block"))
    op.create_index("ix_ledger_job", "ledger", ["tenant_id", "job_id"])
    op.add_column("datasets", sa.Column("block", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.create_table(
        "balances",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("source_id", sa.String(length=40), primary_key=True),
        sa.Column("block", sa.Integer(), primary_key=True),
        sa.Column("holder_id", sa.String(length=40), primary_key=True),
        sa.Column("revision", sa.Integer(), primary_key=True),
        sa.Column("used", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "source_id", "revision"], ["ledger.tenant_id", "ledger.source_id", "ledger.revision"]
        ),
    )
    op.create_table(
        "links",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("kind", sa.String(length=512), nullable=False),
        sa.Column("row_id", sa.String(length=512), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.UniqueConstraint("tenant_id", "kind", "row_id"),
    )
    op.create_table(
        "units",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("mac", sa.LargeBinary(length=32), primary_key=True),
        sa.Column("dataset_id", sa.String(length=40), primary_key=True),
        sa.Column("source_id", sa.String(length=40), nullable=False),
        sa.Column("block", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id", "dataset_id"], ["datasets.tenant_id", "datasets.id"]),
    )
    op.create_index("ix_units_dataset", "units", ["tenant_id", "dataset_id"])
    op.create_index("ix_ledger_kind", "ledger", ["tenant_id", "source_id", "kind", "block"])
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("kind", sa.String(length=512), nullable=False, server_default=sa.text("'train'")))
        jobs.add_column(sa.Column("result_id", sa.String(length=40), nullable=True))
        jobs.alter_column("model_id", existing_type=sa.String(length=40), nullable=True)
    for table in _APPEND_ONLY:
        _refuse_changes(table)


def _index_ledger(*, freeze: tuple[str, ...], reserve: tuple[str, ...]) -> None:
    """Make the indexes anew that keep a filter and a reservation unique."""
    for kind, columns in (("freeze", freeze), ("reserve", reserve)):
        where = sa.text(f"kind = '{kind}'")
        op.drop_index(f"ux_ledger_{kind}", "ledger")
        op.create_index(
            f"ux_ledger_{kind}", "ledger", list(columns), unique=True, sqlite_where=where, postgresql_where=where
        )


def _refuse_changes(table: str) -> None:
    """The database itself refuses to change or remove a row that was written."""
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {table}_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{table} is append-only'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_append_only()"
    )


def downgrade() -> None:
    op.drop_table("units")
    for table in _APPEND_ONLY:
        op.drop_table(table)
        if op.get_bind().dialect.name != "sqlite":
            op.execute(f"DROP FUNCTION {table}_append_only")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("result_id")
        jobs.drop_column("kind")
        jobs.alter_column("model_id", existing_type=sa.String(length=40), nullable=False)
    op.drop_column("datasets", "block")
    _index_ledger(freeze=("tenant_id", "source_id"), reserve=("tenant_id", "job_id"))
    op.drop_index("ix_ledger_kind", "ledger")
    op.drop_index("ix_ledger_job", "ledger")
    # SQLite drops a column in place, and keeps the triggers that refuse changes.
    op.drop_column("ledger", "block")
    op.drop_table("blocks")
