"""Holds a write of the worker back inside its transaction, before the COMMIT.

A trigger in the test's own database makes the statement wait: on PostgreSQL for an advisory lock that the
test holds, on SQLite by counting for longer than any test takes. Nothing of the product knows of it.
"""

import secrets
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg

from certworker.store.database import sqlite_path

_TRIGGER = "chaos_hold"
_VERBS = ("INSERT", "UPDATE")
_COUNT_TO = 100_000_000
"""Takes SQLite some 20 s, while it holds the write lock."""
_STEADY = 0.5
"""Seconds for which the write lock must be seen held by one transaction; a commit to a busy disk is shorter."""


class Held(ABC):
    """A write that is held once it comes, until it is released or whoever wrote is dead."""

    @property
    @abstractmethod
    def reached(self) -> bool:
        """Whether a transaction is held now."""

    @abstractmethod
    def release(self) -> None:
        """Hold nothing any more; on SQLite only once the one that is held has been killed."""


@contextmanager
def held_write(url: str, table: str, when: str) -> Iterator[Held]:
    """Hold the next write of a row of `table` for which `when` is true, in SQL, of `NEW`."""
    path = sqlite_path(url)
    held = _HeldInSqlite(str(path), table, when) if path else _HeldInPostgresql(url, table, when)
    try:
        yield held
    finally:
        held.release()


class _HeldInPostgresql(Held):
    def __init__(self, url: str, table: str, when: str) -> None:
        self._table, self._key = table, secrets.randbits(62)
        self._session = psycopg.connect(url, autocommit=True)
        run = self._session.execute
        run("SELECT pg_advisory_lock(%s)", [self._key])
        run(
            f"CREATE FUNCTION {_TRIGGER}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN PERFORM pg_advisory_xact_lock({self._key}); RETURN NEW; END $$"
        )
        run(
            f"CREATE TRIGGER {_TRIGGER} BEFORE {' OR '.join(_VERBS)} ON {table} FOR EACH ROW "
            f"WHEN ({when}) EXECUTE FUNCTION {_TRIGGER}()"
        )

    @property
    def reached(self) -> bool:
        # A key of 64 bits is shown in two halves, `objsubid` 1 says so.
        waiting = self._session.execute(
            "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objsubid = 1 "
            "AND (classid::bigint << 32) + objid::bigint = %s",
            [self._key],
        )
        return waiting.fetchone() is not None

    def release(self) -> None:
        if self._session.closed:
            return
        with self._session:
            self._session.execute("SELECT pg_advisory_unlock(%s)", [self._key])
            # Waits until the one that was held has ended: by then its server process knows that it is dead.
            self._session.execute(f"DROP FUNCTION {_TRIGGER} CASCADE")


class _HeldInSqlite(Held):
    def __init__(self, path: str, table: str, when: str) -> None:
        self._path = path
        # It only ever tries: a busy timeout would hide what it looks for.
        self._session = sqlite3.connect(path, timeout=0, isolation_level=None)
        count = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {_COUNT_TO}) SELECT i FROM n"
        self._execute(*(
            f"CREATE TRIGGER {_TRIGGER}_{verb} BEFORE {verb} ON {table} WHEN {when} "
            f"BEGIN SELECT count(*) FROM ({count}); END"
            for verb in _VERBS
        ))  # fmt: skip

    @property
    def reached(self) -> bool:
        """Seen by the write lock: one transaction, which commits nothing, holds it on and on."""
        version, until = self._data_version(), time.monotonic() + _STEADY
        while time.monotonic() < until:
            if not self._locked() or self._data_version() != version:
                return False
            time.sleep(_STEADY / 20)
        return True

    def release(self) -> None:
        with closing(self._session):
            self._execute(*(f"DROP TRIGGER IF EXISTS {_TRIGGER}_{verb}" for verb in _VERBS))

    def _execute(self, *statements: str) -> None:
        with closing(sqlite3.connect(self._path, timeout=5, isolation_level=None)) as session:
            session.execute("BEGIN IMMEDIATE")
            for statement in statements:
                session.execute(statement)
            session.execute("COMMIT")

    def _locked(self) -> bool:
        try:
            self._session.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        self._session.execute("ROLLBACK")
        return False

    def _data_version(self) -> int:
        """Return a number that changes with every commit of another connection."""
        return int(self._session.execute("PRAGMA data_version").fetchone()[0])
