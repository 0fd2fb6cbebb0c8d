"""Faults, one after the other and one upon the other, chosen by a generator that a seed can repeat.

What strikes, whom and for how long is the seed's; when exactly it hits is the machine's.
"""

import heapq
import itertools
import json
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psycopg

from tests.chaos.proxy import (
    Exchange,
    Fault,
    Hold,
    Rule,
    Turn,
    close_after,
    reset_after,
    reset_before,
    say,
    say_problem,
    trickle,
    truncate,
)
from tests.flow.box import until

from .fleet import Fleet
from .servers import CrashingPostgres
from .watch import Watch

_OF_ORDER = ("newOrder", "order", "authorization", "challenge", "finalize", "certificate")
"""Where it shows who asks again: each of these requests is about one order, or about its names."""
_ROUTES = ("directory", "newNonce", "renewalInfo", *_OF_ORDER)
_NOBODY = "127.0.0.2"
"""An address where nothing listens."""
_CALM = 8 * 60
"""Seconds between two outages: after one the CA is left alone for half a minute, after the next for longer."""
_STOP_LIMIT = 30.0
LONGEST_WAIT = 5
"""Seconds in the Retry-After that are sent."""
_FIRST_STEP = 4.0
"""Seconds, at the least, after a first failure that passes by itself: 5 less the fifth that spreads them."""

_BROKEN: dict[str, Fault] = {
    "reset before": reset_before,
    "reset after": reset_after,
    "closed after": close_after,
    "500": say_problem(500, "serverInternal", "something went wrong"),
    "502 in HTML": say(502, b"<html><body><h1>502 Bad Gateway</h1></body></html>", content_type="text/html"),
    "truncated": truncate,
    "trickled": trickle(0.002),
}
"""What becomes of an answer, or of the request for it."""
_REFUSALS = ("500", "502 in HTML", "truncated")
"""Of these, what is a failure at once: where no answer comes, a request that only reads is sent once more."""


@dataclass(frozen=True)
class Waited:
    """A request that failed, and how long it must not be repeated."""

    exchange: Exchange
    at: float
    """When that was said, by the monotonic clock."""
    seconds: float


@dataclass
class Struck:
    """What has happened."""

    counts: Counter[str] = field(default_factory=Counter)
    """Of each kind of fault."""
    asked_to_wait: list[Waited] = field(default_factory=list)
    """What was answered with Retry-After."""
    refused: list[Waited] = field(default_factory=list)
    """What failed without it: our own schedule says when it is tried again."""
    disturbed: list[tuple[float, float]] = field(default_factory=list)
    """When what a worker had just been told could not be noted: it, or the database, was away."""
    slowest_stop: float = 0.0
    """Seconds from SIGTERM to the end."""
    faults: list[str] = field(default_factory=list)
    """What a worker did that it must not: a SIGTERM that did not end with 0, a process that ended by itself."""
    outage_at: float = -math.inf
    """When the last outage was, by the monotonic clock."""
    resets: list[int] = field(default_factory=list)
    """How much the CA had issued each time it was reset."""


class Storm:
    """Strikes a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        watch: Watch,
        struck: Struck,
        seed: int,
        *,
        postgres: CrashingPostgres | None = None,
        mortal: Sequence[str] = (),
        only: Collection[str] | None = None,
        ca_resets: bool = False,
        by_hand: bool = True,
        every: float = 1.2,
        renew_per_second: int = 4,
    ) -> None:
        """Strike about once in `every` seconds, with any kind of fault or with `only` these.

        `mortal` names die and live again. What takes minutes, the leases of a frozen worker and what follows an
        outage, ends `by_hand`, or in its own time.
        """
        self._fleet, self._watch, self._struck, self._postgres = fleet, watch, struck, postgres
        self._draw = random.Random(seed)
        self._dice = random.Random(seed + 1)
        """Rolled for each request, so that what strikes next does not depend on how many there were."""
        self._mortal, self._ca_resets, self._by_hand, self._every = mortal, ca_resets, by_hand, every
        self._renew_per_second = renew_per_second
        self._kinds = self._weigh(only)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._busy: set[int] = set()
        """Workers that something happens to."""
        self._over = False
        self._rules: list[tuple[str, Rule]] = []

    def _weigh(self, only: Collection[str] | None) -> dict[str, tuple[Callable[[], None], float]]:
        """Return what may strike, and how often compared with the rest."""
        kinds: dict[str, tuple[Callable[[], None], float]] = {
            "SIGKILL": (self._kill, 4), "SIGTERM": (self._terminate, 1.5), "held": (self._hold, 1.5),
            "503 Retry-After": (lambda: self._ask_to_wait(503), 1.5),
            "429": (lambda: self._ask_to_wait(429), 1.5), "badNonce storm": (self._refuse_nonces, 1),
            "CA outage": (self._outage, 0.5), **{kind: (partial(self._break, kind), 1.2) for kind in _BROKEN},
        }  # fmt: skip
        if self._postgres is not None:
            kinds |= {"PostgreSQL restart": (self._restart_postgres, 0.5), "connections cut": (self._cut, 1.5)}
        if len(self._fleet.workers) > 1:
            # Alone on SQLite it would hold the lock that the storm itself needs.
            kinds["SIGSTOP"] = (self._freeze, 2)
        if self._mortal:
            kinds["name dies"] = (self._let_die, 1)
        if self._ca_resets:
            kinds["CA reset"] = (self._reset_ca, 0.5)
        return {kind: what for kind, what in kinds.items() if only is None or kind in only}

    def rage(self, seconds: float, going: Callable[[], bool] = lambda: True) -> None:
        """Strike for so long, or while `going`; afterwards everything stands again."""
        over = time.monotonic() + seconds
        next_at = time.monotonic()
        self._keep_busy()
        self._hurry()
        while time.monotonic() < over and going():
            while self._agenda and self._agenda[0][0] <= time.monotonic():
                heapq.heappop(self._agenda)[2]()
            if self._kinds and next_at <= time.monotonic():
                self._strike()
                next_at = time.monotonic() + self._draw.uniform(0.3, 1.7) * self._every
            self._look_for_dead()
            time.sleep(0.02)
        self._end()

    def _keep_busy(self) -> None:
        """Let some certificates be renewed long before their time, so that there is always something to break."""
        if self._renew_per_second:
            self._fleet.renew(self._renew_per_second, self._dice)
            self._later(1, self._keep_busy)

    def _hurry(self) -> None:
        """Let a CA in trouble be tried again every few seconds: its own schedule would take up all of a short storm."""
        if self._by_hand and not self._over:
            self._fleet.end_outage()
            self._later(4, self._hurry)

    def _strike(self) -> None:
        kinds = list(self._kinds)
        (kind,) = self._draw.choices(kinds, [self._kinds[one][1] for one in kinds])
        self._kinds[kind][0]()

    def _end(self) -> None:
        self._renew_per_second, self._over = 0, True
        while self._agenda:
            heapq.heappop(self._agenda)[2]()
            time.sleep(0.01)
        until(self._all_there)
        self._fleet.proxy.clear()
        for kind, rule in self._rules:
            self._struck.counts[kind] += rule.met
        self._rules.clear()

    def _all_there(self) -> bool:
        """See whether nothing happens to any worker any more: one that still starts would not outlive a database."""
        for number in list(self._busy):
            self._await(number)
        return not self._busy

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (time.monotonic() + seconds, next(self._numbers), act))

    def _look_for_dead(self) -> None:
        for number, worker in enumerate(self._fleet.workers):
            if number not in self._busy and worker.process is not None and worker.process.poll() is not None:
                self._struck.faults.append(f"worker {number} ended by itself with {worker.process.returncode}")
                worker.process = None
                worker.start()

    # -- workers --------------------------------------------------------------------------------------

    def _pick(self, *, signed_on: bool = False) -> int | None:
        """Choose a worker to strike, one with something in its hands if there is any; most are left alone."""
        workers = self._fleet.workers
        if len(self._busy) >= max(1, len(workers) // 2):
            return None
        free = [number for number in range(len(workers)) if number not in self._busy]
        number = self._draw.choice([one for one in free if self._fleet.held_by(workers[one])] or free)
        if signed_on and self._fleet.id_of(workers[number]) is None:
            return None
        self._busy.add(number)
        self._watch.forget(number)
        return number

    def _await(self, number: int) -> None:
        """Leave a worker alone until it is there: the CA is to find somebody."""
        worker = self._fleet.workers[number]
        assert worker.process is not None
        if worker.process.poll() is not None:
            # Without a database there is no start; whoever looks after processes tries again.
            self._struck.counts["starts in vain"] += 1
            worker.process = None
            worker.start()
        if self._fleet.id_of(worker) is not None:
            self._busy.discard(number)
        elif not self._over:
            self._later(0.1, lambda: self._await(number))

    def _kill(self) -> None:
        number = self._pick()
        if number is None:
            return
        worker = self._fleet.workers[number]
        held, now = self._fleet.held_by(worker), time.monotonic()
        owner = self._fleet.id_of(worker)
        worker.kill()
        if self._by_hand and owner is not None:
            self._fleet.end_trial_of(owner)
        self._struck.counts["SIGKILL"] += 1
        self._struck.disturbed.append((now, now))

        def start() -> None:
            worker.start()
            self._watch.follow(number, held, worker.started_at)
            self._await(number)

        self._later(self._draw.uniform(0, 2), start)

    def _terminate(self) -> None:
        number = self._pick(signed_on=True)
        if number is None:
            return
        worker, began, wait = self._fleet.workers[number], time.monotonic(), self._draw.uniform(0, 1)
        assert worker.process is not None
        worker.process.send_signal(signal.SIGTERM)
        self._struck.counts["SIGTERM"] += 1

        def start() -> None:
            worker.start()
            self._await(number)

        def look() -> None:
            assert worker.process is not None
            took = time.monotonic() - began
            if worker.process.poll() is None and took < _STOP_LIMIT + 5:
                self._later(0.1, look)
                return
            self._struck.slowest_stop = max(self._struck.slowest_stop, took)
            if worker.process.returncode != 0 or took > _STOP_LIMIT:
                said = f"worker {number} ended with {worker.process.returncode} {took:.1f} s after SIGTERM"
                self._struck.faults.append(said)
            if worker.process.returncode is None:
                worker.kill()
            worker.process = None
            self._later(wait, start)

        self._later(0.1, look)

    def _freeze(self) -> None:
        number = self._pick(signed_on=True)
        if number is None:
            return
        worker = self._fleet.workers[number]
        began, seconds = time.monotonic(), self._draw.uniform(2, 6) if self._by_hand else self._draw.uniform(3, 75)
        worker.freeze()
        self._struck.counts["SIGSTOP"] += 1

        def thaw() -> None:
            worker.thaw()
            self._struck.disturbed.append((began, time.monotonic()))
            self._busy.discard(number)

        if self._by_hand:
            self._later(seconds / 2, lambda: self._fleet.end_leases_of(worker))
        self._later(seconds, thaw)

    # -- PostgreSQL -----------------------------------------------------------------------------------

    def _restart_postgres(self) -> None:
        assert self._postgres is not None
        now = time.monotonic()
        self._postgres.restart()
        self._struck.counts["PostgreSQL restart"] += 1
        # The workers have to notice it, and connect.
        self._struck.disturbed.append((now, time.monotonic() + 3))

    def _cut(self) -> None:
        assert self._postgres is not None
        with psycopg.connect(self._postgres.server.url(), autocommit=True) as session:
            rows = session.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'certworker'").fetchall()
            for (pid,) in self._draw.sample(rows, len(rows) // 2):
                session.execute("SELECT pg_terminate_backend(%s)", [pid])
        self._struck.counts["connections cut"] += len(rows) // 2
        self._struck.disturbed.append((time.monotonic(), time.monotonic() + 1))

    # -- the CA ---------------------------------------------------------------------------------------

    def _on(self, kind: str, route: str | None, fault: Fault, seconds: float = 5.0, **when: Any) -> None:
        """Let requests meet a fault, but none that comes much later."""
        over, where = time.monotonic() + seconds, when.pop("where", lambda _: True)
        rule = self._fleet.proxy.on(route, fault, where=lambda one: time.monotonic() < over and where(one), **when)
        self._rules.append((kind, rule))

    def _break(self, kind: str) -> None:
        def fault(turn: Turn) -> None:
            if kind in _REFUSALS and turn.exchange.route in _OF_ORDER:
                self._struck.refused.append(Waited(turn.exchange, time.monotonic(), _FIRST_STEP))
            _BROKEN[kind](turn)

        self._on(kind, self._draw.choice(_ROUTES), fault, times=self._draw.randint(1, 2))

    def _hold(self) -> None:
        hold = Hold(answered=self._draw.random() < 0.5, outlive=self._draw.random() < 0.5)
        self._on("held", self._draw.choice(_ROUTES), hold)
        self._later(self._draw.uniform(2, 12), hold.release)

    def _ask_to_wait(self, status: int) -> None:
        seconds = self._draw.randint(1, LONGEST_WAIT)
        code = "rateLimited" if status == 429 else "serverInternal"
        refusal = say_problem(status, code, "not so fast", retry_after=str(seconds))

        def fault(turn: Turn) -> None:
            self._struck.asked_to_wait.append(Waited(turn.exchange, time.monotonic(), seconds))
            refusal(turn)

        kind = "429" if status == 429 else "503 Retry-After"
        self._on(kind, self._draw.choice(_OF_ORDER), fault, times=self._draw.randint(1, 2))

    def _refuse_nonces(self) -> None:
        refusal = say_problem(400, "badNonce", "half of them")
        seconds, unlucky = self._draw.uniform(2, 5), lambda _: self._dice.random() < 0.5
        self._on("badNonce storm", None, refusal, seconds, method="POST", where=unlucky, times=None)

    def _outage(self) -> None:
        now, seconds = time.monotonic(), self._draw.uniform(3, 8)
        if now < self._struck.outage_at + _CALM:
            return
        self._struck.outage_at = now
        self._on("CA outage", None, say(503), seconds, times=None)

    def _reset_ca(self) -> None:
        self._struck.resets.append(len(self._fleet.ledger()))
        self._fleet.ca.restart()
        self._struck.counts["CA reset"] += 1

    def _let_die(self) -> None:
        name = self._draw.choice(self._mortal)
        let_die(self._fleet, name)
        self._struck.counts["name dies"] += 1
        self._later(self._draw.uniform(5, 20), lambda: revive(self._fleet, name))


def revive(fleet: Fleet, name: str) -> None:
    """Let a name lead to the responders again."""
    fleet.ca.challtest("clear-a", {"host": f"{name}."})


def let_die(fleet: Fleet, name: str) -> None:
    """Let a name lead to nobody."""
    fleet.ca.challtest("add-a", {"host": f"{name}.", "addresses": [_NOBODY]})


# -- O6 -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spacing:
    """How what was to be waited for was."""

    judged: int
    excused: int
    """Answers that nobody could note down: whoever got them died then, or the database was away."""
    worst: float
    """Seconds after the first moment that was allowed; negative is too soon."""


def kept_retry_after(struck: Struck, exchanges: list[Exchange]) -> Spacing:
    """Compare when each request was repeated with when the CA had asked for that."""
    return _spacing(struck.asked_to_wait, struck.disturbed, exchanges, _what)


def kept_schedule(struck: Struck, exchanges: list[Exchange]) -> Spacing:
    """Compare when an equal request was made after a failure with the first step of our own schedule."""
    # Equal in every word: an order that the CA refuses is made once more, at once, without `replaces`.
    return _spacing(struck.refused, struck.disturbed, exchanges, lambda one: (*_what(one), json.dumps(one.payload)))


def _spacing(
    waits: list[Waited],
    disturbed: list[tuple[float, float]],
    exchanges: list[Exchange],
    what: Callable[[Exchange], tuple[str, ...]],
) -> Spacing:
    later: dict[tuple[str, ...], list[float]] = {}
    for exchange in exchanges:
        later.setdefault(what(exchange), []).append(exchange.at)
    margins, excused = [], 0
    for waited in waits:
        again = next((at for at in sorted(later[what(waited.exchange)]) if at > waited.at), None)
        if any(began - 0.5 <= waited.at <= ended + 0.5 or 0 <= began - waited.at <= 1 for began, ended in disturbed):
            excused += 1
        elif again is not None:
            margins.append(again - waited.at - waited.seconds)
    return Spacing(len(margins), excused, min(margins, default=0.0))


def _what(exchange: Exchange) -> tuple[str, str, str]:
    """Return what was asked for, so that a repetition is seen as one."""
    names = json.dumps(exchange.payload.get("identifiers")) if exchange.route == "newOrder" else ""
    return exchange.method, exchange.path, names
