"""Prepared statements do what SQLAlchemy's own do, on both databases."""

from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, bindparam, event, insert, select, update

from certworker.errors import StoreError, StoreRefused
from certworker.store.database import Database
from certworker.store.prepared import Prepared
from certworker.store.rows import among, new_id
from certworker.store.tables import issuances, settings_kv

from .conftest import NOW
from .given import url_of

_ADD = Prepared(insert(settings_kv))
_FIND = Prepared(select(settings_kv.c.value).where(settings_kv.c.key == bindparam("wanted")))
_CHANGE = Prepared(update(settings_kv).where(settings_kv.c.key == bindparam("wanted")))
_APPEND = Prepared(
    update(settings_kv)
    .where(settings_kv.c.key == bindparam("wanted"))
    .values(value=settings_kv.c.value + "%")
    .returning(settings_kv.c.value)
)


@pytest.fixture
def row(lineage_id: str) -> dict[str, Any]:
    """An issuance with something in a column of each type."""
    return {
        "id": new_id(), "lineage_id": lineage_id, "reason": "first", "state": "queued", "state_at": NOW,
        "attempt_at": NOW + timedelta(microseconds=1), "created_at": NOW, "key_pem": None, "csr_der": b"\0\xff",
        "error": {"text": "50 %", "parts": [1, None]}, "dns_names": ["a.test", "ä%s"], "urgent": True, "crashes": 7,
    }  # fmt: skip


def test_every_type_goes_in_and_comes_out(db: Database, row: dict[str, Any]) -> None:
    """As SQLAlchemy has it, whichever of the two wrote it."""
    of_lineage = (among(issuances.c.lineage_id, "lineages"), issuances.c.urgent == bindparam("urgent"))
    query = select(*(issuances.c[name] for name in row)).where(*of_lineage).order_by(issuances.c.state.desc())
    theirs = {**row, "id": new_id(), "error": None, "dns_names": None}
    asked = {"lineages": [row["lineage_id"]], "urgent": True}

    def write(tx: Connection) -> None:
        assert Prepared(insert(issuances)).run(tx, [row]) == 1
        tx.execute(insert(issuances), [{**theirs, "state": "failed", "closed_at": NOW}])

    db.write(write)

    found = db.read(lambda tx: Prepared(query).fetch(tx, **asked))
    assert [dict(zip(row, one, strict=True)) for one in found] == [row, {**theirs, "state": "failed"}]
    assert [tuple(one) for one in found] == db.read(lambda tx: [tuple(one) for one in tx.execute(query, asked)])


def test_rows_are_counted(db: Database) -> None:
    """Those that were changed, by many at once; without a row nothing is sent."""

    def write(tx: Connection) -> list[int]:
        return [
            _ADD.run(tx, [{"key": "a", "value": "1"}, {"key": "b", "value": "2"}]),
            _CHANGE.run(tx, [{"wanted": key, "value": "3"} for key in "abc"]),
            _CHANGE.run(tx, []),
        ]

    assert db.write(write) == [2, 2, 0]
    assert db.read(lambda tx: [_FIND.fetch(tx, wanted=key)[0][0] for key in "ab"]) == ["3", "3"]


def test_the_text_depends_on_what_is_given(db: Database) -> None:
    """Of one UPDATE several, each with its own columns; what the statement says itself stays."""
    key = {"key": "a", "value": "1"}
    db.write(lambda tx: _ADD.run(tx, [key]))

    assert [[*one] for one in db.write(lambda tx: _APPEND.fetch(tx, wanted="a"))] == [["1%"]]
    db.write(lambda tx: _CHANGE.run(tx, [{"wanted": "a", "key": "b"}]))
    assert db.read(lambda tx: _FIND.fetch(tx, wanted="a")) == []
    assert [[*one] for one in db.read(lambda tx: _FIND.fetch(tx, wanted="b"))] == [["1%"]]


@pytest.mark.parametrize("many", [False, True])
def test_who_listens_hears_of_it(db: Database, many: bool) -> None:
    """As of any statement: how counts and plans are taken."""
    rows = [{"key": key, "value": "1"} for key in ("ab" if many else "a")]
    heard: list[tuple[str, bool]] = []

    def note(_connection: Connection, _cursor: Any, statement: str, _values: Any, _context: Any, many: bool) -> None:
        heard.append((statement.split()[0], many))

    event.listen(db.engine, "before_cursor_execute", note)
    db.write(lambda tx: (_ADD.run(tx, rows), _FIND.fetch(tx, wanted="a")))
    event.remove(db.engine, "before_cursor_execute", note)

    assert [one for one in heard if one[0] != "BEGIN"] == [("INSERT", many), ("SELECT", False)]


def test_what_the_database_refuses_says_why(db: Database) -> None:
    """Without the values: one of them may be a key. Nothing of it is kept."""
    twice = [{"key": "a", "value": "secret"}, {"key": "a", "value": "secret"}]

    with pytest.raises(StoreRefused) as refused:
        db.write(lambda tx: _ADD.run(tx, twice))

    assert "unique" in str(refused.value).lower()
    assert "secret" not in str(refused.value)
    assert db.read(lambda tx: _FIND.fetch(tx, wanted="a")) == []


def test_a_lost_connection_is_noticed(postgresql_db: Database) -> None:
    """What was under way is run again with another one."""
    pids = []

    def write(tx: Connection) -> int:
        pids.append(tx.connection.driver_connection.info.backend_pid)  # type: ignore[union-attr]
        if len(pids) == 1:
            with psycopg.connect(url_of(postgresql_db), autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", pids)
        return _ADD.run(tx, [{"key": "a", "value": "1"}])

    assert postgresql_db.write(write) == 1
    assert len(set(pids)) == 2


def test_what_cannot_be_run_again_is_an_outage(sqlite_db: Database) -> None:
    """A table that is gone is no row that is refused."""
    sqlite_db.write(lambda tx: tx.exec_driver_sql("DROP TABLE settings_kv"))

    with pytest.raises(StoreError, match="cannot read from the database: no such table") as error:
        sqlite_db.read(lambda tx: _FIND.fetch(tx, wanted="a"))

    assert not isinstance(error.value, StoreRefused)
