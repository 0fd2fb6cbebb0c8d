"""The tables in the code are the tables that the migrations make, by what the database itself says.

Alembic's own comparison does not see checks, predicates, index methods or triggers.
"""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DefaultClause,
    ForeignKeyConstraint,
    MetaData,
    PrimaryKeyConstraint,
    Text,
    UniqueConstraint,
    text,
)

from certworker.store import schema, tables
from certworker.store.database import SCHEMA_REVISION, Database, open_database
from certworker.store.tables import complete
from tests.conftest import PostgresServer

from .catalog import read_catalog

pytestmark = pytest.mark.check


@pytest.fixture
def created(request: pytest.FixtureRequest, db: Database, tmp_path: Path) -> Iterator[Database]:
    """An empty database of the same kind as `db`."""
    if db.embedded:
        other = open_database(f"sqlite:///{tmp_path / 'created.db'}")
        yield other
        other.close()
        return
    server: PostgresServer = request.getfixturevalue("postgresql")
    name = server.create_database()
    other = open_database(server.url(name))
    yield other
    other.close()
    server.drop_database(name)


def copy_of_the_models() -> MetaData:
    """Return the models made anew: `Table.to_metadata` forgets which database a check is for."""
    models: MetaData = runpy.run_path(str(tables.__file__))["complete"]()
    return models


def create(db: Database, models: MetaData) -> None:
    with db.engine.begin() as tx:
        models.create_all(tx)


def test_models_equal_the_migrated_schema(db: Database, created: Database) -> None:
    """Columns, types, nullability, defaults, keys, actions, checks, indexes, predicates, methods."""
    create(created, complete())

    migrated, modelled = read_catalog(db), read_catalog(created)
    assert sorted(migrated - modelled) == []
    assert sorted(modelled - migrated) == []
    assert {fact[0] for fact in migrated} >= {"column", "primary key", "foreign key", "check", "index"}
    assert len(migrated) > 250


def test_alembic_agrees(db: Database) -> None:
    """`db check` says the same, for an operator."""
    assert schema.differences(db) == []


# -- what the comparison finds ------------------------------------------------------------------------


def _type(models: MetaData) -> None:
    models.tables["lineages"].c.failures.type = BigInteger()


def _nullability(models: MetaData) -> None:
    models.tables["listeners"].c.name.nullable = False


def _default(models: MetaData) -> None:
    models.tables["upstream_targets"].c.weight.server_default = DefaultClause(text("2"))


def _no_default(models: MetaData) -> None:
    models.tables["routes"].c.created_at.server_default = None


def _column(models: MetaData) -> None:
    models.tables["routes"].append_column(Column("extra", Text))


def _primary_key(models: MetaData) -> None:
    models.tables["counters"].c.value.primary_key = True
    models.tables["counters"].append_constraint(PrimaryKeyConstraint("name", "value"))


def _foreign_key(models: MetaData) -> None:
    _drop_constraint(models, "node_status", ForeignKeyConstraint)


def _foreign_key_action(models: MetaData) -> None:
    (key,) = models.tables["lineage_names"].foreign_key_constraints
    key.ondelete = None


def _unique(models: MetaData) -> None:
    _drop_constraint(models, "node_status", UniqueConstraint)


def _no_check(models: MetaData) -> None:
    table = models.tables["issuances"]
    table.constraints = {found for found in table.constraints if not str(found.name).endswith("key_first")}


def _check(models: MetaData) -> None:
    for found in models.tables["routes"].constraints:
        if isinstance(found, CheckConstraint) and str(found.name).endswith("type_known"):
            found.sqltext = text("type IN ('port', 'path', 'ws', 'grpc')")


def _index(models: MetaData) -> None:
    models.tables["routes"].indexes.pop()


def _index_columns(models: MetaData) -> None:
    _change_index(models, "issuances", "ix_issuances_history")


def _predicate(models: MetaData) -> None:
    (index,) = (i for i in models.tables["certificates"].indexes if i.name == "ix_certificates_active")
    for dialect in ("sqlite", "postgresql"):
        index.dialect_options[dialect]["where"] = text("status = 'expired'")


def _uniqueness(models: MetaData) -> None:
    (index,) = (i for i in models.tables["issuances"].indexes if i.name == "uq_issuances_open")
    index.unique = False


def _method(models: MetaData) -> None:
    (index,) = (i for i in models.tables["tls_policies"].indexes if i.name == "tls_policies_domains_idx")
    index.dialect_options["postgresql"]["using"] = "btree"


def _drop_constraint(models: MetaData, table: str, kind: type) -> None:
    models.tables[table].constraints = {c for c in models.tables[table].constraints if not isinstance(c, kind)}


def _change_index(models: MetaData, table: str, name: str) -> None:
    (index,) = (i for i in models.tables[table].indexes if i.name == name)
    index.expressions = index.expressions[:1]


PLANTED: dict[str, Callable[[MetaData], None]] = {
    "column: type": _type,
    "column: nullability": _nullability,
    "column: default": _default,
    "column: no default": _no_default,
    "column: another one": _column,
    "primary key": _primary_key,
    "foreign key": _foreign_key,
    "foreign key: action": _foreign_key_action,
    "unique": _unique,
    "check: missing": _no_check,
    "check: other condition": _check,
    "index: missing": _index,
    "index: columns": _index_columns,
    "index: predicate": _predicate,
    "index: uniqueness": _uniqueness,
    "index: method": _method,
}


@pytest.mark.parametrize("kind", PLANTED)
def test_the_comparison_finds_a_planted_difference(db: Database, created: Database, kind: str) -> None:
    """One difference of each kind is seen, and as what it is."""
    if db.embedded and kind == "index: method":
        assert "gin" not in str(read_catalog(db))  # SQLite has one method
        return
    models = copy_of_the_models()
    PLANTED[kind](models)
    create(created, models)

    different = {fact[0] for fact in read_catalog(db) ^ read_catalog(created)}
    expected = kind.partition(":")[0]
    if expected == "unique":
        assert "index" in different  # what a UNIQUE constraint is made of
    elif expected == "primary key":
        assert "primary key" in different
    else:
        assert different == {expected}


def test_an_unchanged_copy_shows_no_difference(db: Database, created: Database) -> None:
    """What the planted differences are measured against."""
    create(created, copy_of_the_models())

    assert read_catalog(db) == read_catalog(created)


def test_the_release_names_the_newest_revision() -> None:
    """SCHEMA_REVISION is what Alembic would migrate to, and every revision's file is named after it."""
    script = ScriptDirectory(str(schema.migrations_folder()))

    assert script.get_heads() == [SCHEMA_REVISION]
    for revision in script.walk_revisions():
        assert Path(str(revision.path)).name.startswith(f"{revision.revision}_")
