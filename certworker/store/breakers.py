"""`ca_breakers`: what the workers together know of a CA, and which of them tries the one order of a half-open one.

Instants are the injected clock's, but for the lease on the trial, which is the database's time. Nothing
deletes rows.
"""

from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, bindparam, exists, literal, or_, select, update

from certworker.core.breaker import Breaker, Limited, State
from certworker.store.rows import columns_of, insert_new
from certworker.store.tables import ca_breakers, workers
from certworker.store.types import db_now, seconds_from_now

TRIAL = timedelta(seconds=60)
"""For so long one worker alone tries, unless it signs off; it may take the trial again."""


def find(tx: Connection, directory_url: str) -> Breaker:
    """Return the breaker of a CA."""
    row = tx.execute(_FIND, {"asked": directory_url}).first()
    return Breaker() if row is None else _read(row)


_FIND = select(*columns_of(Breaker, ca_breakers)).where(ca_breakers.c.directory_url == bindparam("asked"))


def lock(tx: Connection, directory_url: str) -> Breaker:
    """Return the breaker of a CA, which nobody else changes until the commit."""
    insert_new(tx, ca_breakers, directory_url=directory_url, **_written(Breaker()))
    query = select(*columns_of(Breaker, ca_breakers)).where(ca_breakers.c.directory_url == directory_url)
    return _read(tx.execute(query.with_for_update()).one())


def put(tx: Connection, directory_url: str, breaker: Breaker) -> None:
    """Replace a breaker that is locked; a trial ends with the state that it belongs to."""
    values = _written(breaker)
    if breaker.state is not State.HALF_OPEN:
        values |= {"trial_owner": None, "trial_until": None}
    tx.execute(update(ca_breakers).where(ca_breakers.c.directory_url == directory_url).values(**values))


def take_trial(tx: Connection, directory_url: str, worker_id: str) -> bool:
    """Let `worker_id` be the one who tries a half-open CA, for TRIAL from now; say whether it is."""
    owner, until = ca_breakers.c.trial_owner, ca_breakers.c.trial_until
    gone = ~exists().where(workers.c.id == owner)
    ahead = until > seconds_from_now(literal(2 * int(TRIAL.total_seconds())))  # of a clock that was put right
    free = or_(until.is_(None), until <= db_now(), ahead, owner == worker_id, gone)
    half_open = ca_breakers.c.state == State.HALF_OPEN
    taken = (
        update(ca_breakers)
        .where(ca_breakers.c.directory_url == directory_url, half_open, free)
        .values(trial_owner=worker_id, trial_until=seconds_from_now(literal(int(TRIAL.total_seconds()))))
    )
    return tx.execute(taken).rowcount == 1


def _read(row: Row[Any]) -> Breaker:
    values = row._asdict()
    limited = (
        Limited(name, datetime.fromisoformat(at), datetime.fromisoformat(until))
        for name, at, until in values["limited"] or []
    )
    return Breaker(**{**values, "state": State(values["state"]), "limited": tuple(limited)})


def _written(breaker: Breaker) -> dict[str, Any]:
    values = {field.name: getattr(breaker, field.name) for field in fields(Breaker)}
    limited = [[one.lineage_id, one.at.isoformat(), one.until.isoformat()] for one in breaker.limited]
    return {**values, "limited": limited or None}
