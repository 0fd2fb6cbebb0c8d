"""What is reaped of what all workers share, and what never is."""

from datetime import timedelta

from sqlalchemy import select, update

from certworker.core.budget import Limit, validations_bucket
from certworker.steps.reap import FULL_BUCKETS, HISTORY, reap
from certworker.store import budget, certificates, challenges, issuances, thumbprints, workers
from certworker.store.rows import new_id
from certworker.store.tables import issuances as rows
from certworker.store.tables import rate_buckets
from tests.store.plans import explain

from .world import START, World

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


def test_what_another_program_has_ended_is_closed(world: World) -> None:
    """It said so in one column only: without the other the name would never be issued for again."""
    world.add_policy("a.test")
    world.take_over()
    world.execute("UPDATE issuances SET state = 'failed'")
    queue = lambda: world.db.write(lambda tx: issuances.queue(tx, world.lineage("a.test").id, "forced", world.clock()))  # noqa: E731
    assert queue() is None

    reap(world.db, world.clock)

    assert world.rows("SELECT count(*) FROM issuances WHERE closed_at IS NOT NULL") == [(1,)]
    assert queue() is not None


# -- what it costs --------------------------------------------------------------------------------------


def test_what_is_reaped_is_found_by_its_index(world: World) -> None:
    """However many issuances, tombstones and hosts there are, and however many of them stay."""
    now = world.clock()
    # With no row in the table, one index of what is open costs PostgreSQL as much as another.
    of_open = "ix_issuances_due" if world.db.embedded else "uq_issuances_open"
    plans = {
        "ix_issuances_fruitless": explain(world.db, lambda tx: issuances.forget_keys(tx, now, now), "DELETE"),
        "ix_issuances_ended": explain(world.db, lambda tx: issuances.forget_keys(tx, now, now), "DELETE", before=1),
        of_open: explain(world.db, lambda tx: issuances.cancel_abandoned(tx, now, now), "UPDATE"),
        "removed_at": explain(world.db, lambda tx: certificates.forget_removed(tx, now), "DELETE"),
        "ix_thumbprints_removed": explain(world.db, lambda tx: thumbprints.forget_removed(tx, now), "DELETE"),
    }
    issuance_of = "INDEX sqlite_autoindex_issuances_1" if world.db.embedded else "pk_issuances on issuances"

    assert [index for index, plan in plans.items() if index not in plan] == []
    assert issuance_of in explain(world.db, lambda tx: challenges.withdraw_stale(tx, now), "DELETE")


def test_a_history_longer_than_a_page_goes_in_one_call(world: World) -> None:
    """Page by page, as far as a stop can wait; the rest in the next."""
    for number in range(5):
        world.issue(f"{number}.test")
    world.clock.move(timedelta(days=365))

    assert reap(world.db, world.clock, page=2).issuances == 5


def test_what_ended_early_and_came_late_holds_up_nothing_for_good(world: World) -> None:
    """A page of short lives is looked at first; it goes when it is old enough, and then the others."""
    for name in ("a.test", "b.test"):
        world.issue(name)
    early, late = world.last_issuance("a.test"), world.last_issuance("b.test")
    day = timedelta(days=1)
    for row, closed_at, not_after in ((early, START - 10 * day, START - 4 * day), (late, START - 90 * day, START)):
        values = {"closed_at": closed_at, "not_after": not_after}
        world.db.write(lambda tx: tx.execute(update(rows).where(rows.c.id == row.id).values(**values)))  # noqa: B023

    def forget(at: timedelta) -> int:
        return world.db.write(lambda tx: issuances.forget_keys(tx, START + at - HISTORY, START + at, limit=1))

    assert [forget(timedelta(0)), forget(21 * day), forget(21 * day), forget(21 * day)] == [0, 1, 1, 0]
