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
"""A closed issuance is kept so long, and in any case until its certificate's own end."""
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


def reap(db: Database, clock: Clock) -> Reaped:
    """Delete what nothing needs any more."""

    def all_of_it(tx: Connection) -> Reaped:
        now = clock()
        workers.bury(tx)
        return Reaped(
            abandoned=issuances.cancel_abandoned(tx, now - ABANDONED, now),
            tokens=challenges.withdraw_stale(tx, now - TOKENS),
            issuances=issuances.forget_keys(tx, now - HISTORY, now),
            tombstones=certificates.forget_removed(tx, now - TOMBSTONES)
            + thumbprints.forget_removed(tx, now - TOMBSTONES),
            versions=versions.forget_old(tx, KEPT_VERSIONS),
            nodes=enrolments.forget(tx, FORMER_NODES),
            buckets=budget.forget_full(tx, now - FULL_BUCKETS, _MOST_BUCKETS),
        )

    return db.write(all_of_it)
