"""Up, down, up again: with rows, with other migrators, with a failure in the middle."""

import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier

import pytest
from sqlalchemy import text

from certworker.errors import SchemaError, StoreError
from certworker.store import schema
from certworker.store.database import SCHEMA_REVISION as NEWEST
from certworker.store.database import Database, open_database, schema_revision
from certworker.store.schema import downgrade, upgrade
from tests.conftest import PostgresServer
from tests.store.given import INSERTS, LISTENER, POLICY, REFUSED, ROUTE, Program, url_of

from .catalog import read_catalog


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without a schema."""
    if request.param == "sqlite":
        db = open_database(f"sqlite:///{tmp_path / 'empty.db'}")
        yield db
        db.close()
        return
    server: PostgresServer = request.getfixturevalue("postgresql")
    name = server.create_database()
    db = open_database(server.url(name))
    yield db
    db.close()
    server.drop_database(name)


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give the release one more migration, which does what the lines say."""

    def add(lines: str) -> None:
        folder = tmp_path / "migrations"
        shutil.copytree(schema.migrations_folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
        head = f'from alembic import op\nrevision = "9999"\ndown_revision = "{NEWEST}"\n\n\ndef upgrade():\n    '
        (folder / "versions" / "9999_newer.py").write_text(head + lines)
        monkeypatch.setattr(schema, "migrations_folder", lambda: folder)

    return add


def rows_of(db: Database, tables: list[str]) -> dict[str, int]:
    return db.read(lambda tx: {t: tx.execute(text(f"SELECT count(*) FROM {t}")).scalar_one() for t in tables})


def test_down_and_up_again_keeps_every_row_and_key(db: Database) -> None:
    """The ten tables' rows outlive ours, and their foreign keys and triggers work afterwards."""
    program = Program(db)
    program.insert_all()
    before = read_catalog(db)

    assert downgrade(db, "0001") == (NEWEST, "0001")
    assert rows_of(db, list(INSERTS)) == dict.fromkeys(INSERTS, 1)
    with pytest.raises(REFUSED):
        program("DELETE FROM listeners")
    assert upgrade(db) == ("0001", NEWEST)

    assert rows_of(db, list(INSERTS)) == dict.fromkeys(INSERTS, 1)
    assert read_catalog(db) == before
    for statement in ("DELETE FROM listeners", "DELETE FROM config_versions", "DELETE FROM upstream_pools"):
        with pytest.raises(REFUSED):
            program(statement)
    program.notes()
    program("UPDATE routes SET enabled = false")
    assert program.notes() == [("gateway", ROUTE)]
    program.close()


def test_down_to_nothing_and_up_again(db: Database) -> None:
    """Both revisions undo all they did, the functions of PostgreSQL included."""
    before = read_catalog(db)

    assert downgrade(db, "base") == (NEWEST, None)
    assert read_catalog(db) == set()
    assert upgrade(db) == (None, NEWEST)
    assert read_catalog(db) == before


def test_rows_that_were_there_before_certworker_are_noted(empty: Database) -> None:
    """A gateway that ran on revision 0001 is taken over whole."""
    upgrade(empty, "0001")
    program = Program(empty)
    program.insert_all()

    upgrade(empty)

    assert {topic for topic, _ in program.notes()} == {"policy", "certificate", "gateway"}
    program("UPDATE listeners SET port = 444")
    assert program.notes() == [("gateway", LISTENER)]
    program.close()


def test_a_policy_from_before_is_noted_by_its_id(empty: Database) -> None:
    """The note names the row."""
    upgrade(empty, "0001")
    program = Program(empty)
    program(INSERTS["tls_policies"])

    upgrade(empty)

    assert program.notes() == [("policy", POLICY)]
    program.close()


@pytest.mark.parametrize(
    ("gone", "goes_on"), [("key_ready", "queued"), ("published", "validating"), ("issued", "finalizing")]
)
def test_an_issuance_of_an_older_release_goes_on(empty: Database, gone: str, goes_on: str) -> None:
    """A state that is committed no more becomes the one before it."""
    upgrade(empty, "0007")
    program = Program(empty)
    values = "'2026-11-22T12:00:00.000000Z'"
    program(
        "INSERT INTO lineages (id, dns_names, names_hash, directory_url, key_type, created_at, updated_at)"
        f" VALUES ('{POLICY}', '{'[]' if empty.embedded else '{}'}', 'h', 'u', 'k', {values}, {values})"
    )
    program(
        "INSERT INTO issuances (id, lineage_id, reason, state, state_at, attempt_at, created_at, key_pem, csr_der)"
        f" VALUES ('{ROUTE}', '{POLICY}', 'first', '{gone}', {values}, {values}, {values}, 'k', 'c')"
    )

    upgrade(empty)

    assert empty.read(lambda tx: tx.execute(text("SELECT state FROM issuances")).scalars().all()) == [goes_on]
    program.close()


@pytest.mark.parametrize(("state", "closed_at"), [("failed", None), ("queued", "2026-11-22T13:00:00.000000Z")])
def test_an_issuance_is_open_or_closed_in_both_columns(empty: Database, state: str, closed_at: str | None) -> None:
    """Whatever another program has done to it: what is open is found by `closed_at` from then on."""
    upgrade(empty, "0008")
    program = Program(empty)
    now, closed = "'2026-11-22T12:00:00.000000Z'", f"'{closed_at}'" if closed_at else "NULL"
    program(
        "INSERT INTO lineages (id, dns_names, names_hash, directory_url, key_type, created_at, updated_at)"
        f" VALUES ('{POLICY}', '{'[]' if empty.embedded else '{}'}', 'h', 'u', 'k', {now}, {now})"
    )
    program(
        "INSERT INTO issuances (id, lineage_id, reason, state, state_at, attempt_at, created_at, closed_at)"
        f" VALUES ('{ROUTE}', '{POLICY}', 'first', '{state}', {now}, {now}, {now}, {closed})"
    )

    upgrade(empty)

    is_closed = "SELECT closed_at = state_at FROM issuances WHERE closed_at IS NOT NULL"
    assert empty.read(lambda tx: tx.execute(text(is_closed)).scalars().all()) == ([True] if state == "failed" else [])
    program.close()


def test_two_migrators_at_once(empty: Database) -> None:
    """The second waits for the first and finds nothing to do."""
    start = Barrier(2)
    both = [open_database(url_of(empty)) for _ in range(2)]

    def migrate(db: Database) -> tuple[str | None, str | None]:
        start.wait()
        return upgrade(db)

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(migrate, both))
    for db in both:
        db.close()

    assert sorted(results, key=str) == [(NEWEST, NEWEST), (None, NEWEST)]
    empty.check_schema()


def test_nothing_is_left_of_a_migration_that_fails(db: Database, newer: Callable[[str], None]) -> None:
    """It is one transaction; the error is one line without a statement."""
    newer('op.execute("CREATE TABLE half (a int)"); op.execute("SELECT x FROM nowhere")')
    before = read_catalog(db)

    with pytest.raises(SchemaError) as caught:
        upgrade(db)

    assert str(caught.value).startswith("cannot take the database's schema to head: ")
    assert "nowhere" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "SELECT" not in str(caught.value)
    assert read_catalog(db) == before
    assert db.read(schema_revision) == NEWEST


REBUILD = 'with op.batch_alter_table("lineages", recreate="always"):\n        pass'


@pytest.fixture
def child(sqlite_db: Database) -> Callable[[], int]:
    """A lineage with a name; count the names, which go with their lineage."""
    program = Program(sqlite_db)
    program(f"""INSERT INTO lineages (id, dns_names, names_hash, directory_url, key_type)
        VALUES ('{POLICY}', <a.test>, 'h', 'd', 'k')""")
    program(f"INSERT INTO lineage_names (dns_name, lineage_id) VALUES ('a.test', '{POLICY}')")
    program.close()
    return lambda: rows_of(sqlite_db, ["lineage_names"])["lineage_names"]


def test_rebuilding_a_table_keeps_its_children(
    sqlite_db: Database, newer: Callable[[str], None], child: Callable[[], int]
) -> None:
    """SQLite changes a column by dropping the table, which cascades unless foreign keys are off."""
    newer(REBUILD)

    upgrade(sqlite_db)

    assert child() == 1
    assert sqlite_db.read(lambda tx: tx.exec_driver_sql("PRAGMA foreign_keys").scalar()) == 1


def test_rebuilding_with_foreign_keys_on_loses_them(
    sqlite_db: Database, newer: Callable[[str], None], child: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the test above means something."""
    newer(REBUILD)
    monkeypatch.setattr(schema, "_without_foreign_keys", nullcontext)

    upgrade(sqlite_db)

    assert child() == 0


def test_a_migration_that_orphans_a_row_is_refused(
    sqlite_db: Database, newer: Callable[[str], None], child: Callable[[], int]
) -> None:
    """Foreign keys are checked before the commit."""
    newer('op.execute("DELETE FROM lineages")')

    with pytest.raises(RuntimeError, match="without their parent"):
        upgrade(sqlite_db)

    assert child() == 1
    assert rows_of(sqlite_db, ["lineages"]) == {"lineages": 1}


# -- the copy of an SQLite file -------------------------------------------------------------------------


def test_the_file_is_copied_before_anything_changes(sqlite_db: Database, tmp_path: Path) -> None:
    """Whole, mode 0600, at the old revision, and before a downgrade as before an upgrade."""
    program = Program(sqlite_db)
    program.insert_all()

    downgrade(sqlite_db, "0001")
    program("DELETE FROM audit_logs")
    upgrade(sqlite_db)

    program.close()
    for revision, logs in ((NEWEST, 1), ("0001", 0)):
        path = tmp_path / f"certworker.db.before-{revision}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        copy = open_database(f"sqlite:///{path}")
        assert copy.read(schema_revision) == revision
        assert rows_of(copy, ["audit_logs", "listeners"]) == {"audit_logs": logs, "listeners": 1}
        copy.close()


def test_nothing_is_copied_when_nothing_is_to_do(sqlite_db: Database, tmp_path: Path) -> None:
    """`init` and `db upgrade` can be repeated for nothing."""
    upgrade(sqlite_db)

    assert list(tmp_path.glob("*.before-*")) == []


def test_a_copy_that_was_cut_short_is_made_anew(sqlite_db: Database, tmp_path: Path) -> None:
    """What a killed migration left is not taken for a copy, and a second attempt copies what is there then."""
    (tmp_path / f"certworker.db.before-{NEWEST}.unfinished").write_text("half")
    (tmp_path / f"certworker.db.before-{NEWEST}").write_text("of an earlier attempt")

    downgrade(sqlite_db, "0001")

    copy = open_database(f"sqlite:///{tmp_path}/certworker.db.before-{NEWEST}")
    copy.check_schema()
    copy.close()
    assert list(tmp_path.glob("*.unfinished")) == []


# -- what does not fit ----------------------------------------------------------------------------------


def test_an_empty_database_is_told_to_init(empty: Database) -> None:
    """No traceback about a missing table."""
    with pytest.raises(SchemaError, match=rf"is empty, this release needs {NEWEST}: run `certworker init`"):
        empty.check_schema()
    assert schema.differences(empty) == [f"the schema is empty, this release needs {NEWEST}"]


def test_an_old_schema_is_told_to_upgrade(db: Database) -> None:
    """And one made by a newer release not to be touched."""
    downgrade(db, "0001")
    with pytest.raises(SchemaError, match=rf"is 0001, this release needs {NEWEST}: run `certworker db upgrade`"):
        db.check_schema()
    upgrade(db)
    db.check_schema()


def test_a_newer_schema_needs_a_newer_release(db: Database) -> None:
    """Upgrading cannot help, and says so in one line."""
    db.write(lambda tx: tx.execute(text("UPDATE alembic_version SET version_num = '9999'")))

    with pytest.raises(SchemaError, match="a newer release has worked with it, run that one"):
        db.check_schema()
    with pytest.raises(SchemaError, match="9999"):
        upgrade(db)


def test_a_database_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """For PostgreSQL, a file that is something else, and a folder that is missing."""
    (tmp_path / "text.db").write_text("no database at all, but long enough to be looked into by SQLite" * 20)
    for url in ("postgresql://127.0.0.1:1/x", f"sqlite:///{tmp_path}/text.db", f"sqlite:///{tmp_path}/no/folder.db"):
        db = open_database(url)
        for call in (db.check_schema, lambda db=db: upgrade(db), lambda db=db: db.write(lambda _: None)):
            with pytest.raises(StoreError) as caught:
                call()
            assert "\n" not in str(caught.value)
        db.close()
