"""Nodes on other machines: who is enrolled, and with what; which tombstones are gone.

Revision: 0005, follows 0004.
"""

from typing import Any

from alembic import op
from sqlalchemy import Boolean, Column, Index, MetaData, Table, Text, text

from certworker.store.types import UtcTime, UuidText, form_checks, server_time

NAMING = {
    "pk": "pk_%(table_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}

metadata = MetaData(naming_convention=NAMING)

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def _table(name: str, *items: Any) -> Table:
    columns = [item for item in items if isinstance(item, Column)]
    return Table(name, metadata, *items, *form_checks(columns))


_table(
    "nodes",
    Column("id", UuidText, primary_key=True),
    Column("name", Text, nullable=False),
    Column("token_hash", Text, nullable=False),
    Column("canary", Boolean, nullable=False, server_default=text("false")),
    Column("enrolled_at", UtcTime, nullable=False, server_default=server_time()),
    Column("removed_at", UtcTime),
    Index(
        "uq_nodes_name",
        "name",
        unique=True,
        sqlite_where=text("removed_at IS NULL"),
        postgresql_where=text("removed_at IS NULL"),
    ),
)

_table(
    "enrolments",
    Column("id", UuidText, primary_key=True),
    Column("name", Text, nullable=False),
    Column("secret_hash", Text, nullable=False),
    Column("canary", Boolean, nullable=False, server_default=text("false")),
    Column("expires_at", UtcTime, nullable=False),
    Column("node_id", UuidText),
    Index(None, "name"),
    Index(None, "expires_at"),
)

# A hint for waiting nodes: certificates or a version are new. They look by themselves too.
_TOLD = "CREATE TRIGGER counters_told AFTER UPDATE ON counters FOR EACH STATEMENT EXECUTE FUNCTION certworker_tell()"


def upgrade() -> None:
    metadata.create_all(op.get_bind(), checkfirst=False)
    op.execute("INSERT INTO counters (name, value) VALUES ('forgotten', 0)")
    if op.get_bind().dialect.name == "postgresql":
        op.execute(_TOLD)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER counters_told ON counters")
    op.execute("DELETE FROM counters WHERE name = 'forgotten'")
    metadata.drop_all(op.get_bind(), checkfirst=False)
