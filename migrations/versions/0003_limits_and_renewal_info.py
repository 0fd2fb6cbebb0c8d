"""Rate ledger, circuit breaker, renewal information, names that are left out, and wake-ups.

Revision: 0003, follows 0002.
"""

from typing import Any

from alembic import op
from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    text,
)
from sqlalchemy.schema import CreateColumn

from certworker.store.types import Json, TextArray, UtcTime, UuidText, form_checks

NAMING = {
    "pk": "pk_%(table_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}

metadata = MetaData(naming_convention=NAMING)

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def _table(name: str, *items: Any) -> Table:
    columns = [item for item in items if isinstance(item, Column)]
    return Table(name, metadata, *items, *form_checks(columns))


_table(
    "rate_buckets",
    Column("directory_url", Text, primary_key=True),
    Column("account", Text, primary_key=True),
    Column("bucket", Text, primary_key=True),
    Column("full_at", UtcTime, nullable=False),
    Column("promised_at", UtcTime),
    Index(None, "full_at"),
)

_table(
    "ca_breakers",
    Column("directory_url", Text, primary_key=True),
    Column("state", Text, nullable=False, server_default=text("'closed'")),
    Column("state_at", UtcTime, nullable=False),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("successes", Integer, nullable=False, server_default=text("0")),
    Column("probes", Integer, nullable=False, server_default=text("0")),
    Column("probe_at", UtcTime),
    Column("hold_until", UtcTime),
    Column("limited", Json),
    Column("error", Json),
    Column("registration", Text),
    Column("trial_owner", UuidText),
    Column("trial_until", UtcTime),
    CheckConstraint("state IN ('closed', 'open', 'half_open', 'paused')", name="state_known"),
)

ADDED: dict[str, list[Column[Any]]] = {
    "lineages": [
        Column("renewal_id", Text),
        Column("window_start", UtcTime),
        Column("window_end", UtcTime),
        Column("window_url", Text),
        Column("ari_check_at", UtcTime),
        Column("ari_failures", Integer, nullable=False, server_default=text("0")),
        Column("ari_error", Json),
    ],
    "lineage_names": [
        Column("left_out_at", UtcTime),
        Column("probe_at", UtcTime),
        Column("failures", Integer, nullable=False, server_default=text("0")),
        Column("error", Json),
    ],
    "issuances": [
        Column("dns_names", TextArray),
        Column("names_hash", Text),
        Column("replaces", Text),
        Column("urgent", Boolean, nullable=False, server_default=text("false")),
        Column("crashes", Integer, nullable=False, server_default=text("0")),
    ],
    "workers": [Column("place", Text)],
}

_OPEN = "state NOT IN ('done', 'failed', 'cancelled')"
INDEXES = {
    "ix_certificates_expired": "certificates (expires_at) WHERE status = 'expired'",
    "ix_lineages_ari": "lineages (directory_url, ari_check_at) WHERE ari_check_at IS NOT NULL",
    "ix_lineage_names_left_out": "lineage_names (lineage_id) WHERE left_out_at IS NOT NULL",
    "ix_issuances_urgent": f"issuances (attempt_at) WHERE urgent AND {_OPEN}",
    "ix_issuances_ordering": f"issuances (names_hash) WHERE names_hash IS NOT NULL AND {_OPEN}",
    "ix_issuances_replaces": "issuances (replaces) WHERE replaces IS NOT NULL",
}

_TELL = """
CREATE FUNCTION certworker_tell() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('certworker', TG_TABLE_NAME);
    RETURN NULL;
END $$
"""
TOLD = ("issuances", "changes")


def _dialect() -> Dialect:
    return op.get_bind().dialect


def _add_column(table: str, column: Column[Any]) -> None:
    # Native ADD COLUMN on both: SQLite's batch mode would rebuild the table, children and all.
    Table(table, MetaData(), column)
    sql = f"ALTER TABLE {table} ADD COLUMN {CreateColumn(column).compile(dialect=_dialect())}"
    for check in form_checks([column], [_dialect().name]):
        sql += f" CONSTRAINT ck_{table}_{column.name}_form CHECK ({check.sqltext})"
    op.execute(text(sql.replace(":", "\\:")))


def upgrade() -> None:
    metadata.create_all(op.get_bind(), checkfirst=False)
    for table, columns in ADDED.items():
        for column in columns:
            _add_column(table, column._copy())
    for name, index in INDEXES.items():
        op.execute(f"CREATE INDEX {name} ON {index}")
    if _dialect().name == "postgresql":
        # A hint for waiting workers; they look by themselves too.
        op.execute(_TELL)
        for table in TOLD:
            op.execute(
                f"CREATE TRIGGER {table}_told AFTER INSERT ON {table} "
                "FOR EACH STATEMENT EXECUTE FUNCTION certworker_tell()"
            )


def downgrade() -> None:
    if _dialect().name == "postgresql":
        for table in TOLD:
            op.execute(f"DROP TRIGGER {table}_told ON {table}")
        op.execute("DROP FUNCTION certworker_tell()")
    for name in INDEXES:
        op.execute(f"DROP INDEX {name}")
    for table, columns in ADDED.items():
        for column in columns:
            op.execute(f"ALTER TABLE {table} DROP COLUMN {column.name}")
    metadata.drop_all(op.get_bind(), checkfirst=False)
