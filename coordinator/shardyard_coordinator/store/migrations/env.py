"""How Alembic reaches the store: over the connection that `migrate` holds already."""

from alembic import context

from shardyard_coordinator.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite can change tables in a transaction, but Alembic does not assume it.
    transactional_ddl=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
