"""Migrations: bringing a database to the newest schema, and saying whether it is there.

Only `init` and `db` import this (Alembic is slow to import); everything else asks
`Database.check_schema`. The revisions are in `migrations/` beside the package in a checkout, and
inside it once installed.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from certworker.errors import SchemaError
from certworker.store.database import SCHEMA_REVISION, Database, first_line, schema_revision
from certworker.store.tables import complete

_MIGRATION_LOCK = 0x63_77_6D_69_67  # "cwmig": one migrator at a time on PostgreSQL


def upgrade(db: Database, revision: str = "head") -> tuple[str | None, str | None]:
    """Bring the schema to `revision`; return the revisions before and after.

    All of it is one transaction. An SQLite file that has a schema already is copied beside itself
    first, to `<file>.before-<its revision>`; SchemaError says why it cannot be done.
    """
    return _migrate(db, command.upgrade, revision)


def downgrade(db: Database, revision: str) -> tuple[str | None, str | None]:
    """Take the schema back to `revision`, as `upgrade` does; return the revisions before and after."""
    return _migrate(db, command.downgrade, revision)


def differences(db: Database) -> list[str]:
    """Return how the database's schema differs from the one this release was written for, [] if not at all."""

    def compare(tx: Connection) -> list[str]:
        found = schema_revision(tx)
        if found != SCHEMA_REVISION:
            return [f"the schema is {found or 'empty'}, this release needs {SCHEMA_REVISION}"]
        context = MigrationContext.configure(tx, opts={"compare_type": True, "include_object": _belongs})
        return [str(difference) for difference in compare_metadata(context, complete())]

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


def _migrate(db: Database, act: Callable[[Config, str], None], revision: str) -> tuple[str | None, str | None]:
    try:
        with db.engine.connect() as connection, _without_foreign_keys(connection):
            connection = connection.execution_options(certworker_write=True)
            with connection.begin():
                return _migrate_in(connection, act, revision)
    except (DBAPIError, CommandError) as error:
        raise SchemaError(f"cannot take the database's schema to {revision}: {first_line(error)}") from None


def _migrate_in(
    connection: Connection, act: Callable[[Config, str], None], revision: str
) -> tuple[str | None, str | None]:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
    before = schema_revision(connection)
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    if before not in (None, ScriptDirectory.from_config(config).as_revision_number(revision)):
        _copy_sqlite(connection, before)
    act(config, revision)
    return before, schema_revision(connection)


@contextmanager
def _without_foreign_keys(connection: Connection) -> Iterator[None]:
    """Let SQLite rebuild a table without cascading to its children; env.py checks the keys at the end."""
    if connection.dialect.name != "sqlite":
        yield
        return
    # Past SQLAlchemy, which would begin a transaction first: inside one SQLite ignores it.
    cursor = connection.connection.cursor()
    (patience,) = cursor.execute("PRAGMA busy_timeout").fetchone()
    cursor.execute("PRAGMA foreign_keys=OFF")
    cursor.execute("PRAGMA busy_timeout=60000")  # another migration may take longer than any write does
    try:
        yield
    finally:
        cursor.execute(f"PRAGMA busy_timeout={patience}")
        cursor.execute("PRAGMA foreign_keys=ON")


def _copy_sqlite(connection: Connection, revision: str | None) -> None:
    if connection.dialect.name != "sqlite":
        return
    path = Path(str(connection.engine.url.database))
    target, unfinished = (path.with_name(f"{path.name}.before-{revision}{end}") for end in ("", ".unfinished"))
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(unfinished)) as copy:
        source.backup(copy)
    unfinished.replace(target)
