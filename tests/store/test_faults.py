"""The database fails in all the ways it can: what is run again, what is told, and that nothing doubles."""

import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import OperationalError

from certworker.errors import StoreError
from certworker.store import counters, database, issuances, policies, settings_kv
from certworker.store.database import Database, open_database
from certworker.store.rows import new_id
from tests.chaos.pgproxy import PostgresProxy
from tests.conftest import PostgresServer, migrate, run_postgres

from .conftest import NOW
from .given import url_of

CONNECTIONS = 10


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server that nobody else needs, with few connections and strange defaults."""
    options = (f"max_connections={CONNECTIONS}", "superuser_reserved_connections=0", "max_wal_senders=0")
    with run_postgres(*options, "default_transaction_isolation=serializable") as server:
        migrate(server.url())
        yield server


@pytest.fixture
def frail(server: PostgresServer) -> Iterator[Database]:
    """Its database, with nothing in it of the tests before."""
    db = open_database(server.url())
    db.write(lambda tx: tx.execute(text("DELETE FROM settings_kv")))
    yield db
    db.close()


def put(tx: Connection) -> None:
    settings_kv.put(tx, "k", "v")


def find(tx: Connection) -> str | None:
    return settings_kv.find(tx, "k")


# -- the server goes away and comes back ----------------------------------------------------------------


def crash(server: PostgresServer) -> None:
    """Let the server find a session dead: it ends all of them, recovers from its log, and goes on."""
    with psycopg.connect(server.url()) as victim, psycopg.connect(server.url()) as witness:
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            witness.execute("SELECT pg_sleep(30)")


def test_a_server_s_crash_costs_a_write_nothing_but_time(server: PostgresServer, frail: Database) -> None:
    """It is run again from its start; what was committed before is there, what was not never was."""
    runs = []
    frail.write(lambda tx: settings_kv.put(tx, "before", "committed"))
    first = frail.read(lambda tx: counters.value(tx, counters.REVISION))

    def write(tx: Connection) -> None:
        runs.append(counters.next_value(tx, counters.REVISION))
        if len(runs) == 1:
            crash(server)
            tx.execute(text("SELECT pg_sleep(15)"))  # until this session is ended too
        put(tx)

    frail.write(write)

    assert set(runs) == {first + 1}
    assert len(runs) == 2
    assert frail.read(find) == "v"
    assert frail.read(lambda tx: settings_kv.find(tx, "before")) == "committed"


def test_a_whole_pool_of_dead_connections_is_replaced(server: PostgresServer, frail: Database) -> None:
    """Reads, too: a CA that asks for a token meanwhile gets its answer."""
    held = [frail.engine.connect() for _ in range(6)]
    for connection in held:
        connection.close()
    crash(server)

    assert [frail.read(find) for _ in held] == [None] * 6


def test_a_read_that_loses_its_connection_is_run_again(frail: Database) -> None:
    """From its start, as a write is."""
    pids = []

    def read(tx: Connection) -> str | None:
        pids.append(tx.execute(text("SELECT pg_backend_pid()")).scalar_one())
        if len(pids) == 1:
            with psycopg.connect(url_of(frail), autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", pids)
        return find(tx)

    assert frail.read(read) is None
    assert len(set(pids)) == 2


def test_the_first_look_of_a_start_is_repeated_too(frail: Database) -> None:
    """A line that breaks while a service starts is no reason to end."""
    frail.engine.dispose()
    cut: list[int] = []

    @event.listens_for(frail.engine, "before_cursor_execute")
    def end_session(connection: Connection, *_: object) -> None:
        if not cut:
            cut.append(connection.connection.driver_connection.info.backend_pid)  # type: ignore[union-attr]
            with psycopg.connect(url_of(frail), autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", cut)

    frail.check_schema()

    assert len(cut) == 1


def test_a_server_without_a_free_connection_is_asked_again(server: PostgresServer, frail: Database) -> None:
    """Somebody may end; if nobody does, the error says what the server said."""
    frail.engine.dispose()
    others = [psycopg.connect(server.url()) for _ in range(CONNECTIONS)]
    with pytest.raises(StoreError, match=r"cannot write to the database: .*too many clients already"):
        frail.write(put)

    @event.listens_for(frail.engine, "handle_error")
    def leave(_: object) -> None:
        others.pop().close()

    frail.write(put)

    assert len(others) < CONNECTIONS
    for other in others:
        other.close()


# -- the answer to a COMMIT is lost -------------------------------------------------------------------


@pytest.fixture
def through_proxy(server: PostgresServer, frail: Database) -> Iterator[tuple[PostgresProxy, Database]]:
    """The database by a line that can lose an answer."""
    with PostgresProxy(server.port) as proxy:
        db = open_database(f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres")
        yield proxy, db
        db.close()


def test_a_commit_whose_answer_is_lost_may_have_happened(through_proxy: tuple[PostgresProxy, Database]) -> None:
    """The function is run again and finds what it wrote: it has to be one that looks first."""
    proxy, db = through_proxy
    found = []

    def write(tx: Connection) -> None:
        found.append(find(tx))
        put(tx)

    lost = proxy.lose_commit()
    db.write(write)

    assert lost.reached
    assert found == [None, "v"]


def test_a_policy_is_added_once_though_nobody_heard_of_it(through_proxy: tuple[PostgresProxy, Database]) -> None:
    """Its id is made outside of what is run again, and the second run says that it is there."""
    proxy, db = through_proxy
    policy_id, runs = new_id(), []

    def add(tx: Connection) -> None:
        runs.append(policies.add(tx, [f"{policy_id}.test"], NOW, policy_id=policy_id))

    proxy.lose_commit()
    db.write(add)

    assert runs == [policy_id, None]
    assert [policy.id for policy in db.read(lambda tx: policies.wanting(tx, f"{policy_id}.test"))] == [policy_id]


# -- what is run again, and what is told ----------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["40001", "40P01", "55P03", "57P01", "57P02", "57P03", "53300", "08006", "08003", "08P01"]
)
def test_what_passes_is_run_again(frail: Database, code: str) -> None:
    """The server itself says each of these, once."""
    runs = []

    def write(tx: Connection) -> None:
        runs.append(1)
        if len(runs) == 1:
            _raise(tx, code)
        put(tx)

    frail.write(write)

    assert len(runs) == 2
    assert frail.read(find) == "v"


@pytest.mark.parametrize(
    ("code", "advice"),
    [("25006", "the database is read-only; look whether"), ("53100", "its disk is full; make room"),
     ("57014", "as planned"), ("53200", "as planned"), ("42501", "as planned")],
)  # fmt: skip
def test_what_does_not_pass_is_told_at_once(frail: Database, code: str, advice: str) -> None:
    """With what a person can do, where the server's words do not say it."""
    runs = []

    def write(tx: Connection) -> None:
        runs.append(1)
        put(tx)
        _raise(tx, code)

    with pytest.raises(StoreError, match=f"^cannot write to the database: as planned.*{advice}|{advice}$"):
        frail.write(write)

    assert len(runs) == 1
    assert frail.read(find) is None


def _raise(tx: Connection, code: str) -> None:
    tx.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'as planned' USING ERRCODE = '{code}'; END $$")


def test_a_database_that_was_made_read_only(server: PostgresServer, frail: Database) -> None:
    """As after a failover: reading goes on, and writing when it is over."""
    with psycopg.connect(server.url(), autocommit=True) as operator:
        operator.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        standby = open_database(server.url())
        with pytest.raises(StoreError, match="read-only transaction: the database is read-only; look whether"):
            standby.write(put)
        assert standby.read(find) is None
        standby.close()
        operator.execute("ALTER DATABASE postgres RESET default_transaction_read_only")

    frail.write(put)


def test_a_statement_that_takes_too_long_is_cut_and_told(frail: Database) -> None:
    """Not run again: it would take as long."""
    runs = []

    def write(tx: Connection) -> None:
        runs.append(1)
        put(tx)
        tx.execute(text("SET LOCAL statement_timeout = 50"))
        tx.execute(text("SELECT pg_sleep(30)"))

    with pytest.raises(StoreError, match="canceling statement due to statement timeout"):
        frail.write(write)

    assert runs == [1]
    assert frail.read(find) is None


def test_a_lock_that_is_not_to_be_had_is_asked_for_again(frail: Database, server: PostgresServer) -> None:
    """Whoever holds it may be done by then."""
    holder, runs = psycopg.connect(server.url()), []
    holder.execute("SELECT * FROM counters WHERE name = 'epoch' FOR UPDATE")

    def write(tx: Connection) -> int:
        runs.append(1)
        if len(runs) == 2:
            holder.close()
        tx.execute(text("SET LOCAL lock_timeout = 50"))
        return counters.next_value(tx, counters.EPOCH)

    assert frail.write(write) > 1
    assert len(runs) == 2


@pytest.fixture
def fragile(sqlite_db: Database) -> Iterator[Database]:
    """The SQLite file as a process has it whose connections are changed."""
    db = open_database(url_of(sqlite_db))
    yield db
    db.close()


def _fill(tx: Connection) -> None:
    tx.exec_driver_sql("PRAGMA max_page_count = 1")  # no smaller than it is now
    settings_kv.put(tx, "k", "v" * 100_000)


def _make_read_only(tx: Connection) -> None:
    tx.exec_driver_sql("PRAGMA query_only = ON")
    put(tx)


def _fail_to_sync(_: Connection) -> None:
    said = sqlite3.OperationalError("disk I/O error")
    said.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    raise OperationalError("COMMIT", {}, said)


@pytest.mark.parametrize(
    ("act", "said"),
    [(_fill, "database or disk is full: its disk is full; make room"),
     (_make_read_only, "attempt to write a readonly database: the database is read-only; check who owns its file"),
     (_fail_to_sync, "disk I/O error: its disk cannot be read or written; check the disk")],
)  # fmt: skip
def test_an_sqlite_file_that_cannot_be_written(fragile: Database, act: Callable[[Connection], None], said: str) -> None:
    """Told at once, with what a person can do; nothing of it was kept."""
    runs = []

    def write(tx: Connection) -> None:
        runs.append(1)
        act(tx)

    with pytest.raises(StoreError, match=f"^cannot write to the database: {said}"):
        fragile.write(write)

    assert runs == [1]
    assert fragile.read(find) is None


def test_an_sqlite_file_whose_folder_is_gone(tmp_path: Path) -> None:
    """Not a traceback of the driver's."""
    with pytest.raises(StoreError, match="unable to open database file: check that its folder is there"):
        open_database(f"sqlite:///{tmp_path}/nowhere/x.db").read(find)


@pytest.fixture
def locked(fragile: Database) -> Iterator[sqlite3.Connection]:
    """Another process holds the file, and ours waits for a moment only."""
    event.listen(fragile.engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout = 1"))
    holder = sqlite3.connect(str(fragile.engine.url.database), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    yield holder
    holder.close()


def test_an_sqlite_file_that_is_locked_is_asked_for_again(fragile: Database, locked: sqlite3.Connection) -> None:
    """Longer than SQLite itself waits."""

    @event.listens_for(fragile.engine, "handle_error")
    def let_go(_: object) -> None:
        locked.execute("ROLLBACK")

    fragile.write(put)

    assert not locked.in_transaction
    assert fragile.read(find) == "v"


def test_an_sqlite_file_that_stays_locked(
    fragile: Database, locked: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody left a transaction open: the error says what to look for."""
    monkeypatch.setattr(database, "_ATTEMPTS", 1)
    with pytest.raises(StoreError, match="database is locked: another process holds on to it; look for a backup"):
        fragile.write(put)


def test_who_has_waited_for_long_is_told(frail: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many attempts are left: its caller has other things to do."""
    monkeypatch.setattr(database, "_PATIENCE", 0.0)
    runs = []

    def write(tx: Connection) -> None:
        runs.append(1)
        _raise(tx, "55P03")

    with pytest.raises(StoreError, match="as planned"):
        frail.write(write)
    assert runs == [1]


# -- connections ----------------------------------------------------------------------------------------


def test_a_session_is_ours_whatever_the_server_s_defaults(frail: Database) -> None:
    """Commits that survive a crash, and the isolation that the store reckons with."""
    names = ("synchronous_commit", "transaction_isolation", "timezone", "statement_timeout", "lock_timeout")
    shown = [frail.read(lambda tx, name=name: tx.exec_driver_sql(f"SHOW {name}").scalar()) for name in names]

    assert shown == ["on", "read committed", "UTC", "15s", "5s"]


def test_a_drained_pool_costs_no_lease(db: Database, lineage_id: str) -> None:
    """Heartbeats have a connection of their own; whoever else wants one waits for a while and is told."""
    reserved = db.reserve()
    worker = new_id()
    db.write(lambda tx: issuances.queue(tx, lineage_id, "first", NOW))
    (claimed,) = db.write(lambda tx: issuances.claim(tx, worker, NOW, 1))
    pool = db.engine.pool
    assert pool.timeout() == 5  # type: ignore[attr-defined]
    pool._timeout = 0.05  # type: ignore[attr-defined]
    # SQLite's writers take turns: what drains its pool are readers.
    held = [db.engine.connect() for _ in range(24 if not db.embedded else 39)]
    if not db.embedded:
        with pytest.raises(StoreError, match="write to the database: none of our connections to it became free in 5 s"):
            db.write(put)

    kept = reserved.write(lambda tx: issuances.extend_leases(tx, worker, [claimed.id]))

    assert kept == {claimed.id: claimed.lease_token}
    for connection in held:
        connection.close()
    reserved.close()
    assert db.read(find) is None


def test_the_reserved_connection_is_one_and_in_a_hurry(postgresql_db: Database) -> None:
    """A heartbeat that waits as long as a lease lasts is no use; and it keeps nobody else from a connection."""
    reserved = postgresql_db.reserve()
    names = ("statement_timeout", "lock_timeout", "synchronous_commit")
    shown = [reserved.read(lambda tx, name=name: tx.exec_driver_sql(f"SHOW {name}").scalar()) for name in names]
    pids = {reserved.read(lambda tx: tx.exec_driver_sql("SELECT pg_backend_pid()").scalar()) for _ in range(3)}
    reserved.close()

    assert shown == ["5s", "2s", "on"]
    assert len(pids) == 1


def test_sqlite_reserves_itself(sqlite_db: Database) -> None:
    """A second lock of ours on the same file would make writers poll instead of queue."""
    assert sqlite_db.reserve() is sqlite_db
