"""What is reaped of what all workers share, and what never is."""

from datetime import timedelta

from sqlalchemy import select

from certworker.core.budget import Limit, validations_bucket
from certworker.steps.reap import FULL_BUCKETS, reap
from certworker.store import budget, workers
from certworker.store.rows import new_id
from certworker.store.tables import rate_buckets

from .world import World

LIMIT = Limit(3, timedelta(hours=2))


def spend(world: World, name: str) -> None:
    ca, now = world.ca.directory_url, world.clock()
    world.db.write(lambda tx: budget.charge(tx, ca, validations_bucket(name), new_id(), LIMIT, now))


def test_a_bucket_is_forgotten_a_day_after_it_was_full(world: World) -> None:
    """Not before: a clock that is an hour ahead would forget what was spent."""
    spend(world, "a.test")
    (full_at,) = world.db.read(lambda tx: tx.execute(select(rate_buckets.c.full_at)).scalars())
    world.clock.now = full_at + FULL_BUCKETS
    assert reap(world.db, world.clock).buckets == 0
    spend(world, "b.test")

    world.clock.move(timedelta(seconds=1))
    assert reap(world.db, world.clock).buckets == 1
    assert [row[0] for row in world.rows("SELECT bucket FROM rate_buckets")] == [validations_bucket("b.test")]


def test_the_audit_log_is_kept(world: World) -> None:
    """However old it is."""
    world.issue("a.test")
    before = world.count("audit_logs")
    world.clock.move(timedelta(days=3650))
    reap(world.db, world.clock)

    assert before
    assert world.count("audit_logs") == before


def test_a_worker_s_row_is_judged_by_the_database_s_time(world: World) -> None:
    """A step ahead of the clock that is handed in buries nobody."""
    world.db.write(lambda tx: workers.enter(tx, world.worker, "host", 1, "0.1"))
    world.clock.move(timedelta(days=3650))
    reap(world.db, world.clock)

    assert [worker.id for worker in world.db.read(workers.alive)] == [world.worker]
