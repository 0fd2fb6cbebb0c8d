"""What this room's tests share: another program, a second worker, and a lineage to work on."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import Connection

from certworker.store import lineages
from certworker.store.database import Database, open_database

from .given import Program, url_of

NOW = datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=UTC)
ISSUER = lineages.Issuer("https://ca.test/dir", "", "ecdsa-p256")


def add_lineage(tx: Connection, names: list[str], issuer: lineages.Issuer = ISSUER) -> str:
    """Return the id of the lineage for these names, made if it is not there."""
    return lineages.find_or_add(tx, [names], issuer, NOW)[0]


@pytest.fixture
def program(db: Database) -> Iterator[Program]:
    """Another gateway program on the same database."""
    program = Program(db)
    yield program
    program.close()


@pytest.fixture
def twin(db: Database) -> Iterator[Database]:
    """The same database as another process sees it: with connections of its own."""
    twin = open_database(url_of(db))
    yield twin
    twin.close()


@pytest.fixture
def lineage_id(db: Database) -> str:
    """A lineage for `a.test`."""
    return db.write(lambda tx: add_lineage(tx, ["a.test"]))


@pytest.fixture
def twin_pg(postgresql_db: Database) -> Iterator[Database]:
    """Another worker's connections to the same PostgreSQL."""
    twin = open_database(url_of(postgresql_db))
    yield twin
    twin.close()
