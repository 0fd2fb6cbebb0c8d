"""CAs say when they want their certificates renewed (RFC 9773): asked, one moment drawn of each window, stored.

Trouble with this costs a certificate nothing but the CA's advice: it is renewed as it was planned. So it shows
in the lineage's `ari_error`, never in its `error`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from certworker.ca.client import Client
from certworker.ca.problems import classify
from certworker.clock import Clock
from certworker.core.renewal import RenewalInfo, choose_moment, look_after_answer, look_after_failure
from certworker.core.retry import Endpoint, Failure, Scope
from certworker.errors import CaError, ProblemReported, StoreRefused, TransportFault
from certworker.steps.trouble import describe
from certworker.store import renewal_info
from certworker.store.database import Database, Transaction
from certworker.store.renewal_info import Advice, Trouble, Watched

_log = logging.getLogger(__name__)
_Note = TypeVar("_Note", Advice, Trouble)

_PAGE = 100
_AT_ONCE = 8
"""Questions at a time; Let's Encrypt takes a thousand a second."""
_HOLD = timedelta(minutes=10)
"""More than a page takes when every question of it waits for its time limit."""
_NOTICE = 0.2
"""Seconds within which a stop is noticed."""
_GIVE_UP = 5
"""So many questions in a row without any answer, and the others wait for another pass."""
_PASSING = frozenset(["timeout", "reset", "tls", "proxy"])
"""Kinds of TransportFault that RFC 9773 §4.3.3 calls temporary: neither DNS nor a refused connection."""


def refresh_ari(
    db: Database,
    client: Client,
    clock: Clock,
    draw: Callable[[], float],
    going: Callable[[], bool] = lambda: True,
    closed: Callable[[], bool] = lambda: False,
    trouble: Callable[[Failure], None] = lambda _failure: None,
) -> int:
    """Ask the CA about every certificate that it is time for, while `going`; return how many those were.

    `draw` returns uniform numbers in [0, 1). Nothing is asked while the CA is `closed` to us; `trouble` is told of
    what everybody would meet who asks it.
    """
    if closed() or not db.read(lambda tx: renewal_info.any_due(tx, client.directory_url, clock())):
        return 0
    try:
        if client.directory().renewal_info is None:
            return 0
    except CaError as error:
        trouble(classify(error, Endpoint.DIRECTORY))
        return 0
    this = _Pass(db, client, clock, draw, going, closed, trouble)
    while this.goes_on() and (page := this.take()) is not None:
        this.ask_all(page)
    return this.asked


@dataclass(frozen=True, slots=True)
class _Heard:
    """What came of one question, and when."""

    watched: Watched
    answer: RenewalInfo | CaError
    at: datetime


@dataclass(slots=True)
class _Pass:
    """One pass over what is due."""

    db: Database
    client: Client
    clock: Clock
    draw: Callable[[], float]
    going: Callable[[], bool]
    closed: Callable[[], bool]
    trouble: Callable[[Failure], None]
    asked: int = 0
    silent: int = 0
    """Questions in a row that got no answer, or about so many: threads that count at once may miss one."""
    fault: Exception | None = None
    """What a thread met that is none of the CA's trouble: no database, say."""

    def goes_on(self) -> bool:
        return self.silent < _GIVE_UP and self.going() and not self.closed()

    def take(self) -> list[Watched] | None:
        url = self.client.directory_url
        return self.db.write(lambda tx: renewal_info.due(tx, url, self.clock(), _PAGE, _HOLD))

    def ask_all(self, page: list[Watched]) -> None:
        """Ask about a page, several at a time, and record what was heard.

        What is left when the pass is to end is due again after the hold, as is a page that a crash loses. A stop
        does not wait for a CA that hangs: what such a question still brings is as good as what a later one would.
        """
        waiting, heard = SimpleQueue[Watched](), list[_Heard]()
        for watched in page:
            waiting.put(watched)
        threads = [Thread(target=self._work, args=[waiting, heard], name="ari", daemon=True) for _ in page[:_AT_ONCE]]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and self.going():
                thread.join(_NOTICE)
        self._record_all(list(heard))
        if self.fault is not None:
            raise self.fault

    def _work(self, waiting: SimpleQueue[Watched], heard: list[_Heard]) -> None:
        try:
            while self.goes_on():
                heard.append(self._ask(waiting.get_nowait()))
        except Empty:
            return
        except Exception as error:  # noqa: BLE001 - raised where the pass was asked for
            self.fault = error

    def _ask(self, watched: Watched) -> _Heard:
        answer: RenewalInfo | CaError
        try:
            answer = self.client.fetch_renewal_info(watched.renewal_id)
        except CaError as error:
            answer = error
            failure = classify(error, Endpoint.RENEWAL_INFO)
            if failure.scope is Scope.CA:
                self.trouble(failure)
        self.silent = self.silent + 1 if isinstance(answer, TransportFault) else 0
        return _Heard(watched, answer, self.clock())

    def _record_all(self, heard: list[_Heard]) -> None:
        self.asked += len(heard)
        answers, troubles = list[Advice](), list[Trouble]()
        for one in heard:
            if isinstance(one.answer, CaError):
                troubles.append(_trouble(one.watched, one.answer, one.at))
            else:
                answers.append(self._advice(one.watched, one.answer, one.at))
        self._record(renewal_info.record, answers)
        self._record(renewal_info.record_trouble, troubles)
        for advice in answers:
            _tell_if_moved(advice)

    def _record(self, write: Callable[[Transaction, Sequence[_Note]], None], notes: Sequence[_Note]) -> None:
        """Write all of them at once; one that the database will not have is left out, and asked about again."""
        if not notes:
            return
        try:
            self.db.write(lambda tx: write(tx, notes))
        except StoreRefused as error:
            if len(notes) == 1:
                names = notes[0].watched.dns_names[:3]
                _log.error("ari.refused", extra={"names": names, "error": str(error)})
                return
            for note in notes:
                self._record(write, [note])

    def _advice(self, watched: Watched, said: RenewalInfo, at: datetime) -> Advice:
        planned_at = watched.planned_at
        if said.window != watched.window or planned_at is None:
            # Once for each window: drawing again at every look would favour early moments.
            planned_at = choose_moment(said.window, watched.validity, self.draw())
        return Advice(watched, said, planned_at, at + look_after_answer(said.retry_after), at)


def _trouble(watched: Watched, error: CaError, at: datetime) -> Trouble:
    failure = classify(error, Endpoint.RENEWAL_INFO)
    wait = look_after_failure(watched.failures + 1, passing=_is_passing(error), retry_after=failure.retry_after)
    _log.info("ari.trouble", extra={"names": watched.dns_names[:3], "error": failure.detail})
    return Trouble(watched, dict(describe(failure, at, at + wait)), at + wait, at)


def _tell_if_moved(advice: Advice) -> None:
    watched, said = advice.watched, advice.said
    if watched.window is not None and said.window != watched.window:
        _log.warning(
            "ari.window_moved",
            extra={
                "names": watched.dns_names[:3], "from": watched.window.start.isoformat(),
                "to": said.window.start.isoformat(), "renew_at": advice.planned_at.isoformat(),
                "explanation": said.explanation_url,
            },
        )  # fmt: skip


def _is_passing(error: CaError) -> bool:
    if isinstance(error, TransportFault):
        return error.kind in _PASSING
    return isinstance(error, ProblemReported) and (error.problem.status or 0) >= 500
