"""What is due is queued: a page at a time, in a few statements however many there are."""

from datetime import timedelta

from certworker.steps.reconcile import reconcile
from certworker.steps.renew import request
from certworker.steps.scan import LOOK_AGAIN, ScanReport, scan
from certworker.store import issuances, policies
from tests.store.plans import statements

from .world import World


def want(world: World, count: int) -> None:
    """Let `count` new lineages be due."""
    for number in range(count):
        world.add_policy(f"n{number}.test")
    reconcile(world.db, world.clock, world.wanted, world.sealer)


def test_a_scan_of_many_costs_few_statements(world: World) -> None:
    """500 of them are queued in one transaction, and not looked at again before they have had their time."""
    want(world, 500)
    with statements(world.db) as sent:
        report = scan(world.db, world.clock)

    assert report == ScanReport(500, 500)
    assert len(sent) <= 8
    assert world.count("issuances") == 500
    assert scan(world.db, world.clock) == ScanReport(0, 0)
    world.clock.move(LOOK_AGAIN)
    assert scan(world.db, world.clock) == ScanReport(500, 0)


def test_a_scan_of_nothing_is_two_statements(world: World) -> None:
    """What is due, and that it was looked for."""
    world.issue("a.test")
    with statements(world.db) as sent:
        assert scan(world.db, world.clock) == ScanReport(0, 0)

    assert len(sent) == 2


def test_more_than_a_page_is_queued_page_by_page(world: World) -> None:
    """All of it, in one scan."""
    want(world, 501)

    assert scan(world.db, world.clock) == ScanReport(501, 501)


def test_in_one_page_each_gets_its_own_answer(world: World) -> None:
    """One is due, one not yet, one is about to end while its issuance is open, and one is wanted no more."""
    waits, gone = world.issue("waits.test"), world.issue("gone.test")
    world.issue("ends.test")
    world.issue("due.test")
    world.execute("UPDATE lineages SET next_check_at = NULL")
    later = world.lineage("waits.test").not_before
    assert later is not None
    world.clock.now = later + timedelta(days=88)
    now = world.clock()
    world.db.write(lambda tx: issuances.queue(tx, world.lineage("ends.test").id, "lifetime_used", now))
    world.execute("UPDATE lineages SET next_check_at = created_at")
    at = world.clock() + timedelta(days=90)
    fresh = "UPDATE lineages SET not_before = :now, not_after = :at, renew_at = :at WHERE id = :id"
    form = "%Y-%m-%dT%H:%M:%S.000000Z"
    world.execute(fresh, now=now.strftime(form), at=at.strftime(form), id=waits.id)
    (policy_id,) = [
        row[0] for row in world.rows("SELECT policy_id FROM policy_lineages WHERE lineage_id = :id", id=gone.id)
    ]
    world.db.write(lambda tx: policies.set_paused(tx, str(policy_id), now, now))

    assert scan(world.db, world.clock) == ScanReport(4, 1)

    assert world.lineage("gone.test").next_check_at is None
    assert (world.lineage("waits.test").next_check_at or now) > now + LOOK_AGAIN
    assert world.lineage("due.test").next_check_at == now + LOOK_AGAIN
    assert world.last_issuance("ends.test").urgent
    assert world.last_issuance("due.test").urgent


def test_a_request_for_many_costs_few_statements(world: World) -> None:
    """Those that are queued already keep their issuance, the others get one."""
    want(world, 300)
    scan(world.db, world.clock)
    world.execute(
        "UPDATE issuances SET state = 'cancelled', closed_at = created_at WHERE CAST(lineage_id AS text) LIKE '%0'"
    )
    kept = world.rows("SELECT count(*) FROM issuances WHERE state = 'queued'")[0][0]
    with statements(world.db) as sent:
        asked = request(world.db, world.clock, [], force=True, dry_run=False, private_ca=True)

    assert len(asked.tickets) == 300
    assert len(sent) <= 12
    assert 0 < kept < 300
    assert world.rows("SELECT count(*) FROM issuances WHERE state = 'queued'") == [(300,)]
    assert world.count("issuances") == 600 - kept
