"""The gateway's tables: read whole for a snapshot, written whole from one document.

A document is `{table name: [row, ...]}` with columns as keys. A row that another row names may be
named by its `name` (pools, listeners) or its id.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, Text, bindparam, delete, insert, select, text, update

from certworker.core.gateway_rows import GatewayRows, ListenerRow, PolicyRow, PoolRow, RouteRow, TargetRow
from certworker.store.rows import columns_of, to_value
from certworker.store.tables import listeners, routes, tls_policies, upstream_pools, upstream_targets
from certworker.store.types import TextArray, UuidText

APPLIED: tuple[Table, ...] = (upstream_pools, upstream_targets, tls_policies, listeners, routes)
"""In an order in which rows can be inserted."""

APPLIED_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "upstream_pools": ("id", "name", "policy", "health_check"),
    "upstream_targets": ("id", "pool_id", "address", "weight", "enabled"),
    "tls_policies": ("id", "mode", "domains", "shared"),
    "listeners": ("id", "name", "port", "protocol", "tls_policy_id", "enabled", "challenge"),
    "routes": ("id", "listener_id", "type", "match_expr", "priority", "upstream_pool_id", "enabled"),
}
"""What a document may set; the rest is the program's."""

UNIQUE_COLUMNS: Mapping[str, tuple[str, ...]] = {"upstream_pools": ("name",), "listeners": ("port", "protocol")}


def read(tx: Connection) -> GatewayRows:
    """Return the rows a snapshot is built from; of the policies only those that a listener names."""
    named = select(listeners.c.tls_policy_id).where(listeners.c.tls_policy_id.is_not(None))
    policies = select(*columns_of(PolicyRow, tls_policies)).where(tls_policies.c.id.in_(named))
    return GatewayRows(
        listeners=tuple(to_value(ListenerRow, row) for row in tx.execute(select(*columns_of(ListenerRow, listeners)))),
        routes=tuple(to_value(RouteRow, row) for row in tx.execute(select(*columns_of(RouteRow, routes)))),
        pools=tuple(to_value(PoolRow, row) for row in tx.execute(select(*columns_of(PoolRow, upstream_pools)))),
        targets=tuple(to_value(TargetRow, row) for row in tx.execute(select(*columns_of(TargetRow, upstream_targets)))),
        policies=tuple(to_value(PolicyRow, row) for row in tx.execute(policies)),
    )


def names(tx: Connection) -> dict[str, str]:
    """Return the names of pools and listeners by id, for people; not every listener has one."""
    found: dict[str, str] = {}
    for table in (upstream_pools, listeners):
        found |= {row_id: name for row_id, name in tx.execute(select(table.c.id, table.c.name)) if name is not None}
    return found


def has_http_listener(tx: Connection) -> bool:
    """Say whether a listener is enabled that a CA can look at first (RFC 8555 §8.3)."""
    query = select(listeners.c.id).where(listeners.c.enabled, listeners.c.protocol == "http")
    return tx.execute(query.limit(1)).first() is not None


def is_challenge_used(tx: Connection, challenge: str) -> bool:
    """Say whether an enabled http listener, where CAs look first, answers HTTP-01 challenges in this way."""
    query = select(listeners.c.id).where(
        listeners.c.enabled, listeners.c.protocol == "http", listeners.c.challenge == challenge
    )
    return tx.execute(query.limit(1)).first() is not None


_NAMING = {
    "postgresql": "SELECT name.value, policy.id FROM unnest(:names) AS name (value) "
    "JOIN tls_policies AS policy ON policy.domains @> ARRAY[name.value]",
    "sqlite": "SELECT name.value, policy.id FROM tls_policies AS policy, json_each(policy.domains) AS name "
    "WHERE name.value IN (SELECT value FROM json_each(:names))",
}
_POLICIES_NAMING = {
    dialect: text(query).bindparams(bindparam("names", type_=TextArray())).columns(value=Text(), id=UuidText())
    for dialect, query in _NAMING.items()
}


def policies_naming(tx: Connection, dns_names: Iterable[str]) -> dict[str, set[str]]:
    """Return the ids of the policies whose `domains` has exactly this name, for each of the names that any has.

    GIN index on PostgreSQL; SQLite reads every policy, however many names are asked for.
    """
    found: dict[str, set[str]] = {}
    for name, policy_id in tx.execute(_POLICIES_NAMING[tx.dialect.name], {"names": sorted(set(dns_names))}):
        found.setdefault(name, set()).add(policy_id)
    return found


def export(tx: Connection) -> dict[str, list[dict[str, Any]]]:
    """Return every table as rows of the columns a document may set, ordered by id."""
    document = {}
    for table in APPLIED:
        names = APPLIED_COLUMNS[table.name]
        rows = tx.execute(select(*(table.c[name] for name in names)).order_by(table.c.id))
        # Plain text as keys: SQLAlchemy's own names are text of a kind that YAML does not print.
        document[str(table.name)] = [dict(zip(names, row, strict=True)) for row in rows]
    return document


def replace(tx: Connection, document: Mapping[str, list[dict[str, Any]]], now: datetime) -> dict[str, int]:
    """Make the tables that `document` names hold exactly its rows; return how many rows changed, per table.

    Rows are complete and checked, every reference is an id. A row that stays as it is is not touched.
    """
    changed = dict.fromkeys(document, 0)
    wanted = {table: {row["id"]: row for row in document[table.name]} for table in APPLIED if table.name in document}
    held = {table: {row["id"]: row for row in _rows(tx, table)} for table in wanted}
    for table in reversed(APPLIED):
        for row_id in set(held.get(table, {})) - set(wanted.get(table, {})):
            changed[table.name] += tx.execute(delete(table).where(table.c.id == row_id)).rowcount
    for table in (table for table in APPLIED if table in wanted):
        _vacate(tx, table, wanted[table], held[table])
        changed[table.name] += _update(tx, table, wanted[table], held[table], now)
        changed[table.name] += _insert(
            tx, table, [wanted[table][i] for i in wanted[table] if i not in held[table]], now
        )
    return changed


def _rows(tx: Connection, table: Table) -> list[dict[str, Any]]:
    columns = [table.c[name] for name in APPLIED_COLUMNS[table.name]]
    return [dict(row._mapping) for row in tx.execute(select(*columns))]


def _vacate(tx: Connection, table: Table, wanted: dict[str, dict[str, Any]], held: dict[str, dict[str, Any]]) -> None:
    """Take what is unique from the rows that give it up: two rows may trade, and each statement is checked."""
    columns = UNIQUE_COLUMNS.get(table.name, ())
    leaving = [row_id for row_id in wanted.keys() & held if any(wanted[row_id][c] != held[row_id][c] for c in columns)]
    for number, row_id in enumerate(leaving, 1):
        nobodys = {"port": -number} if table is listeners else {"name": row_id}
        tx.execute(update(table).where(table.c.id == row_id).values(**nobodys))


def _update(
    tx: Connection, table: Table, wanted: dict[str, dict[str, Any]], held: dict[str, dict[str, Any]], now: datetime
) -> int:
    unlike = [row for row_id, row in wanted.items() if row_id in held and held[row_id] != row]
    for row in unlike:
        tx.execute(update(table).where(table.c.id == row["id"]).values(updated_at=now, **row))
    return len(unlike)


def _insert(tx: Connection, table: Table, rows: list[dict[str, Any]], now: datetime) -> int:
    ours = {"created_at": now, "updated_at": now, **({"status": "pending"} if table is tls_policies else {})}
    if rows:
        tx.execute(insert(table), [{**ours, **row} for row in rows])  # one statement: there may be tens of thousands
    return len(rows)
