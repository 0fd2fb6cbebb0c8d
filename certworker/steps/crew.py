"""Threads that work on issuances.

A worker holds the leases of the issuances it has in flight and keeps them alive together. An issuance
that waits for the CA holds no thread: it is an entry in a list, until its time or until the responder
saw the CA fetch its token. A wait that is longer than a lease is given back to the database.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from certworker.core.issuance import State
from certworker.errors import LeaseLost, StoreError, StoreRefused
from certworker.steps.issue import LONGEST_HOLD, Bench, Session, advance, give_back, open_session, put_off_bug
from certworker.store import issuances, workers
from certworker.store.issuances import Issuance

_log = logging.getLogger(__name__)

_MOST_THREADS = 16
"""More only wait for each other: the CA's answers are what takes time, and waiting holds no thread."""
_POLL = timedelta(seconds=1)
"""How often the database is asked for work that nobody announced."""
_DRAIN = timedelta(seconds=8)
"""How long a stop waits for CAs that are validating."""
_LAST_ACTION = timedelta(seconds=5)
_AFTER_FETCH = timedelta(milliseconds=100)
"""CAs fetch a token several times; after the last fetch of a burst the CA is asked what it thinks."""


class Crew:
    """Works on every issuance that is due, or (`only`) on the given ones, until stopped."""

    def __init__(
        self,
        bench: Bench,
        worker_id: str,
        concurrency: int,
        only: list[str] | None = None,
        heartbeat: timedelta = issuances.HEARTBEAT,
        may_order: Callable[[], bool] = lambda: True,
    ) -> None:
        """Work on what is due while `may_order`: a CA that looks before a proxy can answer fails the name."""
        self._bench = bench
        self._worker_id = worker_id
        self._concurrency = concurrency
        self._only = only
        self._changed = threading.Condition()
        self._waiting: list[Session] = []
        self._in_work: list[Session] = []
        self._claim_at: datetime | None = None
        """When the database is asked for work again; None: now."""
        self._claiming = False
        self._stopping = threading.Event()
        self._cut = threading.Event()
        """Set when nothing more is seen through."""
        self._heartbeat = heartbeat
        self._may_order = may_order
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        targets: list[tuple[str, Callable[[], None]]] = [("leases", self._keep_leases)]
        targets += [(f"issuer-{n}", self._work) for n in range(min(self._concurrency, _MOST_THREADS))]
        self._threads = [threading.Thread(target=target, name=name, daemon=True) for name, target in targets]
        for thread in self._threads:
            thread.start()

    def stop(self, within: timedelta = _DRAIN) -> bool:
        """Finish the actions under way, give every lease back; return whether all ended in time.

        A CA that was told to look would find nobody and call the name invalid: what it validates is
        seen through first.
        """
        give_up_at = time.monotonic() + within.total_seconds()
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
            while self._validating() and time.monotonic() < give_up_at:
                self._changed.wait(0.1)
            self._cut.set()
            self._changed.notify_all()
        # A request to the CA under way has its own time limit; the lease is given back all the same.
        give_up_at = max(give_up_at, time.monotonic() + _LAST_ACTION.total_seconds())
        for thread in self._threads:
            thread.join(max(give_up_at - time.monotonic(), 0))
        ended = not any(thread.is_alive() for thread in self._threads)
        try:
            self._bench.db.write(lambda tx: issuances.free_leases(tx, self._worker_id))
        except StoreError as error:
            _log.warning("leases.not_given_back", extra={"error": str(error)})  # they end by themselves
        return ended

    def poke(self) -> None:
        """Ask the database for work now: something was queued."""
        with self._changed:
            self._claim_at = None
            self._changed.notify_all()

    def fetched(self, token: str) -> None:
        """Look soon at the issuance whose token the CA has just fetched."""
        with self._changed:
            for session in self._waiting:
                if token in session.tokens:
                    session.wait_until = min(self._until(session), self._bench.clock() + _AFTER_FETCH)
                    self._changed.notify()

    @property
    def in_flight(self) -> int:
        """How many issuances this worker holds."""
        with self._changed:
            return len(self._in_work) + len(self._waiting)

    # -- threads --------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._cut.is_set():
            try:
                session = self._next()
                if session is not None:
                    self._move(session)
            except StoreError as error:
                _log.warning("issuers.database", extra={"error": str(error)})
                self._stopping.wait(1)
            except Exception:  # noqa: BLE001
                # The thread must outlive whatever it met; the issuance is claimed again when its lease ends.
                _log.exception("issuers.bug")
                self._stopping.wait(1)

    def _next(self) -> Session | None:
        """Return a session to move, claiming new ones when there is room; None when the wait was cut short."""
        with self._changed:
            now = self._bench.clock()
            due = [session for session in self._waiting if self._goes_on(session) and self._until(session) <= now]
            if due:
                session = min(due, key=self._until)
                self._waiting.remove(session)
                self._in_work.append(session)
                return session
            if not self._may_claim(now):
                self._changed.wait(self._pause(now).total_seconds())
                return None
            self._claiming = True
            room = self._concurrency - len(self._in_work) - len(self._waiting)
        self._claim(now, room)
        return None

    def _claim(self, now: datetime, room: int) -> None:
        db, claimed, claim_at = self._bench.db, list[Issuance](), now + _POLL
        directory_url = self._bench.accounts.directory_url
        try:
            claimed = db.write(lambda tx: issuances.claim(tx, self._worker_id, now, room, self._only, directory_url))
            if len(claimed) < room:
                upcoming = db.read(lambda tx: issuances.next_attempt_at(tx, self._only, directory_url))
                claim_at = claim_at if upcoming is None else min(claim_at, max(upcoming, now + _AFTER_FETCH))
            sessions = [open_session(db, issuance) for issuance in claimed]
        finally:
            with self._changed:
                self._claiming = False
                self._claim_at = claim_at
                self._changed.notify_all()
        with self._changed:
            self._waiting.extend(sessions)
            if len(claimed) == room:
                self._claim_at = None
            self._changed.notify_all()

    def _move(self, session: Session) -> None:
        """Move one session until it waits or ends."""
        kept = False
        try:
            while session.issuance.is_open and self._goes_on(session):
                self._advance(session)
                if session.wait_until is not None:
                    break
            kept = self._keeps(session)
        except LeaseLost as error:
            _log.warning("issuance.lease_lost", extra={"issuance": session.issuance.id, "error": str(error)})
        finally:
            with self._changed:
                self._in_work.remove(session)
                if kept:
                    self._waiting.append(session)
                self._changed.notify_all()

    def _advance(self, session: Session) -> None:
        try:
            advance(self._bench, session)
        except StoreRefused as error:
            _log.exception("issuance.refused", extra={"issuance": session.issuance.id})
            put_off_bug(self._bench, session, f"{error} in state {session.issuance.state}")
        except (LeaseLost, StoreError):
            raise
        except Exception as error:  # noqa: BLE001 - one strange issuance must not stop the others
            _log.exception("issuance.bug", extra={"issuance": session.issuance.id})
            put_off_bug(self._bench, session, f"{type(error).__name__} in state {session.issuance.state}")

    def _keeps(self, session: Session) -> bool:
        """Say whether the session stays with this worker; one that waits for long is given back."""
        if not session.issuance.is_open or session.issuance.lease_owner is None or session.wait_until is None:
            return False
        if session.wait_until - self._bench.clock() <= LONGEST_HOLD:
            return True
        give_back(self._bench, session, session.wait_until)
        return False

    def _keep_leases(self) -> None:
        while not self._cut.wait(self._heartbeat.total_seconds()):
            try:
                self._extend_leases()
                self._bench.db.write(lambda tx: workers.beat(tx, self._worker_id))
            except StoreError as error:
                _log.warning("leases.database", extra={"error": str(error)})
            except Exception:  # noqa: BLE001 - without this thread every lease would run out
                _log.exception("leases.bug")

    def _extend_leases(self) -> None:
        """Keep what is held here, and nothing else: a lease that no session stands behind has to end.

        What another worker has taken is dropped; a session in work finds out at its next write.
        """
        with self._changed:
            sessions = [*self._in_work, *self._waiting]
        ids = [session.issuance.id for session in sessions]
        held = self._bench.db.write(lambda tx: issuances.extend_leases(tx, self._worker_id, ids))
        with self._changed:
            for session in sessions:
                if held.get(session.issuance.id) != session.issuance.lease_token and session in self._waiting:
                    _log.warning("issuance.lease_lost", extra={"issuance": session.issuance.id})
                    self._waiting.remove(session)

    def _goes_on(self, session: Session) -> bool:
        """Say whether a session is moved: while stopping, only what the CA is validating."""
        return not self._stopping.is_set() or (_is_validating(session) and not self._cut.is_set())

    # -- with the lock held ---------------------------------------------------------------------------

    def _may_claim(self, now: datetime) -> bool:
        room = self._concurrency - len(self._in_work) - len(self._waiting)
        if self._stopping.is_set() or not self._may_order():
            return False
        return not self._claiming and room > 0 and (self._claim_at is None or self._claim_at <= now)

    def _pause(self, now: datetime) -> timedelta:
        moments = [self._until(session) for session in self._waiting if self._goes_on(session)]
        if self._claim_at is not None and not self._claiming:
            moments.append(self._claim_at)
        longest = now + _POLL
        return max(min([*moments, longest]) - now, timedelta(milliseconds=1))

    def _validating(self) -> bool:
        return any(_is_validating(session) for session in [*self._in_work, *self._waiting])

    def _until(self, session: Session) -> datetime:
        return session.wait_until or session.issuance.attempt_at


def _is_validating(session: Session) -> bool:
    return session.issuance.state in (State.PUBLISHED, State.VALIDATING)
