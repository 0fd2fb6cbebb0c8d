"""`workers`: who is alive. One row per process that runs the service, removed when it ends."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, literal, select, update

from certworker.store.rows import columns_of, put_row, to_value
from certworker.store.tables import workers
from certworker.store.types import db_now, seconds_from_now

SILENT = timedelta(seconds=60)
"""A worker whose heartbeat is older is not counted on."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A row of `workers`; times are the database's."""

    id: str
    host: str
    pid: int
    version: str
    started_at: datetime
    heartbeat_at: datetime


def enter(tx: Connection, worker_id: str, host: str, pid: int, version: str, place: str | None = None) -> None:
    """Say that a worker is there, and which `store.role.Place` it holds."""
    put_row(
        tx, workers, id=worker_id, host=host, pid=pid, version=version, place=place, started_at=db_now(),
        heartbeat_at=db_now(),
    )  # fmt: skip


def beat(tx: Connection, worker_id: str) -> datetime | None:
    """Say that it still is; return the database's time, None if it was taken for dead and has to enter again."""
    row = update(workers).where(workers.c.id == worker_id).values(heartbeat_at=db_now())
    return tx.execute(row.returning(workers.c.heartbeat_at)).scalar()


def leave(tx: Connection, worker_id: str) -> None:
    """Say that it is no more."""
    tx.execute(delete(workers).where(workers.c.id == worker_id))


def alive(tx: Connection) -> list[Worker]:
    """Return the workers heard of lately."""
    silent = int(SILENT.total_seconds())
    # A heartbeat from the future is from before the database's clock was set back: who is alive has had a newer one.
    lately = workers.c.heartbeat_at.between(seconds_from_now(literal(-silent)), seconds_from_now(literal(silent)))
    query = select(*columns_of(Worker, workers)).where(lately).order_by(workers.c.started_at)
    return [to_value(Worker, row) for row in tx.execute(query)]


def bury_place(tx: Connection, place: str) -> list[str]:
    """Delete whoever was at `place`, which the caller holds now; return their ids, for the leases they left."""
    return list(tx.execute(delete(workers).where(workers.c.place == place).returning(workers.c.id)).scalars())


def bury(tx: Connection, *, everybody: bool = False) -> None:
    """Delete workers that were not heard of for ten times as long as SILENT, or (SQLite's one) all."""
    dead = delete(workers)
    if not everybody:
        dead = dead.where(workers.c.heartbeat_at < seconds_from_now(literal(-10 * int(SILENT.total_seconds()))))
    tx.execute(dead)
