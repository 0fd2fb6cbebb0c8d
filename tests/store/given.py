"""Rows of the ten given tables, written as another gateway program writes them: SQL and nothing of ours."""

import sqlite3
from typing import Any

import psycopg

from certworker.store.database import Database

REFUSED = (sqlite3.IntegrityError, psycopg.IntegrityError, psycopg.DataError)
"""What a driver raises when the database refuses a row."""

LISTENER = "11111111-1111-4111-8111-111111111111"
POOL = "22222222-2222-4222-8222-222222222222"
POLICY = "33333333-3333-4333-8333-333333333333"
CERTIFICATE = "44444444-4444-4444-8444-444444444444"
VERSION = "55555555-5555-4555-8555-555555555555"
ACCOUNT = "66666666-6666-4666-8666-666666666666"
ROUTE = "77777777-7777-4777-8777-777777777777"
TARGET = "88888888-8888-4888-8888-888888888888"
NODE = "99999999-9999-4999-8999-999999999999"
AUDIT = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"

AT = "2026-11-22T12:00:00.000000Z"

INSERTS = {
    "listeners": f"""INSERT INTO listeners (id, name, port, protocol, tls_policy_id, enabled, created_at, updated_at)
        VALUES ('{LISTENER}', NULL, 443, 'https', NULL, true, '{AT}', '{AT}')""",
    "upstream_pools": f"""INSERT INTO upstream_pools (id, name, policy, health_check, created_at, updated_at)
        VALUES ('{POOL}', 'web', 'round_robin', NULL, '{AT}', '{AT}')""",
    "routes": f"""INSERT INTO routes
            (id, listener_id, type, match_expr, priority, upstream_pool_id, enabled, created_at, updated_at)
        VALUES ('{ROUTE}', '{LISTENER}', 'path', '{{"host": "*.a.test"}}', 10, '{POOL}', true, '{AT}', '{AT}')""",
    "upstream_targets": f"""INSERT INTO upstream_targets
            (id, pool_id, address, weight, enabled, created_at, updated_at)
        VALUES ('{TARGET}', '{POOL}', '127.0.0.1:8080', 1, true, '{AT}', '{AT}')""",
    "tls_policies": f"""INSERT INTO tls_policies (id, mode, domains, status, created_at, updated_at)
        VALUES ('{POLICY}', 'auto', <a.test, b.test>, 'pending', '{AT}', '{AT}')""",
    "certificates": f"""INSERT INTO certificates
            (id, domain, cert_pem, key_pem, expires_at, status, created_at, updated_at)
        VALUES ('{CERTIFICATE}', 'm.test', 'chain', 'key', '{AT}', 'active', '{AT}', '{AT}')""",
    "config_versions": f"""INSERT INTO config_versions (id, snapshot_json, status, created_by, created_at)
        VALUES ('{VERSION}', '{{}}', 'published', 'gateway', '{AT}')""",
    "node_status": f"""INSERT INTO node_status (id, node_id, version_id, heartbeat_at, metadata)
        VALUES ('{NODE}', 'edge-1', '{VERSION}', '{AT}', NULL)""",
    "audit_logs": f"""INSERT INTO audit_logs (id, actor, action, diff, created_at)
        VALUES ('{AUDIT}', 'alice', 'listener.added', '{{}}', '{AT}')""",
    "acme_accounts": f"""INSERT INTO acme_accounts (id, directory_url, credentials_json, created_at)
        VALUES ('{ACCOUNT}', 'https://ca.test/dir', '{{"key": "pem"}}', '{AT}')""",
}
"""One row per table with all its given columns, in an order in which they can be inserted."""

SHORTEST = {
    "listeners": f"INSERT INTO listeners (id, port, protocol) VALUES ('{LISTENER}', 80, 'http')",
    "upstream_pools": f"INSERT INTO upstream_pools (id, name, policy) VALUES ('{POOL}', 'web', 'weighted')",
    "routes": f"""INSERT INTO routes (id, listener_id, type, match_expr, priority, upstream_pool_id)
        VALUES ('{ROUTE}', '{LISTENER}', 'ws', '{{}}', 10, '{POOL}')""",
    "upstream_targets": f"INSERT INTO upstream_targets (id, pool_id, address) VALUES ('{TARGET}', '{POOL}', 'h:1')",
    "tls_policies": f"""INSERT INTO tls_policies (id, mode, domains, status)
        VALUES ('{POLICY}', 'manual', <>, 'error')""",
    "certificates": f"""INSERT INTO certificates (id, domain, cert_pem, key_pem, expires_at, status)
        VALUES ('{CERTIFICATE}', 'm.test', '', '', '{AT}', 'expired')""",
    "config_versions": f"""INSERT INTO config_versions (id, snapshot_json, status, created_by)
        VALUES ('{VERSION}', '{{}}', 'draft', 'gateway')""",
    "node_status": f"INSERT INTO node_status (id, node_id, heartbeat_at) VALUES ('{NODE}', 'edge-1', '{AT}')",
    "audit_logs": f"INSERT INTO audit_logs (id, actor, action, diff) VALUES ('{AUDIT}', 'alice', 'x', '{{}}')",
    "acme_accounts": f"""INSERT INTO acme_accounts (id, directory_url, credentials_json)
        VALUES ('{ACCOUNT}', 'https://ca.test/dir', '{{}}')""",
}
"""The same with the columns that have a default left out."""


class Program:
    """Another program on the same database, with a driver's connection of its own; every statement commits."""

    def __init__(self, db: Database, *, role: str = "") -> None:
        self.embedded = db.embedded
        self._connection: Any
        if self.embedded:
            self._connection = sqlite3.connect(str(db.engine.url.database), isolation_level=None, timeout=5)
            self._connection.execute("PRAGMA foreign_keys=ON")
        else:
            self._connection = psycopg.connect(url_of(db), autocommit=True, **({"user": role} if role else {}))

    def __call__(self, statement: str) -> list[tuple[Any, ...]]:
        """Run one statement, in which <a, b> is an array of text, and return its rows."""
        cursor = self._connection.execute(self._spell(statement))
        return list(cursor.fetchall()) if cursor.description else []

    def insert_all(self, rows: dict[str, str] = INSERTS) -> None:
        """Write a row to every given table."""
        for statement in rows.values():
            self(statement)

    def notes(self) -> list[tuple[str, str]]:
        """Return and forget what the triggers noted."""
        noted = self("SELECT topic, row_id FROM changes ORDER BY id")
        self("DELETE FROM changes")
        return [(topic, str(row_id)) for topic, row_id in noted]

    def close(self) -> None:
        self._connection.close()

    def _spell(self, statement: str) -> str:
        before, opened, rest = statement.partition("<")
        if not opened or ">" not in rest:
            return statement
        inside, _, after = rest.partition(">")
        names = [name.strip() for name in inside.split(",") if name.strip()]
        if self.embedded:
            return before + "'[" + ", ".join(f'"{name}"' for name in names) + "]'" + after
        return before + "'{" + ",".join(names) + "}'" + after


def url_of(db: Database) -> str:
    """Return the URL of a test's database, for a second connection to it."""
    return db.engine.url.render_as_string(hide_password=False)
