"""Numbers that grow with commits.

Never a database sequence: the row lock that `next_value` takes is held until the commit, so values
become visible in order, and a reader that asks for "everything after R" misses nothing. Call it as
the last statement before the commit.
"""

from sqlalchemy import Connection, select, update

from certworker.store.tables import counters

REVISION = "revision"
CONFIG_VERSION = "config_version"
EPOCH = "epoch"


def next_value(tx: Connection, name: str, steps: int = 1) -> int:
    """Raise the counter by `steps` and return its new value."""
    raised = update(counters).where(counters.c.name == name).values(value=counters.c.value + steps)
    return int(tx.execute(raised.returning(counters.c.value)).scalar_one())


def lock(tx: Connection, name: str) -> None:
    """Let nobody else raise the counter until the commit."""
    tx.execute(select(counters.c.value).where(counters.c.name == name).with_for_update())


def value(tx: Connection, name: str) -> int:
    """Return the counter as it stands."""
    return int(tx.execute(select(counters.c.value).where(counters.c.name == name)).scalar_one())
