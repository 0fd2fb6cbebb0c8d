"""Runs the revisions on the connection that `certworker.store.schema` hands over.

On SQLite foreign keys are off while tables are rebuilt (dropping the old table would cascade to its
children) and checked before the commit.
"""

from alembic import context
from sqlalchemy import text

from certworker.store.tables import complete

connection = context.config.attributes["connection"]
sqlite = connection.dialect.name == "sqlite"

context.configure(connection=connection, target_metadata=complete(), render_as_batch=True, compare_type=True)
with context.begin_transaction():
    context.run_migrations()
    if sqlite:
        broken = connection.execute(text("PRAGMA foreign_key_check")).all()
        if broken:
            raise RuntimeError(f"migration left rows without their parent: {broken[:5]}")
