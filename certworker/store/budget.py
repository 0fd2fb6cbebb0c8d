"""`rate_buckets`: what was spent of the limits that we allow ourselves at a CA, shared by all workers.

A transaction locks every bucket that it asks, missing rows included, in one order (`core.budget.turn`):
two of them never spend the same token, and never wait for each other in a circle.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Text, bindparam, delete, select, text, tuple_, update

from certworker.core import budget
from certworker.core.budget import Charge, Granted, Limit, Refused
from certworker.store.prepared import Prepared
from certworker.store.rows import columns_of, to_value
from certworker.store.tables import rate_buckets
from certworker.store.types import Json, UtcTime


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nothing was spent: `bucket` has no token now, ask again `until` then."""

    bucket: str
    until: datetime


class Ledger:
    """The buckets that some orders ask, locked until the commit: asked in memory, written once.

    Open it before anything else in the transaction is locked. From then on nobody else spends for the same sets
    of names: the bucket `runaway` of an order is the first to be locked.
    """

    def __init__(
        self, tx: Connection, directory_url: str, charges: Iterable[Charge], account_id: str, now: datetime
    ) -> None:
        """Lock every bucket that `charges` name."""
        self._tx = tx
        self._directory_url = directory_url
        self._now = now
        wanted = {charge.bucket for charge in charges}
        self._held = _lock(tx, directory_url, account_id, sorted(wanted, key=budget.turn), now)
        self._changed: dict[str, _Bucket] = {}

    def spend(self, charges: Sequence[Charge]) -> Refusal | None:
        """Take a token for each of `charges`, or none at all."""
        granted: dict[str, _Bucket] = {}
        refused: list[tuple[Refused, Charge]] = []
        for want in sorted(charges, key=lambda want: budget.turn(want.bucket)):
            bucket = self._held[want.bucket]
            match budget.spend(bucket.full_at, self._now, want.limit, reserve=want.reserve):
                case Refused() as answer:
                    refused.append((answer, want))
                case Granted(full_at) if not want.only_asked:
                    granted[want.bucket] = replace(bucket, full_at=full_at)
        if refused:
            return self._refuse(refused)
        self._keep(granted)
        return None

    def _refuse(self, refused: list[tuple[Refused, Charge]]) -> Refusal:
        """Say when to ask again: when the last of the refusing buckets has a token, and nobody else is told to come."""
        buckets = {want.bucket: replace(self._held[want.bucket], full_at=answer.full_at) for answer, want in refused}
        last, want = max(refused, key=lambda one: one[0].until)
        until, bucket = last.until, buckets[want.bucket]
        if not want.urgent:
            until = budget.promise(bucket.promised_at, until, self._now, want.limit)
            buckets[want.bucket] = replace(bucket, promised_at=until)
        self._keep(buckets)
        return Refusal(want.bucket, until)

    def _keep(self, buckets: Mapping[str, "_Bucket"]) -> None:
        self._held |= buckets
        self._changed |= buckets

    def write(self) -> None:
        """Write what has changed."""
        _write(self._tx, self._directory_url, list(self._changed.values()))


def spend(
    tx: Connection, directory_url: str, charges: Sequence[Charge], account_id: str, now: datetime
) -> Refusal | None:
    """Take a token for each of `charges`, or none at all; see `Ledger`."""
    ledger = Ledger(tx, directory_url, charges, account_id, now)
    refusal = ledger.spend(charges)
    ledger.write()
    return refusal


def charge(tx: Connection, directory_url: str, bucket: str, account_id: str, limit: Limit, now: datetime) -> None:
    """Take a token without asking: what it is for has happened. Several in one transaction: sorted by bucket."""
    held = _lock(tx, directory_url, account_id, [bucket], now)[bucket]
    _write(tx, directory_url, [replace(held, full_at=budget.debit(held.full_at, now, limit))])


def give_back(tx: Connection, directory_url: str, charges: Sequence[Charge], account_id: str, now: datetime) -> None:
    """Return a token for each of `charges`: what they were taken for has not come about."""
    wants = sorted(charges, key=lambda want: budget.turn(want.bucket))
    if not wants:
        return
    held = _lock(tx, directory_url, account_id, [want.bucket for want in wants], now)
    buckets = [held[want.bucket] for want in wants]
    _write(tx, directory_url, [
        replace(bucket, full_at=budget.credit(bucket.full_at, want.limit))
        for bucket, want in zip(buckets, wants, strict=True)
    ])  # fmt: skip


def forget_full(tx: Connection, before: datetime, limit: int) -> int:
    """Delete at most `limit` buckets that were full `before` then, the longest first; return how many.

    A full bucket is as good as none. One that somebody asks right now is left alone.
    """
    key = [*rate_buckets.primary_key]
    full = select(*key).where(rate_buckets.c.full_at < before).order_by(rate_buckets.c.full_at).limit(limit)
    free = full.with_for_update(skip_locked=True)
    return tx.execute(delete(rate_buckets).where(tuple_(*key).in_(free))).rowcount


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A locked row."""

    account: str
    bucket: str
    full_at: datetime
    promised_at: datetime | None


def _lock(tx: Connection, directory_url: str, account_id: str, buckets: list[str], now: datetime) -> dict[str, _Bucket]:
    """Lock these buckets in the given order; one that was never used is full."""
    if not buckets:
        return {}
    rows = [[account_id if budget.is_per_account(bucket) else "", bucket] for bucket in buckets]
    locked = _LOCK[tx.dialect.name].fetch(tx, of_ca=directory_url, rows=rows, now=now)
    return {one.bucket: one for one in (to_value(_Bucket, row) for row in locked)}


def _locking(rows: str) -> Prepared:
    """Return the statement that locks the buckets of a SELECT, and inserts those that are not there.

    One for both: between two of them another transaction could insert the row, or delete it, and what is not there
    cannot be locked.
    """
    statement = text(f"""
        INSERT INTO rate_buckets (directory_url, account, bucket, full_at)
        SELECT :of_ca, account, bucket, :now FROM ({rows}) AS asked WHERE true ORDER BY turn
        ON CONFLICT (directory_url, account, bucket) DO UPDATE SET bucket = rate_buckets.bucket
        RETURNING account, bucket, full_at, promised_at
    """)  # noqa: S608 - one of the two below
    bound = (bindparam("of_ca", type_=Text()), bindparam("rows", type_=Json), bindparam("now", type_=UtcTime()))
    return Prepared(statement.bindparams(*bound).columns(*columns_of(_Bucket, rate_buckets)))


_LOCK = {
    "sqlite": _locking(
        "SELECT json_extract(value, '$[0]') AS account, json_extract(value, '$[1]') AS bucket, key AS turn"
        " FROM json_each(:rows)"
    ),
    "postgresql": _locking(
        "SELECT value ->> 0 AS account, value ->> 1 AS bucket, turn"
        " FROM jsonb_array_elements(:rows) WITH ORDINALITY AS listed (value, turn)"
    ),
}


def _write(tx: Connection, directory_url: str, buckets: list[_Bucket]) -> None:
    _KEEP.run(tx, [{"of_ca": directory_url, **_bound(bucket)} for bucket in buckets])


_KEEP = Prepared(
    update(rate_buckets)
    .where(
        rate_buckets.c.directory_url == bindparam("of_ca"),
        rate_buckets.c.account == bindparam("the_account"),
        rate_buckets.c.bucket == bindparam("the_bucket"),
    )
    .values(full_at=bindparam("the_full_at"), promised_at=bindparam("the_promised_at"))
)


def _bound(bucket: _Bucket) -> dict[str, Any]:
    return {f"the_{field.name}": getattr(bucket, field.name) for field in fields(_Bucket)}
