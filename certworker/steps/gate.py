"""Whether the CA may be asked now: this worker's side of the circuit breaker that all workers share.

What was last seen of the row answers without SQL; only what changes it is written. Who finds the CA
unavailable, or available again, says so in the log once, for all workers.

A worker whom the CA does not answer while it answers the others steps aside: its own way to the CA is
broken, and must not be taken for an outage by everybody.
"""

import logging
import sys
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from certworker.ca.client import Client
from certworker.ca.problems import Endpoint, classify
from certworker.clock import Clock
from certworker.core import breaker
from certworker.core.breaker import Breaker, Closed, Free, State, Trial
from certworker.core.retry import Failure
from certworker.errors import CaError
from certworker.store import breakers, lineages
from certworker.store.database import Database, Transaction

_log = logging.getLogger(__name__)

UNLIMITED = sys.maxsize
_SLOW_START = timedelta(minutes=5)
"""A CA that has held for so long after an outage is trusted with any number of issuances."""
_ELSEWHERE = timedelta(seconds=2)
"""When to look again while another worker tries."""
_ALONE_AFTER = 5
"""Acts in a row that the CA did not answer us, while it answered others, before we step aside."""
_ASIDE_HINT = (
    "the CA answers other workers: check this one's way to it (DNS, firewall, HTTPS_PROXY, ACME_CA_BUNDLE); "
    "they go on, and this one joins them when it can read the directory"
)


class Gate:
    """Asked before issuances are claimed, and before one speaks to the CA.

    Any number of threads may share it; none may call it inside a transaction.
    """

    def __init__(
        self,
        db: Database,
        directory_url: str,
        clock: Clock,
        draw: Callable[[], float],
        worker_id: str,
        registration: str,
    ) -> None:
        """`registration` names what accounts are made with: a start with another one ends a pause."""
        self._db = db
        self._directory_url = directory_url
        self._clock = clock
        self._draw = draw
        self._worker_id = worker_id
        self._registration = registration
        self._lock = threading.Lock()
        """Held while the row is read or written, so that what is seen last is newest; not for looking at `_seen`."""
        self._seen = Breaker()
        self._started = False
        self._trial_until: datetime | None = None
        """Until then the one order of a half-open CA is this worker's."""
        self._allowed = 1
        """Issuances in flight soon after an outage."""
        self._unanswered = 0
        """Acts of this worker in a row that the CA did not answer, counted as the row counts everybody's."""
        self._look_at: datetime | None = None
        """While it stands aside: when this worker reads the directory next."""
        self._looks = 0
        self._told = False
        """Whether an operator has heard of it."""

    # -- before claiming, and before asking the CA ----------------------------------------------------

    def refresh(self) -> None:
        """See what the other workers know; the first time also whether settings have changed since a pause."""
        with self._lock:
            self._see(self._db.read(lambda tx: breakers.find(tx, self._directory_url)))
        # Later a difference means that two workers have different settings: each would end the other's pause.
        if not self._started and self._seen.registration != self._registration:
            self._end_pause()
        self._started = True

    def admits(self) -> int | datetime:
        """Return how many issuances this worker may have in flight, or when to ask again: until then none."""
        now = self._clock()
        if self._look_at is not None:
            return max(self._look_at, now + _ELSEWHERE)
        match breaker.admits(self._seen, now):
            case Closed(until):
                return until
            case Trial():
                return 1 if self._takes_trial(now) else now + _ELSEWHERE
            case Free():
                return UNLIMITED if now - self._seen.state_at >= _SLOW_START else self._allowed

    def closed_until(self) -> datetime | None:
        """Return when to ask again if the CA may not be asked now; reads no database."""
        now = self._clock()
        if self._look_at is not None:
            return max(self._look_at, now + _ELSEWHERE)
        match breaker.admits(self._seen, now):
            case Closed(until):
                return until
            case Trial():
                return None if self._tries(now) else now + _ELSEWHERE
            case Free():
                return None

    # -- after asking the CA --------------------------------------------------------------------------

    def succeeded(self) -> None:
        """Note that the CA answered an issuance as RFC 8555 has it."""
        now = self._clock()
        self._change(lambda seen: breaker.after_success(seen, now), answered=True)

    def failed(self, failure: Failure, lineage_id: str) -> None:
        """Note what an issuance has met while asking the CA, whatever its scope."""
        now, draw, answered = self._clock(), self._draw(), breaker.is_answered(failure)
        if answered is False and self._look_at is not None:
            return  # it says nothing of the CA
        self._change(
            lambda seen: breaker.after_failure(seen, failure, lineage_id, self._registration, now, draw), answered
        )

    def issued(self) -> None:
        """Note that an issuance has ended well: soon after an outage twice as many may follow."""
        with self._lock:
            self._allowed = min(self._allowed * 2, UNLIMITED)

    # -- while it is closed ---------------------------------------------------------------------------

    def probe(self, client: Client) -> None:
        """Read the CA's directory if that is due; of all workers one does, and each that stands aside."""
        if self._look_at is not None and self._seen.state is not State.OPEN:
            self._look(client, self._look_at)
            return
        now, draw = self._clock(), self._draw()
        if not self._change(lambda seen: breaker.begin_probe(seen, now, draw) or seen):
            return
        failure, now = _ask(client), self._clock()
        if failure is None:
            self._come_back()
        self._change(lambda seen: breaker.after_probe(seen, failure, now, draw))

    def _look(self, client: Client, look_at: datetime) -> None:
        """Read the directory for ourselves: whether the CA answers others is known."""
        if self._clock() < look_at:
            return
        failure = _ask(client)
        if failure is None:
            self._come_back()
            return
        self._tell_aside(failure)
        self._look_at = self._clock() + breaker.probe_wait(self._looks, self._draw())
        self._looks += 1

    def _step_aside(self) -> None:
        self._look_at, self._looks = self._clock(), 0

    def _tell_aside(self, failure: Failure) -> None:
        """Log it once, when we have seen for certain that it is not the CA."""
        if not self._told:
            self._told = True
            said = {"type": failure.type, "detail": failure.detail, "hint": _ASIDE_HINT}
            _log.warning("ca.out_of_reach", extra={"directory_url": self._directory_url, **said})

    def _come_back(self) -> None:
        with self._lock:
            self._look_at, self._unanswered = None, 0
        if self._told:
            self._told = False
            _log.info("ca.in_reach", extra={"directory_url": self._directory_url})

    def resume(self) -> None:
        """End a pause: the operator says that they have acted."""
        self.refresh()
        self._end_pause()

    def _end_pause(self, *, if_due: bool = False) -> None:
        """Let what the account was refused for be tried again, by one order first."""
        now, draw = self._clock(), self._draw()

        def end(seen: Breaker) -> Breaker:
            due = isinstance(breaker.admits(seen, now), Trial)
            return breaker.resume(seen, now, draw) if due or not if_due else seen

        if self._change(end):
            self._db.write(lambda tx: lineages.try_refused_again(tx, self._directory_url, now))

    def _takes_trial(self, now: datetime) -> bool:
        if self._tries(now):
            return True
        # A pause that nobody ended is tried all the same after a day.
        self._end_pause(if_due=True)
        with self._lock:
            taken = self._db.write(lambda tx: breakers.take_trial(tx, self._directory_url, self._worker_id))
            self._trial_until = now + breakers.TRIAL if taken else None
        return taken

    def _tries(self, now: datetime) -> bool:
        until = self._trial_until
        return until is not None and now < until

    # -- the row --------------------------------------------------------------------------------------

    def _change(self, change: Callable[[Breaker], Breaker], answered: bool | None = None) -> bool:
        """Write what `change` makes of the row, unless it would leave what was last seen; say whether it changed.

        `answered` is whether the CA has answered this worker, None if that does not show.
        """
        seen = self._seen
        if (after := change(seen)) is seen or after == seen:
            if answered:
                self._unanswered = 0
            return False

        def write(tx: Transaction) -> tuple[Breaker, Breaker]:
            before = breakers.lock(tx, self._directory_url)
            after = change(before)
            if after != before:
                breakers.put(tx, self._directory_url, after)
            return before, after

        with self._lock:
            before, after = self._db.write(write)
            if answered is not None:
                self._unanswered = 0 if answered else self._unanswered + 1
            self._see(before)
            self._see(after)
            # Alone, the row would count what we count: somebody was answered in between.
            if after.state is State.CLOSED and after.failures < self._unanswered >= _ALONE_AFTER:
                self._step_aside()
        _tell(before, after, self._directory_url, self._clock())
        return after != before

    def _see(self, seen: Breaker) -> None:
        if seen.state is not State.HALF_OPEN:
            self._trial_until = None
        if seen.state_at != self._seen.state_at:
            self._allowed = 1
            if seen.state is State.CLOSED and self._unanswered:
                self._step_aside()  # it was closed by answers to others
        self._seen = seen


def incident(tx: Transaction, directory_url: str, now: datetime) -> dict[str, Any] | None:
    """Return why a CA is not asked, since when and until when, for `status`; None if all is well."""
    seen = breakers.find(tx, directory_url)
    match breaker.admits(seen, now):
        case Free():
            return None
        case Closed(until):
            next_at: datetime | None = until
        case Trial():
            next_at = None
    held = seen.state is State.CLOSED
    return {
        "directory_url": directory_url, "state": "held" if held else seen.state.value,
        "since": None if held else seen.state_at, "error": seen.error, "next_attempt_at": next_at,
    }  # fmt: skip


def _ask(client: Client) -> Failure | None:
    try:
        client.refresh_directory()
    except CaError as error:
        return classify(error, Endpoint.DIRECTORY)
    return None


def _tell(before: Breaker, after: Breaker, directory_url: str, now: datetime) -> None:
    """Log what an operator has to know, once: tries that did not help are the same incident."""
    where = {"directory_url": directory_url, "state": after.state.value}
    if after.state is State.CLOSED and before.state is not State.CLOSED:
        seconds = round((after.state_at - before.state_at).total_seconds())
        _log.info("ca.available", extra={**where, "after_seconds": seconds})
    elif after.state is not before.state and (before.state is State.CLOSED or _is_another(before, after)):
        _log.warning("ca.unavailable", extra={**where, **(after.error or {})})
    elif after.state is State.CLOSED and _is_held(after, now) and not _is_held(before, now):
        _log.warning("ca.wait", extra={**where, "until": str(after.hold_until), **(after.error or {})})


def _is_held(seen: Breaker, now: datetime) -> bool:
    return seen.hold_until is not None and now < seen.hold_until


def _is_another(before: Breaker, after: Breaker) -> bool:
    """Say whether an outage has become a pause, which a person has to end."""
    return after.state is State.PAUSED and (before.error or {}).get("type") != (after.error or {}).get("type")
