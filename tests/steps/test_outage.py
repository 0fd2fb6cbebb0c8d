"""A CA that is down for three days, and a fleet that outlives it: simulated, with Let's Encrypt's limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise

import pytest

from certworker.ca.transport import ANSWER_LIMIT, Response
from certworker.core.budget import LETS_ENCRYPT
from certworker.errors import TransportFault
from certworker.steps.expire import expire
from certworker.steps.issue import advance
from certworker.steps.scan import scan
from certworker.steps.session import Bench, Session, open_sessions
from certworker.store import issuances, lineages
from certworker.store.database import Database
from certworker.store.rows import new_id
from tests.steps.world import World

NAMES = 150
WORKERS = 3
DAY = timedelta(days=1)
EXPIRED = "SELECT count(*) FROM certificates WHERE status = 'expired'"


@dataclass
class Line:
    """The way to the CA: a log of what went over it, and whether anything does."""

    world: World
    down: bool = False
    sent: list[tuple[datetime, str]] = field(default_factory=list)

    def request(
        self, method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *,
        max_bytes: int = ANSWER_LIMIT, repeatable: bool = False,
    ) -> Response:  # fmt: skip
        self.sent.append((self.world.clock(), url.rpartition("/")[2] if method == "POST" else "look"))
        if self.down:
            raise TransportFault("connect", url, "the connection was refused; check address and port")
        return self.world.ca.request(method, url, body, headers, max_bytes=max_bytes, repeatable=repeatable)

    def since(self, start: datetime, what: str = "") -> list[datetime]:
        return [at for at, path in self.sent if at >= start and (not what or path == what)]


class Fleet:
    """Workers that take turns on one database, in a time that jumps to the next event."""

    def __init__(self, world: World, line: Line) -> None:
        self.world = world
        self.ids = [new_id() for _ in range(WORKERS)]
        self.benches: list[Bench] = []
        for worker in self.ids:
            world.worker = worker
            self.benches.append(world.bench(line))

    def run(self, until: datetime) -> None:
        """Let everybody work until then."""
        clock = self.world.clock
        while clock() < until:
            self.turn()
            clock.now = max(clock() + timedelta(seconds=1), min(self.next_event(), until))

    def turn(self) -> None:
        """Let each worker do once what there is to do."""
        db, clock = self.world.db, self.world.clock
        expire(db, clock)
        scan(db, clock)
        for worker, bench in zip(self.ids, self.benches, strict=True):
            bench.gate.refresh()
            bench.gate.probe(bench.client)
            admitted = bench.gate.admits()
            if isinstance(admitted, datetime):
                continue
            for session in self.claim(worker, min(admitted, 16)):
                self.work(bench, session)

    def claim(self, worker: str, room: int) -> list[Session]:
        db, now = self.world.db, self.world.clock()
        return db.write(lambda tx: open_sessions(tx, issuances.claim(tx, worker, now, room)))

    def work(self, bench: Bench, session: Session) -> None:
        clock = self.world.clock
        while session.issuance.is_open and session.issuance.lease_owner is not None:
            advance(bench, session)
            if session.wait_until is not None and session.issuance.lease_owner is not None:
                clock.now = max(clock(), session.wait_until)

    def next_event(self) -> datetime:
        """Return when something is due: half a minute at most, but for what a closed gate makes wait."""
        db, now = self.world.db, self.world.clock()
        closed = [until for bench in self.benches if (until := bench.gate.closed_until()) is not None]
        if len(closed) == len(self.benches):
            return min(closed)
        due = db.read(issuances.next_attempt_at)
        planned = db.read(lambda tx: tx.exec_driver_sql("SELECT min(next_check_at) FROM lineages").scalar())
        if isinstance(planned, str):
            planned = datetime.fromisoformat(planned)
        return min(moment for moment in (due, planned, now + timedelta(hours=1)) if moment is not None)


@pytest.fixture
def world(sqlite_db: Database) -> World:
    world = World(sqlite_db)
    world.limits = LETS_ENCRYPT
    return world


@pytest.mark.timeout(300)
def test_three_days_without_a_ca_cost_no_certificate(world: World) -> None:
    """Nothing expires, the whole fleet asks every five minutes, and the backlog stays within the limits."""
    line = Line(world)
    fleet = Fleet(world, line)
    fleet.world.add_policy(*[f"www.site{number}.com" for number in range(NAMES)])
    world.take_over()
    fleet.run(world.clock() + DAY)
    assert world.rows("SELECT count(*) FROM certificates") == [(NAMES,)]
    first_due = min(renew_at(world))
    fleet.run(first_due - timedelta(hours=1))

    down_at = world.clock()
    line.down = True
    fleet.run(down_at + 3 * DAY)
    asked = line.since(down_at)
    waiting = due_now(world)

    up_at = world.clock()
    line.down = False
    fleet.run(up_at + timedelta(minutes=6))
    while due_now(world) and world.clock() < up_at + DAY:
        fleet.run(world.clock() + timedelta(minutes=5))
    cleared = world.clock() - up_at

    print(
        f"\n{NAMES} certificates, {WORKERS} workers, CA down for 3 days: {waiting} waited, {len(asked)} requests "
        f"meanwhile, backlog cleared in {cleared}, most newOrders in 3 h: {most_within(line, timedelta(hours=3))}"
    )
    assert waiting > 10
    assert world.rows(EXPIRED) == [(0,)]
    late = [at for at in asked if at > asked[0] + timedelta(minutes=15)]
    assert all(later - earlier >= timedelta(minutes=5) for earlier, later in pairwise(late))
    assert len(late) <= 3 * 24 * 12
    assert cleared <= timedelta(hours=6)
    assert most_within(line, timedelta(hours=3)) <= 290
    assert len(world.ca.issued) == NAMES + renewed(world)


def renew_at(world: World) -> list[datetime]:
    return [one.renew_at for one in world.db.read(lambda tx: lineages.list_wanted(tx, limit=NAMES)) if one.renew_at]


def due_now(world: World) -> int:
    """Return how many certificates are past their plan."""
    return sum(at <= world.clock() for at in renew_at(world))


def renewed(world: World) -> int:
    return int(world.rows("SELECT count(*) FROM issuances WHERE state = 'done' AND reason <> 'first'")[0][0])


def most_within(line: Line, span: timedelta) -> int:
    orders = [at for at, path in line.sent if path == "new-order"]
    return max(sum(start <= at < start + span for at in orders) for start in orders)
