"""Names of a shared certificate that the CA refuses: left out, remembered, tried again."""

from datetime import datetime, timedelta

import pytest

from certworker.core.budget import LETS_ENCRYPT
from certworker.core.retry import ErrorClass
from certworker.steps.issue import advance
from certworker.steps.renew import request
from certworker.steps.scan import scan
from certworker.store import certificates, lineages
from certworker.store.lineages import LeftOut
from tests.steps.world import World

NAMES = ("a.example.com", "b.example.com", "dead.example.com")
ALIVE = ("a.example.com", "b.example.com")


def shared(world: World, *dead: str) -> str:
    """Want one certificate for NAMES, of which some are dead; take it as far as it goes."""
    world.closed_names = set(dead)
    policy_id = world.add_policy(*NAMES, shared=True)
    world.take_over()
    world.work()
    return policy_id


def served(world: World) -> list[str]:
    found = world.db.read(lambda tx: certificates.find_of_lineage(tx, world.lineage(NAMES[0]).id))
    return list(found.dns_names or ()) if found is not None else []


def left_out(world: World) -> list[LeftOut]:
    return world.db.read(lambda tx: lineages.left_out(tx, world.lineage(NAMES[0]).id))


def again(world: World) -> None:
    """Let the scan look, and work on what it finds."""
    scan(world.db, world.clock)
    world.work()


def test_a_dead_name_does_not_block_its_neighbours(world: World) -> None:
    """They get their certificate in the same issuance; the policy says that a name is missing."""
    policy_id = shared(world, "dead.example.com")

    assert served(world) == sorted(ALIVE)
    assert world.count("issuances") == 1
    (missing,) = left_out(world)
    assert (missing.dns_name, missing.failures, missing.error["class"]) == ("dead.example.com", 1, "validation")
    assert world.policy_status(policy_id) == "error"
    assert world.lineage(NAMES[0]).error == missing.error


def test_a_name_that_lives_again_comes_back_by_itself(world: World) -> None:
    """It is tried when its schedule says, with the others, and the policy is well."""
    policy_id = shared(world, "dead.example.com")
    (missing,) = left_out(world)
    world.closed_names.clear()

    world.clock.now = missing.probe_at - timedelta(seconds=1)
    again(world)
    assert served(world) == sorted(ALIVE)
    world.clock.now = missing.probe_at
    again(world)

    assert served(world) == sorted(NAMES)
    assert left_out(world) == []
    assert world.policy_status(policy_id) == "active"
    assert world.last_issuance(NAMES[0]).reason == "names_missing"


def test_a_try_that_fails_changes_nothing_for_the_others(world: World) -> None:
    """Their certificate stays, no other one is ordered, and the next try is later."""
    shared(world, "dead.example.com")
    (first,) = left_out(world)
    before = [line.serial for line in world.ca.issued]

    world.clock.now = first.probe_at
    again(world)

    assert [line.serial for line in world.ca.issued] == before
    (second,) = left_out(world)
    assert second.failures == 2
    assert second.probe_at - world.clock() > first.probe_at - datetime.fromisoformat(first.error["at"])
    lineage = world.lineage(NAMES[0])
    assert lineage.failures == 0
    assert lineage.next_check_at is not None
    scan(world.db, world.clock)
    assert world.lineage(NAMES[0]).next_check_at == second.probe_at


def test_names_that_the_ca_rejects_outright_are_left_out_too(world: World) -> None:
    """A problem document that names them is as good as a failed validation (RFC 8555 §6.7.1)."""
    world.ca.refused_names = frozenset(["dead.example.com"])
    shared(world)

    assert served(world) == sorted(ALIVE)
    (missing,) = left_out(world)
    assert missing.error["class"] == ErrorClass.PERMANENT


def test_two_dead_names_fall_one_order_after_the_other_or_together(world: World) -> None:
    """Whatever is left gets its certificate."""
    shared(world, "dead.example.com", "b.example.com")

    assert served(world) == ["a.example.com"]
    assert [name.dns_name for name in left_out(world)] == ["b.example.com", "dead.example.com"]


def test_when_all_are_dead_the_attempt_has_failed(world: World) -> None:
    """Nothing is left to go on with."""
    policy_id = shared(world, *NAMES)

    assert served(world) == []
    assert left_out(world) == []
    assert world.last_issuance(NAMES[0]).state == "failed"
    assert world.policy_status(policy_id) == "error"


def test_a_name_that_is_served_gets_three_tries_before_a_renewal_goes_on_without_it(world: World) -> None:
    """It would lose its certificate, which is still good for a month."""
    shared(world)
    world.closed_names = {"dead.example.com"}
    renew_at = world.lineage(NAMES[0]).renew_at
    assert renew_at is not None
    world.clock.now = renew_at

    for failures in (1, 2):
        again(world)
        assert served(world) == sorted(NAMES)
        lineage = world.lineage(NAMES[0])
        assert lineage.failures == failures
        assert lineage.next_check_at is not None
        world.clock.now = lineage.next_check_at
    again(world)

    assert served(world) == sorted(ALIVE)
    assert [name.dns_name for name in left_out(world)] == ["dead.example.com"]


def test_a_certificate_about_to_end_is_renewed_without_it_at_once(world: World) -> None:
    """The neighbours cannot wait."""
    shared(world)
    world.closed_names = {"dead.example.com"}
    not_after = world.lineage(NAMES[0]).not_after
    assert not_after is not None
    world.clock.now = not_after - timedelta(days=1)

    again(world)

    assert served(world) == sorted(ALIVE)


def test_a_failed_validation_is_counted_for_its_name_only(world: World) -> None:
    """The rate ledger remembers it, as the CA does."""
    world.limits = LETS_ENCRYPT
    shared(world, "dead.example.com")

    query = "SELECT bucket FROM rate_buckets b WHERE bucket LIKE 'validations:%' AND full_at > "
    query += "(SELECT min(full_at) FROM rate_buckets WHERE bucket LIKE 'validations:%')"
    assert world.rows(query) == [("validations:dead.example.com",)]


def test_a_person_may_ask_for_the_missing_name_at_once(world: World) -> None:
    """`renew NAME` does not wait for its next try."""
    shared(world, "dead.example.com")
    world.closed_names.clear()

    asked = request(world.db, world.clock, ["dead.example.com"], force=False, dry_run=False, private_ca=True)
    world.work()

    assert len(asked.tickets) == 1
    assert served(world) == sorted(NAMES)


def test_a_dry_run_says_so_and_writes_nothing(world: World) -> None:
    """The reason is the missing name; its next try stays where it was."""
    shared(world, "dead.example.com")
    before = left_out(world)

    asked = request(world.db, world.clock, ["dead.example.com"], force=False, dry_run=True, private_ca=True)

    assert asked.would_renew == [("a.example.com", "names_missing")]
    assert left_out(world) == before


@pytest.mark.parametrize("moves", range(1, 12))
def test_a_crash_anywhere_ends_in_the_same_place(world: World, moves: int) -> None:
    """The names to order are in the issuance, so whoever takes over goes on without the dead one."""
    world.closed_names = {"dead.example.com"}
    world.add_policy(*NAMES, shared=True)
    world.take_over()
    bench = world.bench()
    (session,) = world.claim()
    for _ in range(moves):
        advance(bench, session)
        if session.wait_until is not None:
            world.clock.now = max(world.clock.now, session.wait_until)
    world.crash()
    world.work()

    assert served(world) == sorted(ALIVE)
    assert len(world.ca.issued) == 1
