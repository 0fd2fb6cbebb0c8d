"""Several workers and one CA in trouble: one probes, one tries, all know, and an operator hears of it once."""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from certworker.ca.client import Client
from certworker.ca.transport import ANSWER_LIMIT, Response
from certworker.core.retry import Endpoint, ErrorClass, Failure, Scope
from certworker.errors import TransportFault
from certworker.steps.gate import UNLIMITED, Gate, incident
from certworker.store import workers
from certworker.store.database import Database, open_database
from certworker.store.rows import new_id
from tests.ca.fake import FakeCa
from tests.store.given import url_of
from tests.store.plans import statements

from .world import START, Clock, World

SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
T, V, R, P, X = ErrorClass


def failure(
    scope: Scope = Scope.CA,
    error_class: ErrorClass = T,
    endpoint: Endpoint = Endpoint.NEW_ORDER,
    retry_after: timedelta | None = None,
) -> Failure:
    return Failure(error_class, f"certworker:{error_class}", "said", "hint", retry_after, scope, endpoint)


DOWN = failure()
REFUSED = failure(Scope.ACCOUNT, X)


@dataclass
class Line:
    """The way to the CA: may be cut, and remembers when the directory was read."""

    ca: FakeCa
    clock: Clock
    down: bool = False
    read_at: list[datetime] = field(default_factory=list)
    meanwhile: Callable[[], object] = lambda: None
    """Done while a request is under way."""

    def request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        max_bytes: int = ANSWER_LIMIT,
        repeatable: bool = False,
    ) -> Response:
        if url == self.ca.directory_url:
            self.read_at.append(self.clock())
        self.meanwhile()
        if self.down:
            raise TransportFault("connect", url, "the connection was refused")
        return self.ca.request(method, url, body, headers, max_bytes=max_bytes, repeatable=repeatable)


class Fleet:
    """Workers with connections of their own, and one CA; `draw` is the same for all of them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clock = world.clock
        self.line = Line(world.ca, world.clock)
        self.draw = 0.0
        self.opened: list[Database] = []

    def start(self, registration: str = "settings") -> Gate:
        """Start a worker: its gate has seen the row once."""
        db, worker_id = open_database(url_of(self.world.db)), new_id()
        self.opened.append(db)
        db.write(lambda tx: workers.enter(tx, worker_id, "host", 1, "1.0"))
        gate = Gate(db, self.world.ca.directory_url, self.clock, lambda: self.draw, worker_id, registration)
        gate.refresh()
        return gate

    def client(self) -> Client:
        return Client(self.world.ca.directory_url, self.line, self.clock)

    def incident(self) -> dict[str, Any] | None:
        return self.world.db.read(lambda tx: incident(tx, self.world.ca.directory_url, self.clock()))

    def open_breaker(self, gate: Gate) -> None:
        self.line.down = True
        for _ in range(5):
            gate.failed(DOWN, "a")

    def half_open(self, gate: Gate) -> None:
        self.half_open_by(gate, opened_by=gate)

    def half_open_by(self, gate: Gate, opened_by: Gate) -> None:
        self.open_breaker(opened_by)
        self.line.down = False
        self.clock.move(30 * SECOND)
        gate.refresh()
        gate.probe(self.client())


@pytest.fixture
def fleet(world: World) -> Iterator[Fleet]:
    fleet = Fleet(world)
    yield fleet
    for db in fleet.opened:
        db.close()


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return what an operator sees of the CA."""
    return [(record.levelname, record.message) for record in caplog.records if record.message.startswith("ca.")]


# -- a CA that is well ----------------------------------------------------------------------------------


def test_a_ca_that_is_well_costs_no_sql(fleet: Fleet) -> None:
    """Neither looking, nor answers, nor what one order meets alone."""
    gate = fleet.start()

    with statements(fleet.opened[0]) as sent:
        assert gate.admits() == UNLIMITED
        assert gate.closed_until() is None
        gate.succeeded()
        gate.issued()
        gate.failed(failure(Scope.ISSUANCE, V, Endpoint.VALIDATION), "a")
        gate.failed(failure(Scope.ISSUANCE, T, Endpoint.ORDER), "a")
        gate.probe(fleet.client())

    assert sent == []
    assert fleet.line.read_at == []
    assert fleet.incident() is None


def test_an_answer_is_written_only_after_failures(fleet: Fleet) -> None:
    gate = fleet.start()
    gate.failed(DOWN, "a")

    with statements(fleet.opened[0]) as sent:
        gate.succeeded()
        written = len(sent)
        gate.succeeded()

    assert written > 0
    assert len(sent) == written


# -- an outage ------------------------------------------------------------------------------------------


def test_failures_of_all_workers_count(fleet: Fleet) -> None:
    """Five in a row, whoever met them; whoever looks then knows."""
    one, other = fleet.start(), fleet.start()
    for gate in (one, other, one, other, one):
        assert fleet.incident() is None
        gate.failed(DOWN, "a")

    other.refresh()
    for gate in (one, other):
        assert gate.closed_until() == gate.admits() == START + 30 * SECOND
    assert fleet.incident() == {
        "directory_url": fleet.world.ca.directory_url,
        "state": "open",
        "since": START,
        "error": {"class": "transient", "type": DOWN.type, "detail": "said", "hint": "hint"},
        "next_attempt_at": START + 30 * SECOND,
    }


def test_one_worker_probes(fleet: Fleet) -> None:
    """When it is due, and no sooner; while one reads the others go away."""
    gates = [fleet.start() for _ in range(3)]
    fleet.open_breaker(gates[0])
    for gate in gates:
        gate.refresh()
        gate.probe(fleet.client())
    assert fleet.line.read_at == []

    fleet.clock.move(30 * SECOND)
    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(gate.probe, fleet.client()) for gate in gates * 4]:
            done.result()

    assert fleet.line.read_at == [START + 30 * SECOND]
    assert fleet.incident() is not None


def test_a_probe_holds_no_transaction(fleet: Fleet) -> None:
    """On SQLite everybody else would wait for the CA."""
    gate = fleet.start()
    fleet.open_breaker(gate)
    fleet.clock.move(30 * SECOND)
    fleet.line.meanwhile = lambda: fleet.world.execute("UPDATE ca_breakers SET failures = failures")

    gate.probe(fleet.client())

    assert len(fleet.line.read_at) == 1


def test_a_probe_that_fails_keeps_it_closed(fleet: Fleet) -> None:
    """And what it met is what is shown."""
    gate = fleet.start()
    fleet.open_breaker(gate)
    fleet.clock.move(30 * SECOND)
    gate.probe(fleet.client())

    found = fleet.incident()
    assert found is not None
    assert (found["state"], found["error"]["type"]) == ("open", "certworker:ca-connect")
    assert gate.closed_until() == found["next_attempt_at"] == fleet.clock() + MINUTE


def test_a_prober_that_dies_leaves_the_schedule(fleet: Fleet) -> None:
    """It was on record before it asked."""

    def die() -> None:
        raise KeyboardInterrupt

    one, other = fleet.start(), fleet.start()
    fleet.open_breaker(one)
    fleet.clock.move(30 * SECOND)
    fleet.line.meanwhile = die
    with pytest.raises(KeyboardInterrupt):
        one.probe(fleet.client())
    fleet.line.meanwhile = lambda: None

    for step, count in ((59 * SECOND, 1), (SECOND, 2)):
        fleet.clock.move(step)
        other.refresh()
        other.probe(fleet.client())
        assert len(fleet.line.read_at) == count


def test_one_worker_tries_one_order(fleet: Fleet) -> None:
    """The others look again soon; three answers later everybody may, slowly."""
    one, other = fleet.start(), fleet.start()
    fleet.half_open(one)
    other.refresh()
    assert other.closed_until() is not None

    assert one.admits() == 1
    assert one.closed_until() is None
    assert one.admits() == 1
    later = other.admits()
    assert isinstance(later, datetime)
    assert fleet.clock() < later <= fleet.clock() + 5 * SECOND
    for _ in range(3):
        one.succeeded()
    other.refresh()

    assert fleet.incident() is None
    assert (one.admits(), other.admits()) == (1, 1)
    assert other.closed_until() is None


def test_a_race_for_the_trial_has_one_winner(fleet: Fleet) -> None:
    gates = [fleet.start() for _ in range(4)]
    fleet.half_open(gates[0])
    for gate in gates:
        gate.refresh()

    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(gate.admits) for gate in gates]

    assert [answer.result() for answer in answers].count(1) == 1


def test_a_trial_whose_worker_is_gone_is_anothers(fleet: Fleet) -> None:
    """When its lease has ended, by the database's time."""
    one, other = fleet.start(), fleet.start()
    fleet.half_open(one)
    assert one.admits() == 1
    other.refresh()
    assert other.admits() != 1

    fleet.world.execute("UPDATE ca_breakers SET trial_until = '2000-01-01T00:00:00.000000Z'")
    assert other.admits() == 1
    fleet.clock.move(MINUTE)

    assert one.closed_until() is not None
    assert one.admits() != 1


def test_a_failed_trial_closes_it_for_all(fleet: Fleet) -> None:
    """The probes go on where they were."""
    one, other = fleet.start(), fleet.start()
    fleet.half_open(one)
    assert one.admits() == 1
    one.failed(DOWN, "a")
    other.refresh()

    assert one.closed_until() == other.admits() == fleet.clock() + MINUTE
    assert one.admits() == other.admits()


def test_it_starts_slowly(fleet: Fleet) -> None:
    """One in flight, then twice as many with each that ends well; after five good minutes any number."""
    gate, absent = fleet.start(), fleet.start()
    for _ in range(10):
        gate.issued()
        absent.issued()
    fleet.half_open(gate)
    assert gate.admits() == 1
    for _ in range(3):
        gate.succeeded()

    absent.refresh()
    assert absent.admits() == 1
    for allowed in (1, 2, 4, 8):
        assert gate.admits() == allowed
        gate.issued()
    for _ in range(100):
        gate.issued()
    assert gate.admits() == UNLIMITED

    late = fleet.start()
    assert late.admits() == 1
    fleet.clock.move(5 * MINUTE)
    assert late.admits() == UNLIMITED


def test_threads_of_one_worker_open_it_once(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Sixteen requests that fail at once are one incident."""
    gate = fleet.start()
    with ThreadPoolExecutor(16) as threads:
        for done in [threads.submit(gate.failed, DOWN, str(n)) for n in range(64)]:
            done.result()

    assert told(caplog) == [("WARNING", "ca.unavailable")]
    assert gate.closed_until() == START + 30 * SECOND


def test_an_outage_is_told_once(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Not with every probe and every trial; and once when it is over."""
    caplog.set_level(logging.INFO)
    gate = fleet.start()
    fleet.half_open(gate)
    assert gate.admits() == 1
    gate.failed(DOWN, "a")
    fleet.clock.move(5 * MINUTE)
    gate.probe(fleet.client())
    for _ in range(3):
        gate.succeeded()

    assert told(caplog) == [("WARNING", "ca.unavailable"), ("INFO", "ca.available")]
    began, ended = (record for record in caplog.records if record.message.startswith("ca."))
    assert (began.type, began.hint) == (DOWN.type, "hint")  # type: ignore[attr-defined]
    assert ended.after_seconds == 330  # type: ignore[attr-defined]


# -- waits for everybody --------------------------------------------------------------------------------


def test_a_wait_for_everybody_is_shared(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """And told once, however many requests were under way."""
    one, other = fleet.start(), fleet.start()
    for _ in range(3):
        one.failed(failure(error_class=R, endpoint=Endpoint.NEW_ACCOUNT, retry_after=HOUR), "a")
    other.refresh()

    assert other.admits() == other.closed_until() == START + HOUR
    assert told(caplog) == [("WARNING", "ca.wait")]
    found = fleet.incident()
    assert found is not None
    assert (found["state"], found["since"], found["next_attempt_at"]) == ("held", None, START + HOUR)

    fleet.clock.move(HOUR)
    assert other.admits() == UNLIMITED
    assert fleet.incident() is None


def test_limits_of_all_workers_count(fleet: Fleet) -> None:
    one, other = fleet.start(), fleet.start()
    limited = failure(Scope.ISSUANCE, R, retry_after=2 * HOUR)
    for gate, lineage_id in ((one, "a"), (other, "b"), (one, "c")):
        assert gate.closed_until() is None
        gate.failed(limited, lineage_id)

    assert one.closed_until() == START + HOUR


# -- a refused account ----------------------------------------------------------------------------------


# -- a worker whose own way to the CA is broken ---------------------------------------------------------


def test_a_worker_that_alone_is_not_answered_steps_aside(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Five in a row while the others are answered: it is not the CA; an operator hears which worker it is."""
    broken, well = fleet.start(), fleet.start()
    for _ in range(5):
        assert broken.closed_until() is None
        broken.failed(DOWN, "a")
        well.refresh()
        well.succeeded()

    assert well.admits() == UNLIMITED
    assert fleet.incident() is None
    assert isinstance(broken.admits(), datetime)
    assert isinstance(broken.closed_until(), datetime)
    fleet.line.down = True
    broken.probe(fleet.client())
    assert told(caplog) == [("WARNING", "ca.out_of_reach")]
    for _ in range(9):
        broken.failed(DOWN, "a")
    well.refresh()
    assert well.admits() == UNLIMITED


def test_one_that_was_taken_for_an_outage_is_told_apart_afterwards(fleet: Fleet) -> None:
    """Five at once look like an outage; when another worker's orders show that it was none, it happens once."""
    broken, well = fleet.start(), fleet.start()
    fleet.half_open_by(well, opened_by=broken)
    well.refresh()
    assert well.admits() == 1
    for _ in range(3):
        well.succeeded()

    broken.refresh()

    assert isinstance(broken.admits(), datetime)
    for _ in range(9):
        broken.failed(DOWN, "a")
    well.refresh()
    assert well.closed_until() is None


def test_who_stands_aside_looks_for_itself(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """At once, then as rarely as everybody looks at a CA that is down; who can read the directory joins in again."""
    caplog.set_level(logging.INFO)
    broken, well = fleet.start(), fleet.start()
    for _ in range(5):
        broken.failed(DOWN, "a")
        well.refresh()
        well.succeeded()
    fleet.line.down = True
    for _ in range(60):
        broken.probe(fleet.client())
        fleet.clock.move(10 * SECOND)
    assert [at - START for at in fleet.line.read_at] == [s * SECOND for s in (0, 30, 90, 210, 510)]
    assert well.admits() == UNLIMITED

    fleet.line.down = False
    fleet.clock.move(5 * MINUTE)
    broken.probe(fleet.client())

    assert broken.admits() == UNLIMITED
    assert broken.closed_until() is None
    assert told(caplog) == [("WARNING", "ca.out_of_reach"), ("INFO", "ca.in_reach")]
    broken.failed(DOWN, "a")
    assert broken.closed_until() is None


def test_an_outage_that_all_meet_sets_nobody_aside(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever took part in finding it looks once, when the CA is back, and goes on; nobody hears of that."""
    caplog.set_level(logging.INFO)
    one, other = fleet.start(), fleet.start()
    for gate in (one, other, one, other, one):
        gate.failed(DOWN, "a")
    fleet.clock.move(30 * SECOND)
    one.probe(fleet.client())
    one.refresh()
    assert one.admits() == 1
    for _ in range(3):
        one.succeeded()

    other.refresh()
    other.probe(fleet.client())

    assert other.admits() == 1
    assert len(fleet.line.read_at) == 2
    assert told(caplog) == [("WARNING", "ca.unavailable"), ("INFO", "ca.available")]


def test_who_stands_aside_still_looks_at_a_ca_that_is_down_for_all(fleet: Fleet) -> None:
    """Else nobody would, were it the last one."""
    broken, well = fleet.start(), fleet.start()
    for _ in range(5):
        broken.failed(DOWN, "a")
        well.refresh()
        well.succeeded()
    fleet.open_breaker(well)
    fleet.line.down = False
    broken.refresh()
    fleet.clock.move(30 * SECOND)

    broken.probe(fleet.client())
    broken.probe(fleet.client())

    assert fleet.line.read_at == [START + 30 * SECOND]
    assert broken.admits() == 1


def test_a_refused_account_pauses_all_workers(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Until a day has passed; nobody probes, for nothing is wrong with the CA."""
    one, other = fleet.start(), fleet.start()
    one.failed(REFUSED, "a")
    one.failed(REFUSED, "b")
    other.refresh()

    assert other.admits() == other.closed_until() == START + DAY
    assert told(caplog) == [("WARNING", "ca.unavailable")]
    fleet.clock.move(23 * HOUR)
    other.probe(fleet.client())
    assert fleet.line.read_at == []


def test_after_a_day_one_order_is_tried(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Refused again, and it is the same incident for another day."""
    one, other = fleet.start(), fleet.start()
    one.failed(REFUSED, "a")
    fleet.clock.move(DAY)
    other.refresh()

    assert (one.admits(), one.closed_until()) == (1, None)
    assert other.admits() != 1
    one.failed(REFUSED, "b")

    assert one.admits() == fleet.clock() + DAY
    assert told(caplog) == [("WARNING", "ca.unavailable")]


def test_a_fresh_pause_is_not_ended_by_who_comes_late(fleet: Fleet) -> None:
    """What one has seen a day ago is not what is true now."""
    one, other = fleet.start(), fleet.start()
    one.failed(REFUSED, "a")
    other.refresh()
    fleet.clock.move(DAY)
    assert one.admits() == 1
    one.failed(REFUSED, "b")

    assert other.admits() != 1
    found = fleet.incident()
    assert found is not None
    assert found["state"] == "paused"


def test_an_operator_ends_a_pause(fleet: Fleet) -> None:
    """By saying so, to any worker; one order shows whether they are right."""
    gate, other = fleet.start(), fleet.start()
    gate.failed(REFUSED, "a")
    other.resume()
    gate.refresh()

    assert gate.admits() == 1
    for _ in range(3):
        gate.succeeded()
    assert fleet.incident() is None


def test_a_trial_ends_with_what_it_showed(fleet: Fleet) -> None:
    """Who tried before a pause does not try beside whoever tries after it."""
    one, other = fleet.start(), fleet.start()
    fleet.half_open(one)
    assert one.admits() == 1
    one.failed(REFUSED, "a")
    other.resume()
    assert other.admits() == 1

    one.refresh()
    assert one.closed_until() is not None
    assert one.admits() != 1


def test_a_start_with_other_settings_ends_a_pause(fleet: Fleet) -> None:
    """One with the same settings does not."""
    fleet.start("no terms").failed(REFUSED, "a")

    assert fleet.start("no terms").admits() == START + DAY
    assert fleet.start("terms agreed").admits() == 1


def test_workers_with_different_settings_do_not_end_each_others_pauses(fleet: Fleet) -> None:
    """Or they would ask a CA that refuses them both without end."""
    one, other = fleet.start("one"), fleet.start("other")
    one.failed(REFUSED, "a")
    other.refresh()

    assert other.admits() == START + DAY


def test_an_outage_that_becomes_a_pause_is_told(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """A person has to act now."""
    gate = fleet.start()
    fleet.half_open(gate)
    gate.failed(REFUSED, "a")

    assert told(caplog) == [("WARNING", "ca.unavailable")] * 2


# -- three days -----------------------------------------------------------------------------------------


def test_three_days_without_a_ca(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Three workers come by every few seconds at first, then now and then: at most one probe in five minutes.

    When the CA is back, one order is sent within five minutes and the spread, and it is over.
    """
    caplog.set_level(logging.INFO)
    fleet.draw = 0.9
    gates = [fleet.start() for _ in range(3)]
    fleet.open_breaker(gates[0])
    sent: list[datetime] = []

    def come_by(gate: Gate) -> None:
        gate.refresh()
        gate.probe(fleet.client())
        if gate.admits() == 1:
            sent.append(fleet.clock())
            for _ in range(3):
                gate.succeeded()

    def let_pass(time: timedelta, step: timedelta) -> None:
        end = fleet.clock() + time
        while fleet.clock() < end:
            for gate in gates:
                fleet.clock.move(step / 3)
                come_by(gate)

    let_pass(20 * MINUTE, 6 * SECOND)
    let_pass(3 * DAY - 20 * MINUTE, 4 * MINUTE)

    probes = fleet.line.read_at
    late = [at for at in probes if at - START > 15 * MINUTE]
    assert len(probes) - len(late) <= 6
    assert all(after - before >= 5 * MINUTE for before, after in pairwise(late))
    assert 3 * DAY / (7.5 * MINUTE) < len(probes) <= 3 * DAY / (5 * MINUTE)
    assert sent == []
    fleet.line.down, recovered_at = False, fleet.clock()
    let_pass(6 * MINUTE, 3 * SECOND)

    assert timedelta(0) < sent[0] - recovered_at <= 5 * MINUTE * 1.1 + 3 * SECOND
    assert fleet.incident() is None
    assert told(caplog) == [("WARNING", "ca.unavailable"), ("INFO", "ca.available")]
