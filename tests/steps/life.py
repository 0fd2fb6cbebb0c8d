"""A worker's lives on a small world, in a time that jumps to whatever is due, and the wire between it and the CA."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import event

from certworker.ca.transport import ANSWER_LIMIT, Response
from certworker.core.issuance import State
from certworker.core.retry import ErrorClass, Scope
from certworker.steps.gate import incident
from certworker.steps.issue import advance
from certworker.steps.scan import scan
from certworker.steps.session import Session
from certworker.store import certificates, issuances
from certworker.store.database import Database
from certworker.store.issuances import Issuance
from tests.ca import fake_jws

from .world import World

SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
T, V, R, P, X = ErrorClass
ONE, ACCOUNT, CA = Scope
NAME = "a.test"

PLACES = {
    # place: method, path, what is committed when it is asked
    "newAccount": ("POST", "/new-account", State.QUEUED),
    "directory": ("GET", "/directory", State.QUEUED),
    "newNonce": ("HEAD", "/new-nonce", State.ORDER_INTENT),
    "newOrder": ("POST", "/new-order", State.ORDER_INTENT),
    "authorization": ("POST", "/authorization/*", State.ORDERED),
    "challenge": ("POST", "/challenge/*", State.VALIDATING),
    "order": ("POST", "/order/*", State.VALIDATING),
    "finalize": ("POST", "/finalize/*", State.FINALIZING),
    "certificate": ("POST", "/certificate/*", State.FINALIZING),
}
"""What is asked in the course of an issuance; of several on one world only the first asks for an account."""
TIMES = {"badNonce": 10, "accountDoesNotExist": 2}
"""Mended in line once or more: so many in a row are one failure."""
FIRST = {T: 5 * SECOND, V: MINUTE, R: HOUR, P: DAY, X: DAY}
"""The first wait of each schedule; the draw of these tests leaves them as they are."""


def unsynced(db: Database) -> World:
    """Return a world on an SQLite that need not survive a power cut."""
    event.listen(db.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    db.engine.dispose()
    return World(db)


@dataclass(frozen=True)
class Sent:
    """One request."""

    at: datetime
    method: str
    path: str
    body: bytes | None = field(repr=False)
    host: str = ""

    @property
    def payload(self) -> Any:
        """The signed JSON, "" for a POST-as-GET."""
        signed = fake_jws.parse(self.body or b"").payload
        return json.loads(signed) if signed else ""


Change = Callable[[dict[str, Any]], object]


@dataclass
class Wire:
    """The way to the CA: remembers what went over it and when, and may change the JSON that comes back."""

    world: World
    sent: list[Sent] = field(default_factory=list)
    changes: list[list[Any]] = field(default_factory=list)

    def change(self, path: str, change: Change, times: int = 10**9) -> None:
        """Change the next answers from `path`, which may hold wildcards."""
        self.changes.append([path, change, times])

    def request(
        self, method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *,
        max_bytes: int = ANSWER_LIMIT, repeatable: bool = False,
    ) -> Response:  # fmt: skip
        path = urlsplit(url).path
        self.sent.append(Sent(self.world.clock(), method, path, body, urlsplit(url).netloc))
        answer = self.world.ca.request(method, url, body, headers, max_bytes=max_bytes, repeatable=repeatable)
        for one in self.changes:
            if fnmatchcase(path, one[0]) and answer.body.startswith(b"{") and one[2]:
                one[2] -= 1
                document = json.loads(answer.body)
                one[1](document)
                answer = replace(answer, body=json.dumps(document).encode())
        return answer

    def to(self, path: str) -> list[Sent]:
        return [sent for sent in self.sent if fnmatchcase(sent.path, path)]

    def times(self, path: str) -> list[datetime]:
        return [sent.at for sent in self.to(path)]


class Life:
    """A worker on a world; `restart` puts another in its place, which remembers nothing."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clock = world.clock
        self.wire = Wire(world)
        self.restart()

    def restart(self) -> None:
        self.world.crash()
        self.bench = self.world.bench(self.wire)

    def run(self, span: timedelta) -> None:
        """Do for a while whatever is due."""
        until = self.clock() + span
        while self.clock() < until:
            self.turn()
            self.clock.now = max(self.clock() + SECOND, min(self.next_event(), until))

    def turn(self) -> None:
        """Do once what is due, as the service does it."""
        scan(self.world.db, self.clock)
        gate = self.bench.gate
        gate.refresh()
        gate.probe(self.bench.client)
        admitted = gate.admits()
        if isinstance(admitted, datetime):
            return
        for session in self.world.claim(min(admitted, 16)):
            self.move(session)

    def move(self, session: Session, until: State | None = None) -> Session:
        """Work on one until it is given back, closed, or where it is wanted."""
        while session.issuance.is_open and session.issuance.lease_owner and session.issuance.state != until:
            advance(self.bench, session)
            if session.wait_until is not None and session.issuance.lease_owner:
                if session.wait_until - self.clock() > MINUTE:
                    self.give_back(session, session.wait_until)
                else:
                    self.wait(session.wait_until)
        return session

    def wait(self, until: datetime) -> None:
        """Let the time come that an issuance waits for."""
        self.clock.now = max(self.clock(), until)

    def give_back(self, session: Session, until: datetime) -> None:
        now, db = self.clock(), self.world.db
        session.issuance = db.write(lambda tx: issuances.release(tx, session.issuance, until, now))

    def reach(self, state: State, *names: str) -> Session:
        """Want one more certificate, and take it to this state."""
        self.world.add_policy(*names, shared=len(names) > 1)
        self.world.take_over()
        (session,) = self.world.claim()
        return self.move(session, state)

    def next_event(self) -> datetime:
        now = self.clock()
        closed = self.bench.gate.closed_until()
        due = self.world.db.read(issuances.next_attempt_at)
        ((planned,),) = self.world.rows("SELECT min(next_check_at) FROM lineages")
        moments = [closed] if closed else [due, datetime.fromisoformat(planned) if planned else None]
        return min([moment for moment in moments if moment is not None], default=now + HOUR)


# -- what there is, and what goes wrong ---------------------------------------------------------------


def fail(world: World, place: str, **fault: Any) -> None:
    """Let the next request there fail."""
    method, path, _ = PLACES[place]
    world.ca.fail_next(method, path, **fault)


def serving(world: World, *, due: bool = False) -> certificates.StoredCertificate:
    """Issue a certificate, and let its renewal be queued if it is to be `due`."""
    lineage = world.issue(NAME)
    if due:
        assert lineage.renew_at is not None
        world.clock.now = lineage.renew_at
        world.take_over()
    return certificate(world)


def certificate(world: World, name: str = NAME) -> certificates.StoredCertificate:
    found = world.db.read(lambda tx: certificates.find_of_lineage(tx, world.lineage(name).id))
    assert found is not None
    return found


def policy_statuses(world: World) -> list[str]:
    return [row[0] for row in world.rows("SELECT status FROM tls_policies")]


def history(world: World, name: str = NAME) -> list[Issuance]:
    """Return all issuances, newest first."""
    return world.db.read(lambda tx: issuances.history(tx, world.lineage(name).id))


def told(life: Life) -> dict[str, Any] | None:
    """Return the incident that an operator is shown."""
    return life.world.db.read(lambda tx: incident(tx, life.world.ca.directory_url, life.clock()))
