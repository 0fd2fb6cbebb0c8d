"""CAs say when they want their certificates renewed (RFC 9773): asked, one moment drawn of each window, stored.

Trouble with this costs a certificate nothing but the CA's advice: it is renewed as it was planned. So it shows
in the lineage's `ari_error`, never in its `error`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread

from certworker.ca.client import Client
from certworker.ca.problems import classify
from certworker.clock import Clock
from certworker.core.renewal import RenewalInfo, choose_moment, look_after_answer, look_after_failure
from certworker.core.retry import Endpoint, Failure, Scope
from certworker.errors import CaError, ProblemReported, TransportFault
from certworker.steps.trouble import describe
from certworker.store import renewal_info
from certworker.store.database import Database
from certworker.store.renewal_info import Watched

_log = logging.getLogger(__name__)

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
    return len(this.asked)


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
    asked: list[str] = field(default_factory=list)
    """Ids of lineages."""
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
        """Ask about a page, several at a time.

        What is left when the pass is to end is due again after the hold. A stop does not wait for a CA that
        hangs: what such a question still brings is as good as what a later one would.
        """
        waiting: SimpleQueue[Watched] = SimpleQueue()
        for watched in page:
            waiting.put(watched)
        threads = [Thread(target=self._work, args=[waiting], name="ari", daemon=True) for _ in page[:_AT_ONCE]]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and self.going():
                thread.join(_NOTICE)
        if self.fault is not None:
            raise self.fault

    def _work(self, waiting: SimpleQueue[Watched]) -> None:
        try:
            while self.goes_on():
                self._ask(waiting.get_nowait())
        except Empty:
            return
        except Exception as error:  # noqa: BLE001 - raised where the pass was asked for
            self.fault = error

    def _ask(self, watched: Watched) -> None:
        """Ask about one certificate, and record what was said."""
        self.asked.append(watched.lineage_id)
        try:
            said = self.client.fetch_renewal_info(watched.renewal_id)
        except CaError as error:
            self.silent = self.silent + 1 if isinstance(error, TransportFault) else 0
            self._record_failure(watched, error)
        else:
            self.silent = 0
            self._record(watched, said)

    def _record(self, watched: Watched, said: RenewalInfo) -> None:
        now, planned_at = self.clock(), watched.planned_at
        if said.window != watched.window or planned_at is None:
            # Once for each window: drawing again at every look would favour early moments.
            planned_at = choose_moment(said.window, watched.validity, self.draw())
        check_at = now + look_after_answer(said.retry_after)
        self.db.write(lambda tx: renewal_info.record(tx, watched, said, planned_at, check_at, now))
        if watched.window is not None and said.window != watched.window:
            _log.warning(
                "ari.window_moved",
                extra={
                    "names": watched.dns_names[:3], "from": watched.window.start.isoformat(),
                    "to": said.window.start.isoformat(), "renew_at": planned_at.isoformat(),
                    "explanation": said.explanation_url,
                },
            )  # fmt: skip

    def _record_failure(self, watched: Watched, error: CaError) -> None:
        now, failure = self.clock(), classify(error, Endpoint.RENEWAL_INFO)
        wait = look_after_failure(watched.failures + 1, passing=_is_passing(error), retry_after=failure.retry_after)
        shown = dict(describe(failure, now, now + wait))
        self.db.write(lambda tx: renewal_info.record_failure(tx, watched, shown, now + wait, now))
        _log.info("ari.trouble", extra={"names": watched.dns_names[:3], "error": failure.detail})
        if failure.scope is Scope.CA:
            self.trouble(failure)


def _is_passing(error: CaError) -> bool:
    if isinstance(error, TransportFault):
        return error.kind in _PASSING
    return isinstance(error, ProblemReported) and (error.problem.status or 0) >= 500
