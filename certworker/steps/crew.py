"""Threads that work on issuances.

A worker holds the leases of the issuances it has in flight and keeps them alive together, over a
connection that nothing else uses. An issuance that waits for the CA holds no thread: it is an entry in
a list, until its time or until the responder saw the CA fetch its token. A wait that is longer than a
lease is given back to the database.

Nothing is sent to a CA that could not be recorded: not without a lease that outlives the request, and
not while the database cannot be written.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta

from certworker.core.issuance import State
from certworker.errors import LeaseLost, StoreError, StoreRefused
from certworker.steps import trouble
from certworker.steps.issue import advance
from certworker.steps.session import Bench, Session, give_back, open_sessions, read_again
from certworker.steps.waiting import Waiting, until
from certworker.store import issuances, settings_kv, workers
from certworker.store.database import Database, Transaction

_log = logging.getLogger(__name__)

_MOST_THREADS = 64
"""Requests to the CA under way at once; an issuance that waits for it holds no thread."""
_AT_ONCE = 4
"""While there is plenty to do, the database is asked for more when one in so many places is free ..."""
_GATHER = timedelta(milliseconds=100)
"""... or after this."""
POLL = timedelta(seconds=1)
"""How often the database is asked for work that nobody announced."""
_LONGEST_HOLD = timedelta(seconds=30)
"""A lease is kept through a wait up to this; a longer one is given back."""
_FENCE = 25.0
"""Seconds; a lease heard of longer ago is made sure of first: what is left of it must outlive a request's 30 s."""
_STORAGE = (0.2, 10.0)
"""Seconds between two tries to write to a database that failed: the first and the longest."""
_CONTENDED = timedelta(seconds=5)
"""When an issuance is tried again for which somebody else has locked a row: the others must not wait for it."""
_DRAIN = timedelta(seconds=8)
"""How long a stop waits for CAs that are validating."""
_LAST_ACTION = timedelta(seconds=5)


class Crew:
    """Works on every issuance that is due, or (`only`) on the given ones, until stopped."""

    def __init__(
        self,
        bench: Bench,
        worker_id: str,
        concurrency: int,
        only: list[str] | None = None,
        heartbeat: timedelta = issuances.HEARTBEAT,
        poll: timedelta = POLL,
        may_order: Callable[[], bool] = lambda: True,
        beaten: Callable[[datetime | None], object] = lambda _db_now: None,
    ) -> None:
        """Work on what is due while `may_order`: a CA that looks before a proxy can answer fails the name.

        `beaten` is told the database's time with every heartbeat, None when it was taken for dead.
        """
        self._bench = bench
        self._worker_id = worker_id
        self._concurrency = concurrency
        self._only = None if only is None else dict.fromkeys(only)
        """What may be claimed, in this order, and is not in hand."""
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        """Threads with nothing to do."""
        self._watch = threading.Condition(self._lock)
        """One of them, which watches the time; it hears of what is due sooner than it was."""
        self._watched: datetime | None = None
        """Until when that thread sleeps; None: nobody watches."""
        self._waiting = Waiting()
        self._in_work: dict[str, Session] = {}
        """By issuance id."""
        self._by_token: dict[str, Session] = {}
        self._claim_at: datetime | None = None
        """When the database is asked for work again; None: now."""
        self._gate_at = bench.clock()
        """When the breaker of the CA is read again, at the earliest."""
        self._plenty = False
        """The last time there was more to do than room for it."""
        self._claiming = False
        self._poked = False
        """Something was queued since the claim under way has begun, which may not have seen it."""
        self._stopping = threading.Event()
        self._cut = threading.Event()
        """Set when nothing more is seen through."""
        self._heartbeat = heartbeat
        self._poll = poll
        self._may_order = may_order
        self._beaten = beaten
        self._reserved = bench.db.reserve()
        self._storage = _Storage(bench, self._cut)
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        self._keeper = threading.Thread(target=self._keep_leases, name="leases", daemon=True)
        many = min(self._concurrency, _MOST_THREADS)
        issuers = [threading.Thread(target=self._work, name=f"issuer-{n}", daemon=True) for n in range(many)]
        self._threads = [self._keeper, *issuers]
        for thread in self._threads:
            thread.start()

    @property
    def threads(self) -> list[threading.Thread]:
        """What works on issuances, once it is started."""
        return [thread for thread in self._threads if thread is not self._keeper]

    def stop(self, within: timedelta = _DRAIN) -> bool:
        """Finish the actions under way, give every lease back; return whether all ended in time.

        A CA that was told to look would find nobody and call the name invalid: what it validates is
        seen through first.
        """
        give_up_at = time.monotonic() + within.total_seconds()
        with self._lock:
            self._stopping.set()
            for session in self._waiting:
                if not self._goes_on(session):
                    self._waiting.remove(session)
            self._wake_all()
            while self._validating() and time.monotonic() < give_up_at:
                self._idle.wait(0.1)
            self._cut.set()
            self._wake_all()
        # A request to the CA under way has its own time limit; the lease is given back all the same.
        give_up_at = time.monotonic() + _LAST_ACTION.total_seconds()
        for thread in self._threads:
            thread.join(max(give_up_at - time.monotonic(), 0))
        ended = not any(thread.is_alive() for thread in self._threads)
        try:
            self._bench.db.write(lambda tx: issuances.free_leases(tx, self._worker_id))
        except StoreError as error:
            _log.warning("leases.not_given_back", extra={"error": str(error)})  # they end by themselves
        if self._reserved is not self._bench.db:
            self._reserved.close()
        return ended

    def poke(self) -> None:
        """Ask the database for work now: something was queued."""
        with self._lock:
            self._claim_at, self._poked = None, True
            self._watch.notify()

    def realign(self) -> None:
        """Let nobody wait for a time that was another clock's: everything that waits looks now."""
        with self._lock:
            self._claim_at = None
            for session in self._waiting:
                session.wait_until = self._bench.clock()
                self._waiting.put(session)
            self._wake_all()

    def fetched(self, token: str) -> None:
        """Look soon at the issuance whose token the CA has just fetched; one in work hears of it all the same."""
        session = self._by_token.get(token)
        if session is None or session.fetched:
            return  # most: a CA fetches from several places
        with self._lock:
            session.fetched, session.looks = True, 0
            if session in self._waiting:
                session.wait_until = self._after_fetch(session)
                self._wait_for(session)

    def _after_fetch(self, session: Session) -> datetime:
        session.first_wait = self._bench.paces.verdict.wait(0)
        return min(until(session), self._bench.clock() + session.first_wait)

    def answer(self, token: str) -> str | None:
        """Return the key authorization of a token that is being proved here; asks nobody, and waits for nobody."""
        session = self._by_token.get(token)
        return None if session is None else session.answers.get(token)

    @property
    def in_flight(self) -> int:
        """How many issuances this worker holds."""
        with self._lock:
            return len(self._in_work) + len(self._waiting)

    # -- threads --------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._cut.is_set():
            try:
                if not self._storage.is_well():
                    continue
                session = self._next()
                if session is not None:
                    self._move(session)
            except StoreError as error:
                self._storage.failed(error)
            except Exception:  # noqa: BLE001
                # The thread must outlive whatever it met; the issuance is claimed again when its lease ends.
                _log.exception("issuers.bug")
                self._stopping.wait(1)

    def _next(self) -> Session | None:
        """Return a session to move, claiming new ones when there is room; None when there was nothing to do."""
        with self._lock:
            now = self._bench.clock()
            session = self._waiting.take(now)
            if session is not None:
                self._in_work[session.issuance.id] = session
                self._call_another()
                return session
            if not self._may_claim(now):
                self._await_work(now)
                return None
            self._claiming, self._poked = True, False
            self._call_another()
            room = self._room()
        self._claim(now, room)
        return None

    def _await_work(self, now: datetime) -> None:
        """Wait until there may be something to do: one thread watches the time, the others are called."""
        if self._watched is not None:
            self._idle.wait(POLL.total_seconds())
            return
        pause = self._pause(now)
        self._watched = now + pause
        self._watch.wait(pause.total_seconds())
        self._watched = None

    def _call_another(self) -> None:
        """Let somebody else see what there is to do, or watch the time."""
        if self._watched is None:
            self._idle.notify()

    def _wake_all(self) -> None:
        self._watch.notify_all()
        self._idle.notify_all()

    def _claim(self, now: datetime, room: int) -> None:
        """Ask the database for work; what may be ours then is in our hands, whatever went wrong."""
        claim_at, taken = now + self._poll * (0.8 + 0.4 * self._bench.draw()), dict[str, Session]()
        plenty = False
        try:
            self._ask_gate(now)
            room = self._admitted(room)
            if room > 0:
                upcoming = self._take(now, room, taken)
                plenty = len(taken) == room
                if upcoming is not None:
                    claim_at = min(claim_at, max(upcoming, now + _GATHER))
        except Exception:
            # Whether the claim was committed shows when the database is back.
            for session in taken.values():
                session.unsure = True
            raise
        finally:
            with self._lock:
                self._claiming, self._plenty = False, plenty
                self._claim_at = None if self._poked else claim_at
                for session in taken.values():
                    self._hold(session)
                self._watch.notify()
                self._call_another()

    def _hold(self, session: Session) -> None:
        """Keep a session until its time; while stopping, only what the CA is validating."""
        if self._goes_on(session):
            if session.fetched and session.looks == 0 and _is_validating(session):
                session.wait_until = self._after_fetch(session)  # it came while we were on the way here
            self._wait_for(session)

    def _wait_for(self, session: Session) -> None:
        self._waiting.put(session)
        if self._watched is not None and until(session) < self._watched:
            self._watch.notify()

    def _ask_gate(self, now: datetime) -> None:
        """See what other workers know of the CA; several times a second at most, however fast it issues."""
        if self._claim_at is None or now >= self._gate_at:
            self._gate_at = now + _GATHER
            self._bench.gate.refresh()

    def _admitted(self, room: int) -> int:
        """Return how many may be claimed: fewer than there is room for while the CA is in trouble."""
        admitted = self._bench.gate.admits()
        return 0 if isinstance(admitted, datetime) else min(room, admitted - self.in_flight)

    def _take(self, now: datetime, room: int, taken: dict[str, Session]) -> datetime | None:
        """Claim up to `room` issuances and return when the next one is due, after these.

        `taken` gets by id what may have become ours, also when this fails.
        """
        kept_at, directory_url = time.monotonic(), self._bench.accounts.directory_url
        only = None if self._only is None else list(self._only)

        def claim(tx: Transaction) -> datetime | None:
            # When this is run again, nobody knows whether it was committed before.
            for session in taken.values():
                session.unsure = True
            claimed = issuances.claim(tx, self._worker_id, now, room, only, directory_url)
            for session in open_sessions(tx, claimed):
                session.kept_at = kept_at
                taken[session.issuance.id] = session
            # There may be as many again that are due, which a full hand need not ask for.
            return now if len(claimed) == room else issuances.next_attempt_at(tx, only, directory_url)

        upcoming = self._bench.db.write(claim)
        for session in self._too_many_suspects(taken.values()):
            with suppress(LeaseLost):
                give_back(self._bench, session, now + self._poll)
            del taken[session.issuance.id]
        if self._only is not None:
            for issuance_id in taken:
                self._only.pop(issuance_id, None)
        return upcoming

    def _too_many_suspects(self, taken: Iterable[Session]) -> list[Session]:
        """Return which of these must not be worked on beside another suspect."""
        with self._lock:
            in_hand = any(map(_is_suspect, self._in_hand()))
        suspects = [session for session in taken if _is_suspect(session)]
        return suspects if in_hand else suspects[1:]

    def _move(self, session: Session) -> None:
        """Move one session until it waits or ends."""
        kept = False
        try:
            if session.unsure:
                read_again(self._bench, session)
            if session.issuance.crashes >= trouble.MOST_CRASHES:
                self._set_aside(session)
            while session.issuance.is_open and session.issuance.lease_owner is not None and self._goes_on(session):
                self._make_sure(session)
                self._advance(session)
                self._expect_fetch(session)
                if session.wait_until is not None:
                    break
            kept = self._keeps(session)
        except LeaseLost as error:
            _log.warning("issuance.lease_lost", extra={"issuance": session.issuance.id, "error": str(error)})
        except StoreError as error:
            # Whether the last write was committed shows when the database is back.
            session.unsure, session.wait_until, kept = True, None, True
            if error.contended:
                session.wait_until = self._bench.clock() + _CONTENDED
            raise
        finally:
            with self._lock:
                if self._in_work.get(session.issuance.id) is session:
                    del self._in_work[session.issuance.id]
                if kept:
                    self._hold(session)
                else:
                    self._let_go(session)

    def _expect_fetch(self, session: Session) -> None:
        """Know what the CA is about to fetch, before it is told that it may."""
        if session.issuance.state == State.VALIDATING and not session.told:
            with self._lock:
                self._forget_tokens(session)
                session.expected = tuple(session.answers)
                self._by_token |= dict.fromkeys(session.expected, session)

    def _forget_tokens(self, session: Session) -> None:
        for token in session.expected:
            if self._by_token.get(token) is session:  # two orders may share one
                del self._by_token[token]

    def _let_go(self, session: Session) -> None:
        """Forget a session; one that is still open may be claimed again."""
        self._forget_tokens(session)
        if self._only is not None:
            self._only.pop(session.issuance.id, None)
            if session.issuance.is_open:
                self._only[session.issuance.id] = None

    def _set_aside(self, session: Session) -> None:
        _log.error("issuance.quarantined", extra={"issuance": session.issuance.id, "state": session.issuance.state})
        trouble.quarantine(self._bench, session)

    def _make_sure(self, session: Session) -> None:
        """Raise LeaseLost unless the lease outlives a request to the CA, whatever held us up."""
        if time.monotonic() - session.kept_at <= _FENCE:
            return
        if session.issuance.id not in self._extend(self._bench.db, [session]):
            raise LeaseLost(f"issuance {session.issuance.id} belongs to another worker now, so nothing more is sent")

    def _advance(self, session: Session) -> None:
        try:
            advance(self._bench, session)
        except StoreRefused as error:
            _log.exception("issuance.refused", extra={"issuance": session.issuance.id})
            self._put_off_bug(session, str(error))
        except (LeaseLost, StoreError):
            raise
        except Exception as error:  # noqa: BLE001 - one strange issuance must not stop the others
            _log.exception("issuance.bug", extra={"issuance": session.issuance.id})
            self._put_off_bug(session, type(error).__name__)

    def _put_off_bug(self, session: Session, said: str) -> None:
        if session.issuance.is_open:  # what has ended is as it should be, whatever went wrong after it
            trouble.put_off_bug(self._bench, session, f"{said} in state {session.issuance.state}")

    def _keeps(self, session: Session) -> bool:
        """Say whether the session stays with this worker; one that waits for long is given back."""
        if not session.issuance.is_open or session.issuance.lease_owner is None or session.wait_until is None:
            return False
        if session.wait_until - self._bench.clock() <= _LONGEST_HOLD:
            return True
        give_back(self._bench, session, session.wait_until, worked_on=True)
        return False

    def _keep_leases(self) -> None:
        while not self._cut.wait(self._heartbeat.total_seconds()):
            try:
                self._extend_leases()
                self._beaten(self._reserved.write(lambda tx: workers.beat(tx, self._worker_id)))
            except StoreError as error:
                _log.warning("leases.database", extra={"error": str(error)})
            except Exception:  # noqa: BLE001 - without this thread every lease would run out
                _log.exception("leases.bug")

    def _extend_leases(self) -> None:
        """Keep what is held here, and nothing else: a lease that no session stands behind has to end.

        What another worker has taken is dropped; a session in work finds out at its next write.
        """
        with self._lock:
            sessions = self._in_hand()
        kept = self._extend(self._reserved, sessions, waits=False)
        kept |= self._held([session for session in sessions if session.issuance.id not in kept])
        with self._lock:
            waiting = [session for session in sessions if session in self._waiting and not session.unsure]
            lost = [session for session in waiting if session.issuance.id not in kept]
            for session in lost:
                self._waiting.remove(session)
                self._let_go(session)
        for session in lost:
            _log.warning("issuance.lease_lost", extra={"issuance": session.issuance.id})

    def _extend(self, db: Database, sessions: list[Session], *, waits: bool = True) -> set[str]:
        """Extend the leases of these sessions; return the ids of those for which that was done."""
        asked_at, ids = time.monotonic(), [session.issuance.id for session in sessions]
        ours = _ours(sessions, db.write(lambda tx: issuances.extend_leases(tx, self._worker_id, ids, waits=waits)))
        for session in ours:
            session.kept_at = asked_at
        return {session.issuance.id for session in ours}

    def _held(self, sessions: list[Session]) -> set[str]:
        """Return the ids of those sessions whose leases are ours, though they were not extended now."""
        if not sessions:
            return set()
        ids = [session.issuance.id for session in sessions]
        tokens = self._reserved.read(lambda tx: issuances.held(tx, self._worker_id, ids))
        return {session.issuance.id for session in _ours(sessions, tokens)}

    def _goes_on(self, session: Session) -> bool:
        """Say whether a session is moved: while stopping, only what the CA is validating."""
        return not self._stopping.is_set() or (_is_validating(session) and not self._cut.is_set())

    # -- with the lock held ---------------------------------------------------------------------------

    def _may_claim(self, now: datetime) -> bool:
        if not self._has_room():
            return False
        due = self._claim_at is None or self._claim_at <= now
        return due or (self._plenty and self._room() * _AT_ONCE >= self._concurrency)

    def _has_room(self) -> bool:
        return self._room() > 0 and not self._claiming and not self._stopping.is_set() and self._may_order()

    def _room(self) -> int:
        return self._concurrency - len(self._in_work) - len(self._waiting)

    def _pause(self, now: datetime) -> timedelta:
        moments = [now + POLL]  # whether a proxy answers by now is told by nobody
        if (first := self._waiting.first()) is not None:
            moments.append(first)
        if self._claim_at is not None and self._has_room():
            moments.append(self._claim_at)
        return max(min(moments) - now, timedelta(milliseconds=1))

    def _in_hand(self) -> list[Session]:
        return [*self._in_work.values(), *self._waiting]

    def _validating(self) -> bool:
        return any(map(_is_validating, self._in_hand()))


def _ours(sessions: Iterable[Session], tokens: Mapping[str, int]) -> list[Session]:
    """Return the sessions whose fencing tokens are still these, by issuance id."""
    return [session for session in sessions if tokens.get(session.issuance.id) == session.issuance.lease_token]


def _is_suspect(session: Session) -> bool:
    return trouble.SUSPECT_CRASHES <= session.issuance.crashes < trouble.MOST_CRASHES


def _is_validating(session: Session) -> bool:
    return session.issuance.state == State.VALIDATING and session.told


class _Storage:
    """Whether the database can be written, asked by every thread before it does anything."""

    def __init__(self, bench: Bench, cut: threading.Event) -> None:
        self._bench = bench
        self._cut = cut
        self._lock = threading.Lock()
        self._failures = 0

    def failed(self, error: StoreError) -> None:
        """Note that it could not be used; one line in the log for each outage."""
        with self._lock:
            if not self._failures:
                _log.warning("issuers.database", extra={"error": str(error)})
            self._failures += 1

    def is_well(self) -> bool:
        """Say whether to go on; after a failure only when something could be written, tried ever more rarely."""
        if not self._failures:
            return True
        first, longest = _STORAGE
        with self._lock:  # one thread tries, the others wait for what it finds
            if self._failures and not self._cut.wait(min(first * 2 ** min(self._failures, 10), longest)):
                self._try()
            return not self._failures

    def _try(self) -> None:
        now = self._bench.clock().isoformat()
        try:
            self._bench.db.write(lambda tx: settings_kv.put(tx, settings_kv.WRITTEN_AT, now))
        except StoreError:
            self._failures += 1
        else:
            _log.info("issuers.database_back")
            self._failures = 0
