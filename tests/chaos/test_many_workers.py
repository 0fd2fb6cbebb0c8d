"""Several workers on one PostgreSQL: killed, frozen, cut off; what one drops another picks up, and nobody twice."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Row, select

from certworker.cli.pebble import Pebble
from certworker.store.tables import certificates, issuances
from tests.chaos.oracles import (
    assert_audited,
    assert_nothing_stuck,
    assert_pairs,
    assert_quiet,
    keys_lost,
)
from tests.chaos.proxy import Exchange, FaultProxy, Hold
from tests.conftest import migrate
from tests.flow.box import until
from tests.soak.checks import bugs, duplicates, leaks
from tests.soak.fleet import Fleet, fleet_of
from tests.soak.servers import CrashingPostgres, run_crashing_postgres
from tests.soak.storm import Storm, Struck
from tests.soak.watch import Watch

pytestmark = [pytest.mark.pebble, pytest.mark.proxy]

NAMES = 120
RESUME_LIMIT = 10.0
"""Seconds from the start of a killed worker in its old place until it works on what it had."""

MakeFleet = Callable[..., Fleet]


@pytest.fixture(scope="module")
def postgres() -> Iterator[CrashingPostgres]:
    """A PostgreSQL that may crash without any other test's noticing."""
    with run_crashing_postgres() as postgres:
        yield postgres


@pytest.fixture
def make_fleet(ca: Pebble, proxy: FaultProxy, postgres: CrashingPostgres, tmp_path: Path) -> Iterator[MakeFleet]:
    """Make a fleet of so many workers on a database of its own; none runs yet."""
    name = postgres.server.create_database()
    url = postgres.server.url(name)
    migrate(url)
    with ExitStack() as stack:
        yield lambda count, **settings: stack.enter_context(fleet_of(count, ca, proxy, tmp_path, url, **settings))
    postgres.server.drop_database(name)


def assert_well(fleet: Fleet, wanted: int) -> None:
    """O2 to O5, O7 and O12: so many certificates of the CA's, each served, and nothing else."""
    assert_quiet(fleet.first)
    assert len(fleet.ledger()) == wanted
    assert duplicates(fleet) == []
    assert keys_lost(fleet.first) == []
    assert fleet.served() == wanted
    assert_pairs(fleet.first)
    assert_nothing_stuck(fleet.db)
    assert_audited(fleet.db)
    assert leaks(fleet) == []
    assert bugs(fleet) == []


def test_a_storm_of_signals(make_fleet: MakeFleet, postgres: CrashingPostgres) -> None:
    """kill -9 and SIGSTOP of four workers at any moment, a crash of PostgreSQL: each certificate once."""
    fleet, struck, seed = make_fleet(4), Struck(), secrets.randbelow(10**6)
    print(f"seed {seed}")
    fleet.want(*[[f"n{number}.storm.test"] for number in range(NAMES)])
    with Watch(fleet.url) as watch:
        fleet.start()
        for half in (NAMES // 2, NAMES):
            storm = Storm(fleet, watch, struck, seed + half, only=("SIGKILL", "SIGSTOP"), every=0.7, renew_per_second=0)
            storm.rage(40, lambda half=half: fleet.done() < half)  # type: ignore[misc]
            postgres.restart()
        until(lambda: fleet.open() == 0)
        # The CA may have looked while nobody could answer.
        fleet.end_waits()
        until(lambda: fleet.served() == NAMES)
        assert_well(fleet, NAMES)
        watch.await_sample()

    print(struck.counts, f"resumed {len(watch.resumed)}, slowest {max(watch.resumed, default=0):.1f} s")
    assert watch.faults == set()
    assert struck.faults == []
    assert struck.counts["SIGKILL"] > 0
    assert fleet.first.accounts() == 1


def test_a_zombie_changes_nothing(make_fleet: MakeFleet) -> None:
    """Frozen while it finalizes, and thawed when another worker has finished: not one column is touched."""
    fleet, hold = make_fleet(2), Hold()
    zombie, other = fleet.workers
    fleet.proxy.on("finalize", hold)
    fleet.want(["zombie.many.test"])
    zombie.start()
    until(lambda: hold.reached)
    zombie.freeze()
    fleet.end_leases_of(zombie)
    other.start()
    until(lambda: fleet.served() == 1)
    before = rows(fleet)
    zombie.thaw()
    hold.release()
    until(lambda: '"issuance.lease_lost"' in zombie.said())

    assert rows(fleet) == before
    assert_well(fleet, 1)
    zombie.stop()
    other.stop()


def rows(fleet: Fleet) -> list[Row[Any]]:
    """Return everything that is known of the issuances and certificates."""
    return [
        row
        for table in (issuances, certificates)
        for row in fleet.db.read(lambda tx, table=table: tx.execute(select(table).order_by(table.c.id)).all())  # type: ignore[misc]
    ]


def test_frozen_in_the_middle_of_a_claim(make_fleet: MakeFleet) -> None:
    """Its row locks hide what it was about to take, and that only; PostgreSQL ends them, and another one takes it."""
    fleet = make_fleet(2)
    frozen, other = fleet.workers
    frozen.start()
    worker_id = until(lambda: fleet.id_of(frozen))
    with held_claims(fleet, worker_id) as is_held:
        fleet.want(["one.hidden.test", "two.hidden.test"])
        until(is_held)
        frozen.freeze()
    other.start()
    fleet.want(["seen.test"])
    until(lambda: fleet.first.serial("seen.test"))
    assert fleet.served() == 1
    until(lambda: fleet.served() == 3)
    frozen.thaw()
    until(lambda: '"issuers.database_back"' in frozen.said() or '"issuers.database"' not in frozen.said())

    assert_well(fleet, 3)
    frozen.stop()
    other.stop()


@contextmanager
def held_claims(fleet: Fleet, worker_id: str | None) -> Iterator[Callable[[], bool]]:
    """Hold the claims of a worker inside their transaction; yield what says whether one is held."""
    key = secrets.randbits(31)
    with psycopg.connect(fleet.url, autocommit=True) as session:
        session.execute("SELECT pg_advisory_lock(%s)", [key])
        session.execute(
            "CREATE FUNCTION hold_claim() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN PERFORM pg_advisory_xact_lock({key}); RETURN NEW; END $$"
        )
        session.execute(
            "CREATE TRIGGER hold_claim BEFORE UPDATE ON issuances FOR EACH ROW "
            f"WHEN (NEW.lease_owner = '{worker_id}') EXECUTE FUNCTION hold_claim()"
        )
        waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = %s"
        yield lambda: session.execute(waiting, [key]).fetchone() is not None
        # The trigger stays: to drop it would wait for whoever is held.


ROUNDS = 6


def test_news_travel_by_notice(make_fleet: MakeFleet) -> None:
    """A name is taken up when it is written and not at the next look; also after the listener was cut off."""
    fleet = make_fleet(1, SCAN_INTERVAL_SECS="3600")
    (worker,) = fleet.workers
    worker.start()
    until(lambda: fleet.id_of(worker))
    with psycopg.connect(fleet.url, autocommit=True) as session:
        listening = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = current_database()"
        (listener,) = until(lambda: session.execute(listening).fetchall())[0]
        before = [latency(fleet, f"n{number}.notice.test") for number in range(ROUNDS)]
        session.execute("SELECT pg_terminate_backend(%s)", [listener])
        until(lambda: session.execute(listening + f" AND pid <> {listener}").fetchone())
        after = [latency(fleet, f"m{number}.notice.test") for number in range(ROUNDS)]
    print(f"seconds until taken up: {sorted(before)}, {sorted(after)}")

    # The next look is up to two seconds away, and each round begins soon after the one before.
    assert sorted(before)[ROUNDS // 2] < 0.5
    assert sorted(after)[ROUNDS // 2] < 0.5
    worker.stop()


def latency(fleet: Fleet, name: str) -> float:
    """Want a name; return how many seconds after the commit its issuance was queued, all by PostgreSQL's clock."""
    fleet.want([name])
    wanted_at = fleet.db.now()
    until(lambda: fleet.first.serial(name))
    (issuance,) = fleet.first.issuances(name)
    queued_at: datetime = issuance.created_at
    return (queued_at - wanted_at).total_seconds()


def test_back_in_its_place(make_fleet: MakeFleet, record_property: Callable[[str, object], None]) -> None:
    """Killed and started again in the same folder it goes on at once with its own, and takes nothing of the living."""
    fleet = make_fleet(2, CONCURRENCY="1")
    killed, living = fleet.workers
    holds = [hold_order(fleet, name) for name in ("killed.place.test", "living.place.test")]
    for worker, name, hold in zip(fleet.workers, ("killed.place.test", "living.place.test"), holds, strict=True):
        worker.start()
        fleet.want([name])
        until(lambda hold=hold: hold.reached)  # type: ignore[misc]
    ((issuance_id, token),) = fleet.held_by(living).items()
    lease_ends = fleet.first.issuance("killed.place.test").lease_until
    killed.kill()
    killed.start()
    until(lambda: fleet.first.serial("killed.place.test"))
    resumed = time.monotonic() - killed.started_at
    taken_up_at = fleet.db.now()

    assert taken_up_at < lease_ends
    assert fleet.held_by(living) == {issuance_id: token}
    holds[1].release()
    until(lambda: fleet.served() == 2)
    assert fleet.first.issuance("living.place.test").claims == 1
    assert_well(fleet, 2)
    print(f"resumed and done {resumed:.1f} s after the start")
    assert resumed <= RESUME_LIMIT
    killed.stop()
    living.stop()


def hold_order(fleet: Fleet, name: str) -> Hold:
    """Hold the first newOrder for a name."""
    hold = Hold()

    def is_for_name(exchange: Exchange) -> bool:
        return name in str(exchange.payload)

    fleet.proxy.on("newOrder", hold, where=is_for_name)
    return hold
