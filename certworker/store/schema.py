"""Migrations: bringing a database to the newest schema, and saying whether it is there.

Only `init` and `db` import this (Alembic is slow to import); everything else asks
`Database.check_schema`. The revisions are in `migrations/` beside the package in a checkout, and
inside it once installed.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from certworker.errors import SchemaError
from certworker.store.database import SCHEMA_REVISION, Database, schema_revision
from certworker.store.tables import metadata

_MIGRATION_LOCK = 0x63_77_6D_69_67  # "cwmig": one migrator at a time on PostgreSQL


def upgrade(db: Database, revision: str = "head") -> tuple[str | None, str | None]:
    """Bring the schema to `revision`; return the revisions before and after.

    All of it is one transaction. An SQLite file that has a schema already is copied beside itself
    first, to `<file>.before-<revision>`.
    """
    return _migrate(db, lambda config: command.upgrade(config, revision), backup=True)


def downgrade(db: Database, revision: str) -> tuple[str | None, str | None]:
    """Take the schema back to `revision`; return the revisions before and after."""
    return _migrate(db, lambda config: command.downgrade(config, revision), backup=True)


def differences(db: Database) -> list[str]:
    """Return how the database's schema differs from the one this release was written for, [] if not at all."""

    def compare(tx: Connection) -> list[str]:
        found = schema_revision(tx)
        if found != SCHEMA_REVISION:
            return [f"the schema is {found or 'empty'}, this release needs {SCHEMA_REVISION}"]
        context = MigrationContext.configure(tx, opts={"compare_type": True, "include_object": _belongs})
        return [str(difference) for difference in compare_metadata(context, metadata)]

    return db.read(compare)


def migrations_folder() -> Path:
    """Return where the revisions are."""
    package = Path(__file__).parents[1]
    for folder in (package / "migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise SchemaError(f"no migrations beside {package}: this installation is incomplete, install certworker again")


def _belongs(_item: object, name: str | None, kind: str, _reflected: bool, _other: object) -> bool:
    # Alembic does not ask `ddl_if`: the GIN index exists on PostgreSQL only, and is compared there by a test.
    return not (kind == "index" and name == "tls_policies_domains_idx")


def _migrate(db: Database, act: Callable[[Config], None], *, backup: bool) -> tuple[str | None, str | None]:
    with db.engine.connect() as connection:
        if db.embedded:
            # Outside a transaction, or SQLite ignores it. Rebuilding a table would cascade to its children.
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
            connection.rollback()
        try:
            connection = connection.execution_options(certworker_write=True)
            with connection.begin():
                if not db.embedded:
                    connection.execute(text("SET LOCAL lock_timeout = 0"))
                    connection.execute(text("SET LOCAL statement_timeout = 0"))
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
                before = schema_revision(connection)
                if db.embedded and before is not None and backup:
                    _copy_sqlite(connection, before)
                config = Config()
                config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
                config.attributes["connection"] = connection
                act(config)
                after = schema_revision(connection)
        finally:
            if db.embedded:
                connection.exec_driver_sql("PRAGMA foreign_keys=ON")
                connection.rollback()
    return before, after


def _copy_sqlite(connection: Connection, revision: str) -> None:
    path = Path(str(connection.engine.url.database))
    target = path.with_name(f"{path.name}.before-{revision}")
    if schema_is_newest(revision) or target.exists():
        return
    target.touch(mode=0o600)
    source, copy = sqlite3.connect(path), sqlite3.connect(target)
    try:
        source.backup(copy)
    finally:
        copy.close()
        source.close()


def schema_is_newest(revision: str) -> bool:
    """Say whether nothing would be migrated."""
    return revision == SCHEMA_REVISION
