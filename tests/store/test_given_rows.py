"""What another gateway program may write, and what the database refuses whoever writes it."""

from contextlib import closing

import psycopg
import pytest
from sqlalchemy import insert, select

from certworker.store import changes, issuances, policies
from certworker.store.database import Database, open_database
from certworker.store.tables import issuances as issuance_rows
from certworker.store.tables import upstream_pools

from .conftest import NOW
from .given import (
    ACCOUNT,
    AT,
    CERTIFICATE,
    INSERTS,
    LISTENER,
    NODE,
    POLICY,
    POOL,
    REFUSED,
    ROUTE,
    SHORTEST,
    TARGET,
    VERSION,
    Program,
)

ENUMERATIONS = {
    "listeners.protocol": ("http", "https"),
    "routes.type": ("port", "path", "ws"),
    "upstream_pools.policy": ("round_robin", "least_conn", "weighted"),
    "tls_policies.mode": ("auto", "manual"),
    "tls_policies.status": ("active", "error", "pending"),
    "certificates.status": ("active", "expired", "error"),
    "config_versions.status": ("draft", "published", "archived"),
}
TIMES = [
    *(f"{table}.created_at" for table in INSERTS if table != "node_status"),
    *(f"{table}.updated_at" for table in list(INSERTS)[:6]),
    "certificates.expires_at",
    "node_status.heartbeat_at",
]
UUIDS = [
    *(f"{table}.id" for table in INSERTS),
    "listeners.tls_policy_id",
    "routes.listener_id",
    "routes.upstream_pool_id",
    "upstream_targets.pool_id",
    "node_status.version_id",
]


@pytest.mark.parametrize("rows", [INSERTS, SHORTEST], ids=["every column", "no column with a default"])
def test_given_columns_alone_make_a_row(program: Program, rows: dict[str, str]) -> None:
    """Another program needs to know nothing of ours, in any of the ten tables."""
    program.insert_all(rows)

    assert len(rows) == 10
    for table in rows:
        assert program(f"SELECT count(*) FROM {table}") == [(1,)], table


def test_defaults_are_the_contract_s(program: Program) -> None:
    """enabled is true, a weight is 1, and times are the database's, in the contract's form."""
    program.insert_all(SHORTEST)

    assert program("SELECT count(*) FROM listeners WHERE enabled = true") == [(1,)]
    assert program("SELECT weight FROM upstream_targets") == [(1,)]
    if program.embedded:
        ((created_at,),) = program("SELECT created_at FROM audit_logs")
        assert len(created_at) == len("2026-11-22T12:00:00.000000Z")


@pytest.mark.parametrize(("column", "values"), ENUMERATIONS.items(), ids=ENUMERATIONS)
def test_enumeration_is_exactly_the_contract_s(program: Program, column: str, values: tuple[str, ...]) -> None:
    """Every listed word is taken; another one, another case and none at all are refused."""
    table, _, name = column.partition(".")
    program.insert_all()

    for value in values:
        program(f"UPDATE {table} SET {name} = '{value}'")
    for value in ("'other'", f"'{values[0].upper()}'", f"'{values[0]} '", "''", "NULL"):
        with pytest.raises(REFUSED):
            program(f"UPDATE {table} SET {name} = {value}")


@pytest.mark.parametrize("column", UUIDS)
@pytest.mark.parametrize("wrong", [POLICY.replace("-", ""), "ABCDEF00-0000-4000-8000-00000000ABCD", "x", ""])
def test_sqlite_refuses_a_uuid_in_another_form(sqlite_db: Database, column: str, wrong: str) -> None:
    """It would join with nothing; PostgreSQL has a type of its own for it."""
    program = Program(sqlite_db)
    table, _, name = column.partition(".")
    program.insert_all()

    with pytest.raises(REFUSED, match="CHECK"):
        program(f"UPDATE {table} SET {name} = '{wrong}'")
    program.close()


WRONG_TIMES = [
    "2026-11-22 12:00:00",
    "2026-11-22T12:00:00Z",
    "2026-11-22T12:00:00.000Z",
    "2026-11-22T12:00:00.000000",
    "2026-11-22T12:00:00.000000+00:00",
    "2026-11-22 12:00:00.000000Z",
    "2026-13-22T12:00:00.000000Z",
    "2026-02-31T12:00:00.000000Z",
    "2026-11-22T24:00:00.000000Z",
    "2026-11-22T12:00:60.000000Z",
    "0000-11-22T12:00:00.000000Z",
    "1763812800",
    "",
]


@pytest.mark.parametrize("wrong", WRONG_TIMES)
def test_sqlite_refuses_a_time_in_another_form(sqlite_db: Database, wrong: str) -> None:
    """It would sort wrongly, or be one that no program can read, such as the 31st of February."""
    program = Program(sqlite_db)
    program.insert_all()

    for column in TIMES:
        table, _, name = column.partition(".")
        program(f"UPDATE {table} SET {name} = '9999-12-31T23:59:59.999999Z'")
        with pytest.raises(REFUSED, match="CHECK"):
            program(f"UPDATE {table} SET {name} = '{wrong}'")
    program.close()


@pytest.mark.parametrize("wrong", ["infinity", "-infinity", "0044-03-15 12:00:00+00 BC", "10000-01-01 00:00:00+00"])
def test_postgresql_refuses_a_time_python_has_no_word_for(postgresql_db: Database, wrong: str) -> None:
    """One such row would make every query fail that meets it."""
    program = Program(postgresql_db)
    program.insert_all()

    for column in TIMES:
        table, _, name = column.partition(".")
        with pytest.raises(REFUSED):
            program(f"UPDATE {table} SET {name} = '{wrong}'")
    program.close()


@pytest.mark.parametrize("wrong", ["{}", '"a.test"', "a.test", "[", "null"])
def test_sqlite_refuses_domains_that_are_no_list(sqlite_db: Database, wrong: str) -> None:
    """PostgreSQL has a type for it."""
    program = Program(sqlite_db)
    program.insert_all()

    with pytest.raises(REFUSED):
        program(f"UPDATE tls_policies SET domains = '{wrong}'")
    program.close()


@pytest.mark.parametrize(
    "column",
    ["routes.match_expr", "upstream_pools.health_check", "config_versions.snapshot_json", "node_status.metadata",
     "audit_logs.diff", "acme_accounts.credentials_json"],
)  # fmt: skip
def test_what_is_no_json_is_refused(program: Program, column: str) -> None:
    """On both, by a type or by a check."""
    table, _, name = column.partition(".")
    program.insert_all()

    program(f"UPDATE {table} SET {name} = '[1]'")
    with pytest.raises(REFUSED):
        program(f"UPDATE {table} SET {name} = '{{no json'")


@pytest.mark.parametrize(
    "statement",
    [
        f"INSERT INTO listeners (id, port, protocol) VALUES ('{ROUTE}', 443, 'https')",
        f"INSERT INTO upstream_pools (id, name, policy) VALUES ('{ROUTE}', 'web', 'weighted')",
        f"INSERT INTO node_status (id, node_id, heartbeat_at) VALUES ('{ROUTE}', 'edge-1', '{AT}')",
        f"UPDATE routes SET listener_id = '{POOL}'",
        f"UPDATE routes SET upstream_pool_id = '{LISTENER}'",
        f"UPDATE upstream_targets SET pool_id = '{LISTENER}'",
        f"UPDATE node_status SET version_id = '{LISTENER}'",
        "DELETE FROM upstream_pools",
        "DELETE FROM listeners",
        "DELETE FROM config_versions",
    ],
)  # fmt: skip
def test_given_keys_hold(program: Program, statement: str) -> None:
    """UNIQUE and foreign keys are the contract's own."""
    program.insert_all()

    with pytest.raises(REFUSED):
        program(statement)


def test_no_constraint_of_ours_stands_in_the_way(db: Database, program: Program, lineage_id: str) -> None:
    """Rows that our own tables speak of can be changed and deleted as if we were not there."""
    program.insert_all()
    issuance_id = db.write(lambda tx: issuances.queue(tx, lineage_id, "first", NOW))
    program(f"UPDATE issuances SET account_id = '{ACCOUNT}'")
    program(f"UPDATE certificates SET lineage_id = '{lineage_id}', revision = 1")
    program(f"UPDATE lineages SET certificate_id = '{CERTIFICATE}'")
    program(f"INSERT INTO policy_lineages VALUES ('{POLICY}', '{lineage_id}', 'pending')")

    other = "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"
    program(INSERTS["certificates"].replace(CERTIFICATE, other))
    program(INSERTS["acme_accounts"].replace(ACCOUNT, other))
    program(f"UPDATE listeners SET tls_policy_id = '{other}', port = 8443, enabled = false")
    program("UPDATE tls_policies SET domains = <>, status = 'active', mode = 'manual'")
    program("UPDATE certificates SET domain = 'x', cert_pem = '', key_pem = '', status = 'error'")
    program("UPDATE acme_accounts SET directory_url = 'https://other.test/dir'")
    for table in reversed(INSERTS):
        program(f"DELETE FROM {table}")
        assert program(f"SELECT count(*) FROM {table}") == [(0,)]
    left = db.read(lambda tx: issuances.find(tx, str(issuance_id)))
    assert left is not None
    assert left.account_id is None


def test_our_code_reads_foreign_rows(db: Database, program: Program) -> None:
    """What another program wrote comes back as if we had written it."""
    program.insert_all()

    policy = db.read(lambda tx: policies.find(tx, POLICY))
    assert policy is not None
    assert policy.domains == ["a.test", "b.test"]
    assert not policy.shared
    assert policy.created_at == NOW.replace(microsecond=0)
    assert [found.id for found in db.read(lambda tx: policies.wanting(tx, "b.test"))] == [POLICY]


BEYOND_PYTHON = [f"[1{'0' * 5000}]", "[" * 990 + "]" * 990]
"""JSON to both databases: a number of more digits than Python reads, lists deeper than it goes."""


@pytest.mark.parametrize("value", BEYOND_PYTHON, ids=["digits", "depth"])
def test_json_that_python_cannot_read_is_text(db: Database, program: Program, value: str) -> None:
    """It is a wrong value of its own row, and no query that meets it fails."""
    program(INSERTS["upstream_pools"].replace("NULL", f"'{value}'"))

    found = db.read(lambda tx: tx.execute(select(upstream_pools.c.health_check)).scalar())
    assert found == value[:200]


def test_domains_that_python_cannot_read_are_one_wrong_name(sqlite_db: Database) -> None:
    """On PostgreSQL a list of names holds nothing but texts."""
    with closing(Program(sqlite_db)) as program:
        for number, value in enumerate(BEYOND_PYTHON):
            policy = INSERTS["tls_policies"].replace("<a.test, b.test>", f"'{value}'")
            program(policy.replace(POLICY, POLICY[:-1] + str(number)))

    found = sqlite_db.read(policies.list_all)
    assert [policy.domains for policy in found] == [[value[:200]] for value in BEYOND_PYTHON]


# -- notes ----------------------------------------------------------------------------------------------

GATEWAY_ROWS = {"listeners": LISTENER, "upstream_pools": POOL, "routes": ROUTE, "upstream_targets": TARGET}


@pytest.mark.parametrize("table", GATEWAY_ROWS)
def test_every_change_of_the_gateway_is_noted(program: Program, table: str) -> None:
    """Insert, update and delete, whoever does it."""
    program.insert_all()
    noted = program.notes()
    program(
        f"UPDATE {table} SET enabled = false" if table != "upstream_pools" else "UPDATE upstream_pools SET name='x'"
    )
    updated = program.notes()
    for child in ("upstream_targets", "routes"):
        program(f"DELETE FROM {child}")
    program("DELETE FROM listeners")
    program("DELETE FROM upstream_pools")

    assert ("gateway", GATEWAY_ROWS[table]) in noted
    assert updated == [("gateway", GATEWAY_ROWS[table])]
    assert ("gateway", GATEWAY_ROWS[table]) in program.notes()


def test_a_policy_is_noted_for_what_it_wants(program: Program) -> None:
    """Names, mode, shared and paused; not its status, which is ours to flip."""
    program(INSERTS["tls_policies"])
    assert program.notes() == [("policy", POLICY)]

    for change in (
        "domains = <c.test>",
        "mode = 'manual'",
        "shared = true",
        "paused_at = '2026-11-22T12:00:00.000000Z'",
    ):
        program(f"UPDATE tls_policies SET {change}")
        assert program.notes() == [("policy", POLICY)], change
    for change in ("status = 'active'", "refused_names = '[]'", "mode = 'manual'", "domains = <c.test>"):
        program(f"UPDATE tls_policies SET {change}")
        assert program.notes() == [], change
    program("DELETE FROM tls_policies")
    assert program.notes() == [("policy", POLICY)]


def test_a_policy_named_by_a_listener_is_of_the_gateway_too(program: Program) -> None:
    """The snapshot holds its id and mode."""
    program(INSERTS["listeners"].replace("'https', NULL", f"'https', '{POLICY}'"))
    program.notes()
    both = [("policy", POLICY), ("gateway", POLICY)]

    program(INSERTS["tls_policies"])
    assert sorted(program.notes()) == sorted(both)
    program("UPDATE tls_policies SET mode = 'manual'")
    assert sorted(program.notes()) == sorted(both)
    program("UPDATE tls_policies SET status = 'active'")
    assert program.notes() == []
    program("DELETE FROM tls_policies")
    assert sorted(program.notes()) == sorted(both)


def test_a_certificate_is_noted_when_another_program_writes_it(program: Program) -> None:
    """Our own writes carry a new revision, in the same statement."""
    program(INSERTS["certificates"])
    assert program.notes() == [("certificate", CERTIFICATE)]
    program("UPDATE certificates SET revision = 7, status = 'error'")
    assert program.notes() == []
    program("UPDATE certificates SET cert_pem = 'other'")
    assert program.notes() == [("certificate", CERTIFICATE)]
    program("DELETE FROM certificates")
    assert program.notes() == [("certificate", CERTIFICATE)]
    program(INSERTS["certificates"].replace("(id,", "(revision, id,").replace("VALUES (", "VALUES (8, "))
    assert program.notes() == []


def test_nothing_else_is_noted(program: Program) -> None:
    """Heartbeats, audit rows, accounts and versions are nobody's work."""
    for table in ("config_versions", "node_status", "audit_logs", "acme_accounts"):
        program(INSERTS[table])
    program(f"UPDATE node_status SET metadata = '{{}}' WHERE id = '{NODE}'")

    assert program.notes() == []


def test_a_note_is_part_of_the_writer_s_transaction(db: Database) -> None:
    """What is rolled back was never noted."""

    def write_and_fail(tx: object) -> None:
        policies.add(tx, ["a.test"], NOW)  # type: ignore[arg-type]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        db.write(write_and_fail)

    assert not db.read(lambda tx: changes.pending(tx, changes.POLICY))


def test_a_program_with_rights_on_the_given_tables_alone_can_write_them(postgresql_db: Database) -> None:
    """The notes are written with our rights and in our schema, not the writer's."""
    owner = Program(postgresql_db)
    role = f"gateway_{postgresql_db.engine.url.database}"
    owner(f"CREATE ROLE {role} LOGIN")
    try:
        for table in INSERTS:
            owner(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {role}")
        gateway = Program(postgresql_db, role=role)
        gateway("SET search_path = pg_catalog")
        for table, statement in INSERTS.items():
            gateway(statement.replace(f"INTO {table}", f"INTO public.{table}"))
        gateway("UPDATE public.tls_policies SET mode = 'manual'")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            gateway("SELECT * FROM public.changes")
        gateway.close()
        assert ("certificate", CERTIFICATE) in owner.notes()
    finally:
        owner(f"DROP OWNED BY {role}")
        owner(f"DROP ROLE {role}")
        owner.close()


def test_a_second_published_version_is_refused(program: Program) -> None:
    """At most one is, whoever writes; archived ones are many."""
    program(INSERTS["config_versions"])
    program(INSERTS["config_versions"].replace(VERSION, NODE).replace("published", "archived"))
    program(INSERTS["config_versions"].replace(VERSION, ROUTE).replace("published", "archived"))

    with pytest.raises(REFUSED):
        program(f"UPDATE config_versions SET status = 'published' WHERE id = '{NODE}'")


@pytest.mark.parametrize("state", ["order_intent", "ordered", "finalizing", "downloaded", "done"])
def test_no_order_without_its_key(db: Database, program: Program, lineage_id: str, state: str) -> None:
    """From `order_intent` on key and CSR are in the row, and the chain from `downloaded` on."""
    db.write(lambda tx: issuances.queue(tx, lineage_id, "first", NOW))

    for values in ("", ", key_pem = 'k'", ", csr_der = 'c'"):
        with pytest.raises(REFUSED):
            program(f"UPDATE issuances SET state = '{state}'{values}")
    chain = ", chain_pem = 'c'" if state in ("downloaded", "done") else ""
    if chain:
        with pytest.raises(REFUSED):
            program(f"UPDATE issuances SET state = '{state}', key_pem = 'k', csr_der = 'c'")
    program(f"UPDATE issuances SET state = '{state}', key_pem = 'k', csr_der = 'c'{chain}")


def test_one_open_issuance_per_lineage(db: Database, program: Program, lineage_id: str) -> None:
    """The database refuses a second one; closed ones are many."""
    row = {"lineage_id": lineage_id, "reason": "first", "state_at": NOW, "attempt_at": NOW, "created_at": NOW}
    db.write(lambda tx: tx.execute(insert(issuance_rows).values(id=ROUTE, state="failed", closed_at=NOW, **row)))
    db.write(lambda tx: tx.execute(insert(issuance_rows).values(id=POOL, state="queued", **row)))

    with pytest.raises(REFUSED):
        program(f"UPDATE issuances SET state = 'queued', closed_at = NULL WHERE id = '{ROUTE}'")


def test_a_second_connection_sees_the_same(db: Database, twin: Database) -> None:
    """The fixtures themselves: what one commits the other reads, and a third can be opened."""
    db.write(lambda tx: policies.add(tx, ["a.test"], NOW))

    assert len(twin.read(policies.list_all)) == 1
    third = open_database(twin.engine.url.render_as_string(hide_password=False))
    third.check_schema()
    third.close()
