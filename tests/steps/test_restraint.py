"""What keeps us from asking a CA too much: the rate ledger, the guard against loops, the gate, the quarantine."""

from datetime import datetime, timedelta

import pytest

from certworker.core.budget import LETS_ENCRYPT, Limit, Limits
from certworker.core.retry import Endpoint
from certworker.errors import StoreError, TransportFault
from certworker.steps import trouble
from certworker.steps.crew import Crew
from certworker.steps.issue import advance
from certworker.steps.renew import request
from certworker.steps.scan import scan
from certworker.steps.session import Bench, Session
from certworker.store import issuances, workers
from tests.steps.test_crew import real_time, until, working
from tests.steps.world import World

HOUR = timedelta(hours=1)


def ask(world: World, *names: str, force: bool = False) -> None:
    """Ask for a renewal as a person does."""
    request(world.db, world.clock, names, force=force, dry_run=False, private_ca=True)


def orders(world: World) -> int:
    return world.ca.count("POST", "/new-order")


# -- the rate ledger ------------------------------------------------------------------------------------


def test_an_order_that_the_ledger_refuses_is_not_sent(world: World) -> None:
    """It waits for its moment, says so, and is no failure."""
    world.limits = Limits(orders=Limit(5, HOUR))
    world.add_policy(*(f"n{number}.example.com" for number in range(6)))
    world.take_over()
    world.work()

    # One in five is kept for what is about to end.
    assert orders(world) == 4
    waiting = [row for row in world.rows("SELECT state, failures FROM issuances") if row[0] != "done"]
    assert waiting == [("queued", 0)] * 2
    errors = {one["type"] for one in errors_of(world)}
    assert errors == {"certworker:budget"}


def errors_of(world: World) -> list[dict[str, str]]:
    open_ones = world.db.read(issuances.list_open)
    return [issuance.error for issuance, _ in open_ones if issuance.error is not None]


def test_each_that_waits_goes_on_at_a_moment_of_its_own(world: World) -> None:
    """The promise is kept the first time it is asked, and nobody asks before."""
    world.limits = Limits(orders=Limit(1, HOUR))
    world.add_policy("a.example.com", "b.example.com", "c.example.com")
    world.take_over()
    world.work()
    moments = sorted(issuance.attempt_at for issuance, _ in world.db.read(issuances.list_open))
    assert len(set(moments)) == 2

    for count, moment in enumerate(moments, 2):
        world.clock.now = moment - timedelta(seconds=1)
        world.work()
        assert orders(world) == count - 1
        world.clock.now = max(moment, world.clock.now)
        world.work()
        assert orders(world) == count


def test_a_person_does_not_pass_the_ledger(world: World) -> None:
    """`renew --force` brings nothing forward that waits for a limit of ours."""
    world.limits = Limits(orders=Limit(1, HOUR))
    world.add_policy("a.example.com", "b.example.com")
    world.take_over()
    world.work()
    ((waiting, names),) = world.db.read(issuances.list_open)

    ask(world, *names, force=True)
    world.work()

    assert orders(world) == 1
    assert world.db.read(lambda tx: issuances.find(tx, waiting.id)) == waiting


def test_what_is_about_to_end_takes_the_reserve(world: World) -> None:
    """The orders that are left for it are there when all others have to wait."""
    world.limits = Limits(orders=Limit(5, 1000 * HOUR))
    world.issue("old.example.com")
    not_after = world.lineage("old.example.com").not_after
    assert not_after is not None
    world.clock.now = not_after - HOUR
    world.add_policy(*(f"n{number}.example.com" for number in range(6)))
    world.take_over()
    world.work()

    assert world.lineage("old.example.com").not_after != not_after
    assert world.last_issuance("old.example.com").urgent


def test_nobody_makes_it_order_the_same_names_for_ever(world: World) -> None:
    """Ten orders a day for one set of names, whatever asks for them; then one each 144 minutes."""
    world.issue("a.example.com")
    for _ in range(20):
        ask(world, "a.example.com", force=True)
        world.work()

    assert orders(world) == 10
    (error,) = errors_of(world)
    assert error["detail"] == "our own limit 'runaway' for this CA is used up for a.example.com"


def test_the_ledger_of_lets_encrypt_is_asked_once_for_each_order(world: World) -> None:
    """A token of each bucket, and none of those that are only asked."""
    world.limits = LETS_ENCRYPT
    world.issue("www.example.com")

    now = world.clock()
    full = world.rows("SELECT bucket, full_at FROM rate_buckets ORDER BY bucket")
    taken = {bucket.partition(":")[0]: _time(full_at) > now for bucket, full_at in full}
    assert taken == {"domain": True, "names": True, "orders": True, "runaway": True, "validations": False}


def _time(value: object) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(str(value))


# -- the gate -------------------------------------------------------------------------------------------


def five_failures(world: World, bench: Bench) -> None:
    """Let the CA be gone for five issuances."""
    world.ca.fail_next("POST", "/new-order", raises=TransportFault("connect", "", "refused"), times=5)
    for session in world.claim(5):
        while session.issuance.is_open and session.wait_until is None:
            advance(bench, session)


def test_a_ca_in_trouble_is_left_alone_by_those_who_have_not_met_it(world: World) -> None:
    """They are given back as they are: no failure, nothing put off, nothing sent."""
    world.add_policy(*(f"n{number}.example.com" for number in range(7)))
    world.take_over()
    bench = world.bench()
    five_failures(world, bench)
    asked, now = len(world.ca.requests), world.clock()

    for session in world.claim():
        while session.issuance.is_open and session.issuance.lease_owner is not None:
            advance(bench, session)
        assert (session.issuance.failures, session.issuance.error) == (0, None)
        assert session.issuance.attempt_at == now

    assert len(world.ca.requests) == asked


def test_one_answer_that_many_waited_for_is_one_failure_of_the_ca(world: World) -> None:
    """Issuances that wait for one newAccount get its error, all of them; each is put off, the CA has failed once."""
    world.add_policy(*(f"n{number}.example.com" for number in range(6)))
    world.take_over()
    bench, error = world.bench(), TransportFault("connect", "https://ca.test/new-account", "refused")

    for session in world.claim():
        trouble.meet(bench, session, error, Endpoint.NEW_ACCOUNT)
        assert session.issuance.failures == 1

    assert world.rows("SELECT state, failures FROM ca_breakers") == [("closed", 1)]


def test_what_a_person_has_to_mend_stops_everybody_until_it_is_mended(world: World) -> None:
    """One is refused, the others are not even tried; when the operator has acted, all go on at once."""
    world.ca.fail_next("POST", "/new-order", problem="userActionRequired", status=403)
    world.add_policy("a.example.com", "b.example.com")
    world.take_over()
    bench = world.bench()
    for session in world.claim():
        while session.issuance.is_open and session.issuance.lease_owner is not None:
            advance(bench, session)
    assert orders(world) == 1
    assert sorted(states(world)) == ["failed", "queued"]

    bench.gate.resume()
    scan(world.db, world.clock)
    world.work()

    assert sorted(states(world)) == ["done", "done", "failed"]


def states(world: World) -> list[str]:
    return [row[0] for row in world.rows("SELECT state FROM issuances")]


def test_a_crew_claims_nothing_while_the_gate_is_closed(world: World) -> None:
    """And takes everything up when it opens."""
    real_time(world)
    world.add_policy(*(f"n{number}.example.com" for number in range(6)))
    world.take_over()
    bench = world.bench()
    five_failures(world, bench)
    claims = world.rows("SELECT sum(claims) FROM issuances")

    with working(world) as crew:
        until(lambda: crew._claim_at is not None)
        assert world.rows("SELECT sum(claims) FROM issuances") == claims
        world.execute("DELETE FROM ca_breakers")
        world.execute("UPDATE issuances SET attempt_at = created_at")
        until(lambda: states(world) == ["done"] * 6)


def test_nonces_that_are_refused_for_one_kind_of_request_only(world: World) -> None:
    """Every look at the order succeeds, so the breaker never opens: the issuance itself grows patient."""
    world.ca.fail_next("POST", "/finalize/*", problem="badNonce", times=1_000_000)
    world.add_policy("a.example.com")
    world.take_over()
    for _ in range(3 * 60):
        world.work(patience=30)
        world.clock.move(timedelta(minutes=1))

    schedule_in_three_hours = 9
    assert world.ca.count("POST", "/finalize/*") <= 10 * (12 + schedule_in_three_hours)
    assert world.last_issuance("a.example.com").state == "finalizing"


# -- an issuance that kills its workers -----------------------------------------------------------------


def test_an_issuance_that_kills_its_workers_is_set_aside(world: World) -> None:
    """After five in a row; it is shown, the others go on, and a person can have it tried."""
    real_time(world)
    world.add_policy("deadly.example.com", "good.example.com")
    world.take_over()
    deadly = world.last_issuance("deadly.example.com")
    for _ in range(trouble.MOST_CRASHES):
        world.db.write(lambda tx: issuances.claim(tx, world.worker, world.clock(), 1, [deadly.id]))
        world.crash()

    with working(world):
        until(lambda: states(world).count("done") == 1)

    after = world.last_issuance("deadly.example.com")
    assert after.state == "queued"
    assert after.error is not None
    assert after.error["type"] == "certworker:quarantined"
    assert after.attempt_at > world.clock() + 20 * HOUR
    ask(world, "deadly.example.com")
    with working(world):
        until(lambda: states(world) == ["done"] * 2)


# -- leases and storage ---------------------------------------------------------------------------------


def take(crew: Crew, world: World) -> Session:
    """Let a crew that has no threads claim one."""
    taken: dict[str, Session] = {}
    crew._take(world.clock(), 1, taken)
    (session,) = taken.values()
    return session


def test_nothing_is_sent_under_a_lease_that_was_lost_meanwhile(world: World) -> None:
    """A thread that was held up makes sure first; the other worker's session goes on alone."""
    world.add_policy("a.example.com")
    world.take_over()
    bench = world.bench()
    crew = Crew(bench, world.worker, 1)
    session = take(crew, world)
    while session.issuance.state != "ordered":
        advance(bench, session)
    session.look_anew()  # the next thing it does is to ask
    session.kept_at -= 26
    world.crash()
    world.worker = "00000000-0000-4000-8000-00000000000f"
    (other,) = world.claim()
    asked = len(world.ca.requests)
    crew._in_work[session.issuance.id] = session

    crew._move(session)

    assert len(world.ca.requests) == asked
    assert world.db.read(lambda tx: issuances.find(tx, other.issuance.id)) == other.issuance


def test_a_lease_that_is_still_ours_is_extended_and_the_work_goes_on(world: World) -> None:
    """The same delay, and nobody else came."""
    world.add_policy("a.example.com")
    world.take_over()
    crew = Crew(world.bench(), world.worker, 1)
    session = take(crew, world)
    session.kept_at -= 26
    kept_at = session.kept_at
    crew._in_work[session.issuance.id] = session

    crew._move(session)

    assert session.kept_at > kept_at + 25
    assert session.issuance.state != "queued"


def test_nothing_is_asked_while_the_database_cannot_be_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line in the log; then everything goes on where it was, and each certificate is issued once."""
    real_time(world)
    world.add_policy(*(f"n{number}.example.com" for number in range(8)))
    world.take_over()
    broken, write = [False], world.db.write

    def fail(fn: object) -> object:
        if broken[0]:
            raise StoreError("cannot write to the database: disk full")
        return write(fn)  # type: ignore[arg-type]

    monkeypatch.setattr(world.db, "write", fail)
    world.ca.processing_looks = 3
    with working(world) as crew:
        until(lambda: len(world.ca.orders) >= 3)
        broken[0] = True
        until(lambda: crew._storage._failures > 1)
        # What was under way when it broke has ended by now: each thread has met the fault, or waits behind it.
        until(lambda: not crew._in_work)
        asked = len(world.ca.requests)
        until(lambda: crew._storage._failures > 2)
        assert len(world.ca.requests) == asked
        broken[0] = False
        until(lambda: states(world) == ["done"] * 8)

    assert len(world.ca.issued) == 8
    assert world.rows("SELECT count(*) FROM audit_logs WHERE action = 'certificate.active'") == [(8,)]


def test_a_commit_that_nobody_heard_of_is_not_done_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of an issuance runs twice: the same certificate, one audit row, one debit, one failure."""
    write = world.db.write

    def twice(fn: object) -> object:
        write(fn)  # type: ignore[arg-type]
        return write(fn)  # type: ignore[arg-type]

    world.limits = LETS_ENCRYPT
    world.closed_names = {"dead.example.org"}
    world.add_policy("a.example.com", "dead.example.org")
    world.take_over()
    sessions, bench = world.claim(), world.bench()
    monkeypatch.setattr(world.db, "write", twice)
    for session in sessions:
        while session.issuance.is_open and session.issuance.lease_owner is not None:
            advance(bench, session)
            world.clock.now = max(world.clock.now, session.wait_until or world.clock.now)
    monkeypatch.undo()

    assert len(world.ca.issued) == 1
    assert sorted(states(world)) == ["done", "failed"]
    assert world.rows("SELECT count(*) FROM audit_logs WHERE action = 'certificate.active'") == [(1,)]
    assert world.lineage("dead.example.org").failures == 1
    orders_full_at = _time(world.rows("SELECT full_at FROM rate_buckets WHERE bucket = 'orders'")[0][0])
    assert orders_full_at <= world.clock() + 2 * timedelta(seconds=45)


def test_a_worker_taken_for_dead_is_told(world: World) -> None:
    """So that it can sign on again."""
    real_time(world)
    heard: list[datetime | None] = []
    crew = Crew(world.bench(), world.worker, 1, heartbeat=timedelta(milliseconds=20), beaten=heard.append)
    crew.start()
    until(lambda: None in heard)
    world.db.write(lambda tx: workers.enter(tx, world.worker, "host", 1, "1"))
    until(lambda: heard[-1] is not None)
    crew.stop()
