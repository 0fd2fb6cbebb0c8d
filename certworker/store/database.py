"""Connections and transactions; nothing here knows a table.

All writes go through `Database.write(fn)`, which returns after the commit. `fn` may be run again from
its start when the database asks for it (serialization failure, deadlock, lost connection), so it
must do nothing but SQL. It may be run again even after its commit: when the connection is lost with the
COMMIT under way, nobody can tell which way that went. So an id that must not be made twice is made
outside, and what is added is looked for first.

SQLite: WAL, `synchronous=FULL` (a key must survive power loss before its order exists), every write
is a `BEGIN IMMEDIATE` behind one lock of this process, so that its threads queue instead of polling.
"""

import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from certworker.errors import SchemaError, StoreError, StoreRefused
from certworker.store.types import db_now, read_json

T = TypeVar("T")

Transaction = Connection
"""What `write` and `read` hand to a function; other rooms name it without speaking SQL."""

SCHEMA_REVISION = "0009"
"""The migration this release of certworker works with; a test holds it to the newest one."""

_ATTEMPTS = 5
_FIRST_WAIT = 0.2
"""Seconds before the second attempt, at most; twice as long before each further one: a server needs some to recover."""
_PATIENCE = 10.0
"""Seconds after which nothing is run again: whoever waited so long for a lock or a server is told."""
_POOL_WAIT = 5.0
"""Seconds to wait for a connection while all are in use."""
_SQLITE_PRAGMAS = ("busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "cache_size=-512")
"""SQLite's own 2 MiB of pages for each connection would be held twenty times over; the kernel has the file anyway."""
_SQLITE_STATEMENTS = 48
"""Prepared statements that each connection keeps, some 20 KiB each."""

# What a server's own defaults must not change, and what ends by itself.
_SESSION = {
    "statement_timeout": "15s",
    "lock_timeout": "5s",
    # A stopped process that holds a row lock would hide its work from every other worker.
    "idle_in_transaction_session_timeout": "10s",
    # A key that was committed has to outlive the server's crash, because its order does.
    "synchronous_commit": "on",
    "default_transaction_isolation": r"read\ committed",
    "timezone": "UTC",
}
_CONNECT = {
    "connect_timeout": 10,
    "application_name": "certworker",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15000,
}
_SNAPSHOT = "REPEATABLE READ"
_HURRIED_SESSION = {**_SESSION, "statement_timeout": "5s", "lock_timeout": "2s"}
_HURRIED_CONNECT = {**_CONNECT, "connect_timeout": 5, "tcp_user_timeout": 5000}

_REPEATED = frozenset({
    "40001", "40P01",  # serialization failure, deadlock
    "55P03",  # a lock was not to be had in time
    "57P01", "57P02", "57P03",  # the server is stopped, has crashed, is starting
    "53300",  # it has no connection left
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,
})  # fmt: skip
_CONTENDED = frozenset(["40001", "40P01", "55P03"])
"""Of these, what somebody else's transaction on some rows has brought about."""
_CONNECTION_LOST = "08"
_ADVICE: Mapping[str | int | None, str] = {
    "25006": "the database is read-only; look whether its server is a standby, or was set so",
    "53100": "its disk is full; make room",
    sqlite3.SQLITE_READONLY: "the database is read-only; check who owns its file and folder, and how they are mounted",
    sqlite3.SQLITE_FULL: "its disk is full; make room",
    sqlite3.SQLITE_IOERR: "its disk cannot be read or written; check the disk and the kernel's log",
    sqlite3.SQLITE_CANTOPEN: "check that its folder is there, and who may use it",
    sqlite3.SQLITE_BUSY: "another process holds on to it; look for a backup, or a shell with an open transaction",
}
"""What a person can look at, by the database's code."""


class Database:
    """One database, for all threads of this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = threading.Lock() if engine.dialect.name == "sqlite" else None
        self._kept: Connection | None = None
        """The one that writes, of SQLite: taken from the pool and given back, it costs more than what is written."""

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine, for migrations."""
        return self._engine

    @property
    def embedded(self) -> bool:
        """True for SQLite: one worker process only."""
        return self._engine.dialect.name == "sqlite"

    def write(self, fn: Callable[[Connection], T], *, at_one_moment: bool = False) -> T:
        """Run `fn` in one transaction and return its result after the commit.

        With `at_one_moment` all its statements see the database as the first one did, on PostgreSQL too, and
        `fn` is run again if a row that it wants to change has been changed since.
        Raises StoreError when the database cannot be reached or written, or is locked for too long,
        StoreRefused when it will not have what `fn` wrote.
        """
        return _persist("write to", lambda: self._write_once(fn, at_one_moment=at_one_moment))

    def _write_once(self, fn: Callable[[Connection], T], *, at_one_moment: bool = False) -> T:
        if self._writer is None:
            with self._connect(_SNAPSHOT if at_one_moment else None) as connection, connection.begin():
                return fn(connection)
        with self._writer:
            if self._kept is None:
                self._kept = self._engine.connect().execution_options(certworker_write=True)
            try:
                with self._kept.begin():
                    return fn(self._kept)
            except BaseException:
                self._give_up_kept()
                raise

    def _give_up_kept(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()

    def read(self, fn: Callable[[Connection], T], *, at_one_moment: bool = False) -> T:
        """Run `fn`, which only reads; all its statements see the same moment on SQLite, and with `at_one_moment`.

        On PostgreSQL each is a transaction of its own otherwise, so that nothing has to be begun and ended around it.
        """
        return _persist("read from", lambda: self._read_once(fn, at_one_moment=at_one_moment))

    def _read_once(self, fn: Callable[[Connection], T], *, at_one_moment: bool = False) -> T:
        with self._connect(_SNAPSHOT if at_one_moment else "AUTOCOMMIT") as connection, connection.begin():
            return fn(connection)

    def _connect(self, isolation_level: str | None) -> Connection:
        """Return a connection of this isolation level; None is that of `_SESSION`, and SQLite has but one."""
        connection = self._engine.connect()
        if isolation_level is None or self.embedded:
            return connection
        return connection.execution_options(isolation_level=isolation_level)

    def now(self) -> datetime:
        """Return the database's present time."""
        return self.read(lambda tx: tx.execute(select(db_now())).scalar_one())

    def reserve(self) -> "Database":
        """Return this database with one connection of its own, for what must not wait behind others: leases.

        SQLite returns itself: its writers take turns however many connections there are.
        """
        if self.embedded:
            return self
        return Database(_postgresql(self._engine.url, 1, 0, _HURRIED_CONNECT, _HURRIED_SESSION))

    def check_schema(self) -> None:
        """Raise SchemaError unless the schema is the one this release works with."""
        found = self.read(schema_revision)
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
        with self._writer or nullcontext():
            self._give_up_kept()
        self._engine.dispose()


def open_database(url: str) -> Database:
    """Return the database at the SQLAlchemy `url`; nothing is connected yet for PostgreSQL."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return Database(_sqlite(url))
    if parsed.get_backend_name() != "postgresql":
        raise StoreError(f"database url {parsed.render_as_string()!r}: only sqlite and postgresql are supported")
    return Database(_postgresql(parsed, 8, 16, _CONNECT, _SESSION))


def driver_arguments(url: str) -> dict[str, Any]:
    """Return what psycopg is to be called with for the SQLAlchemy `url` of a PostgreSQL."""
    parsed = make_url(url)
    _, given = parsed.get_dialect()().create_connect_args(parsed)
    return {**given, **_besides(parsed, _CONNECT, _SESSION)}


def sqlite_path(url: str) -> Path | None:
    """Return the file of an SQLite url, None for PostgreSQL."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def schema_revision(tx: Connection) -> str | None:
    """Return the migration the database stands at, None when it has no tables of ours."""
    if not inspect(tx).has_table("alembic_version"):
        return None
    return tx.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _postgresql(
    url: URL, pool_size: int, max_overflow: int, connect: Mapping[str, Any], session: Mapping[str, str]
) -> Engine:
    # Last in, first out: the server's process that was used last has the most in its caches.
    return create_engine(
        url, pool_size=pool_size, max_overflow=max_overflow, pool_timeout=_POOL_WAIT, pool_pre_ping=True,
        pool_use_lifo=True, hide_parameters=True, json_deserializer=read_json,
        connect_args=_besides(url, connect, session),
    )  # fmt: skip


def _besides(url: URL, connect: Mapping[str, Any], session: Mapping[str, str]) -> dict[str, Any]:
    """Return our settings for what `url` does not say itself: given beside it, they would win over it."""
    ours = {key: value for key, value in connect.items() if key not in url.query}
    options = [f"-c {name}={value}" for name, value in session.items()]
    return {**ours, "options": " ".join([*options, *url.normalized_query.get("options", ())])}


def _sqlite(url: str) -> Engine:
    path = sqlite_path(url)
    if path is None or path.name in ("", ":memory:"):
        raise StoreError(f"database url {url!r}: name a file, an in-memory database would forget its keys")
    if path.parent.is_dir() and not path.exists():
        # SQLite would create it with the umask; it is to hold keys.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    engine = create_engine(
        url,
        pool_size=8,
        max_overflow=32,
        pool_timeout=_POOL_WAIT,
        hide_parameters=True,
        json_deserializer=read_json,
        connect_args={"cached_statements": _SQLITE_STATEMENTS},
    )
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


def _persist(doing: str, once: Callable[[], T]) -> T:
    """Return what `once` returns, calling it again while the database gives hope."""
    give_up_at, attempt = time.monotonic() + _PATIENCE, 1
    while True:
        try:
            return once()
        except (DBAPIError, PoolTimeout) as error:
            if attempt == _ATTEMPTS or time.monotonic() >= give_up_at or not _worth_repeating(error):
                raise _store_error(doing, error) from None
        threading.Event().wait(_FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1))  # noqa: S311
        attempt += 1


def _worth_repeating(error: DBAPIError | PoolTimeout) -> bool:
    if isinstance(error, PoolTimeout):
        return False
    if error.connection_invalidated:
        return True
    code = _code(error)
    if code is None:
        # What a server says before a connection stands comes without a code: too many, starting, gone.
        return isinstance(error, OperationalError)
    return code in _REPEATED or str(code).startswith(_CONNECTION_LOST)


def _code(error: Exception) -> str | int | None:
    """Return PostgreSQL's SQLSTATE, or SQLite's primary result code."""
    said = getattr(error, "orig", None)
    extended = getattr(said, "sqlite_errorcode", None)
    # The upper bits say which of several ways it happened.
    return getattr(said, "sqlstate", None) if extended is None else extended & 0xFF


def first_line(error: Exception) -> str:
    """Return what the database said, without the rows it said it of.

    Raise what is made of it `from None`: PostgreSQL's DETAIL quotes the failing row, keys included.
    """
    said = str(getattr(error, "orig", None) or error).strip().splitlines()
    return said[0] if said else type(error).__name__


def _store_error(doing: str, error: Exception) -> StoreError:
    if isinstance(error, PoolTimeout):
        return StoreError(f"cannot {doing} the database: none of our connections to it became free in {_POOL_WAIT:g} s")
    kind = StoreRefused if isinstance(error, (IntegrityError, DataError)) else StoreError
    advice = _ADVICE.get(_code(error))
    said = kind(f"cannot {doing} the database: {first_line(error)}" + (f": {advice}" if advice else ""))
    said.contended = _code(error) in _CONTENDED
    return said
