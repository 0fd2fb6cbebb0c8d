"""Looks at the database all the while, with eyes of its own: what must hold at every instant."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from sqlalchemy import case, func, or_, select

from certworker.errors import StoreError
from certworker.store.database import open_database
from certworker.store.tables import ca_breakers, certificates, issuances, lineages

_SAMPLE = 0.2


@dataclass
class _Left:
    """Issuances that a killed worker held when it was killed, and their fencing tokens."""

    tokens: dict[str, int]
    since: float
    """When it was started again, by the monotonic clock."""


@dataclass
class Watch:
    """Samples while the block lasts; a database that is away is no sample."""

    url: str
    mortal: Collection[str] = ()
    """Names whose certificate may end: nobody can renew it while they are dead."""
    samples: int = 0
    faults: set[str] = field(default_factory=set)
    """O1: more than one active certificate, or none; and one that has ended, which is what G5 is to the database."""
    resumed: list[float] = field(default_factory=list)
    """Seconds from the start of a killed worker until each issuance that it had held was worked on again."""
    closed: Counter[str] = field(default_factory=Counter)
    """Samples in which the CA was not asked, by the state of the circuit breaker."""
    longest_gap: float = 0.0
    """Seconds without a sample."""

    def __enter__(self) -> Self:
        self._db = open_database(self.url)
        self._over = threading.Event()
        self._left: dict[int, _Left] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watch")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._db.close()

    def follow(self, worker: int, tokens: dict[str, int], since: float) -> None:
        """Note when each of these issuances, which a worker had held, is claimed again, or closed."""
        with self._lock:
            self._left[worker] = _Left(tokens, since)

    def forget(self, worker: int) -> None:
        """What this worker had held says nothing any more: it is struck again."""
        with self._lock:
            self._left.pop(worker, None)

    def await_sample(self) -> None:
        """Wait until everything was looked at once more."""
        until = self.samples + 2
        while self.samples < until and self._thread.is_alive():
            time.sleep(_SAMPLE)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(_SAMPLE):
            if not all(map(self._try, (self._sample, self._look_for_resumed, self._look_at_breaker))):
                continue
            now = time.monotonic()
            self.longest_gap, last = max(self.longest_gap, now - last), now
            self.samples += 1

    def _try(self, look: Callable[[], None]) -> bool:
        try:
            look()
        except StoreError:
            return False
        return True

    def _sample(self) -> None:
        now = datetime.now(UTC)
        active = func.sum(case((certificates.c.status == "active", 1), else_=0))
        ends_at = func.max(certificates.c.expires_at)
        query = (
            select(lineages.c.dns_names, active, ends_at)
            .join(certificates, certificates.c.lineage_id == lineages.c.id)
            .group_by(lineages.c.id, lineages.c.dns_names)
            .having(or_(active != 1, ends_at <= now))
        )
        for names, count, end in self._db.read(lambda tx: tx.execute(query).all()):
            if end > now or count > 1:
                self.faults.add(f"{', '.join(names)}: {count} active certificates")
            elif not set(names) & set(self.mortal):
                self.faults.add(f"{', '.join(names)}: its certificate ended at {end:%H:%M:%S} while it was wanted")

    def _look_for_resumed(self) -> None:
        with self._lock:
            left = list(self._left.values())
        ids = [one for each in left for one in each.tokens]
        if not ids:
            return
        query = select(issuances.c.id, issuances.c.lease_token).where(
            issuances.c.id.in_(ids), issuances.c.closed_at.is_(None)
        )
        tokens = {row[0]: row[1] for row in self._db.read(lambda tx: tx.execute(query).all())}
        now = time.monotonic()
        for each in left:
            for one in [one for one, token in each.tokens.items() if tokens.get(one, token + 1) > token]:
                del each.tokens[one]
                self.resumed.append(now - each.since)

    def _look_at_breaker(self) -> None:
        query = select(ca_breakers.c.state).where(ca_breakers.c.state != "closed")
        self.closed.update(self._db.read(lambda tx: tx.execute(query).scalars().all()))
