"""Issuances that move together, and a COMMIT whose answer is lost: what was written is written once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from certworker.core.order import OrderStatus
from certworker.errors import StoreError
from certworker.steps.issue import advance
from certworker.steps.session import Bench, Session, read_again
from certworker.store import policies
from certworker.store.database import Database, Transaction

from .test_counts import Gathered, claimed, issue
from .world import START, World

THREE = 3


class Unanswered:
    """A database that commits, and is asked again because nobody could tell."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def write(self, fn: Callable[[Transaction], Any]) -> Any:
        self._db.write(fn)
        return self._db.write(fn)


def unanswered(world: World) -> Gathered:
    journal = Gathered(world.db, THREE)
    journal._db = Unanswered(world.db)  # type: ignore[assignment]
    return journal


def test_every_commit_is_made_twice(world: World) -> None:
    """One order, one certificate, one debit, one audit row each, and nobody's lease is lost."""
    bench, sessions, wire = claimed(world, THREE)

    issue(world, replace(bench, journal=unanswered(world)), sessions)

    assert [session.issuance.state for session in sessions] == ["done"] * THREE
    assert len(wire.to("/new-order")) == len(world.ca.issued) - 1 == THREE
    audit = "SELECT count(*) FROM audit_logs WHERE action = 'certificate.active'"
    assert world.rows(audit) == [(THREE + 1,)]
    assert world.rows("SELECT max(revision) FROM certificates") == [(THREE + 1,)]
    spent = {str(row[0]) for row in world.rows("SELECT full_at FROM rate_buckets WHERE bucket LIKE 'runaway:%'")}
    assert len(spent) == 2  # one moment for the first, one for the three that came together


def test_one_of_several_is_wanted_no_more(world: World) -> None:
    """Its issuance ends, with what was downloaded; the others serve, each written once."""
    by_name = {f"n{number}.test": world.add_policy(f"n{number}.test") for number in range(THREE)}
    world.take_over()
    sessions, bench = world.claim(), world.bench()
    for session in sessions:
        while session.order is None or session.order.status is not OrderStatus.VALID:
            advance(bench, session)
            world.clock.move(timedelta(seconds=1))
    gone, *others = sessions
    world.db.write(lambda tx: policies.remove(tx, by_name[gone.dns_names[0]]))

    issue(world, replace(bench, journal=unanswered(world)), sessions)

    assert gone.issuance.state == "cancelled"
    assert gone.issuance.chain_pem is not None
    assert [session.issuance.state for session in others] == ["done"] * (THREE - 1)
    assert world.rows("SELECT count(*) FROM audit_logs WHERE action = 'certificate.active'") == [(THREE - 1,)]


def test_a_database_that_fails_before_the_ca_is_told(world: World) -> None:
    """It is told when the database is back, not when ten minutes are over."""
    world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    asked = iter([StoreError("it does not answer")])

    def unready(_names: Sequence[str], _thumbprint: str) -> str | None:
        if (error := next(asked, None)) is not None:
            raise error
        return None

    bench = replace(world.bench(), unready=unready)
    with pytest.raises(StoreError):
        finish(world, bench, session)
    read_again(bench, session)
    finish(world, bench, session)

    assert world.clock() - START < timedelta(seconds=30)


def finish(world: World, bench: Bench, session: Session) -> None:
    while session.issuance.is_open:
        advance(bench, session)
        world.clock.now = max(world.clock.now, session.wait_until or world.clock.now)
