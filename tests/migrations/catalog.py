"""A schema as the database itself tells it, as a set of facts: two schemas are equal when the sets are."""

import re
import sqlite3
from collections.abc import Iterator

import psycopg

from certworker.store.database import Database

Fact = tuple[str, ...]
"""Kind, table, and what there is to say."""


def read_catalog(db: Database) -> set[Fact]:
    """Return the schema's facts, without Alembic's own table."""
    facts = _sqlite(str(db.engine.url.database)) if db.embedded else _postgresql(db)
    return {fact for fact in facts if fact[1] != "alembic_version"}


def _sqlite(path: str) -> set[Fact]:
    connection = sqlite3.connect(path)
    try:
        return set(_sqlite_facts(connection))
    finally:
        connection.close()


def _sqlite_facts(connection: sqlite3.Connection) -> Iterator[Fact]:
    written = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    for (table,) in tables.fetchall():
        key = []
        for _, column, kind, not_null, default, in_key, _ in connection.execute(f"PRAGMA table_xinfo({table})"):
            yield "column", table, column, kind, "NOT NULL" if not_null else "NULL", f"DEFAULT {default}"
            key += [(in_key, column)] if in_key else []
        yield "primary key", table, *(column for _, column in sorted(key))
        for row in connection.execute(f"PRAGMA foreign_key_list({table})"):
            yield "foreign key", table, *(str(value) for value in row[2:7])
        for _, index, unique, origin, _ in connection.execute(f"PRAGMA index_list({table})").fetchall():
            columns = [str(row[2]) for row in connection.execute(f"PRAGMA index_xinfo({index})") if row[5]]
            name = index if origin == "c" else "by constraint"
            where = _squeeze(written.get(index, "").partition(" WHERE ")[2])
            yield "index", table, name, "unique" if unique else "", ", ".join(columns), where
        checks = list(_checks(written[table]))
        assert len(checks) == len(re.findall(r"\bCHECK\b", written[table])), "a check without a name cannot be changed"
        for name, condition in checks:
            yield "check", table, name, condition


def _checks(created: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r"CONSTRAINT (\w+) CHECK \(", created):
        depth, end = 1, found.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(created[end], 0)
            end += 1
        yield found[1], _squeeze(created[found.end() : end - 1])


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


_POSTGRESQL = """
SELECT 'column', c.relname, a.attname, format_type(a.atttypid, a.atttypmod),
       CASE WHEN a.attnotnull THEN 'NOT NULL' ELSE 'NULL' END, 'DEFAULT ' || pg_get_expr(d.adbin, d.adrelid)
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT CASE contype WHEN 'c' THEN 'check' WHEN 'f' THEN 'foreign key' WHEN 'p' THEN 'primary key' ELSE 'unique' END,
       c.relname, conname, pg_get_constraintdef(k.oid), NULL, NULL
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
 WHERE c.relnamespace = 'public'::regnamespace AND contype <> 'n'
UNION ALL
SELECT 'index', tablename, indexname, indexdef, NULL, NULL FROM pg_indexes WHERE schemaname = 'public'
"""


def _postgresql(db: Database) -> set[Fact]:
    with psycopg.connect(db.engine.url.render_as_string(hide_password=False)) as connection:
        return {tuple("" if value is None else str(value) for value in row) for row in connection.execute(_POSTGRESQL)}
