"""How the database goes about a query."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, event, text

from certworker.store.database import Database


def explain(db: Database, fn: Callable[[Connection], Any], verb: str = "SELECT", before: int = 0) -> str:
    """Run `fn` and return the plan of its first `verb`, after `before` others.

    It is made with the very statement and values that ran. PostgreSQL is told that reading a whole table is dear, or
    it would read an empty one whole.
    """
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, _context: Any, many: bool) -> None:
        seen.append((statement, values[0] if many else values))

    def run(tx: Connection) -> str:
        event.listen(tx, "before_cursor_execute", note)
        fn(tx)
        event.remove(tx, "before_cursor_execute", note)
        statement, values = [(s, v) for s, v in seen if s.lstrip().startswith(verb)][before]
        word = "EXPLAIN QUERY PLAN " if db.embedded else "EXPLAIN "
        if not db.embedded:
            tx.exec_driver_sql("SET LOCAL enable_seqscan = off")
        return "\n".join(str(row[-1]) for row in tx.exec_driver_sql(word + statement, values))

    return db.write(run)


@contextmanager
def statements(db: Database) -> Iterator[list[str]]:
    """Collect what is sent to a database, without BEGIN; a statement that is sent with many rows is one."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            sent.append(statement)

    event.listen(db.engine, "before_cursor_execute", note)
    yield sent
    event.remove(db.engine, "before_cursor_execute", note)


def wait_for_waiting(db: Database) -> None:
    """Return when a transaction waits for another one's lock."""
    query = text("SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
    for _ in range(1000):
        if db.read(lambda tx: tx.execute(query).first()):
            return
        threading.Event().wait(0.01)
    raise AssertionError("nobody waits")
