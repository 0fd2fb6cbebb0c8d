"""What has served its time is deleted: old tokens, old issuances, tombstones, former nodes, full rate buckets,
old versions, dead workers.

The audit log is kept.
"""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.store import (
    budget,
    certificates,
    challenges,
    enrolments,
    issuances,
    thumbprints,
    versions,
    workers,
)
from certworker.store.database import Database

TOKENS = timedelta(minutes=10)
HISTORY = timedelta(days=30)
"""A closed issuance is kept so long, and in any case until its certificate's own end; at most so long after both."""
ABANDONED = timedelta(days=1)
"""An issuance that nobody wants and no worker moves is closed after this."""
TOMBSTONES = timedelta(days=30)
"""A node that was away for longer starts from a whole manifest."""
FORMER_NODES = timedelta(days=30)
"""For so long a node that was removed is told so, and whoever uses an old enrolment token why not."""
FULL_BUCKETS = timedelta(days=1)
"""A full bucket is as good as none, unless a clock that ran ahead took it for full."""
KEPT_VERSIONS = 100
"""Archived versions and drafts, besides the published one and what a node still serves."""
_MOST_BUCKETS = 1000
"""In one call: each certificate has some."""
_MOST_PAGES = 20
"""Of issuances in one call, for which a stop waits. A million certificates of six days leave 3 in ten minutes."""


@dataclass(frozen=True, slots=True)
class Reaped:
    """How many rows of each kind went."""

    abandoned: int
    """Cancelled; the others are deleted."""
    tokens: int
    issuances: int
    tombstones: int
    """Of certificates, and of hosts that are answered for no more."""
    nodes: int
    buckets: int
    versions: int


def reap(db: Database, clock: Clock, page: int = 500) -> Reaped:
    """Delete what nothing needs any more; of issuances `page` in one transaction."""

    forgotten = _forget_history(db, clock, page)

    def the_rest(tx: Connection) -> Reaped:
        now = clock()
        workers.bury(tx)
        issuances.close_ended(tx, now)
        return Reaped(
            abandoned=issuances.cancel_abandoned(tx, now - ABANDONED, now),
            tokens=challenges.withdraw_stale(tx, now - TOKENS),
            issuances=forgotten,
            tombstones=certificates.forget_removed(tx, now - TOMBSTONES)
            + thumbprints.forget_removed(tx, now - TOMBSTONES),
            versions=versions.forget_old(tx, KEPT_VERSIONS),
            nodes=enrolments.forget(tx, FORMER_NODES),
            buckets=budget.forget_full(tx, now - FULL_BUCKETS, _MOST_BUCKETS),
        )

    return db.write(the_rest)


def _forget_history(db: Database, clock: Clock, page: int) -> int:
    """Delete closed issuances: each certificate leaves one behind, and thousands may have ended together."""
    forgotten = 0
    for _ in range(_MOST_PAGES):
        count = db.write(lambda tx: issuances.forget_keys(tx, clock() - HISTORY, clock(), page))
        forgotten += count
        if not count:
            break
    return forgotten
