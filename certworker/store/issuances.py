"""`issuances`: one attempt to get one certificate, claimed by one worker at a time.

A claim is a lease with a fencing token. The lease is the database's time, so that workers with
different clocks agree; the token only ever grows, every later write names it, and a write whose row
has moved on raises LeaseLost. What is *due* is the injected clock's.

`Database.write` may run a function twice when the answer to its COMMIT was lost. `record` finds then what
it wrote before; a function that writes more than the issuance asks `find_recorded` first.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Select,
    bindparam,
    case,
    delete,
    exists,
    literal,
    not_,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from certworker.core.issuance import CLOSED, State
from certworker.errors import LeaseLost
from certworker.store.lineages import policy_names, policy_wants
from certworker.store.prepared import Prepared
from certworker.store.rows import among, columns_of, insert_new_all, new_id, pages, to_value
from certworker.store.tables import OPEN, issuances, lineages, policy_lineages
from certworker.store.types import db_now, seconds_from_now

LEASE = timedelta(seconds=60)
HEARTBEAT = timedelta(seconds=15)
_SET_ASIDE = timedelta(minutes=10)
"""Another issuance for the same names does not wait for one that is not worked on for longer."""

_OPEN = text(f"issuances.{OPEN}")
"""Word for word as in the partial indexes, or SQLite reads the whole history instead."""
_URGENT_OPEN = text(f"issuances.urgent AND issuances.{OPEN}")


@dataclass(frozen=True, slots=True)
class Issuance:
    """A row of `issuances`."""

    id: str
    lineage_id: str
    reason: str
    state: str
    state_at: datetime
    """Since when it is in this state."""
    attempt_at: datetime
    """Not before this is it worked on."""
    failures: int
    error: dict[str, Any] | None
    account_id: str | None
    key_pem: str | None = field(repr=False)
    """Sealed."""
    csr_der: bytes | None = field(repr=False)
    spki_sha256: str | None
    order_url: str | None
    finalize_url: str | None
    order_expires_at: datetime | None
    certificate_url: str | None
    chain_pem: str | None = field(repr=False)
    lease_owner: str | None
    lease_token: int
    claims: int
    """How often it was claimed."""
    created_at: datetime
    closed_at: datetime | None
    serial: str | None
    fingerprint: str | None
    dns_names: list[str] | None
    """What is ordered, fixed with the CSR; None before."""
    names_hash: str | None
    replaces: str | None
    """Renewal id of the certificate that the order says it replaces (RFC 9773 §5)."""
    urgent: bool
    """The certificate that serves is about to end: goes first, and may use the reserve of the rate ledger."""
    crashes: int
    """How many workers in a row have died of it, or lost it, without moving it."""

    @property
    def is_open(self) -> bool:
        return self.state not in CLOSED


def queue(tx: Connection, lineage_id: str, reason: str, now: datetime, *, urgent: bool = False) -> str | None:
    """Insert an issuance that waits to be claimed; return its id, None if one is open already."""
    return queue_all(tx, {lineage_id: reason}, now, urgent={lineage_id} if urgent else ()).get(lineage_id)


def queue_all(
    tx: Connection, reasons: Mapping[str, str], now: datetime, *, urgent: Collection[str] = ()
) -> dict[str, str]:
    """Insert an issuance for each of these lineages; return their ids, both by lineage id.

    Where one is open already nothing is queued, and nothing returned.
    """
    if not reasons:
        return {}
    at = {"state": State.QUEUED, "state_at": now, "attempt_at": now, "created_at": now}
    rows = [
        {"id": new_id(), "lineage_id": lineage_id, "reason": reason, "urgent": lineage_id in urgent, **at}
        for lineage_id, reason in reasons.items()
    ]
    insert_new_all(tx, issuances, rows)
    ours = {row["id"] for row in rows}
    return {one: issuance_id for one, issuance_id in _open_ids(tx, reasons).items() if issuance_id in ours}


def mark_urgent(tx: Connection, lineage_ids: Iterable[str]) -> None:
    """Let the open issuances of these lineages, if there are, go first from now on."""
    for page in pages(sorted(lineage_ids)):
        tx.execute(_MARK_URGENT, {"ids": page})


def _open_ids(tx: Connection, lineage_ids: Iterable[str]) -> dict[str, str]:
    return {row[0]: row[1] for page in pages(sorted(lineage_ids)) for row in tx.execute(_OPEN_IDS, {"ids": page})}


_OF_LINEAGES = among(issuances.c.lineage_id, "ids")
_OPEN_IDS = select(issuances.c.lineage_id, issuances.c.id).where(_OF_LINEAGES, _OPEN)
_MARK_URGENT = update(issuances).where(_OF_LINEAGES, _OPEN).values(urgent=True)


def find(tx: Connection, issuance_id: str) -> Issuance | None:
    """Return one issuance."""
    rows = _FIND.fetch(tx, issuance=issuance_id)
    return to_value(Issuance, rows[0]) if rows else None


_FIND = Prepared(select(*columns_of(Issuance, issuances)).where(issuances.c.id == bindparam("issuance")))


def find_open(tx: Connection, lineage_id: str) -> Issuance | None:
    """Return the one open issuance of a lineage."""
    query = select(*columns_of(Issuance, issuances)).where(issuances.c.lineage_id == lineage_id, _OPEN)
    row = tx.execute(query).first()
    return None if row is None else to_value(Issuance, row)


def find_open_all(tx: Connection, lineage_ids: Iterable[str]) -> dict[str, Issuance]:
    """Return the open issuances of these lineages, by lineage id."""
    rows = [row for page in pages(sorted(lineage_ids)) for row in tx.execute(_FIND_OPEN, {"ids": page})]
    return {one.lineage_id: one for one in (to_value(Issuance, row) for row in rows)}


_FIND_OPEN = select(*columns_of(Issuance, issuances)).where(_OF_LINEAGES, _OPEN)


def list_open(tx: Connection, directory_url: str | None = None) -> list[tuple[Issuance, list[str]]]:
    """Return every open issuance (of one CA) with its names, oldest first."""
    query = (
        select(*columns_of(Issuance, issuances), lineages.c.dns_names)
        .join(lineages, lineages.c.id == issuances.c.lineage_id)
        .where(_OPEN)
        .order_by(issuances.c.created_at)
    )
    if directory_url is not None:
        query = query.where(lineages.c.directory_url == directory_url)
    return [(Issuance(*row[:-1]), row[-1]) for row in tx.execute(query)]


@dataclass(frozen=True, slots=True)
class Standing:
    """How far an open issuance is."""

    state: str
    attempt_at: datetime
    leased: bool


def standings(tx: Connection, ids: list[str]) -> dict[str, Standing]:
    """Return those of `ids` that are open; what is missing has ended."""
    found: dict[str, Standing] = {}
    for page in pages(ids):
        query = select(issuances.c.id, issuances.c.state, issuances.c.attempt_at, issuances.c.lease_until.is_not(None))
        rows = tx.execute(query.where(issuances.c.id.in_(page), _OPEN))
        found |= {row[0]: Standing(*row[1:]) for row in rows}
    return found


@dataclass(frozen=True, slots=True)
class Result:
    """How an issuance stands, or how it ended."""

    id: str
    state: str
    attempt_at: datetime
    error: dict[str, Any] | None
    dns_names: list[str] | None
    serial: str | None
    fingerprint: str | None
    not_after: datetime | None
    """Of the certificate that it got."""


def results(tx: Connection, ids: list[str]) -> dict[str, Result]:
    """Return how these issuances stand, by id."""
    found = [Result(*row) for page in pages(ids) for row in tx.execute(_RESULTS, {"ids": page})]
    return {one.id: one for one in found}


_RESULTS = select(*columns_of(Result, issuances)).where(among(issuances.c.id, "ids"))


def history(tx: Connection, lineage_id: str, limit: int = 20) -> list[Issuance]:
    """Return a lineage's newest issuances, newest first."""
    query = (
        select(*columns_of(Issuance, issuances))
        .where(issuances.c.lineage_id == lineage_id)
        .order_by(issuances.c.created_at.desc())
        .limit(limit)
    )
    return [to_value(Issuance, row) for row in tx.execute(query)]


def find_before(tx: Connection, lineage_id: str, now: datetime, *, came_before: datetime) -> Issuance | None:
    """Return what made the certificate before the present one, if that has not ended.

    None also while the present one came after `came_before`.
    """
    present = select(lineages.c.issuance_id).where(lineages.c.id == lineage_id).scalar_subquery()
    settled = select(issuances.c.closed_at).where(issuances.c.id == present, issuances.c.closed_at <= came_before)
    made = (issuances.c.state == State.DONE, issuances.c.not_after > now)
    query = (
        select(*columns_of(Issuance, issuances))
        .where(issuances.c.lineage_id == lineage_id, *made)
        .where(issuances.c.closed_at < settled.scalar_subquery())
        .order_by(issuances.c.closed_at.desc())
        .limit(1)
    )
    row = tx.execute(query).first()
    return None if row is None else to_value(Issuance, row)


def claim(
    tx: Connection,
    worker: str,
    now: datetime,
    limit: int,
    only: list[str] | None = None,
    directory_url: str | None = None,
) -> list[Issuance]:
    """Lease up to `limit` due issuances to `worker`, urgent ones first, then longest due, and return them.

    `only` restricts it to these ids, for a one-shot run that was given names; `directory_url` to the CA
    that the worker speaks with.
    """
    _walk_in_order(tx, only)
    ids = _find_due(tx, now, limit, only, directory_url, urgent=True)
    if len(ids) < limit:
        # What is urgent and free is ours already.
        more = _find_due(tx, now, limit, only, directory_url, urgent=False)
        ids += [issuance_id for issuance_id in more if issuance_id not in ids][: limit - len(ids)]
    if not ids:
        return []
    claimed = [to_value(Issuance, row) for row in _LEASE.fetch(tx, ids=ids, worker=worker)]
    return sorted(claimed, key=lambda one: (not one.urgent, one.attempt_at))


def _find_due(
    tx: Connection, now: datetime, limit: int, only: list[str] | None, directory_url: str | None, *, urgent: bool
) -> list[str]:
    query = _due(urgent=urgent, restricted=only is not None, of_ca=directory_url is not None)
    found: list[str] = []
    for page in [None] if only is None else pages(only, _ASKED):
        asked = {"now": now, "most": limit - len(found), "only": page, "directory": directory_url}
        given = {name: value for name, value in asked.items() if value is not None}
        found += [row[0] for row in query.fetch(tx, **given)]
        if len(found) >= limit:
            break
    return found


def _walk_in_order(tx: Connection, only: list[str] | None) -> None:
    """Let PostgreSQL look at the queue in order, and stop when it has enough; for the rest of this transaction.

    Statistics of a queue are wrong: taken when it is short, they make it read and sort all of a long one. An index that
    is walked in order also forgets what has left it. A few of `only` are found by their ids.
    """
    if only is None and tx.dialect.name == "postgresql":
        tx.exec_driver_sql("SET LOCAL enable_sort = off")


_ASKED = 100
"""Ids that one look for work names: most of the first ones are due, and a statement of thousands is slow to read."""


@cache
def _due(*, urgent: bool, restricted: bool, of_ca: bool) -> Prepared:
    """Return the query for what is due and free, by parameters `now`, `most`, `only` and `directory`."""
    query = (
        select(issuances.c.id)
        .where(_URGENT_OPEN if urgent else _OPEN, issuances.c.attempt_at <= bindparam("now"), _is_free())
        .order_by(issuances.c.attempt_at)
        .limit(bindparam("most"))
        .with_for_update(skip_locked=True)
    )
    if restricted:
        query = query.where(among(issuances.c.id, "only"))
    if of_ca:
        query = query.where(_is_of_ca(bindparam("directory")))
    return Prepared(query)


def _is_of_ca(directory_url: str | BindParameter[str]) -> ColumnElement[bool]:
    """Look by primary key for each row: `exists` is a join, which PostgreSQL may begin with every lineage of the CA."""
    asked = select(lineages.c.directory_url).where(lineages.c.id == issuances.c.lineage_id).scalar_subquery()
    return asked == directory_url


def extend_leases(tx: Connection, worker: str, ids: list[str], *, waits: bool = True) -> dict[str, int]:
    """Keep those of `ids` that `worker` still holds for another LEASE; return their fencing tokens by id.

    Who does not wait leaves out what somebody is writing at this moment: its own worker, mostly, whose transaction may
    want a row next that was extended before. `held` says whether it is still held.
    """
    return {row[0]: row[1] for row in tx.execute(_EXTEND if waits else _EXTEND_FREE, {"ids": ids, "worker": worker})}


def held(tx: Connection, worker: str, ids: list[str]) -> dict[str, int]:
    """Return the fencing tokens of those of `ids` that `worker` holds, by id."""
    return {row[0]: row[1] for row in tx.execute(_HELD_TOKENS, {"ids": ids, "worker": worker})}


def free_leases(tx: Connection, worker: str) -> None:
    """Give back what `worker` holds: it stops."""
    held = update(issuances).where(_OPEN, issuances.c.lease_owner == worker)
    tx.execute(held.values(lease_owner=None, lease_until=None))


def free_dead_leases(tx: Connection, dead: list[str] | None = None) -> int:
    """Free what workers held that are known to be dead, or (None) whatever is held; return how many.

    None is for the one process that holds the worker role: everybody else is dead.
    """
    held = update(issuances).where(_OPEN, issuances.c.lease_until.is_not(None))
    if dead is not None:
        held = held.where(issuances.c.lease_owner.in_(dead))
    return tx.execute(held.values(lease_owner=None, lease_until=None, crashes=issuances.c.crashes + 1)).rowcount


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be written to a claimed issuance: `values` by column."""

    claimed: Issuance
    now: datetime
    values: Mapping[str, Any]


def change(claimed: Issuance, now: datetime, **values: Any) -> Change:
    """Return a change; one of state begins the time in that state, and shows that nobody died of it."""
    if values.get("state", claimed.state) != claimed.state:
        values |= {"state_at": now, "crashes": 0}
    return Change(claimed, now, values)


def closing(claimed: Issuance, state: State, now: datetime, **values: Any) -> Change:
    """Return the change that ends a claimed issuance."""
    return change(claimed, now, state=state, closed_at=now, lease_owner=None, lease_until=None, **values)


def record_all(tx: Connection, changes: Sequence[Change], *, alone: bool | None = None) -> list[Issuance]:
    """Write changes of several issuances and return these as they are then; LeaseLost if any has moved on.

    Of several nothing may be kept then. Only one that is `alone` in its transaction (by default: if it is one) may
    have been written before by this very claim, whose COMMIT was not answered; see `find_recorded`.
    """
    written = _record_if(tx, _FENCED, changes, alone=alone)
    if written is None:
        raise lease_lost(changes[0].claimed)
    return written


def record_linked(tx: Connection, changes: Sequence[Change]) -> list[Issuance] | None:
    """The same if policies name the lineages still, paused or not; None for one alone that was not written."""
    return _record_if(tx, _FENCED_LINKED, changes)


def record_intents(tx: Connection, changes: Sequence[Change], *, alone: bool) -> list[Issuance] | None:
    """The same of orders that are wanted, and that no other issuance makes (`is_ordered`); None as before."""
    return _record_if(tx, _FENCED_INTENT, changes, _same_order, alone=alone)


def lease_lost(claimed: Issuance) -> LeaseLost:
    """Return the error of a write whose issuance has moved on."""
    return LeaseLost(f"issuance {claimed.id} belongs to another worker now, so nothing more is sent for it")


_Asked = Callable[[Change], Mapping[str, Any]]


def _nothing_else(_: Change) -> Mapping[str, Any]:
    return {}


def _record_if(
    tx: Connection, statement: Prepared, changes: Sequence[Change], asked: _Asked = _nothing_else,
    *, alone: bool | None = None,
) -> list[Issuance] | None:  # fmt: skip
    """Write changes by a fenced statement, each with what else it asks; None if one alone was not written."""
    alike: dict[tuple[str, ...], list[Change]] = {}
    for one in sorted(changes, key=lambda one: one.claimed.id):  # all that lock several do it in this order
        alike.setdefault(tuple(one.values), []).append(one)
    if all(_write_fenced(tx, statement, group, asked) for group in alike.values()):
        return [_changed(one) for one in changes]
    first = changes[0]
    if len(changes) > 1 or alone is False:
        raise lease_lost(first.claimed)
    recorded = find_recorded(tx, first.claimed, first.values.get("state", ""))
    return None if recorded is None else [recorded]


def _write_fenced(tx: Connection, statement: Prepared, changes: Sequence[Change], asked: _Asked) -> bool:
    """Write changes of the same columns; say whether every one was still claimed as it is said to be."""
    rows = [
        {
            **one.values, **asked(one), "claimed_id": one.claimed.id, "claimed_owner": one.claimed.lease_owner,
            "claimed_token": one.claimed.lease_token, "claimed_state": one.claimed.state,
        }
        for one in changes
    ]  # fmt: skip
    return statement.run(tx, rows) == len(rows)


def _same_order(one: Change) -> Mapping[str, Any]:
    """Return what another order would be the same by: the names, and the account."""
    return {
        "asking": one.claimed.id, "hash": one.values["names_hash"], "account": one.values["account_id"],
        "soon": one.now + _SET_ASIDE,
    }  # fmt: skip


def _changed(one: Change) -> Issuance:
    return replace(one.claimed, **{name: value for name, value in one.values.items() if name in _FIELDS})


_FIELDS = frozenset(field.name for field in fields(Issuance))


def record(tx: Connection, claimed: Issuance, now: datetime, **values: Any) -> Issuance:
    """Write `values` to a claimed issuance and return it anew; LeaseLost if it has moved on."""
    return record_all(tx, [change(claimed, now, **values)])[0]


def is_claimed(tx: Connection, claimed: Issuance) -> bool:
    """Say whether the claim still stands, and nothing was written since."""
    found = find(tx, claimed.id)
    fence = (claimed.lease_owner, claimed.lease_token, claimed.state)
    return found is not None and (found.lease_owner, found.lease_token, found.state) == fence


def find_recorded(tx: Connection, claimed: Issuance, state: str) -> Issuance | None:
    """Return the issuance if this very claim has written `state` before: the answer to that COMMIT was lost."""
    found = find(tx, claimed.id)
    ours = found is not None and found.lease_token == claimed.lease_token and found.state == state != claimed.state
    return found if ours else None


def read_again(tx: Connection, claimed: Issuance) -> Issuance:
    """Return a claimed issuance as it is committed; LeaseLost if it is somebody else's, or the claim never was."""
    found = find(tx, claimed.id)
    # After a claim that was rolled back another worker's has the same token.
    ours = found is not None and found.lease_owner in (None, claimed.lease_owner)
    if found is None or not ours or found.lease_token != claimed.lease_token:
        raise lease_lost(claimed)
    return found


def is_ordered(tx: Connection, intended: Change) -> bool:
    """Say whether another open issuance orders the same names with the same account, if not set aside for long.

    A CA may answer two of them with one order (Boulder does), which only one of them can finalize.
    """
    return bool(tx.execute(select(_ORDERED), _same_order(intended)).scalar())


_other = issuances.alias("other")
_ORDERED = exists(
    select(1).where(
        text(f"other.names_hash IS NOT NULL AND other.{OPEN}"),  # as in the partial index
        _other.c.names_hash == bindparam("hash"),
        _other.c.state != State.QUEUED,
        _other.c.id != bindparam("asking"),
        _other.c.account_id == bindparam("account"),
        _other.c.attempt_at <= bindparam("soon"),
    )
)
_CLAIMED = update(issuances).where(
    issuances.c.id == bindparam("claimed_id"),
    issuances.c.lease_owner == bindparam("claimed_owner"),
    issuances.c.lease_token == bindparam("claimed_token"),
    issuances.c.state == bindparam("claimed_state"),
)
_FENCED = Prepared(_CLAIMED)
_FENCED_LINKED = Prepared(_CLAIMED.where(policy_names(issuances.c.lineage_id)))
_FENCED_INTENT = Prepared(_CLAIMED.where(policy_wants(issuances.c.lineage_id), not_(_ORDERED)))


def release(tx: Connection, claimed: Issuance, attempt_at: datetime, now: datetime, **values: Any) -> Issuance:
    """Give a claimed issuance back, not to be worked on before `attempt_at`."""
    return record(tx, claimed, now, attempt_at=attempt_at, lease_owner=None, lease_until=None, **values)


def close(tx: Connection, claimed: Issuance, state: State, now: datetime, **values: Any) -> Issuance:
    """End a claimed issuance."""
    return record_all(tx, [closing(claimed, state, now, **values)])[0]


def cancel_unclaimed(tx: Connection, lineage_id: str, now: datetime) -> bool:
    """Cancel the open issuance of a lineage nobody wants any more, unless a worker holds it or has ordered."""
    free = _is_free()
    cancelled = (
        update(issuances)
        .where(issuances.c.lineage_id == lineage_id, issuances.c.state == State.QUEUED, free)
        .values(state=State.CANCELLED, state_at=now, closed_at=now)
    )
    return tx.execute(cancelled).rowcount == 1


def close_ended(tx: Connection, now: datetime) -> int:
    """Close what another program has given a state that ends it, and nothing else; return how many."""
    ended = update(issuances).where(_OPEN, issuances.c.state.in_(sorted(CLOSED)))
    return tx.execute(ended.values(closed_at=now, lease_owner=None, lease_until=None)).rowcount


def cancel_abandoned(tx: Connection, untouched_since: datetime, now: datetime, limit: int = 500) -> int:
    """Cancel open issuances that no policy wants and no worker has moved since; return how many.

    Their CA is not asked any more, mostly because the settings name another one.
    """
    unwanted = ~exists(select(1).where(policy_lineages.c.lineage_id == issuances.c.lineage_id))
    free = _is_free()
    old = select(issuances.c.id).where(_OPEN, free, unwanted)
    ids = old.where(issuances.c.state_at < untouched_since, issuances.c.attempt_at < untouched_since).limit(limit)
    cancelled = update(issuances).where(issuances.c.id.in_(ids.scalar_subquery()))
    return tx.execute(cancelled.values(state=State.CANCELLED, state_at=now, closed_at=now)).rowcount


def next_attempt_at(tx: Connection, only: list[str] | None = None, directory_url: str | None = None) -> datetime | None:
    """Return when the next unclaimed issuance is due, of those that `claim` would take."""
    _walk_in_order(tx, only)
    query = select(issuances.c.attempt_at).where(_OPEN, issuances.c.lease_until.is_(None))
    moments = [
        tx.execute(_restrict(query, page, directory_url).order_by(issuances.c.attempt_at).limit(1)).scalar()
        for page in ([None] if only is None else pages(only))
    ]
    return min((moment for moment in moments if moment is not None), default=None)


def _restrict(query: Select[Any], only: list[str] | None, directory_url: str | None) -> Select[Any]:
    if only is not None:
        query = query.where(issuances.c.id.in_(only))
    return query if directory_url is None else query.where(_is_of_ca(directory_url))


def bring_forward(tx: Connection, issuance_id: str, now: datetime) -> None:
    """Let an open issuance that waits after a failure of the line be tried at once: a person asked."""
    tx.execute(
        update(issuances)
        .where(issuances.c.id == issuance_id, _OPEN, issuances.c.attempt_at > now)
        .values(attempt_at=now)
    )


def forget_keys(tx: Connection, ended_before: datetime, now: datetime, limit: int = 500) -> int:
    """Delete up to `limit` closed issuances whose certificate, if any, has ended; return how many.

    What was closed after `ended_before` stays. It may hold up what ended after it, for as long: only the first
    `limit` that have ended are looked at, not all that ended lately.
    """
    closed = issuances.c.closed_at < ended_before
    fruitless = select(issuances.c.id).where(closed, issuances.c.not_after.is_(None))
    gone = _delete(tx, fruitless.order_by(issuances.c.closed_at).limit(limit))
    ended = select(issuances.c.id, issuances.c.closed_at).where(
        issuances.c.closed_at.is_not(None), issuances.c.not_after <= now
    )
    first = ended.order_by(issuances.c.not_after).limit(limit - gone).subquery()
    return gone + _delete(tx, select(first.c.id).where(first.c.closed_at < ended_before))


def _delete(tx: Connection, ids: Select[Any]) -> int:
    return tx.execute(delete(issuances).where(issuances.c.id.in_(ids))).rowcount


def _is_free() -> ColumnElement[bool]:
    """Say whether nobody holds it; a lease longer than any that we begin was given by a clock that ran ahead."""
    until, longest = issuances.c.lease_until, seconds_from_now(literal(2 * int(LEASE.total_seconds())))
    return or_(until.is_(None), until <= db_now(), until > longest)


def _lease_end() -> seconds_from_now:
    return seconds_from_now(literal(int(LEASE.total_seconds())))


_GOES_ON = {
    "key_ready": "queued", "published": "validating", "authorized": "validating", "finalize_intent": "finalizing",
    "issued": "finalizing",
}  # fmt: skip
"""What a worker of the release before leaves behind, beside which this one may be started (see migration 0008)."""
_LEASE = Prepared(update(issuances).where(among(issuances.c.id, "ids")).values(
    state=case(_GOES_ON, value=issuances.c.state, else_=issuances.c.state),
    lease_owner=bindparam("worker"),
    lease_token=issuances.c.lease_token + 1,
    lease_until=_lease_end(),
    claims=issuances.c.claims + 1,
    # A lease that nobody gave back: its worker died, or lost the database.
    crashes=issuances.c.crashes + case((issuances.c.lease_owner.is_not(None), 1), else_=0),
).returning(*columns_of(Issuance, issuances)))  # fmt: skip
_HELD = (among(issuances.c.id, "ids"), _OPEN, issuances.c.lease_owner == bindparam("worker"))
_HELD_TOKENS = select(issuances.c.id, issuances.c.lease_token).where(*_HELD)


def _extend(*, waits: bool) -> ReturningUpdate[Any]:
    # In the order in which `record_all` locks them.
    locked = select(issuances.c.id).where(*_HELD).order_by(issuances.c.id).with_for_update(skip_locked=not waits)
    kept = update(issuances).where(issuances.c.id.in_(locked.scalar_subquery())).values(lease_until=_lease_end())
    return kept.returning(issuances.c.id, issuances.c.lease_token)


_EXTEND, _EXTEND_FREE = _extend(waits=True), _extend(waits=False)
