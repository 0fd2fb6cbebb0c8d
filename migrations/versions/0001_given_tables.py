"""The ten given tables: other gateway programs read and write them.

Revision: 0001. The tables stand here as they were then; `certworker.store.tables` has them as they are now.
"""

from typing import Any

from alembic import op
from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.schema import SchemaItem

from certworker.store.types import Json, TextArray, UtcTime, UuidText, form_checks, server_time

NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}

metadata = MetaData(naming_convention=NAMING)

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _table(name: str, *items: SchemaItem) -> Table:
    columns = [item for item in items if isinstance(item, Column)]
    return Table(name, metadata, *items, *form_checks(columns))


def _id() -> Column[str]:
    return Column("id", UuidText, primary_key=True)


def _created() -> Column[Any]:
    return Column("created_at", UtcTime, nullable=False, server_default=server_time())


def _updated() -> Column[Any]:
    return Column("updated_at", UtcTime, nullable=False, server_default=server_time())


def _enabled() -> Column[bool]:
    return Column("enabled", Boolean, nullable=False, server_default=text("true"))


def _one_of(column: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_known")


_table(
    "listeners",
    _id(),
    Column("name", Text),
    Column("port", Integer, nullable=False),
    Column("protocol", Text, nullable=False),
    # Not a foreign key: a dangling id is a fault of the row, reported by the snapshot.
    Column("tls_policy_id", UuidText),
    _enabled(),
    _created(),
    _updated(),
    UniqueConstraint("port", "protocol"),
    _one_of("protocol", "http", "https"),
    Index(None, "enabled"),
)

_table(
    "upstream_pools",
    _id(),
    Column("name", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("health_check", Json),
    _created(),
    _updated(),
    UniqueConstraint("name"),
    _one_of("policy", "round_robin", "least_conn", "weighted"),
)

_table(
    "routes",
    _id(),
    Column("listener_id", UuidText, ForeignKey("listeners.id"), nullable=False),
    Column("type", Text, nullable=False),
    Column("match_expr", Json, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("upstream_pool_id", UuidText, ForeignKey("upstream_pools.id"), nullable=False),
    _enabled(),
    _created(),
    _updated(),
    _one_of("type", "port", "path", "ws"),
    Index(None, "listener_id"),
    Index(None, "enabled"),
    Index(None, "priority"),
)

_table(
    "upstream_targets",
    _id(),
    Column("pool_id", UuidText, ForeignKey("upstream_pools.id"), nullable=False),
    Column("address", Text, nullable=False),
    Column("weight", Integer, nullable=False, server_default=text("1")),
    _enabled(),
    _created(),
    _updated(),
    Index(None, "pool_id"),
    Index(None, "enabled"),
)

_table(
    "tls_policies",
    _id(),
    Column("mode", Text, nullable=False),
    Column("domains", TextArray, nullable=False),
    Column("status", Text, nullable=False),
    _created(),
    _updated(),
    _one_of("mode", "auto", "manual"),
    _one_of("status", "active", "error", "pending"),
    Index("tls_policies_domains_idx", "domains", postgresql_using="gin").ddl_if(dialect="postgresql"),
)

_table(
    "certificates",
    _id(),
    Column("domain", Text, nullable=False),
    Column("cert_pem", Text, nullable=False),
    Column("key_pem", Text, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Column("status", Text, nullable=False),
    _created(),
    _updated(),
    _one_of("status", "active", "expired", "error"),
    Index(None, "domain"),
    Index(None, "expires_at"),
)

_table(
    "config_versions",
    _id(),
    Column("snapshot_json", Json, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    _created(),
    _one_of("status", "draft", "published", "archived"),
    Index(None, "status"),
    Index(None, "created_at"),
)

_table(
    "node_status",
    _id(),
    Column("node_id", Text, nullable=False),
    Column("version_id", UuidText, ForeignKey("config_versions.id")),
    Column("heartbeat_at", UtcTime, nullable=False),
    Column("metadata", Json),
    UniqueConstraint("node_id"),
    Index(None, "heartbeat_at"),
    Index(None, "version_id"),
)

_table(
    "audit_logs",
    _id(),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("diff", Json, nullable=False),
    _created(),
    Index(None, "actor"),
    Index(None, "created_at"),
)

_table(
    "acme_accounts",
    _id(),
    Column("directory_url", Text, nullable=False),
    Column("credentials_json", Json, nullable=False),
    _created(),
    Index(None, "directory_url"),
)


def upgrade() -> None:
    metadata.create_all(op.get_bind(), checkfirst=False)


def downgrade() -> None:
    metadata.drop_all(op.get_bind(), checkfirst=False)
