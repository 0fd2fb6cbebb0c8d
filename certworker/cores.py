"""One core for threads that take turns.

Python lets one thread at a time run its code. When the threads that work on issuances are spread over several cores,
its lock and every object they touch travel from core to core with each turn, which costs half as much again as the
work itself (docs/performance.md). On one core they are as quick as one thread; the others are free for the proxies.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

_STAT = Path("/proc/stat")
_WORTH = 0.3
"""A core has to be idler by this part of the time, or it is as good as another one."""
_TICKS = 100
"""A second in /proc/stat (USER_HZ)."""


class Core:
    """The core that some threads of this process run on; chosen anew with every `gather`.

    Linux only; where threads cannot be bound, or there is one core, nothing is done.
    """

    def __init__(self, pick: Callable[[Sequence[int]], int] = random.choice) -> None:
        """`pick` one of several cores that are as good: workers that start together must not all take the same."""
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set[int]()
        self._pick = pick
        self._chosen: int | None = None
        self._idle = _idle_seconds()
        """Seconds that each core had been idle when it was last looked."""
        self._used = time.process_time()
        """Seconds of CPU that this process had used by then."""
        self._looked_at = time.monotonic()

    def gather(self, threads: Iterable[threading.Thread], *, batch: bool = False) -> None:
        """Let these threads, and those that they start, take turns on the core that others use least.

        As a `batch` (SCHED_BATCH, sched(7)) one that wakes up does not interrupt the one that runs, which mostly holds
        Python's lock, or wants it back at once. On a busy machine everybody else goes first then, also a thread of our
        own that has much to do: for a command that does nothing besides, not for the service.
        """
        if len(self._cores) < 2:
            return
        self._chosen = self._choose()
        for thread in threads:
            if thread.native_id is not None:
                with suppress(OSError):  # it has ended, or we may not
                    os.sched_setaffinity(thread.native_id, {self._chosen})
                    if batch:
                        os.sched_setscheduler(thread.native_id, os.SCHED_BATCH, os.sched_param(0))

    def _choose(self) -> int:
        idle, used, now = _idle_seconds(), time.process_time(), time.monotonic()
        spans = {core: idle.get(core, 0.0) - self._idle.get(core, 0.0) for core in sorted(self._cores)}
        if self._chosen is not None:
            spans[self._chosen] += used - self._used  # what we ran there ourselves would be free for us again
        enough = max(spans.values()) - _WORTH * (now - self._looked_at)
        self._idle, self._used, self._looked_at = idle, used, now
        good = [core for core, span in spans.items() if span >= enough]
        return self._chosen if self._chosen in good else self._pick(good)


def _idle_seconds() -> dict[int, float]:
    """Return for how long each core has been idle since the machine started (proc(5)); nothing if nobody says."""
    found: dict[int, float] = {}
    with suppress(OSError, ValueError):
        for line in _STAT.read_text().splitlines():
            name, *ticks = line.split()
            if name.startswith("cpu") and name != "cpu":
                found[int(name[3:])] = (int(ticks[3]) + int(ticks[4])) / _TICKS
    return found
