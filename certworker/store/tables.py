"""Every table, as the newest migration leaves it.

The first ten are given: other gateway programs read and write them. Their columns, enumerations and
indexes are a contract; ours are marked, and are nullable or have a server default, so that a row
with the given columns alone is a valid row. No constraint of ours makes a valid change of a given
table fail.

A `*_at` column is an instant in UTC. Due times (`next_check_at`, `attempt_at`, `renew_at`) come from
the injected clock; lease and heartbeat times are the database's.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
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
from sqlalchemy.schema import SchemaItem

from certworker.store.types import BigKey, Json, TextArray, UtcTime, UuidText, form_checks, server_time

NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}

metadata = MetaData(naming_convention=NAMING)


Rule = Callable[[], SchemaItem]
"""Makes a constraint or an index of a table."""
_rules: dict[Table, tuple[Rule, ...]] = {}
"""What `complete` has not added yet."""


def complete() -> MetaData:
    """Return `metadata` with constraints and indexes too: what migrations make and compare.

    Nothing else looks at them, and they are slow to make: for one partial index SQLAlchemy imports all that it has
    for PostgreSQL.
    """
    while _rules:
        table, rules = _rules.popitem()
        forms = form_checks(table.columns)
        Table(table.name, metadata, *(rule() for rule in rules), *forms, extend_existing=True)
    return metadata


def _table(name: str, *items: Column[Any] | Rule) -> Table:
    columns = [item for item in items if isinstance(item, Column)]
    table = Table(name, metadata, *columns)
    _rules[table] = tuple(item for item in items if not isinstance(item, Column))
    return table


def _index(name: str | None, *columns: str, where: str | None = None, unique: bool = False) -> Rule:
    def make() -> Index:
        partial: dict[str, Any] = (
            {} if where is None else {"sqlite_where": text(where), "postgresql_where": text(where)}
        )
        return Index(name, *columns, unique=unique, **partial)

    return make


def _unique(*columns: str, name: str | None = None) -> Rule:
    return lambda: UniqueConstraint(*columns, name=name)


def _check(condition: str, name: str) -> Rule:
    return lambda: CheckConstraint(condition, name=name)


def _id() -> Column[str]:
    return Column("id", UuidText, primary_key=True)


def _created() -> Column[Any]:
    return Column("created_at", UtcTime, nullable=False, server_default=server_time())


def _updated() -> Column[Any]:
    return Column("updated_at", UtcTime, nullable=False, server_default=server_time())


def _enabled() -> Column[bool]:
    return Column("enabled", Boolean, nullable=False, server_default=text("true"))


def _one_of(column: str, *values: str) -> Rule:
    listed = ", ".join(f"'{value}'" for value in values)
    return _check(f"{column} IN ({listed})", name=f"{column}_known")


OPEN = "closed_at IS NULL"
"""Of an issuance. An index over its state would be written with every move."""

listeners = _table(
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
    # ours: how HTTP-01 challenges are answered; no CHECK, a wrong value is a fault that the snapshot reports
    Column("challenge", Text),
    _unique("port", "protocol"),
    _one_of("protocol", "http", "https"),
    _index(None, "enabled"),
)

upstream_pools = _table(
    "upstream_pools",
    _id(),
    Column("name", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("health_check", Json),
    _created(),
    _updated(),
    _unique("name"),
    _one_of("policy", "round_robin", "least_conn", "weighted"),
)

routes = _table(
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
    _index(None, "listener_id"),
    _index(None, "enabled"),
    _index(None, "priority"),
)

upstream_targets = _table(
    "upstream_targets",
    _id(),
    Column("pool_id", UuidText, ForeignKey("upstream_pools.id"), nullable=False),
    Column("address", Text, nullable=False),
    Column("weight", Integer, nullable=False, server_default=text("1")),
    _enabled(),
    _created(),
    _updated(),
    _index(None, "pool_id"),
    _index(None, "enabled"),
)

tls_policies = _table(
    "tls_policies",
    _id(),
    Column("mode", Text, nullable=False),
    Column("domains", TextArray, nullable=False),
    Column("status", Text, nullable=False),
    _created(),
    _updated(),
    # ours
    Column("paused_at", UtcTime),
    Column("shared", Boolean, nullable=False, server_default=text("false")),
    Column("refused_names", Json),
    _one_of("mode", "auto", "manual"),
    _one_of("status", "active", "error", "pending"),
    lambda: Index("tls_policies_domains_idx", "domains", postgresql_using="gin").ddl_if(dialect="postgresql"),
)

certificates = _table(
    "certificates",
    _id(),
    Column("domain", Text, nullable=False),
    Column("cert_pem", Text, nullable=False),
    Column("key_pem", Text, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Column("status", Text, nullable=False),
    _created(),
    _updated(),
    # ours
    # Not a foreign key: the table is given, and no constraint of ours may stand in another program's way.
    Column("lineage_id", UuidText),
    Column("dns_names", TextArray),
    Column("serial", Text),
    Column("fingerprint", Text),
    Column("issuer", Text),
    Column("not_before", UtcTime),
    Column("revision", BigInteger),
    _one_of("status", "active", "expired", "error"),
    _index(None, "domain"),
    _index(None, "expires_at"),
    _index("ix_certificates_active", "expires_at", where="status = 'active'"),
    _index("ix_certificates_expired", "expires_at", where="status = 'expired'"),
    _index("ix_certificates_error", "updated_at", where="status = 'error'"),
    _index("uq_certificates_lineage_id", "lineage_id", unique=True),
    _index(None, "revision"),
)

config_versions = _table(
    "config_versions",
    _id(),
    Column("snapshot_json", Json, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    _created(),
    # ours
    Column("number", BigInteger),
    Column("digest", Text),
    Column("restores", BigInteger),  # the number of the version that a roll-back brought back
    _one_of("status", "draft", "published", "archived"),
    _index(None, "status"),
    _index(None, "created_at"),
    _index("uq_config_versions_published", "status", unique=True, where="status = 'published'"),
    _index("uq_config_versions_number", "number", unique=True),
)

node_status = _table(
    "node_status",
    _id(),
    Column("node_id", Text, nullable=False),
    Column("version_id", UuidText, ForeignKey("config_versions.id")),
    Column("heartbeat_at", UtcTime, nullable=False),
    Column("metadata", Json),
    _unique("node_id"),
    _index(None, "heartbeat_at"),
    _index(None, "version_id"),
)

audit_logs = _table(
    "audit_logs",
    _id(),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("diff", Json, nullable=False),
    _created(),
    _index(None, "actor"),
    _index(None, "created_at"),
)

acme_accounts = _table(
    "acme_accounts",
    _id(),
    Column("directory_url", Text, nullable=False),
    Column("credentials_json", Json, nullable=False),
    _created(),
    # ours
    Column("is_default", Boolean, server_default=text("false")),
    _index(None, "directory_url"),
    # Two workers that make the first account at the same time end up with one.
    _index("uq_acme_accounts_default", "directory_url", unique=True, where="is_default"),
)

# -- ours ---------------------------------------------------------------------------------------

lineages = _table(
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
    # What the CA says of the certificate's renewal (RFC 9773); keyed by it, so that nothing stale outlives it.
    Column("renewal_id", Text),
    Column("window_start", UtcTime),
    Column("window_end", UtcTime),
    Column("window_url", Text),
    Column("ari_check_at", UtcTime),
    Column("ari_failures", Integer, nullable=False, server_default=text("0")),
    Column("ari_error", Json),
    _created(),
    _updated(),
    _one_of("status", "active", "error", "pending"),
    _unique("names_hash", "directory_url", "profile", "key_type", name="uq_lineages_wanted"),
    _index("ix_lineages_due", "next_check_at", where="next_check_at IS NOT NULL"),
    _index("ix_lineages_ari", "directory_url", "ari_check_at", where="ari_check_at IS NOT NULL"),
    _index(None, "certificate_id"),
    _index("ix_lineages_unserved", "id", where="served_at IS NULL AND certificate_id IS NOT NULL"),
)

lineage_names = _table(
    "lineage_names",
    Column("dns_name", Text, primary_key=True),
    Column("lineage_id", UuidText, ForeignKey("lineages.id", ondelete="CASCADE"), primary_key=True),
    # A dead name of a shared certificate: wanted all the same, and tried again.
    Column("left_out_at", UtcTime),
    Column("probe_at", UtcTime),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("error", Json),
    _index(None, "lineage_id"),
    _index("ix_lineage_names_left_out", "lineage_id", where="left_out_at IS NOT NULL"),
)

policy_lineages = _table(
    "policy_lineages",
    # Not a foreign key: when a policy is deleted, reconcile still has to find what it wanted.
    Column("policy_id", UuidText, primary_key=True),
    Column("lineage_id", UuidText, ForeignKey("lineages.id", ondelete="CASCADE"), primary_key=True),
    # A copy of the lineage's, so that a policy's status is two index look-ups whatever its size.
    Column("lineage_status", Text, nullable=False),
    _one_of("lineage_status", "active", "error", "pending"),
    _index(None, "lineage_id"),
    _index("ix_policy_lineages_lacking", "policy_id", "lineage_status", where="lineage_status <> 'active'"),
)

issuances = _table(
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
    # What is ordered: fewer than the lineage's names when some were left out; fixed with the CSR.
    Column("dns_names", TextArray),
    Column("names_hash", Text),
    Column("replaces", Text),
    Column("urgent", Boolean, nullable=False, server_default=text("false")),
    Column("crashes", Integer, nullable=False, server_default=text("0")),
    _created(),
    # Five of them are an older release's, see migration 0008.
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
    _check(
        "state IN ('queued', 'failed', 'cancelled') OR (key_pem IS NOT NULL AND csr_der IS NOT NULL)", name="key_first"
    ),
    _check("state NOT IN ('downloaded', 'done') OR chain_pem IS NOT NULL", name="chain_first"),
    _index("uq_issuances_open", "lineage_id", unique=True, where=OPEN),
    _index("ix_issuances_due", "attempt_at", where=OPEN),
    _index("ix_issuances_urgent", "attempt_at", where=f"urgent AND {OPEN}"),
    _index("ix_issuances_ordering", "names_hash", where=f"names_hash IS NOT NULL AND {OPEN}"),
    _index("ix_issuances_replaces", "replaces", where="replaces IS NOT NULL"),
    # Of the open ones: a CA may hand out a pending order again after its issuance was closed.
    _index("uq_issuances_order_url", "order_url", unique=True, where=f"order_url IS NOT NULL AND {OPEN}"),
    _index("uq_issuances_spki_sha256", "spki_sha256", unique=True),
    _index("ix_issuances_history", "lineage_id", "created_at"),
    # What the reaper finds: with a certificate by its end, without one by when it was closed.
    _index("ix_issuances_ended", "not_after", where="closed_at IS NOT NULL AND not_after IS NOT NULL"),
    _index("ix_issuances_fruitless", "closed_at", where="closed_at IS NOT NULL AND not_after IS NULL"),
)

challenges = _table(
    "challenges",
    _id(),
    Column("issuance_id", UuidText, ForeignKey("issuances.id", ondelete="CASCADE"), nullable=False),
    Column("authorization_url", Text, nullable=False),
    Column("dns_name", Text, nullable=False),
    # Not unique: a CA may share a pending authorization between two orders.
    Column("token", Text, nullable=False),
    Column("key_authorization", Text, nullable=False),
    _created(),
    _unique("issuance_id", "authorization_url"),
    _index(None, "token"),
)

removed_certificates = _table(
    "removed_certificates",
    Column("certificate_id", UuidText, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("removed_at", UtcTime, nullable=False),
    _index(None, "revision"),
    _index(None, "removed_at"),
)

thumbprints = _table(
    "thumbprints",
    Column("host", Text, primary_key=True),
    Column("thumbprint", Text),
    Column("revision", BigInteger, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    _index(None, "revision"),
    _index("ix_thumbprints_removed", "updated_at", where="thumbprint IS NULL"),
)

counters = _table(
    "counters",
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)

changes = _table(
    "changes",
    Column("id", BigKey, primary_key=True),
    Column("topic", Text, nullable=False),
    Column("row_id", UuidText, nullable=False),
    _one_of("topic", "gateway", "policy", "certificate"),
    _index(None, "topic", "id"),
)

workers = _table(
    "workers",
    _id(),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("started_at", UtcTime, nullable=False),
    Column("heartbeat_at", UtcTime, nullable=False),
    # What only one process at a time can hold; whoever holds it next knows that this worker is dead.
    Column("place", Text),
)

rate_buckets = _table(
    "rate_buckets",
    Column("directory_url", Text, primary_key=True),
    Column("account", Text, primary_key=True),
    Column("bucket", Text, primary_key=True),
    # GCRA's theoretical arrival time: from then on the bucket is as if never used.
    Column("full_at", UtcTime, nullable=False),
    Column("promised_at", UtcTime),
    _index(None, "full_at"),
)

ca_breakers = _table(
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
    # What accounts are made with: a pause ends when the operator changes it.
    Column("registration", Text),
    # The one who probes, or tries the first order, until then by the database's time.
    Column("trial_owner", UuidText),
    Column("trial_until", UtcTime),
    _one_of("state", "closed", "open", "half_open", "paused"),
)

settings_kv = _table(
    "settings_kv",
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

nodes = _table(
    "nodes",
    _id(),
    Column("name", Text, nullable=False),
    # SHA-256, in hex: the token itself is a random 256 bits that only the node keeps.
    Column("token_hash", Text, nullable=False),
    Column("canary", Boolean, nullable=False, server_default=text("false")),
    Column("enrolled_at", UtcTime, nullable=False, server_default=server_time()),
    Column("removed_at", UtcTime),
    _index("uq_nodes_name", "name", unique=True, where="removed_at IS NULL"),
)

enrolments = _table(
    "enrolments",
    _id(),
    Column("name", Text, nullable=False),
    Column("secret_hash", Text, nullable=False),
    Column("canary", Boolean, nullable=False, server_default=text("false")),
    Column("expires_at", UtcTime, nullable=False),
    # The node that was enrolled with it. NULL: it has not been used.
    Column("node_id", UuidText),
    _index(None, "name"),
    _index(None, "expires_at"),
)
