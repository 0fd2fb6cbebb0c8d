"""`workers`: the dead of one place are known as dead, everybody else is left alone."""

from datetime import timedelta

import pytest
from sqlalchemy import literal, select, update

from certworker.store import workers
from certworker.store.database import Database, Transaction
from certworker.store.tables import workers as worker_rows
from certworker.store.types import seconds_from_now

from .given import LISTENER, POLICY, POOL, ROUTE

HERE, THERE = "11111111-1111-4111-8111-111111111111.7", "11111111-1111-4111-8111-111111111111.8"


def enter(db: Database, worker_id: str, place: str | None) -> None:
    db.write(lambda tx: workers.enter(tx, worker_id, "host", 1, "0.1", place))


def there(db: Database) -> set[str]:
    return set(db.read(lambda tx: tx.execute(select(worker_rows.c.id)).scalars().all()))


def test_only_who_was_at_the_place_is_buried(db: Database) -> None:
    """However lately it was heard of, and not a worker without a place or at another one."""
    for worker_id, place in ((POLICY, HERE), (POOL, HERE), (ROUTE, THERE), (LISTENER, None)):
        enter(db, worker_id, place)

    assert sorted(db.write(lambda tx: workers.bury_place(tx, HERE))) == sorted([POLICY, POOL])
    assert there(db) == {ROUTE, LISTENER}
    assert db.write(lambda tx: workers.bury_place(tx, HERE)) == []


def test_entering_can_be_repeated(db: Database) -> None:
    """The answer to its COMMIT may have been lost: the second time it finds itself, and stays one."""

    def take_over(tx: Transaction) -> list[str]:
        dead = workers.bury_place(tx, HERE)
        workers.enter(tx, POLICY, "host", 1, "0.1", HERE)
        workers.enter(tx, POLICY, "host", 1, "0.1", HERE)
        return dead

    enter(db, POOL, HERE)
    assert db.write(take_over) == [POOL]
    assert db.write(take_over) == [POLICY]
    assert there(db) == {POLICY}


def test_a_heartbeat_says_what_time_it_is(db: Database) -> None:
    """The database's, with the very value that was written; nothing to one that was buried meanwhile."""
    enter(db, POLICY, None)
    row = update(worker_rows).where(worker_rows.c.id == POLICY)
    db.write(lambda tx: tx.execute(row.values(heartbeat_at=seconds_from_now(literal(-50)))))
    said = db.write(lambda tx: workers.beat(tx, POLICY))

    assert said is not None
    assert abs(db.now() - said) < timedelta(seconds=10)
    assert [worker.heartbeat_at for worker in db.read(workers.alive)] == [said]
    assert db.write(lambda tx: workers.beat(tx, POOL)) is None
    assert there(db) == {POLICY}


@pytest.mark.parametrize(("seconds", "counted"), [(-70, False), (-50, True), (50, True), (70, False)])
def test_who_was_heard_of_lately_is_alive(db: Database, seconds: int, counted: bool) -> None:
    """Not in the future either: when the database's clock is set back a day, the dead are not alive for a day."""
    enter(db, POLICY, None)
    at = seconds_from_now(literal(seconds))
    db.write(lambda tx: tx.execute(update(worker_rows).values(heartbeat_at=at)))

    assert bool(db.read(workers.alive)) == counted
