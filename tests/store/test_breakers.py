"""One row for each CA, shared by all workers, and the lease on its one trial."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import literal, update

from certworker.core.breaker import Breaker, Limited, State
from certworker.store import breakers, workers
from certworker.store.database import Database, Transaction
from certworker.store.rows import new_id
from certworker.store.tables import ca_breakers
from certworker.store.types import seconds_from_now

from .conftest import NOW

CA, OTHER_CA = "https://ca.test/dir", "https://other.test/dir"
ME, OTHER = new_id(), new_id()

FULL = Breaker(
    State.PAUSED,
    state_at=NOW,
    failures=4,
    successes=2,
    probes=7,
    probe_at=NOW + timedelta(minutes=5),
    hold_until=NOW + timedelta(hours=1),
    limited=(Limited("a", NOW, NOW + timedelta(seconds=1)), Limited("b", NOW, NOW)),
    error={"class": "transient", "type": "t", "detail": "ünïcode", "hint": "h"},
    registration="settings",
)


def put(breaker: Breaker, directory_url: str = CA) -> Callable[[Transaction], None]:
    def write(tx: Transaction) -> None:
        breakers.lock(tx, directory_url)
        breakers.put(tx, directory_url, breaker)

    return write


def take(worker_id: str) -> Callable[[Transaction], bool]:
    return lambda tx: breakers.take_trial(tx, CA, worker_id)


@pytest.fixture(autouse=True)
def both_at_work(db: Database) -> None:
    for worker_id in (ME, OTHER):
        db.write(enter(worker_id))


def enter(worker_id: str) -> Callable[[Transaction], None]:
    return lambda tx: workers.enter(tx, worker_id, "host", 1, "1.0")


def test_a_ca_never_in_trouble_has_a_breaker_too(db: Database) -> None:
    """Without a row, and with the one that locking it has made."""
    assert db.read(lambda tx: breakers.find(tx, CA)) == Breaker()
    assert db.write(lambda tx: breakers.lock(tx, CA)) == Breaker()
    assert db.read(lambda tx: breakers.find(tx, CA)) == Breaker()


@pytest.mark.parametrize("breaker", [FULL, replace(FULL, limited=(), error=None, registration=None), Breaker()])
def test_what_is_put_is_found(db: Database, twin: Database, breaker: Breaker) -> None:
    """By every worker, whole; each CA has its own."""
    db.write(put(breaker))

    assert twin.read(lambda tx: breakers.find(tx, CA)) == breaker
    assert twin.write(lambda tx: breakers.lock(tx, CA)) == breaker
    assert twin.read(lambda tx: breakers.find(tx, OTHER_CA)) == Breaker()


def test_no_failure_is_lost_between_workers(db: Database, twin: Database) -> None:
    """Whoever locks it sees what was committed before, from the first write on."""

    def count(tx: Transaction) -> None:
        seen = breakers.lock(tx, CA)
        breakers.put(tx, CA, replace(seen, failures=seen.failures + 1))

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit((db, twin)[n % 2].write, count) for n in range(40)]:
            done.result()

    assert db.read(lambda tx: breakers.find(tx, CA)).failures == 40


# -- the trial ----------------------------------------------------------------------------------------


def test_one_worker_tries(db: Database, twin: Database) -> None:
    """For as long as its lease runs, and again if it asks again; more answers change nothing in that."""
    db.write(put(replace(FULL, state=State.HALF_OPEN)))

    assert db.write(take(ME))
    assert not twin.write(take(OTHER))
    assert db.write(take(ME))
    db.write(put(replace(FULL, state=State.HALF_OPEN, successes=1)))
    assert not twin.write(take(OTHER))


def test_a_trial_ends_with_its_lease(db: Database) -> None:
    """By the database's time: who tried may be dead."""
    db.write(put(replace(FULL, state=State.HALF_OPEN)))
    db.write(take(ME))
    assert db.write(
        lambda tx: tx.execute(update(ca_breakers).values(trial_until=seconds_from_now(literal(30))))
    ).rowcount
    assert not db.write(take(OTHER))

    db.write(lambda tx: tx.execute(update(ca_breakers).values(trial_until=seconds_from_now(literal(-1)))))

    assert db.write(take(OTHER))
    assert not db.write(take(ME))


def test_a_trial_ends_when_its_worker_signs_off(db: Database) -> None:
    """Whoever has left, or was buried, tries no more."""
    db.write(put(replace(FULL, state=State.HALF_OPEN)))
    db.write(take(ME))

    db.write(lambda tx: workers.leave(tx, ME))

    assert db.write(take(OTHER))
    db.write(enter(ME))
    assert not db.write(take(ME))


@pytest.mark.parametrize("state", [State.CLOSED, State.OPEN, State.PAUSED])
def test_only_a_half_open_ca_is_tried(db: Database, state: State) -> None:
    """And a trial ends with the state: the next one is anybody's."""
    db.write(put(replace(FULL, state=State.HALF_OPEN)))
    assert db.write(take(ME))

    db.write(put(replace(FULL, state=state)))
    assert not db.write(take(ME))

    db.write(put(replace(FULL, state=State.HALF_OPEN)))
    assert db.write(take(OTHER))


def test_there_is_nothing_to_try_at_a_ca_never_in_trouble(db: Database) -> None:
    assert not db.write(take(ME))


def test_racing_workers_are_one(db: Database, twin: Database) -> None:
    db.write(put(replace(FULL, state=State.HALF_OPEN)))

    racing = [new_id() for _ in range(24)]
    for worker_id in racing:
        db.write(enter(worker_id))

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit((db, twin)[n % 2].write, take(worker_id)) for n, worker_id in enumerate(racing)]

    assert [done.result() for done in asked].count(True) == 1
