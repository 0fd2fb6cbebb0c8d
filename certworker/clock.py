"""The one door to the time: a clock is a function that returns now, as an aware UTC instant.

Everything that asks "is it due?" is handed a `Clock`; tests hand in their own. Leases do not use
it: they are judged by the database's time, which all workers share.
"""

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]


def system_clock() -> datetime:
    """Return the machine's present time in UTC."""
    return datetime.now(UTC)
