"""What goes into a column comes out of it, on both databases, and time keeps its order."""

import sqlite3
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Column, MetaData, Table, insert, literal, select
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.exc import StatementError

from certworker.store import audit, policies
from certworker.store.database import Database
from certworker.store.tables import audit_logs, certificates, tls_policies, upstream_pools
from certworker.store.types import UtcTime, UuidText, db_now, form_checks, read_json, seconds_from_now

from .conftest import NOW
from .given import CERTIFICATE, INSERTS, POLICY, POOL, Program

SQLITE = sqlite_dialect()  # type: ignore[no-untyped-call]

ZONES = [UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=-12)), timezone(timedelta(hours=14))]
YEARS_1_TO_9999 = timedelta(days=3_652_000)
instants = st.builds(
    lambda since, zone: (datetime(1, 1, 2, tzinfo=UTC) + since).astimezone(zone),
    st.timedeltas(timedelta(days=1), YEARS_1_TO_9999),
    st.sampled_from(ZONES),
)


def stored(instant: datetime) -> str:
    """Return the text that SQLite gets."""
    text = UtcTime().process_bind_param(instant, SQLITE)
    assert isinstance(text, str)
    return text


@given(one=instants, other=instants)
def test_times_compare_as_text_as_they_compare_as_times(one: datetime, other: datetime) -> None:
    """Whatever their zones, years below 1000 included: due-comparisons on SQLite are comparisons of text."""
    assert (stored(one) < stored(other)) == (one < other)
    assert (stored(one) == stored(other)) == (one == other)


@given(instant=instants)
def test_every_time_has_the_contract_s_form_and_comes_back(instant: datetime) -> None:
    """What we write passes the check that holds other programs to the form, and is the same instant."""
    column = Column("at", UtcTime, nullable=False)
    Table("t", MetaData(), column)
    (check,) = form_checks([column], ["sqlite"])
    connection = sqlite3.connect(":memory:")
    connection.execute(f"CREATE TABLE t (at TEXT CHECK ({check.sqltext}))")
    connection.execute("INSERT INTO t VALUES (?)", (stored(instant),))
    connection.close()

    back = UtcTime().process_result_value(stored(instant), SQLITE)
    assert back == instant
    assert back is not None
    assert back.utcoffset() == timedelta(0)


@pytest.mark.parametrize("hours", [-12, -3.5, 0, 5.75, 14])
def test_a_time_comes_back_in_utc_to_the_microsecond(db: Database, hours: float) -> None:
    """In whatever zone it was given."""
    given_at = NOW.astimezone(timezone(timedelta(hours=hours)))
    policy_id = db.write(lambda tx: policies.add(tx, ["a.test"], given_at))

    policy = db.read(lambda tx: policies.find(tx, policy_id))
    assert policy is not None
    assert policy.created_at == NOW
    assert policy.created_at.tzinfo is UTC
    assert policy.created_at.microsecond == NOW.microsecond == 123456


def test_a_naive_time_is_refused(db: Database) -> None:
    """Nobody knows which instant it means."""
    with pytest.raises(StatementError, match="naive"):
        db.write(lambda tx: policies.add(tx, ["a.test"], NOW.replace(tzinfo=None)))
    with pytest.raises(StatementError, match="naive"):
        db.read(lambda tx: tx.execute(select(1).where(tls_policies.c.created_at < NOW.replace(tzinfo=None))))

    assert db.read(policies.list_all) == []


def test_an_id_is_text_in_the_contract_s_form(db: Database) -> None:
    """36 characters, lower case, whatever the database keeps; so ids of other programs join with ours."""
    program = Program(db)
    program(INSERTS["tls_policies"])
    program.close()

    ids = db.read(lambda tx: tx.execute(select(tls_policies.c.id)).scalars().all())
    assert ids == [POLICY]


def test_an_array_keeps_order_and_every_letter(db: Database) -> None:
    """Braces, quotes, commas, NULL as a word, other scripts; and nothing at all."""
    hard = ["b.test", "a.test", '"', "{}", "a,b", "NULL", "\\", "münchen.test", "中", "", "%_"]
    ids = [db.write(lambda tx, names=names: policies.add(tx, names, NOW)) for names in (hard, [])]

    found = [db.read(lambda tx, policy_id=policy_id: policies.find(tx, policy_id)) for policy_id in ids]
    assert [policy.domains if policy else None for policy in found] == [hard, []]


def test_json_comes_back_and_none_is_null(db: Database) -> None:
    """Python's None is SQL's NULL, not JSON's `null`, so `IS NULL` finds it."""
    value = {"kind": "tcp", "n": 1, "f": 1.5, "deep": [{"é": None}, True]}
    row = {"id": POOL, "name": "p", "policy": "weighted", "created_at": NOW, "updated_at": NOW}
    db.write(lambda tx: tx.execute(insert(upstream_pools).values(health_check=value, **row)))
    assert db.read(lambda tx: tx.execute(select(upstream_pools.c.health_check)).scalar()) == value

    db.write(lambda tx: tx.execute(upstream_pools.update().values(health_check=None)))
    null = select(upstream_pools.c.id).where(upstream_pools.c.health_check.is_(None))
    assert db.read(lambda tx: tx.execute(null).scalar()) == POOL


@pytest.mark.parametrize("text", [b'["\xff"]', "9" * 5000, "[" * 5000 + "]" * 5000])
def test_json_that_python_cannot_read_is_a_text(text: str | bytes) -> None:
    """Whoever looks at the row refuses it; every other row of the query is read."""
    read = read_json(text)

    assert isinstance(read, str)
    assert 0 < len(read) <= 200


def test_the_database_s_time_is_one_more_time(db: Database) -> None:
    """`db_now` compares with stored times, and `seconds_from_now` counts from it both ways."""

    def ask(tx: object) -> list[bool]:
        earlier, later = seconds_from_now(literal(-60)), seconds_from_now(literal(60))
        query = select(earlier < db_now(), db_now() < later, db_now() > NOW.replace(year=2020), later > later_by(59))
        return list(tx.execute(query).one())  # type: ignore[attr-defined]

    def later_by(seconds: int) -> seconds_from_now:
        return seconds_from_now(literal(seconds))

    assert [bool(answer) for answer in db.read(ask)] == [True] * 4


def test_the_database_s_time_is_aware_and_has_the_form(db: Database) -> None:
    """It can be stored where a time of ours can: the minute a lease ends, for example."""
    instants = db.read(lambda tx: tx.execute(select(db_now(), seconds_from_now(literal(3600)))).one())
    assert [instant.tzinfo for instant in instants] == [UTC, UTC]
    assert timedelta(minutes=59) < instants[1] - instants[0] <= timedelta(hours=1, seconds=1)

    program = Program(db)
    program(INSERTS["certificates"])
    program.close()
    db.write(lambda tx: tx.execute(certificates.update().values(expires_at=seconds_from_now(literal(7)))))
    db.write(lambda tx: tx.execute(certificates.update().values(updated_at=db_now())))
    assert db.read(lambda tx: tx.execute(select(certificates.c.id)).scalar()) == CERTIFICATE


def test_the_database_s_time_moves_inside_a_transaction(postgresql_db: Database) -> None:
    """PostgreSQL's now() stands still, and a lease taken late in a long transaction would be short."""

    def twice(tx: object) -> list[datetime]:
        return [tx.execute(select(db_now())).scalar_one() for _ in range(2)]  # type: ignore[attr-defined]

    first, second = postgresql_db.read(twice)
    assert first < second


def test_a_server_s_default_is_the_present(db: Database) -> None:
    """For rows of programs that do not name `created_at`."""
    program = Program(db)
    program(f"INSERT INTO audit_logs (id, actor, action, diff) VALUES ('{POLICY}', 'a', 'b', '{{}}')")
    program.close()

    (row,) = db.read(audit.newest)
    now = db.read(lambda tx: tx.execute(select(db_now())).scalar_one())
    assert timedelta(seconds=-1) < now - row["created_at"] < timedelta(minutes=5)
    assert audit_logs.c.created_at.type.__class__ is UtcTime
    assert audit_logs.c.id.type.__class__ is UuidText


def test_fixture_files_are_in_wal_mode(sqlite_db: Database, tmp_path: Path) -> None:
    """Readers go on while somebody writes, and a commit is on the disk when it returns."""
    asked = {name: sqlite_db.read(lambda tx, name=name: tx.exec_driver_sql(f"PRAGMA {name}").scalar())
             for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")}  # fmt: skip

    assert asked == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
