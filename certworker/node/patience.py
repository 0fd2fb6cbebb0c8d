"""How a node waits for a proxy: it looks again and again, and never for longer than a limit."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """The time as a node sees it; tests hand in their own."""

    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    pause: timedelta = timedelta(milliseconds=20)

    def until(self, look: Callable[[], T | None], limit: timedelta) -> T | None:
        """Return the first true answer of `look`, or its last answer when `limit` is over."""
        give_up_at = self.monotonic() + limit.total_seconds()
        while not (seen := look()) and self.monotonic() < give_up_at:
            self.sleep(self.pause.total_seconds())
        return seen
