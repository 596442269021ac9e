"""Alembic's entry: runs the migrations on the connection that `cloister_server.store.migrate` hands over."""

from __future__ import annotations

from alembic import context

from cloister_server.store.tables import Table

connection = context.config.attributes["connection"]
if connection.dialect.name != "sqlite":  # row security holds for the owner, too: a migration acts for every tenant
    connection.exec_driver_sql("SELECT set_config('cloister.tenants', '*', true)")
context.configure(
    connection=connection,
    target_metadata=Table.metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
