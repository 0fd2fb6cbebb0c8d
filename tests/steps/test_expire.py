"""Expiry, by a clock that may have been wrong: what it flipped too early comes back."""

import logging
from collections import Counter
from datetime import timedelta

import pytest

from certworker.steps.expire import expire
from certworker.steps.reconcile import reconcile
from certworker.steps.scan import scan
from certworker.store import certificates
from certworker.store.rows import new_id
from tests.store.plans import explain

from .world import START, World

AHEAD = timedelta(days=400)


def audited(world: World) -> Counter[str]:
    return Counter(row[0] for row in world.rows("SELECT action FROM audit_logs"))


def test_a_clock_that_ran_ahead_and_was_put_right_leaves_nothing_behind(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Certificate, lineage and policy are active again, with audit rows; a second look finds nothing to do."""
    lineage = world.issue("a.test")
    policy_id = str(world.rows("SELECT id FROM tls_policies")[0][0])
    before, ((revision,),) = audited(world), world.rows("SELECT revision FROM certificates")

    world.clock.move(AHEAD)
    assert expire(world.db, world.clock) == 1
    assert (world.lineage("a.test").status, world.policy_status(policy_id)) == ("error", "error")
    world.clock.move(-AHEAD)
    with caplog.at_level(logging.WARNING):
        assert expire(world.db, world.clock) == 0
        assert expire(world.db, world.clock) == 0

    assert world.rows("SELECT status, revision FROM certificates") == [("active", revision + 2)]
    assert (world.lineage("a.test").status, world.policy_status(policy_id)) == ("active", "active")
    assert world.lineage("a.test").validity == lineage.validity
    there_and_back = ["certificate.expired", "policy.error", "certificate.active", "policy.active"]
    assert audited(world) - before == Counter(there_and_back)
    assert [record.message for record in caplog.records] == ["certificates.not_expired_after_all"]


def test_what_has_really_ended_stays_expired(world: World) -> None:
    """To the very instant: at its end it is expired, a moment before it is not."""
    lineage = world.issue("a.test")
    assert lineage.not_after is not None

    for moment, status in ((timedelta(), "expired"), (timedelta(microseconds=-1), "active"), (timedelta(), "expired")):
        world.clock.now = lineage.not_after + moment
        expire(world.db, world.clock)
        expire(world.db, world.clock)
        assert world.rows("SELECT status FROM certificates") == [(status,)]


def test_what_the_clock_put_off_is_looked_at_again(world: World) -> None:
    """Or its next look would come after the certificate's real end. Nothing is ordered for it before its time."""
    lineage = world.issue("a.test")
    world.clock.move(AHEAD)
    expire(world.db, world.clock)
    world.execute("UPDATE lineages SET next_check_at = :at", at=spelled(world, AHEAD))
    world.clock.move(-AHEAD)
    expire(world.db, world.clock)

    assert world.lineage("a.test").next_check_at == world.clock()
    assert scan(world.db, world.clock).queued == 0
    assert world.lineage("a.test").next_check_at == lineage.renew_at


def test_what_nobody_wants_any_more_comes_back_unplanned(world: World) -> None:
    """It serves as before, and is renewed no more than before."""
    world.issue("a.test")
    world.execute("DELETE FROM tls_policies")
    reconcile(world.db, world.clock, world.wanted, world.sealer)
    world.clock.move(AHEAD)
    expire(world.db, world.clock)
    world.clock.move(-AHEAD)
    expire(world.db, world.clock)

    assert world.rows("SELECT status FROM certificates") == [("active",)]
    assert world.lineage("a.test").next_check_at is None


def test_what_was_renewed_meanwhile_is_left_alone(world: World) -> None:
    """Its row is a newer certificate's by then."""
    world.issue("a.test")
    world.clock.move(timedelta(days=91))
    expire(world.db, world.clock)
    scan(world.db, world.clock)
    world.work()
    serving = world.rows("SELECT serial, status, revision FROM certificates")
    world.clock.now = START
    expire(world.db, world.clock)

    assert serving[0][1] == "active"
    assert world.rows("SELECT serial, status, revision FROM certificates") == serving


# -- rows of other programs ---------------------------------------------------------------------------


def test_an_upload_and_its_policy_come_back(world: World) -> None:
    """A certificate of another program has no lineage; the policies that name it are told all the same."""
    policy_id = world.add_policy("m.test", mode="manual")
    upload(world, "active")
    world.clock.move(AHEAD)
    expire(world.db, world.clock)
    assert world.policy_status(policy_id) == "error"
    world.clock.move(-AHEAD)
    expire(world.db, world.clock)

    assert world.rows("SELECT status FROM certificates") == [("active",)]
    assert world.policy_status(policy_id) == "active"


def test_a_row_that_was_not_taken_over_yet_is_not_judged(world: World) -> None:
    """Reconcile looks at the pair first: nobody has seen yet whether it can be served."""
    upload(world, "expired", revision=None)
    expire(world.db, world.clock)

    assert world.rows("SELECT status FROM certificates") == [("expired",)]


def test_more_than_a_page_goes_and_comes_back(world: World) -> None:
    """All of it, in one call."""
    for number in range(103):
        upload(world, "active", revision=number)
    world.clock.move(AHEAD)
    assert expire(world.db, world.clock) == 103
    world.clock.move(-AHEAD)
    expire(world.db, world.clock)

    assert world.rows("SELECT status, count(*) FROM certificates GROUP BY status") == [("active", 103)]


def test_looking_costs_what_there_is_to_flip(world: World) -> None:
    """Not what has expired in all the years, nor what is active: one probe of a partial index each way."""
    plan = explain(world.db, lambda tx: certificates.unexpired(tx, START, 5))

    assert "ix_certificates_expired" in plan


def upload(world: World, status: str, revision: int | None = 1) -> None:
    """Write a certificate for m.test as another program would, with a year to go."""
    world.execute(
        """INSERT INTO certificates (id, domain, cert_pem, key_pem, expires_at, status, revision)
            VALUES (:id, 'm.test', '', '', :end, :status, :revision)""",
        id=new_id(), end=spelled(world, timedelta(days=365)), status=status, revision=revision,
    )  # fmt: skip


def spelled(world: World, by: timedelta) -> object:
    """An instant as a plain statement is given it."""
    at = START + by
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if world.db.embedded else at
