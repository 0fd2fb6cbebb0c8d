"""What has served its time is deleted: old tokens, old issuances, tombstones, dead workers."""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.store import certificates, challenges, issuances, workers
from certworker.store.database import Database

TOKENS = timedelta(minutes=10)
HISTORY = timedelta(days=30)
"""A closed issuance is kept so long, and in any case until its certificate's own end."""
TOMBSTONES = timedelta(days=30)
"""A node that was away for longer starts from a whole manifest."""


@dataclass(frozen=True, slots=True)
class Reaped:
    """How many rows of each kind went."""

    tokens: int
    issuances: int
    tombstones: int


def reap(db: Database, clock: Clock) -> Reaped:
    """Delete what nothing needs any more."""

    def all_of_it(tx: Connection) -> Reaped:
        now = clock()
        workers.bury(tx)
        return Reaped(
            tokens=challenges.withdraw_stale(tx, now - TOKENS),
            issuances=issuances.forget_keys(tx, now - HISTORY, now),
            tombstones=certificates.forget_removed(tx, now - TOMBSTONES),
        )

    return db.write(all_of_it)
