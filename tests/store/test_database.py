"""`write` and `read`: what is committed when, who waits for whom, and what an error says."""

import ast
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from threading import Barrier, Event

import pytest
from sqlalchemy import Connection, text

import certworker
from certworker.errors import StoreError
from certworker.store import counters, policies, settings_kv
from certworker.store.database import Database, open_database, sqlite_path

from .conftest import NOW
from .given import POLICY, Program, url_of

SECRET = "-----BEGIN PRIVATE KEY----- canary"


def test_a_write_is_committed_when_it_returns(db: Database, twin: Database) -> None:
    """Another process sees it at once."""
    assert db.write(lambda tx: settings_kv.put(tx, "k", "v")) is None

    assert twin.read(lambda tx: settings_kv.find(tx, "k")) == "v"


def test_a_write_is_not_seen_before(db: Database, twin: Database) -> None:
    """Nor does a reader wait for it."""
    seen = []

    def write(tx: Connection) -> str:
        settings_kv.put(tx, "k", "v")
        seen.append(twin.read(lambda tx: settings_kv.find(tx, "k")))
        return "done"

    assert db.write(write) == "done"
    assert seen == [None]


def test_an_exception_undoes_the_whole_write(db: Database) -> None:
    """And comes out as it is."""

    def write(tx: Connection) -> None:
        settings_kv.put(tx, "k", "v")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        db.write(write)

    assert db.read(lambda tx: settings_kv.find(tx, "k")) is None
    db.write(lambda tx: settings_kv.put(tx, "k", "w"))


def test_a_read_sees_one_moment(sqlite_db: Database) -> None:
    """All its statements do, on SQLite."""

    def read(tx: Connection) -> list[str | None]:
        before = settings_kv.find(tx, "k")
        sqlite_db.write(lambda tx: settings_kv.put(tx, "k", "v"))
        return [before, settings_kv.find(tx, "k")]

    assert sqlite_db.read(read) == [None, None]
    assert sqlite_db.read(lambda tx: settings_kv.find(tx, "k")) == "v"


@pytest.mark.parametrize("act", ["read", "write"])
def test_one_moment_can_be_asked_for(db: Database, twin: Database, act: str) -> None:
    """On PostgreSQL too; what the connection does next sees every commit again."""

    def look(tx: Connection) -> list[str | None]:
        before = settings_kv.find(tx, "k")
        if not db.embedded or act == "read":  # a writer on SQLite has the file for itself
            twin.write(lambda tx: settings_kv.put(tx, "k", "v"))
        return [before, settings_kv.find(tx, "k")]

    assert getattr(db, act)(look, at_one_moment=True) == [None, None]
    if not db.embedded:
        twin.write(lambda tx: settings_kv.put(tx, "k", "old"))
        assert db.read(look) == ["old", "v"]


def test_a_read_holds_nothing_between_its_statements(postgresql_db: Database) -> None:
    """Not on PostgreSQL, where each is a transaction of its own: what is stopped would hold up a migration."""
    state = text("SELECT state FROM pg_stat_activity WHERE pid = :pid")

    def look(tx: Connection) -> str:
        pid = tx.scalar(text("SELECT pg_backend_pid()"))
        with postgresql_db.engine.connect() as other:
            return str(other.scalar(state, {"pid": pid}))

    assert postgresql_db.read(look) == "idle"
    assert postgresql_db.read(look, at_one_moment=True) == postgresql_db.write(look) == "idle in transaction"


def test_an_epoch_is_never_given_twice(db: Database) -> None:
    """Not by restoring one backup twice, and not by a clock that stands still or was put back."""

    def start_over(now: datetime, epoch: int) -> int:
        db.write(lambda tx: tx.execute(text("UPDATE counters SET value = :e WHERE name = 'epoch'"), {"e": epoch}))
        return db.write(lambda tx: counters.start_over(tx, now))

    once = start_over(NOW, 1)
    assert start_over(NOW + timedelta(seconds=1), 1) > once
    assert start_over(NOW, once) == once + 1
    assert start_over(NOW - timedelta(days=1), once) == once + 1


def test_eight_threads_write_at_once(db: Database) -> None:
    """None of them is told that the database is locked, and nothing is lost."""
    start = Barrier(8)

    def work(_: int) -> None:
        start.wait()
        for _ in range(10):
            db.write(lambda tx: counters.next_value(tx, counters.REVISION))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))

    assert db.read(lambda tx: counters.value(tx, counters.REVISION)) == 80


def test_two_processes_write_at_once(db: Database, twin: Database) -> None:
    """Each with connections of its own: SQLite's busy_timeout and PostgreSQL's row locks make them wait."""
    start = Barrier(4)

    def work(database: Database) -> None:
        start.wait()
        for _ in range(10):
            database.write(lambda tx: counters.next_value(tx, counters.REVISION))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, [db, twin, db, twin]))

    assert db.read(lambda tx: counters.value(tx, counters.REVISION)) == 40


def test_a_write_takes_its_turn_before_it_reads(sqlite_db: Database) -> None:
    """Nobody else can begin one until it is committed, so that what it read still holds when it writes."""
    refused = []

    def write(tx: Connection) -> None:
        settings_kv.find(tx, "k")
        other = sqlite3.connect(str(sqlite_db.engine.url.database), timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="database is locked") as caught:
            other.execute("BEGIN IMMEDIATE")
        refused.append(caught.value)
        other.close()

    sqlite_db.write(write)

    assert len(refused) == 1


def test_a_deferred_transaction_would_fail(sqlite_db: Database, twin_sqlite: Database) -> None:
    """Why a write begins IMMEDIATE: one that reads first and then writes loses against any other writer."""

    def read_then_write(tx: Connection) -> None:
        settings_kv.find(tx, "k")
        twin_sqlite.write(lambda tx: settings_kv.put(tx, "k", "v"))
        settings_kv.put(tx, "k", "w")

    with pytest.raises(StoreError, match="database is locked"):
        sqlite_db.read(read_then_write)


@pytest.fixture
def twin_sqlite(sqlite_db: Database) -> Iterator[Database]:
    twin = open_database(url_of(sqlite_db))
    yield twin
    twin.close()


def test_a_serialization_failure_is_run_again(postgresql_db: Database, twin_pg: Database) -> None:
    """From the start of `fn`, which then sees what the other wrote."""
    runs = []

    def write(tx: Connection) -> None:
        tx.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        found = settings_kv.find(tx, "k")
        runs.append(found)
        if len(runs) == 1:
            twin_pg.write(lambda tx: settings_kv.put(tx, "k", "theirs"))
        settings_kv.put(tx, "k", f"{found}, then ours")

    twin_pg.write(lambda tx: settings_kv.put(tx, "k", "old"))
    postgresql_db.write(write)

    assert runs == ["old", "theirs"]
    assert postgresql_db.read(lambda tx: settings_kv.find(tx, "k")) == "theirs, then ours"


def test_a_deadlock_is_run_again(postgresql_db: Database, twin_pg: Database) -> None:
    """Two writers that lock two rows in opposite order both get there."""
    both_locked, runs = Barrier(2), []

    def crosswise(first: str, second: str, database: Database) -> None:
        def write(tx: Connection) -> None:
            runs.append(first)
            counters.next_value(tx, first)
            if len(runs) <= 2:
                both_locked.wait(10)
            counters.next_value(tx, second)

        database.write(write)

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(crosswise, counters.REVISION, counters.EPOCH, postgresql_db)
        other = threads.submit(crosswise, counters.EPOCH, counters.REVISION, twin_pg)
        one.result()
        other.result()

    assert len(runs) == 3
    assert postgresql_db.read(lambda tx: counters.value(tx, counters.REVISION)) == 2


def test_other_failures_are_not_run_again(db: Database) -> None:
    """A row that the database refuses it will refuse again."""
    runs = []

    def write(tx: Connection) -> None:
        runs.append(1)
        tx.execute(text("INSERT INTO settings_kv VALUES ('k', NULL)"))

    with pytest.raises(StoreError, match="cannot write to the database"):
        db.write(write)

    assert len(runs) == 1


@pytest.mark.parametrize("act", ["read", "write"])
def test_a_connection_lost_between_two_calls_is_replaced(postgresql_db: Database, act: str) -> None:
    """A restart of the database costs nobody an error."""
    call = getattr(postgresql_db, act)
    call(lambda tx: tx.execute(text("SELECT 1")).scalar())
    _end_connections(postgresql_db)

    assert call(lambda tx: settings_kv.find(tx, "k")) is None


def test_a_connection_lost_in_the_middle_of_a_write_is_replaced(postgresql_db: Database) -> None:
    """The write is run again; what it did before was never committed."""
    runs = []

    def write(tx: Connection) -> None:
        runs.append(counters.next_value(tx, counters.REVISION))
        if len(runs) == 1:
            _end_connections(postgresql_db)
        settings_kv.put(tx, "k", "v")

    postgresql_db.write(write)

    assert runs == [1, 1]
    assert postgresql_db.read(lambda tx: settings_kv.find(tx, "k")) == "v"


def _end_connections(db: Database) -> None:
    """End every session on the database but the one that says so, and wait until they have ended."""
    program = Program(db)
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid != pg_backend_pid()"
    ended = program(f"SELECT pg_terminate_backend(pid, 5000) {others} AND backend_type = 'client backend'")
    assert ended
    assert all(done for (done,) in ended)
    program.close()


# -- what an error says -----------------------------------------------------------------------------


def _repeat_a_key(tx: Connection) -> None:
    tx.execute(text("INSERT INTO settings_kv VALUES (:key, 'a'), (:key, 'b')"), {"key": SECRET})


def _break_a_check(tx: Connection) -> None:
    row = {"id": POLICY, "domain": "a.test", "key": SECRET, "at": "2026-11-22T12:00:00.000000Z"}
    tx.execute(
        text("""INSERT INTO certificates (id, domain, cert_pem, key_pem, expires_at, status)
            VALUES (:id, :domain, :key, :key, :at, 'unknown')"""),
        row,
    )


def _leave_out_a_value(tx: Connection) -> None:
    tx.execute(text("INSERT INTO certificates (id, domain, key_pem) VALUES (:id, 'a', :key)"),
               {"id": POLICY, "key": SECRET})  # fmt: skip


@pytest.mark.parametrize("act", [_repeat_a_key, _break_a_check, _leave_out_a_value])
def test_an_error_is_one_line_without_the_row(db: Database, act: object) -> None:
    """PostgreSQL quotes the failing row, private key and all, in a second line; it goes no further than that."""
    with pytest.raises(StoreError) as caught:
        db.write(act)  # type: ignore[arg-type]

    error: BaseException | None = caught.value
    assert str(error).startswith("cannot write to the database: ")
    assert "\n" not in str(error)
    assert "canary" not in str(error)
    assert error is not None
    assert error.__suppress_context__


def test_the_driver_s_own_error_does_quote_the_row(postgresql_db: Database) -> None:
    """Why the test above means something."""
    quoted = []

    def write(tx: Connection) -> None:
        try:
            _break_a_check(tx)
        except Exception as error:
            quoted.append(f"{error}")
            raise

    with pytest.raises(StoreError):
        postgresql_db.write(write)

    assert "canary" in quoted[0].partition("DETAIL")[2].partition("[SQL")[0]
    assert "canary" not in quoted[0].partition("[SQL")[2]  # hide_parameters


# -- opening ------------------------------------------------------------------------------------------


def test_a_new_sqlite_file_can_be_read_by_its_owner_only(tmp_path: Path) -> None:
    """It is to hold keys, and so are the files that SQLite puts beside it."""
    db = open_database(f"sqlite:///{tmp_path / 'new.db'}")
    db.write(lambda tx: tx.execute(text("CREATE TABLE t (a int)")))

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    db.close()
    assert modes == {"new.db": 0o600, "new.db-wal": 0o600, "new.db-shm": 0o600}


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///"])
def test_a_database_in_memory_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would forget its keys; and no file of that name is left behind."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises(StoreError, match="would forget its keys"):
        open_database(url)
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_database_is_refused_without_its_password() -> None:
    """One line that says which are supported."""
    with pytest.raises(StoreError, match="only sqlite and postgresql") as caught:
        open_database("mysql://user:canary@host/x")

    assert "canary" not in str(caught.value)


def test_what_the_url_says_is_obeyed(postgresql_db: Database) -> None:
    """Options of the operator's own, beside ours."""
    db = open_database(url_of(postgresql_db) + "?application_name=edge&options=-c%20work_mem%3D7MB")
    names = ("application_name", "work_mem", "timezone", "idle_in_transaction_session_timeout")
    asked = [db.read(lambda tx, name=name: tx.exec_driver_sql(f"SHOW {name}").scalar()) for name in names]
    db.close()

    assert asked == ["edge", "7MB", "UTC", "10s"]


def test_a_url_names_its_file() -> None:
    """For the worker's lock beside it."""
    assert sqlite_path("sqlite:////a/b.db") == Path("/a/b.db")
    assert sqlite_path("postgresql://host/x") is None


def test_a_full_pool_is_a_store_error(sqlite_db: Database) -> None:
    """Not an exception of SQLAlchemy's that nobody expects."""
    db = open_database(url_of(sqlite_db))
    db.engine.pool._timeout = 0  # type: ignore[attr-defined]
    held = [db.engine.connect() for _ in range(40)]

    with pytest.raises(StoreError, match="cannot read from the database"):
        db.read(policies.list_all)
    for connection in held:
        connection.close()
    db.close()


# -- one door -----------------------------------------------------------------------------------------


def calls_of_the_engine(source: str) -> list[str]:
    """Return what a module does with an engine or opens by itself."""
    speaks_sql = "sqlalchemy" in source
    doors = {"begin", "connect", "begin_nested", "raw_connection", "create_engine", "sessionmaker", "Session"}
    imported = {"engine", "create_engine"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "engine":
            found.append(f"line {node.lineno}: .engine")
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in doors - {"connect", "Session"} and (name != "begin" or speaks_sql):
                found.append(f"line {node.lineno}: {name}()")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqlalchemy"):
            found += [f"line {node.lineno}: import {a.name}" for a in node.names if a.name in doors | imported]
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: {m}" for m in modules if m.split(".")[0] in ("psycopg", "sqlite3")]
    return found


def test_all_writes_go_through_one_call() -> None:
    """Nothing but `database` and `schema` begins a transaction, so that commits can one day be shared.

    `listen` has a connection of its own and writes nothing.
    """
    package = Path(certworker.__file__).parent
    allowed = {package / "store" / name for name in ("database.py", "schema.py", "listen.py")}
    modules = [path for path in package.rglob("*.py") if "migrations" not in path.relative_to(package).parts]
    assert len(modules) > 50

    for path in modules:
        found = calls_of_the_engine(path.read_text())
        if path in allowed:
            assert found, path
        else:
            assert found == [], path


def test_the_door_s_guard_sees_who_goes_past_it() -> None:
    """Why the test above means something."""
    past = ["db.engine.begin()", "tx = db.engine", "import sqlalchemy; tx.begin()", "import sqlite3"]
    past += ["import psycopg.sql", "from sqlalchemy import create_engine", "from sqlalchemy.orm import Session"]
    for line in past:
        assert calls_of_the_engine(line), line
    assert calls_of_the_engine("db.write(lambda tx: None); socket.connect(path)") == []


def test_a_thread_that_waits_is_not_the_loop(db: Database) -> None:
    """A write that waits for another one's lock goes on when that one commits."""
    locked, go_on = Event(), Event()

    def hold(tx: Connection) -> None:
        counters.next_value(tx, counters.REVISION)
        locked.set()
        assert go_on.wait(10)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(db.write, hold)
        assert locked.wait(10)
        second = threads.submit(db.write, lambda tx: counters.next_value(tx, counters.REVISION))
        go_on.set()
        first.result()
        assert second.result() == 2
