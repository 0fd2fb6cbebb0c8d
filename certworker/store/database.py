"""Connections and transactions; nothing here knows a table.

All writes go through `Database.write(fn)`, which returns after the commit. `fn` may be run again from
its start when the database asks for it (serialization failure, deadlock, lost connection), so it
must do nothing but SQL.

SQLite: WAL, `synchronous=FULL` (a key must survive power loss before its order exists), every write
is a `BEGIN IMMEDIATE` behind one lock of this process, so that its threads queue instead of polling.
"""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from certworker.errors import SchemaError, StoreError, StoreRefused

T = TypeVar("T")

Transaction = Connection
"""What `write` and `read` hand to a function; other rooms name it without speaking SQL."""

SCHEMA_REVISION = "0003"
"""The migration this release of certworker works with; a test holds it to the newest one."""

_ATTEMPTS = 5
_SQLITE_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000")
_POSTGRESQL_SESSION = {
    "statement_timeout": "15s",
    "lock_timeout": "5s",
    # A stopped process that holds a row lock would hide its work from every other worker.
    "idle_in_transaction_session_timeout": "10s",
    "timezone": "UTC",
}
_POSTGRESQL_CONNECT = {
    "connect_timeout": 10,
    "application_name": "certworker",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15000,
    "options": " ".join(f"-c {name}={value}" for name, value in _POSTGRESQL_SESSION.items()),
}


class Database:
    """One database, for all threads of this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = threading.Lock() if engine.dialect.name == "sqlite" else None

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine, for migrations."""
        return self._engine

    @property
    def embedded(self) -> bool:
        """True for SQLite: one worker process only."""
        return self._engine.dialect.name == "sqlite"

    def write(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` in one transaction and return its result after the commit.

        Raises StoreError when the database cannot be reached, or is locked for too long, StoreRefused
        when it will not have what `fn` wrote.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._write_once(fn)
            except (DBAPIError, PoolTimeout) as error:
                if attempt == _ATTEMPTS or not _worth_repeating(error):
                    raise _store_error("write to", error) from None
                threading.Event().wait(0.05 * 2**attempt * random.random())  # noqa: S311
        raise AssertionError("unreachable")

    def _write_once(self, fn: Callable[[Connection], T]) -> T:
        if self._writer is None:
            with self._engine.begin() as tx:
                return fn(tx)
        with self._writer, self._engine.connect() as connection:
            connection = connection.execution_options(certworker_write=True)
            with connection.begin():
                return fn(connection)

    def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` in one read transaction: all its statements see the same moment on SQLite."""
        try:
            with self._engine.connect() as connection, connection.begin():
                return fn(connection)
        except (DBAPIError, PoolTimeout) as error:
            raise _store_error("read from", error) from None

    def check_schema(self) -> None:
        """Raise SchemaError unless the schema is the one this release works with."""
        try:
            found = self.read(schema_revision)
        except SQLAlchemyError as error:
            raise _store_error("read from", error) from None
        if found == SCHEMA_REVISION:
            return
        if found is None:
            cure = "run `certworker init`"
        elif found < SCHEMA_REVISION:
            cure = "run `certworker db upgrade`"
        else:
            cure = "a newer release has worked with it, run that one"
        raise SchemaError(f"the database's schema is {found or 'empty'}, this release needs {SCHEMA_REVISION}: {cure}")

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


def open_database(url: str) -> Database:
    """Return the database at the SQLAlchemy `url`; nothing is connected yet for PostgreSQL."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return Database(_sqlite(url))
    if parsed.get_backend_name() != "postgresql":
        raise StoreError(f"database url {parsed.render_as_string()!r}: only sqlite and postgresql are supported")
    # What the url says itself comes first: connect_args would win over it.
    ours = {key: value for key, value in _POSTGRESQL_CONNECT.items() if key not in parsed.query}
    if "options" in parsed.query:
        ours["options"] = f"{_POSTGRESQL_CONNECT['options']} {parsed.query['options']}"
    engine = create_engine(
        url, pool_pre_ping=True, pool_size=8, max_overflow=16, hide_parameters=True, connect_args=ours
    )
    return Database(engine)


def sqlite_path(url: str) -> Path | None:
    """Return the file of an SQLite url, None for PostgreSQL."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def schema_revision(tx: Connection) -> str | None:
    """Return the migration the database stands at, None when it has no tables of ours."""
    if not inspect(tx).has_table("alembic_version"):
        return None
    return tx.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _sqlite(url: str) -> Engine:
    path = sqlite_path(url)
    if path is None or path.name in ("", ":memory:"):
        raise StoreError(f"database url {url!r}: name a file, an in-memory database would forget its keys")
    if path.parent.is_dir() and not path.exists():
        # SQLite would create it with the umask; it is to hold keys.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    engine = create_engine(url, pool_size=8, max_overflow=32, hide_parameters=True)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    cursor = connection.cursor()
    for pragma in _SQLITE_PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that turns to writing fails at once when another one wrote in between.
    write = connection.get_execution_options().get("certworker_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _worth_repeating(error: DBAPIError | PoolTimeout) -> bool:
    if isinstance(error, PoolTimeout):
        return False
    if error.connection_invalidated:
        return True
    code = getattr(error.orig, "sqlstate", None)
    if code is not None:
        return code in ("40001", "40P01", "55P03")
    return isinstance(error, OperationalError) and "database is locked" in str(error.orig)


def first_line(error: Exception) -> str:
    """Return what the database said, without the rows it said it of.

    Raise what is made of it `from None`: PostgreSQL's DETAIL quotes the failing row, keys included.
    """
    said = str(getattr(error, "orig", None) or error).strip().splitlines()
    return said[0] if said else type(error).__name__


def _store_error(doing: str, error: Exception) -> StoreError:
    kind = StoreRefused if isinstance(error, (IntegrityError, DataError)) else StoreError
    return kind(f"cannot {doing} the database: {first_line(error)}")
