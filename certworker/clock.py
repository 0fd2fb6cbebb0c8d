"""The one door to the time: a clock is a function that returns now, as an aware UTC instant.

Everything that asks "is it due?" is handed a `Clock`; tests hand in their own. Leases do not use
it: they are judged by the database's time, which all workers share.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

_log = logging.getLogger(__name__)

Clock = Callable[[], datetime]

_DIFFERS = timedelta(seconds=30)
_ON_THE_WAY = timedelta(seconds=1)
"""An answer may be as old as this when it arrives: less is not taken for a step of the database's time."""


def system_clock() -> datetime:
    """Return the machine's present time in UTC."""
    return datetime.now(UTC)


class DatabaseClock:
    """The database's time, carried on by this machine's monotonic clock between two looks at it.

    All workers of a database agree, and a step of one machine's wall clock moves nothing there. An SQLite
    file has no time but its machine's: after a step of that, this clock follows with the next `anchor`.
    """

    def __init__(
        self, read_now: Callable[[], datetime], monotonic: Callable[[], float] = time.monotonic,
        wall: Clock = system_clock,
    ) -> None:  # fmt: skip
        """Start at what `read_now`, the database's time, says; `monotonic` counts seconds from anywhere."""
        self._monotonic = monotonic
        self._wall = wall
        self._told = timedelta()
        """How far ahead this machine was when that was last said."""
        # One value, so that no thread sees half of a new one.
        self._anchor = (read_now(), monotonic())

    def __call__(self) -> datetime:
        """Return now."""
        at, since = self._anchor
        return at + timedelta(seconds=self._monotonic() - since)

    def anchor(self, db_now: datetime) -> timedelta:
        """Take over what the database has just said the time is; return how far that moves this clock, mostly by 0."""
        self._compare(db_now)
        moved = db_now - self()
        if abs(moved) < _ON_THE_WAY:
            return timedelta()
        self._anchor = (db_now, self._monotonic())
        return moved

    def _compare(self, db_now: datetime) -> None:
        """Say it once when this machine's wall clock differs, and again when it differs otherwise."""
        ahead = self._wall() - db_now
        if abs(ahead - self._told) <= _DIFFERS:
            return
        self._told = ahead
        seconds = {"seconds_ahead": round(ahead.total_seconds())}
        if abs(ahead) > _DIFFERS:
            _log.warning("clock.differs", extra=seconds)
        else:
            _log.info("clock.agrees", extra=seconds)
