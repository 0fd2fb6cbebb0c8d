"""Numbers that grow with commits.

Never a database sequence: the row lock that `next_value` takes is held until the commit, so values
become visible in order, and a reader that asks for "everything after R" misses nothing. Call it as
the last statement before the commit.
"""

from datetime import datetime

from sqlalchemy import Connection, bindparam, select, update

from certworker.store.prepared import Prepared
from certworker.store.tables import counters

REVISION = "revision"
CONFIG_VERSION = "config_version"
EPOCH = "epoch"
_SKIPPED = 10_000
"""Versions; more than anybody publishes between two backups."""
FORGOTTEN = "forgotten"
"""Tombstones up to this revision may be gone: a cursor before it has to start from the whole."""


def next_value(tx: Connection, name: str, steps: int = 1) -> int:
    """Raise the counter by `steps` and return its new value."""
    ((raised,),) = _RAISE.fetch(tx, counter=name, steps=steps)
    return int(raised)


_RAISE = Prepared(
    update(counters)
    .where(counters.c.name == bindparam("counter"))
    .values(value=counters.c.value + bindparam("steps"))
    .returning(counters.c.value)
)


def start_over(tx: Connection, now: datetime) -> int:
    """Begin a new epoch, and return it: the database is an older one than nodes have seen.

    By the clock, so that restoring one backup twice gives two epochs. Version numbers skip what may have been
    given out since the backup: a proxy shows by its number that it serves a version.
    """
    next_value(tx, CONFIG_VERSION, _SKIPPED)
    return next_value(tx, EPOCH, max(1, int(now.timestamp()) - value(tx, EPOCH)))


def lock(tx: Connection, name: str) -> None:
    """Let nobody else raise the counter until the commit."""
    tx.execute(select(counters.c.value).where(counters.c.name == name).with_for_update())


def value(tx: Connection, name: str) -> int:
    """Return the counter as it stands."""
    return int(tx.execute(select(counters.c.value).where(counters.c.name == name)).scalar_one())


def raise_to(tx: Connection, name: str, least: int) -> None:
    """See that the counter is at least so high."""
    tx.execute(update(counters).where(counters.c.name == name, counters.c.value < least).values(value=least))
