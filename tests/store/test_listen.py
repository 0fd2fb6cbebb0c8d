"""Wake-ups by PostgreSQL: heard while the line is there, made up for when it was not, never more than a hint."""

import logging
import queue
import socket
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import psycopg
import pytest

from certworker.store import counters, issuances
from certworker.store.database import Database, driver_arguments
from certworker.store.listen import TABLES, Listener

from .conftest import NOW
from .given import INSERTS, Program, url_of


@pytest.fixture
def db(postgresql_db: Database) -> Database:
    """SQLite notifies nobody."""
    return postgresql_db


class Ear:
    """What a listener has called back with."""

    def __init__(self) -> None:
        self._heard: queue.Queue[str] = queue.Queue()

    def __call__(self, table: str) -> None:
        self._heard.put(table)

    def next(self, count: int = 1) -> list[str]:
        """Wait for that many calls and return them."""
        return [self._heard.get(timeout=10) for _ in range(count)]

    @property
    def silent(self) -> bool:
        return self._heard.empty()


@pytest.fixture
def ear() -> Ear:
    return Ear()


Listen = Callable[[str, Callable[[str], object]], Listener]


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Start listeners that stop when the test ends."""
    listeners = []

    def start(url: str, on_notice: Callable[[str], object]) -> Listener:
        listeners.append(Listener(url, on_notice))
        listeners[-1].start()
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.stop()


def test_a_row_that_anybody_inserts_is_heard_of(
    db: Database, program: Program, lineage_id: str, ear: Ear, listen: Listen
) -> None:
    """After its commit; and at the start everything is, because nobody knows what was before."""
    listen(url_of(db), ear)
    assert set(ear.next(len(TABLES))) == TABLES

    program(INSERTS["tls_policies"])
    assert ear.next() == ["changes"]
    db.write(lambda tx: issuances.queue(tx, lineage_id, "first", NOW))
    assert ear.next() == ["issuances"]
    db.write(lambda tx: counters.next_value(tx, counters.REVISION))
    assert ear.next() == ["counters"]
    assert ear.silent


def test_many_rows_of_one_transaction_are_one_call(db: Database, program: Program, ear: Ear, listen: Listen) -> None:
    """What else is notified on the channel is nobody's business here."""
    listen(url_of(db), ear)
    ear.next(len(TABLES))
    program("""SELECT pg_notify('certworker', said) FROM
        unnest(ARRAY['', 'x', 'workers', 'changes', repeat('y', 7000), 'changes ']) said""")

    assert ear.next() == ["changes"]
    assert ear.silent


def test_a_lost_connection_is_replaced_and_everything_called(
    db: Database, program: Program, ear: Ear, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    """What was notified meanwhile was told to nobody."""
    with caplog.at_level(logging.INFO):
        listen(url_of(db), ear)
        ear.next(len(TABLES))
        end_listeners(program)
        assert set(ear.next(len(TABLES))) == TABLES
        program("NOTIFY certworker, 'changes'")
        assert ear.next() == ["changes"]

    said = [(record.levelname, record.message) for record in caplog.records]
    assert said == [("WARNING", "listener.lost"), ("INFO", "listener.back")]


def end_listeners(program: Program) -> None:
    ended = program("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE query = 'LISTEN certworker'")
    assert ended == [(True,)]


def test_a_database_that_is_away_is_asked_ever_more_seldom(
    ear: Ear, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    """At first after a fifth of a second, each time twice as long; said once for the whole outage."""
    tries = []
    with caplog.at_level(logging.INFO), socket.create_server(("127.0.0.1", 0)) as away:
        listen(f"postgresql://127.0.0.1:{away.getsockname()[1]}/x?sslmode=disable&gssencmode=disable", ear)
        away.settimeout(10)
        for _ in range(4):
            away.accept()[0].close()
            tries.append(time.monotonic())

    waits = [after - before for before, after in pairwise(tries)]
    assert all(wait > least for wait, least in zip(waits, (0.09, 0.19, 0.39), strict=True))
    assert [record.message for record in caplog.records] == ["listener.lost"]
    assert ear.silent


def test_whoever_is_called_may_fail(db: Database, program: Program, listen: Listen, ear: Ear) -> None:
    """The thread goes on."""

    def fail(table: str) -> None:
        ear(table)
        raise ZeroDivisionError

    listen(url_of(db), fail)
    assert set(ear.next(len(TABLES))) == TABLES
    program("NOTIFY certworker, 'issuances'")
    assert ear.next() == ["issuances"]


def test_a_stop_does_not_wait_for_a_notice(db: Database, program: Program, ear: Ear, listen: Listen) -> None:
    """Nor is anybody called after it, nor a connection left; twice is nothing."""
    listener = listen(url_of(db), ear)
    ear.next(len(TABLES))
    began = time.monotonic()
    listener.stop()
    listener.stop()

    assert time.monotonic() - began < 1
    program("NOTIFY certworker, 'changes'")
    while program("SELECT 1 FROM pg_stat_activity WHERE query = 'LISTEN certworker'"):
        assert time.monotonic() - began < 10
    assert ear.silent


def test_a_stop_does_not_wait_for_a_database_that_is_away(ear: Ear, listen: Listen) -> None:
    """One that accepts and says nothing keeps the thread for a while, but not whoever stops it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        listener = listen(f"postgresql://127.0.0.1:{silent.getsockname()[1]}/x?connect_timeout=2", ear)
        silent.settimeout(10)
        taken, _ = silent.accept()
        began = time.monotonic()
        listener.stop()

        assert time.monotonic() - began < 2
        taken.close()


def test_one_that_was_never_started_can_be_stopped(ear: Ear) -> None:
    """The service's start may have failed before."""
    Listener("postgresql://127.0.0.1:1/x", ear).stop()


# -- from SQLAlchemy's url to psycopg's arguments ------------------------------------------------------


@pytest.mark.parametrize("driver", ["postgresql", "postgresql+psycopg"])
@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("me:p%40s%2Fs%3A@h.test:5433/d", {"user": "me", "password": "p@s/s:", "host": "h.test", "port": 5433}),
        ("me@/d?host=/run/pg", {"user": "me", "host": "/run/pg", "dbname": "d"}),
        ("/d?host=a.test:1&host=b.test:2&target_session_attrs=read-write",
         {"host": "a.test,b.test", "port": "1,2", "target_session_attrs": "read-write"}),
        ("[::1]:5/d?application_name=edge&connect_timeout=3", {"host": "::1", "application_name": "edge"}),
        ("h.test/d?sslmode=verify-full&sslrootcert=/ca.pem", {"sslmode": "verify-full", "sslrootcert": "/ca.pem"}),
    ],
)  # fmt: skip
def test_the_driver_is_told_what_the_url_says(driver: str, rest: str, said: dict[str, object]) -> None:
    """All of it, and ours only where it says nothing."""
    given = driver_arguments(f"{driver}://{rest}")

    assert said.items() <= given.items()
    assert given["connect_timeout"] == ("3" if "connect_timeout" in rest else 10)


def test_a_socket_and_options_of_the_operator_s_own(db: Database, program: Program) -> None:
    """Each has its way, beside our session."""
    ((folder, port),) = program("SELECT current_setting('unix_socket_directories'), current_setting('port')")
    url = (
        f"postgresql+psycopg://postgres@/{db.engine.url.database}?host={folder}&port={port}&options=-c%20work_mem%3D7MB"
    )
    with psycopg.connect(**driver_arguments(url)) as connection:
        shown = connection.execute(
            """SELECT current_setting('work_mem'), current_setting('synchronous_commit'),
                current_setting('transaction_isolation'), inet_server_addr()"""
        ).fetchone()

    assert shown == ("7MB", "on", "read committed", None)
