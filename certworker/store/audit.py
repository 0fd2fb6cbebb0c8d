"""The audit log: who did what, in the same transaction as the change itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from certworker.store.prepared import Prepared
from certworker.store.rows import new_id
from certworker.store.tables import audit_logs

WORKER = "certworker"
"""The actor of everything the program does by itself."""


def record(tx: Connection, action: str, diff: dict[str, Any], now: datetime, *, actor: str = WORKER) -> None:
    """Write one row. `diff` never holds a key, a token or a whole certificate."""
    _ADD.run(tx, [{"id": new_id(), "actor": actor, "action": action, "diff": diff, "created_at": now}])


@dataclass(frozen=True, slots=True)
class Flip:
    """A row of another table whose status has changed."""

    kind: str
    table: str
    row_id: str
    before: dict[str, Any]
    after: dict[str, Any]
    """With the new `status`."""


def record_flips(tx: Connection, flips: Sequence[Flip], now: datetime) -> None:
    """Write a row for each: action `<kind>.<status>`."""
    rows = [
        {
            "id": new_id(), "actor": WORKER, "action": f"{one.kind}.{one.after['status']}", "created_at": now,
            "diff": {"table": one.table, "id": one.row_id, "before": one.before, "after": one.after},
        }
        for one in flips
    ]  # fmt: skip
    _ADD.run(tx, rows)


_ADD = Prepared(insert(audit_logs))


def newest(tx: Connection, limit: int = 100) -> list[dict[str, Any]]:
    """Return the newest rows, newest first."""
    rows = tx.execute(select(audit_logs).order_by(audit_logs.c.created_at.desc()).limit(limit))
    return [dict(row._mapping) for row in rows]
