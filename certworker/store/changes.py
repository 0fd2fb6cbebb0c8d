"""What changed in the given tables, noted by triggers in the writer's own transaction.

A step consumes by deleting: what it took is gone if it commits and still there if it does not, and a
row that commits late is found late, never missed.
"""

from sqlalchemy import Connection, delete, insert, select

from certworker.store.tables import changes

GATEWAY = "gateway"
POLICY = "policy"
CERTIFICATE = "certificate"


def take(tx: Connection, topic: str, limit: int) -> list[str]:
    """Delete up to `limit` notes of a topic, oldest first, and return the ids of the rows they name."""
    oldest = (
        select(changes.c.id)
        .where(changes.c.topic == topic)
        .order_by(changes.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    ids = list(tx.execute(oldest).scalars())
    if not ids:
        return []
    rows = tx.execute(select(changes.c.row_id).where(changes.c.id.in_(ids)).order_by(changes.c.id))
    row_ids = list(dict.fromkeys(rows.scalars()))
    tx.execute(delete(changes).where(changes.c.id.in_(ids)))
    return row_ids


def pending(tx: Connection, topic: str) -> bool:
    """Say whether there is a note of this topic."""
    return tx.execute(select(changes.c.id).where(changes.c.topic == topic).limit(1)).first() is not None


def note(tx: Connection, topic: str, row_ids: list[str]) -> None:
    """Write notes as a trigger would, so that these rows are looked at again."""
    if row_ids:
        tx.execute(insert(changes), [{"topic": topic, "row_id": row_id} for row_id in row_ids])
