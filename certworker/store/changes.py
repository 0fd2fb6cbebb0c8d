"""What changed in the given tables, noted by triggers in the writer's own transaction.

A step consumes by deleting: what it took is gone if it commits and still there if it does not, and a
row that commits late is found late, never missed.
"""

from sqlalchemy import Connection, bindparam, delete, insert, select

from certworker.store.tables import changes

GATEWAY = "gateway"
POLICY = "policy"
CERTIFICATE = "certificate"


_OF_TOPIC = changes.c.topic == bindparam("topic")
_AMONG = changes.c.id.in_(bindparam("ids", expanding=True))
_LOCK_OLDEST = (
    select(changes.c.id, changes.c.row_id)
    .where(_OF_TOPIC)
    .order_by(changes.c.id)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)
_DELETE = delete(changes).where(_AMONG)
_FIRST = select(changes.c.id).where(_OF_TOPIC).order_by(changes.c.id).limit(1)


def take(tx: Connection, topic: str, limit: int) -> list[str]:
    """Delete up to `limit` notes of a topic, oldest first, and return the ids of the rows they name."""
    notes = lock_oldest(tx, topic, limit)
    remove(tx, list(notes))
    return list(dict.fromkeys(notes.values()))


def lock_oldest(tx: Connection, topic: str, limit: int) -> dict[int, str]:
    """Return up to `limit` notes of a topic, oldest first: row id by note. Who asks meanwhile gets others."""
    return {row[0]: row[1] for row in tx.execute(_LOCK_OLDEST, {"topic": topic, "limit": limit})}


def remove(tx: Connection, notes: list[int]) -> None:
    """Delete these notes: what they tell is being done."""
    if notes:
        tx.execute(_DELETE, {"ids": notes})


def pending(tx: Connection, topic: str) -> bool:
    """Say whether there is a note of this topic."""
    return tx.execute(_FIRST, {"topic": topic}).first() is not None


def note(tx: Connection, topic: str, row_ids: list[str]) -> None:
    """Write notes as a trigger would, so that these rows are looked at again."""
    if row_ids:
        tx.execute(_NOTE, [{"topic": topic, "row_id": row_id} for row_id in row_ids])


_NOTE = insert(changes)
