"""The ten given tables are in the database as the contract lists them (design, section 4)."""

import re

import pytest

from certworker.store.database import Database

from .catalog import read_catalog

GIVEN = {
    "listeners": """id uuid, name text null, port integer, protocol text, tls_policy_id uuid null, enabled boolean,
        created_at time, updated_at time""",
    "routes": """id uuid, listener_id uuid, type text, match_expr jsonb, priority integer, upstream_pool_id uuid,
        enabled boolean, created_at time, updated_at time""",
    "upstream_pools": "id uuid, name text, policy text, health_check jsonb null, created_at time, updated_at time",
    "upstream_targets": """id uuid, pool_id uuid, address text, weight integer, enabled boolean, created_at time,
        updated_at time""",
    "tls_policies": "id uuid, mode text, domains text[], status text, created_at time, updated_at time",
    "certificates": """id uuid, domain text, cert_pem text, key_pem text, expires_at time, status text,
        created_at time, updated_at time""",
    "config_versions": "id uuid, snapshot_json jsonb, status text, created_by text, created_at time",
    "node_status": "id uuid, node_id text, version_id uuid null, heartbeat_at time, metadata jsonb null",
    "audit_logs": "id uuid, actor text, action text, diff jsonb, created_at time",
    "acme_accounts": "id uuid, directory_url text, credentials_json jsonb, created_at time",
}
DEFAULTS = {"enabled": "true", "weight": "1"}
INDEXES = """
    listeners unique port, protocol; listeners enabled; routes listener_id; routes enabled; routes priority;
    upstream_pools unique name; upstream_targets pool_id; upstream_targets enabled; certificates domain;
    certificates expires_at; config_versions status; config_versions created_at; node_status unique node_id;
    node_status heartbeat_at; node_status version_id; audit_logs actor; audit_logs created_at;
    acme_accounts directory_url
"""
FOREIGN_KEYS = {
    ("routes", "listener_id", "listeners"),
    ("routes", "upstream_pool_id", "upstream_pools"),
    ("upstream_targets", "pool_id", "upstream_pools"),
    ("node_status", "version_id", "config_versions"),
}
OURS = {
    "listeners": {"challenge"},
    "tls_policies": {"paused_at", "shared", "refused_names"},
    "certificates": {"lineage_id", "dns_names", "serial", "fingerprint", "issuer", "not_before", "revision"},
    "config_versions": {"number", "digest", "restores"},
    "acme_accounts": {"is_default"},
}
TYPES = {
    "postgresql": {"time": "timestamp with time zone"},
    "sqlite": {"uuid": "TEXT", "text": "TEXT", "text[]": "TEXT", "time": "TEXT", "jsonb": "JSON",
               "integer": "INTEGER", "boolean": "BOOLEAN"},
}  # fmt: skip


def columns_of(db: Database, table: str) -> dict[str, tuple[str, ...]]:
    """Return {column: (type, nullability, default)} of a table."""
    return {fact[2]: fact[3:] for fact in read_catalog(db) if fact[:2] == ("column", table)}


@pytest.mark.parametrize("table", GIVEN)
def test_given_columns_are_exactly_these(db: Database, table: str) -> None:
    """Name, type and nullability; besides them only columns of ours that another program need not name."""
    found, types = columns_of(db, table), TYPES[db.engine.dialect.name]

    for column in re.split(r",\s+", GIVEN[table]):
        name, kind, *null = column.split()
        assert found[name][:2] == (types.get(kind, kind), "NULL" if null else "NOT NULL"), column
        del found[name]
    assert set(found) == OURS.get(table, set())
    for name, (_, null, default) in found.items():
        assert null == "NULL" or default not in ("", "DEFAULT None"), name


def test_defaults_of_the_contract(db: Database) -> None:
    """Rows of other programs are enabled, and weigh 1, unless they say otherwise."""
    for table in GIVEN:
        for column, (_, _, default) in columns_of(db, table).items():
            if column in DEFAULTS:
                assert default == f"DEFAULT {DEFAULTS[column]}"


def test_given_indexes_are_there(db: Database) -> None:
    """Over whole tables, unique where the contract says so."""
    found = set()
    for kind, table, *said in read_catalog(db):
        if kind != "index":
            continue
        if db.embedded:
            _, unique, columns, where = said
        else:
            unique = "unique" if "UNIQUE" in said[1] else ""
            columns, where = re.search(r"USING btree \(([^)]*)\)|$", said[1])[1] or "", said[1].partition("WHERE")[2]
        if not where:
            found.add(" ".join(filter(None, (table, unique, columns))))

    wanted = {" ".join(index.split()) for index in INDEXES.split(";")}
    assert wanted - found == set()


def test_the_index_over_names(db: Database) -> None:
    """A GIN index of the contract's name on PostgreSQL, none on SQLite."""
    over_names = [fact for fact in read_catalog(db) if "tls_policies_domains_idx" in fact]

    if db.embedded:
        assert over_names == []
    else:
        assert len(over_names) == 1
        assert "USING gin (domains)" in over_names[0][3]


def test_given_foreign_keys(db: Database) -> None:
    """These and no other: not from a listener to its policy, and none from a given table to one of ours."""
    found = set()
    for kind, table, *said in read_catalog(db):
        if kind != "foreign key" or table not in GIVEN:
            continue
        if db.embedded:
            found.add((table, said[1], said[0]))
            assert said[3:] == ["NO ACTION", "NO ACTION"]
        else:
            key = re.fullmatch(r"FOREIGN KEY \((\w+)\) REFERENCES (\w+)\(id\)", said[1])
            assert key is not None, said
            found.add((table, *key.groups()))

    assert found == FOREIGN_KEYS


def test_ten_tables_are_given(db: Database) -> None:
    """All of them are there; ids are the primary keys."""
    keys = {fact[1]: fact[2:] for fact in read_catalog(db) if fact[0] == "primary key"}

    assert len(GIVEN) == 10
    for table in GIVEN:
        assert "id" in keys[table][0] or "(id)" in keys[table][1]


@pytest.mark.parametrize("fixture", ["sqlite_db", "postgresql_db"])
def test_triggers_are_there(request: pytest.FixtureRequest, fixture: str) -> None:
    """Three on each of the six tables whose changes are noted; PostgreSQL tells waiting workers besides."""
    db: Database = request.getfixturevalue(fixture)
    query = (
        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        if db.embedded
        else "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal"
    )
    found = db.read(lambda tx: set(tx.exec_driver_sql(query).scalars()))

    noted = ("listeners", "routes", "upstream_pools", "upstream_targets", "tls_policies", "certificates")
    told = set() if db.embedded else {"changes_told", "issuances_told", "counters_told"}
    assert found == told | {f"{table}_{event}_noted" for table in noted for event in ("insert", "update", "delete")}
