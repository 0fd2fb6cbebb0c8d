"""The threads that work on issuances: many at once, waits that hold no thread, a stop that loses nothing."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import pytest
from sqlalchemy import Connection, select, update

from certworker.ca.transport import Response
from certworker.core import breaker
from certworker.core.breaker import Breaker
from certworker.core.issuance import State
from certworker.errors import StoreError
from certworker.steps.crew import Crew
from certworker.steps.session import Session
from certworker.store import breakers, issuances
from certworker.store.database import Database
from certworker.store.tables import issuances as table

from .world import World

T = TypeVar("T")


def until(look: Callable[[], T], limit: float = 20.0) -> T:
    give_up_at = time.monotonic() + limit
    while not (seen := look()):
        assert time.monotonic() < give_up_at, "it did not happen in time"
        time.sleep(0.01)
    return seen


def real_time(world: World) -> None:
    """Threads wait in real time, so the clock has to go on."""
    start, at = world.clock.now, time.monotonic()
    world.clock = _Running(start, at)  # type: ignore[assignment]
    world.ca.now = world.clock


class _Running:
    def __init__(self, start: datetime, at: float) -> None:
        self._start, self._at = start, at

    def __call__(self) -> datetime:
        return (self._start + timedelta(seconds=time.monotonic() - self._at)).astimezone(UTC)


def end_processing(world: World) -> None:
    """Let the CA come to an end with what it is at."""
    for order in world.ca.orders.values():
        order.looks_left = 0


@contextmanager
def working(
    world: World,
    concurrency: int = 16,
    only: list[str] | None = None,
    heartbeat: timedelta = issuances.HEARTBEAT,
) -> Iterator[Crew]:
    crew = Crew(world.bench(), world.worker, concurrency, only, heartbeat)
    crew.start()
    try:
        yield crew
    finally:
        crew.stop()


def states(world: World) -> list[str]:
    return sorted(row[0] for row in world.rows("SELECT state FROM issuances"))


def test_many_are_issued_once_each(world: World) -> None:
    """Forty names, sixteen in flight: one order and one certificate each, one account."""
    real_time(world)
    world.add_policy(*(f"n{number}.test" for number in range(40)))
    world.take_over()

    with working(world) as crew:
        until(lambda: states(world) == ["done"] * 40)
        until(lambda: crew.in_flight == 0)

    assert len(world.ca.issued) == 40
    assert world.ca.count("POST", "/new-order") == 40
    assert len(world.ca.accounts) == 1


def test_two_crews_share_the_work(world: World) -> None:
    """Two workers on one database never take the same issuance."""
    real_time(world)
    world.add_policy(*(f"n{number}.test" for number in range(30)))
    world.take_over()
    other = Crew(world.bench(), "00000000-0000-4000-8000-000000000002", 4)
    other.start()

    with working(world, concurrency=4):
        until(lambda: states(world) == ["done"] * 30)
    other.stop()

    assert len(world.ca.issued) == 30
    assert world.rows("SELECT max(claims) FROM issuances") == [(1,)]


def test_a_busy_crew_hears_of_the_cas_trouble(world: World) -> None:
    """Another worker has met it: however much there is to do, soon nothing more is claimed."""
    real_time(world)
    world.add_policy(*(f"n{number}.test" for number in range(400)))
    world.take_over()
    closed = Breaker(state=breaker.State.PAUSED, hold_until=world.clock() + timedelta(days=1))

    with working(world, concurrency=4) as crew:
        until(lambda: "done" in states(world))
        world.db.write(lambda tx: breakers.lock(tx, world.ca.directory_url))
        world.db.write(lambda tx: breakers.put(tx, world.ca.directory_url, closed))
        until(lambda: crew.in_flight == 0)

    assert states(world).count("queued") > 0


def test_waiting_holds_no_thread(world: World) -> None:
    """With every thread's worth of orders waiting for the CA, another one is still moved."""
    real_time(world)
    world.ca.processing_looks = 10**6
    world.ca.retry_after = "20"
    world.add_policy(*(f"n{number}.test" for number in range(20)))
    world.take_over()

    with working(world, concurrency=64) as crew:
        until(lambda: [order.status for order in world.ca.orders.values()] == ["processing"] * 20)
        world.ca.processing_looks = 1
        world.add_policy("quick.test")
        world.ca.retry_after = None
        world.take_over()
        crew.poke()
        until(lambda: world.rows("SELECT status FROM lineages WHERE status = 'active'") == [("active",)])
        until(lambda: crew.in_flight == 20)  # who has committed that lets go of it a moment later


def test_what_is_queued_during_a_claim_is_claimed_next(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have come too late for the one under way, and nobody will say so again."""
    real_time(world)
    crew = Crew(world.bench(), world.worker, 2, poll=timedelta(hours=1))
    look_through = Crew._too_many_suspects

    def be_poked(self: Crew, taken: Iterable[Session]) -> list[Session]:
        if not states(world):
            world.add_policy("late.test")
            world.take_over()
            crew.poke()
        return look_through(self, taken)

    monkeypatch.setattr(Crew, "_too_many_suspects", be_poked)
    crew.start()
    try:
        until(lambda: states(world) == ["done"])
    finally:
        crew.stop()


def test_concurrency_bounds_what_is_in_flight(world: World) -> None:
    """CONCURRENCY counts the waiting ones too."""
    real_time(world)
    world.ca.processing_looks = 10**6
    world.ca.retry_after = "20"
    world.add_policy(*(f"n{number}.test" for number in range(9)))
    world.take_over()

    with working(world, concurrency=3) as crew:
        until(lambda: states(world).count("finalizing") == 3)
        assert crew.in_flight == 3
        assert states(world) == ["finalizing"] * 3 + ["queued"] * 6


def test_a_long_wait_is_given_back(world: World) -> None:
    """Longer than a lease: the row waits in the database, free for any worker, and holds no place here."""
    real_time(world)
    world.ca.processing_looks = 10**6
    world.ca.retry_after = "55"
    world.add_policy("a.test")
    world.take_over()

    with working(world) as crew:
        until(lambda: states(world) == ["finalizing"])
        until(lambda: crew.in_flight == 0)

    row = world.last_issuance("a.test")
    assert row.lease_owner is None
    assert row.attempt_at - world.clock() > timedelta(seconds=40)


def test_the_cas_fetch_wakes_the_issuance(world: World) -> None:
    """The responder saw the token fetched: the order is looked at soon, not after the CA's long Retry-After."""
    real_time(world)
    world.ca.validate_on = "look"
    world.ca.retry_after = "25"
    world.ca.processing_looks = 0
    world.add_policy("a.test")
    world.take_over()

    with working(world) as crew:
        until(lambda: states(world) == ["validating"])
        (token,) = [row[0] for row in world.rows("SELECT token FROM challenges")]
        crew.fetched("another-token-that-nobody-waits-for")
        crew.fetched(str(token))
        until(lambda: states(world) == ["done"], limit=10)


def test_a_fetch_is_no_news_of_the_certificate(world: World) -> None:
    """What the CA says after finalize, it says of another wait: its Retry-After is obeyed."""
    real_time(world)
    world.ca.validate_on = "look"
    world.ca.retry_after = "20"
    world.add_policy("a.test")
    world.take_over()

    with working(world) as crew:
        until(lambda: world.ca.count("POST", "/challenge/*"))
        (token,) = [row[0] for row in world.rows("SELECT token FROM challenges")]
        crew.fetched(str(token))
        until(lambda: world.ca.count("POST", "/finalize/*"))
        asked = world.ca.count("POST", "/order/*")
        (session,) = until(lambda: list(crew._waiting))
        assert session.wait_until is not None
        assert session.wait_until - world.clock() > timedelta(seconds=15)
    assert world.ca.count("POST", "/order/*") == asked


def test_a_stop_gives_every_lease_back(world: World) -> None:
    """Another worker goes on at once with the same orders."""
    real_time(world)
    world.ca.processing_looks = 10**6
    world.ca.retry_after = "20"
    world.add_policy("a.test", "b.test")
    world.take_over()
    with working(world):
        until(lambda: world.ca.count("POST", "/finalize/*") == 2)

    assert world.rows("SELECT count(*) FROM issuances WHERE lease_owner IS NOT NULL") == [(0,)]
    end_processing(world)
    world.worker = "00000000-0000-4000-8000-000000000002"
    with working(world):
        until(lambda: states(world) == ["done"] * 2)
    assert world.ca.count("POST", "/new-order") == 2


def test_a_stop_sees_through_what_is_being_validated(world: World) -> None:
    """The CA was told to look: the answer is there until it has looked."""
    real_time(world)
    world.ca.validate_on = "look"
    world.ca.retry_after = "1"
    world.add_policy("a.test")
    world.take_over()
    with working(world):
        until(lambda: world.ca.count("POST", "/challenge/*"))

    assert world.last_issuance("a.test").state == State.FINALIZING


def test_a_fault_of_ours_is_put_off_and_blocks_nobody(world: World) -> None:
    """An unexpected exception: that issuance waits with class transient, its neighbours are issued."""
    real_time(world)
    world.add_policy("a.test")
    world.add_policy("bad.test")
    world.take_over()
    original = world.ca.request

    def request(method: str, url: str, *args: object, **more: object) -> Response:
        answer = original(method, url, *args, **more)  # type: ignore[arg-type]
        if method == "POST" and b'"bad.test"' in answer.body and b"authorizations" in answer.body:
            raise ZeroDivisionError("a bug that only this name meets")
        return answer

    world.ca.request = request  # type: ignore[method-assign]
    with working(world):
        until(lambda: "done" in states(world))
        until(lambda: world.last_issuance("bad.test").error is not None)

    error = world.last_issuance("bad.test").error
    assert error is not None
    assert error["type"] == "certworker:bug"
    assert "ZeroDivisionError" in error["detail"]


def test_a_lost_lease_is_dropped(world: World) -> None:
    """Another worker took over meanwhile: this one stops touching the issuance, and goes on with others."""
    real_time(world)
    world.ca.processing_looks = 10**6
    world.ca.retry_after = "20"
    world.add_policy("a.test")
    world.take_over()
    with working(world, heartbeat=timedelta(milliseconds=50)) as crew:
        until(lambda: states(world) == ["finalizing"])
        world.execute("UPDATE issuances SET lease_token = lease_token + 1, lease_owner = :other",
                      other="00000000-0000-4000-8000-000000000009")  # fmt: skip
        until(lambda: crew.in_flight == 0)
        end_processing(world)

    assert world.last_issuance("a.test").state == State.FINALIZING


def test_only_works_on_nothing_else(world: World) -> None:
    """A one-shot run that was given names leaves the rest alone."""
    real_time(world)
    world.add_policy("a.test")
    world.add_policy("b.test")
    world.take_over()
    mine = world.last_issuance("a.test").id
    with working(world, only=[mine]):
        until(lambda: world.last_issuance("a.test").state == State.DONE)

    assert world.last_issuance("b.test").state == State.QUEUED


def test_leases_are_kept_alive_while_waiting(world: World) -> None:
    """The heartbeat extends what this worker holds, and only what a session stands behind."""
    real_time(world)
    world.ca.processing_looks = 10**6
    world.ca.retry_after = "20"
    world.add_policy("a.test")
    world.take_over()
    old = datetime(2020, 1, 1, tzinfo=UTC)
    with working(world, heartbeat=timedelta(milliseconds=50)):
        until(lambda: states(world) == ["finalizing"])
        orphan = world.add_orphan("orphan.test")
        world.db.write(lambda tx: tx.execute(update(table).values(lease_until=old)))
        until(lambda: lease_of(world, world.last_issuance("a.test").id) > old)

        assert lease_of(world, orphan) == old


def test_a_heartbeat_goes_by_a_row_that_is_being_written(postgresql_db: Database) -> None:
    """Whoever writes it may want a row next that the heartbeat has locked: nobody waits, and nothing is lost."""
    world, beats = World(postgresql_db), list[object]()
    real_time(world)
    world.ca.processing_looks = 10**6
    world.ca.retry_after = "20"
    world.add_policy("a.test")
    world.take_over()
    crew = Crew(world.bench(), world.worker, 2, heartbeat=timedelta(milliseconds=20), beaten=beats.append)

    def hold(tx: Connection) -> None:
        tx.execute(select(table.c.id).with_for_update()).all()
        before = len(beats)
        until(lambda: len(beats) >= before + 2)

    crew.start()
    try:
        until(lambda: states(world) == ["finalizing"])
        world.db.write(hold)

        assert crew.in_flight == 1
    finally:
        crew.stop()


def lease_of(world: World, issuance_id: str) -> datetime:
    lease: datetime = world.db.read(
        lambda tx: tx.execute(select(table.c.lease_until).where(table.c.id == issuance_id)).scalar_one()
    )
    return lease


def test_nothing_is_claimed_while_no_proxy_answers(world: World) -> None:
    """A CA that looked now would find nobody; as soon as the proxy answers, the work begins."""
    real_time(world)
    world.add_policy("a.test")
    world.take_over()
    asked, answers = [], [False]

    def may_order() -> bool:
        asked.append(True)
        return answers[0]

    crew = Crew(world.bench(), world.worker, 2, may_order=may_order)
    crew.start()
    try:
        until(lambda: len(asked) >= 4)
        assert states(world) == ["queued"]
        assert world.ca.requests == []
        answers[0] = True
        until(lambda: states(world) == ["done"])
    finally:
        crew.stop()


# -- a claim that nobody answers for --------------------------------------------------------------------

Fn = Callable[[Connection], object]


class Unanswered:
    """A database; it is told what becomes of the first write, whose answer is lost."""

    def __init__(self, db: Database, end: Callable[[Database, Fn], object]) -> None:
        self._db = db
        self._end: Callable[[Database, Fn], object] | None = end

    def write(self, fn: Fn) -> object:
        end, self._end = self._end, None
        return self._db.write(fn) if end is None else end(self._db, fn)

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)


def committed_and_run_again(db: Database, fn: Fn) -> object:
    db.write(fn)
    return db.write(fn)


def committed_and_told_as_lost(db: Database, fn: Fn) -> object:
    db.write(fn)
    raise StoreError("as planned")


def rolled_back(db: Database, fn: Fn) -> object:
    def fail(tx: Connection) -> object:
        fn(tx)
        raise StoreError("as planned")

    return db.write(fail)


@pytest.mark.parametrize("end", [committed_and_run_again, committed_and_told_as_lost, rolled_back])
def test_a_claim_without_an_answer_is_worked_on(world: World, end: Callable[[Database, Fn], object]) -> None:
    """Long before its lease could end, by the same worker, and nobody has died of it."""
    real_time(world)
    world.add_policy(*(f"n{number}.test" for number in range(5)))
    world.take_over()
    bench = replace(world.bench(), db=Unanswered(world.db, end))
    crew = Crew(bench, world.worker, 4)
    crew.start()
    try:
        until(lambda: states(world) == ["done"] * 5)
    finally:
        crew.stop()

    assert world.rows("SELECT DISTINCT claims, crashes, lease_owner FROM issuances") == [(1, 0, None)]
    assert len(world.ca.issued) == world.ca.count("POST", "/new-order") == 5


def test_what_another_worker_claimed_after_a_rollback_is_its_own(world: World) -> None:
    """The fencing token is the same; who holds the lease is not."""
    world.add_policy("a.test")
    world.take_over()
    sessions: list[Session] = []

    def claim(db: Database, fn: Fn) -> object:
        with suppress(StoreError):
            rolled_back(db, fn)
        sessions.extend(world.claim())
        raise StoreError("as planned")

    crew = Crew(replace(world.bench(), db=Unanswered(world.db, claim)), "00000000-0000-4000-8000-00000000000f", 1)
    with pytest.raises(StoreError):
        crew._claim(world.clock(), 1)
    (session,) = crew._waiting
    crew._waiting.remove(session)
    crew._in_work[session.issuance.id] = session
    crew._move(session)

    assert session.issuance.lease_token == sessions[0].issuance.lease_token
    assert world.ca.requests == []
    assert world.last_issuance("a.test") == sessions[0].issuance
