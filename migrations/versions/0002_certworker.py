"""certworker's own tables, its columns in the given ones, and the triggers that note changes.

Revision: 0002, follows 0001.
"""

from typing import Any

from alembic import op
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.schema import CreateColumn, SchemaItem

from certworker.store.types import BigKey, Json, TextArray, UtcTime, UuidText, form_checks, server_time

NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}

metadata = MetaData(naming_convention=NAMING)

revision = "0002"
down_revision = "0001"
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


# Only here so that a foreign key finds it.
Table("acme_accounts", metadata, Column("id", UuidText, primary_key=True))

OPEN_STATE = "state NOT IN ('done', 'failed', 'cancelled')"

_table(
    "lineages",
    _id(),
    Column("dns_names", TextArray, nullable=False),
    Column("names_hash", Text, nullable=False),
    Column("directory_url", Text, nullable=False),
    Column("profile", Text, nullable=False, server_default=text("''")),
    Column("key_type", Text, nullable=False),
    Column("status", Text, nullable=False, server_default=text("'pending'")),
    Column("certificate_id", UuidText),
    Column("issuance_id", UuidText),
    Column("not_before", UtcTime),
    Column("not_after", UtcTime),
    Column("renew_at", UtcTime),
    Column("next_check_at", UtcTime),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("error", Json),
    Column("served_at", UtcTime),
    _created(),
    _updated(),
    _one_of("status", "active", "error", "pending"),
    UniqueConstraint("names_hash", "directory_url", "profile", "key_type", name="uq_lineages_wanted"),
    Index(
        "ix_lineages_due",
        "next_check_at",
        sqlite_where=text("next_check_at IS NOT NULL"),
        postgresql_where=text("next_check_at IS NOT NULL"),
    ),
    Index(None, "certificate_id"),
    Index(
        "ix_lineages_unserved",
        "id",
        sqlite_where=text("served_at IS NULL AND certificate_id IS NOT NULL"),
        postgresql_where=text("served_at IS NULL AND certificate_id IS NOT NULL"),
    ),
)

_table(
    "lineage_names",
    Column("dns_name", Text, primary_key=True),
    Column("lineage_id", UuidText, ForeignKey("lineages.id", ondelete="CASCADE"), primary_key=True),
    Index(None, "lineage_id"),
)

_table(
    "policy_lineages",
    # Not a foreign key: when a policy is deleted, reconcile still has to find what it wanted.
    Column("policy_id", UuidText, primary_key=True),
    Column("lineage_id", UuidText, ForeignKey("lineages.id", ondelete="CASCADE"), primary_key=True),
    # A copy of the lineage's, so that a policy's status is two index look-ups whatever its size.
    Column("lineage_status", Text, nullable=False),
    _one_of("lineage_status", "active", "error", "pending"),
    Index(None, "lineage_id"),
    Index(
        "ix_policy_lineages_lacking",
        "policy_id",
        "lineage_status",
        sqlite_where=text("lineage_status <> 'active'"),
        postgresql_where=text("lineage_status <> 'active'"),
    ),
)

_table(
    "issuances",
    _id(),
    Column("lineage_id", UuidText, ForeignKey("lineages.id", ondelete="CASCADE"), nullable=False),
    Column("reason", Text, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'queued'")),
    Column("state_at", UtcTime, nullable=False),
    Column("attempt_at", UtcTime, nullable=False),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("error", Json),
    # The table is given: another program may delete an account, whatever was ordered with it.
    Column("account_id", UuidText, ForeignKey("acme_accounts.id", ondelete="SET NULL")),
    Column("key_pem", Text),
    Column("csr_der", LargeBinary),
    Column("spki_sha256", Text),
    Column("order_url", Text),
    Column("finalize_url", Text),
    Column("order_expires_at", UtcTime),
    Column("certificate_url", Text),
    Column("chain_pem", Text),
    Column("serial", Text),
    Column("fingerprint", Text),
    Column("not_before", UtcTime),
    Column("not_after", UtcTime),
    Column("lease_owner", UuidText),
    Column("lease_token", BigInteger, nullable=False, server_default=text("0")),
    Column("lease_until", UtcTime),
    Column("claims", Integer, nullable=False, server_default=text("0")),
    Column("closed_at", UtcTime),
    _created(),
    _one_of(
        "state",
        "queued",
        "key_ready",
        "order_intent",
        "ordered",
        "published",
        "validating",
        "authorized",
        "finalize_intent",
        "finalizing",
        "issued",
        "downloaded",
        "done",
        "failed",
        "cancelled",
    ),
    # Crash safety rests on this: no order without its key on disk.
    CheckConstraint(
        "state IN ('queued', 'failed', 'cancelled') OR (key_pem IS NOT NULL AND csr_der IS NOT NULL)", name="key_first"
    ),
    CheckConstraint("state NOT IN ('downloaded', 'done') OR chain_pem IS NOT NULL", name="chain_first"),
    Index(
        "uq_issuances_open", "lineage_id", unique=True, sqlite_where=text(OPEN_STATE), postgresql_where=text(OPEN_STATE)
    ),
    Index("ix_issuances_due", "attempt_at", sqlite_where=text(OPEN_STATE), postgresql_where=text(OPEN_STATE)),
    # Of the open ones: a CA may hand out a pending order again after its issuance was closed.
    Index(
        "uq_issuances_order_url",
        "order_url",
        unique=True,
        sqlite_where=text(f"order_url IS NOT NULL AND {OPEN_STATE}"),
        postgresql_where=text(f"order_url IS NOT NULL AND {OPEN_STATE}"),
    ),
    Index("uq_issuances_spki_sha256", "spki_sha256", unique=True),
    Index("ix_issuances_history", "lineage_id", "created_at"),
    Index(
        "ix_issuances_closed_at",
        "closed_at",
        sqlite_where=text("closed_at IS NOT NULL"),
        postgresql_where=text("closed_at IS NOT NULL"),
    ),
)

_table(
    "challenges",
    _id(),
    Column("issuance_id", UuidText, ForeignKey("issuances.id", ondelete="CASCADE"), nullable=False),
    Column("authorization_url", Text, nullable=False),
    Column("dns_name", Text, nullable=False),
    # Not unique: a CA may share a pending authorization between two orders.
    Column("token", Text, nullable=False),
    Column("key_authorization", Text, nullable=False),
    _created(),
    UniqueConstraint("issuance_id", "authorization_url"),
    Index(None, "token"),
)

_table(
    "removed_certificates",
    Column("certificate_id", UuidText, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("removed_at", UtcTime, nullable=False),
    Index(None, "revision"),
)

_table(
    "counters",
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)

_table(
    "changes",
    Column("id", BigKey, primary_key=True),
    Column("topic", Text, nullable=False),
    Column("row_id", UuidText, nullable=False),
    _one_of("topic", "gateway", "policy", "certificate"),
    Index(None, "topic", "id"),
)

_table(
    "workers",
    _id(),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("started_at", UtcTime, nullable=False),
    Column("heartbeat_at", UtcTime, nullable=False),
)

_table(
    "settings_kv",
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

ADDED: dict[str, list[Column[Any]]] = {
    "tls_policies": [
        Column("paused_at", UtcTime),
        Column("shared", Boolean, nullable=False, server_default=text("false")),
        Column("refused_names", Json),
    ],
    "certificates": [
        Column("lineage_id", UuidText),
        Column("dns_names", TextArray),
        Column("serial", Text),
        Column("fingerprint", Text),
        Column("issuer", Text),
        Column("not_before", UtcTime),
        Column("revision", BigInteger),
    ],
    "config_versions": [Column("number", BigInteger), Column("digest", Text)],
    "acme_accounts": [Column("is_default", Boolean, server_default=text("false"))],
}

INDEXES = {
    "ix_certificates_active": "INDEX {0} ON certificates (expires_at) WHERE status = 'active'",
    "uq_certificates_lineage_id": "UNIQUE INDEX {0} ON certificates (lineage_id)",
    "ix_certificates_revision": "INDEX {0} ON certificates (revision)",
    "uq_config_versions_published": "UNIQUE INDEX {0} ON config_versions (status) WHERE status = 'published'",
    "uq_config_versions_number": "UNIQUE INDEX {0} ON config_versions (number)",
    "uq_acme_accounts_default": "UNIQUE INDEX {0} ON acme_accounts (directory_url) WHERE is_default",
}

# (trigger, table, event, condition, topic). A trigger writes the row's id in the writer's own
# transaction, whoever the writer is. What certworker itself changes is left out where that can be
# told from the row: a certificate's revision, a policy's status.
_WANTED = "OLD.domains {differs} NEW.domains OR OLD.mode {differs} NEW.mode"
_SHAPE = " OR OLD.shared {differs} NEW.shared OR OLD.paused_at {differs} NEW.paused_at"
_SERVED = "NEW.revision {same} OLD.revision"
_LISTENED = "EXISTS (SELECT 1 FROM listeners WHERE tls_policy_id = {row}.id)"
GATEWAY = ("listeners", "routes", "upstream_pools", "upstream_targets")
TRIGGERS = [
    *(
        (f"{table}_{event.lower()}_noted", table, event, "", "gateway")
        for table in GATEWAY
        for event in ("INSERT", "UPDATE", "DELETE")
    ),
    ("tls_policies_insert_noted", "tls_policies", "INSERT", "", "policy"),
    ("tls_policies_update_noted", "tls_policies", "UPDATE", _WANTED + _SHAPE, "policy"),
    ("tls_policies_delete_noted", "tls_policies", "DELETE", "", "policy"),
    ("certificates_insert_noted", "certificates", "INSERT", "NEW.revision IS NULL", "certificate"),
    ("certificates_update_noted", "certificates", "UPDATE", _SERVED, "certificate"),
    ("certificates_delete_noted", "certificates", "DELETE", "", "certificate"),
]


def _dialect() -> Dialect:
    return op.get_bind().dialect


def _add_column(table: str, column: Column[Any]) -> None:
    # Native ADD COLUMN on both: SQLite's batch mode would rebuild the table, children and all.
    Table(table, MetaData(), column)
    sql = f"ALTER TABLE {table} ADD COLUMN {CreateColumn(column).compile(dialect=_dialect())}"
    for check in form_checks([column], [_dialect().name]):
        sql += f" CONSTRAINT ck_{table}_{column.name}_form CHECK ({check.sqltext})"
    op.execute(text(sql.replace(":", "\\:")))


def _create_trigger(name: str, table: str, event: str, condition: str, topic: str) -> None:
    row = "OLD" if event == "DELETE" else "NEW"
    sqlite = _dialect().name == "sqlite"
    spelled = (
        {"differs": "IS NOT", "same": "IS"}
        if sqlite
        else {"differs": "IS DISTINCT FROM", "same": "IS NOT DISTINCT FROM"}
    )
    when = f"WHEN ({condition.format(**spelled)})" if condition else ""
    if sqlite:
        op.execute(
            f"CREATE TRIGGER {name} AFTER {event} ON {table} FOR EACH ROW {when} "
            f"BEGIN INSERT INTO changes (topic, row_id) VALUES ('{topic}', {row}.id); {_also_gateway(table, row)}END"
        )
    else:
        op.execute(
            f"CREATE TRIGGER {name} AFTER {event} ON {table} FOR EACH ROW {when} "
            f"EXECUTE FUNCTION certworker_note_{'policy' if table == 'tls_policies' else 'change'}('{topic}')"
        )


def _also_gateway(table: str, row: str) -> str:
    """A policy that a listener names belongs to the gateway's snapshot too."""
    if table != "tls_policies":
        return ""
    return f"INSERT INTO changes (topic, row_id) SELECT 'gateway', {row}.id WHERE {_LISTENED.format(row=row)}; "


# With the rights of whoever migrates, and naming the schema: the writer may be another program, with
# a role that may use the given tables only and a search path of its own.
_FUNCTION = """
CREATE FUNCTION certworker_note_{name}() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE noted uuid := CASE WHEN TG_OP = 'DELETE' THEN OLD.id ELSE NEW.id END;
BEGIN
    INSERT INTO {schema}.changes (topic, row_id) VALUES (TG_ARGV[0], noted);
    {besides}
    RETURN NULL;
END $$
"""
_NOTE_GATEWAY = """
    INSERT INTO {schema}.changes (topic, row_id)
        SELECT 'gateway', noted WHERE EXISTS (SELECT 1 FROM {schema}.listeners WHERE tls_policy_id = noted);"""


def upgrade() -> None:
    own = [table for table in metadata.sorted_tables if table.name != "acme_accounts"]
    metadata.create_all(op.get_bind(), tables=own, checkfirst=False)
    for table, columns in ADDED.items():
        for column in columns:
            _add_column(table, column._copy())
    for name, index in INDEXES.items():
        op.execute("CREATE " + index.format(name))
    if _dialect().name == "postgresql":
        current = op.get_bind().execute(text("SELECT current_schema()")).scalar_one()
        schema = _dialect().identifier_preparer.quote(current)
        op.execute(_FUNCTION.format(name="change", schema=schema, besides=""))
        op.execute(_FUNCTION.format(name="policy", schema=schema, besides=_NOTE_GATEWAY.format(schema=schema)))
    for trigger in TRIGGERS:
        _create_trigger(*trigger)
    op.execute("INSERT INTO counters (name, value) VALUES ('revision', 0), ('epoch', 1), ('config_version', 0)")
    # Rows that were there before the triggers were.
    op.execute("INSERT INTO changes (topic, row_id) SELECT 'policy', id FROM tls_policies")
    op.execute("INSERT INTO changes (topic, row_id) SELECT 'certificate', id FROM certificates")
    op.execute("INSERT INTO changes (topic, row_id) SELECT 'gateway', id FROM listeners")


def downgrade() -> None:
    on_table = _dialect().name == "postgresql"
    for name, table, *_ in TRIGGERS:
        op.execute(f"DROP TRIGGER {name}" + (f" ON {table}" if on_table else ""))
    if on_table:
        op.execute("DROP FUNCTION certworker_note_change()")
        op.execute("DROP FUNCTION certworker_note_policy()")
    for name in INDEXES:
        op.execute(f"DROP INDEX {name}")
    for table, columns in ADDED.items():
        for column in columns:
            op.execute(f"ALTER TABLE {table} DROP COLUMN {column.name}")
    own = [table for table in metadata.sorted_tables if table.name != "acme_accounts"]
    metadata.drop_all(op.get_bind(), tables=own, checkfirst=False)
