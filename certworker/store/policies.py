"""`tls_policies`: which names are wanted, and how they stand."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, Text, bindparam, delete, exists, func, select, text, type_coerce, update

from certworker.store import audit
from certworker.store.audit import Flip
from certworker.store.prepared import Prepared
from certworker.store.rows import among, columns_of, insert_new, new_id, pages, to_value
from certworker.store.tables import certificates, lineages, policy_lineages, tls_policies


@dataclass(frozen=True, slots=True)
class Policy:
    """A row of `tls_policies`."""

    id: str
    mode: str
    """`auto` or `manual`."""
    domains: list[Any]
    """As written, by us or by another program: not checked."""
    status: str
    paused_at: datetime | None
    shared: bool
    """One certificate for all its names, instead of one each."""
    refused_names: list[dict[str, str]] | None
    """What of `domains` cannot be ordered: [{"value", "rule"}]."""
    created_at: datetime
    updated_at: datetime

    @property
    def wants(self) -> bool:
        """Whether certificates are issued for it."""
        return self.mode == "auto" and self.paused_at is None


def add(
    tx: Connection, names: list[str], now: datetime, *, mode: str = "auto", shared: bool = False,
    policy_id: str | None = None,
) -> str | None:  # fmt: skip
    """Insert a policy and return its id, None if `policy_id` is there already.

    Who gives the id may be run again after a commit that nobody answered, and adds one policy all the same.
    """
    policy_id = policy_id or new_id()
    added = insert_new(
        tx, tls_policies, id=policy_id, mode=mode, domains=names, status="pending", shared=shared,
        created_at=now, updated_at=now,
    )  # fmt: skip
    return policy_id if added else None


def find(tx: Connection, policy_id: str) -> Policy | None:
    """Return one policy."""
    row = tx.execute(select(*columns_of(Policy, tls_policies)).where(tls_policies.c.id == policy_id)).first()
    return None if row is None else to_value(Policy, row)


def find_all(tx: Connection, ids: list[str]) -> dict[str, Policy]:
    """Return those of these policies that are there, by id."""
    return _read(tx, _FIND, ids)


def lock_all(tx: Connection, ids: list[str]) -> dict[str, Policy]:
    """Return the same, locked until the commit."""
    return _read(tx, _LOCK, sorted(ids))


def _read(tx: Connection, query: Select[Any], ids: list[str]) -> dict[str, Policy]:
    rows = [row for page in pages(ids) for row in tx.execute(query, {"ids": page})]
    return {policy.id: policy for policy in (to_value(Policy, row) for row in rows)}


_AMONG = among(tls_policies.c.id, "ids")
_FIND = select(*columns_of(Policy, tls_policies)).where(_AMONG)
_LOCK = _FIND.order_by(tls_policies.c.id).with_for_update()


def count_names(tx: Connection, ids: list[str]) -> dict[str, int]:
    """Return how many names policies have, by id, without reading them."""
    length = func.cardinality if tx.dialect.name == "postgresql" else func.json_array_length
    query = select(tls_policies.c.id, length(tls_policies.c.domains)).where(_AMONG)
    return {row[0]: row[1] for page in pages(ids) for row in tx.execute(query, {"ids": page})}


def list_all(tx: Connection, *, after: str = "", limit: int = 1000) -> list[Policy]:
    """Return a page of policies by id, those after `after`."""
    query = select(*columns_of(Policy, tls_policies)).order_by(tls_policies.c.id).limit(limit)
    if after:
        query = query.where(tls_policies.c.id > after)
    return [to_value(Policy, row) for row in tx.execute(query)]


def list_ids(tx: Connection, *, after: str = "", limit: int = 1000) -> list[str]:
    """Return the ids of a page of policies, those after `after`."""
    query = select(tls_policies.c.id).order_by(tls_policies.c.id).limit(limit)
    return list(tx.execute(query.where(tls_policies.c.id > after) if after else query).scalars())


def wanting(tx: Connection, dns_name: str) -> list[Policy]:
    """Return the policies whose `domains` has exactly this name, by id (GIN index on PostgreSQL)."""
    if tx.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import ARRAY  # slow to import, and loaded by then

        has_name = type_coerce(tls_policies.c.domains, ARRAY(Text)).contains([dns_name])
    else:
        each = func.json_each(tls_policies.c.domains).table_valued("value")
        has_name = exists(select(1).select_from(each).where(each.c.value == dns_name))
    query = select(*columns_of(Policy, tls_policies)).where(has_name).order_by(tls_policies.c.id)
    return [to_value(Policy, row) for row in tx.execute(query)]


def set_paused(tx: Connection, policy_id: str, paused_at: datetime | None, now: datetime) -> None:
    """Pause a policy (its certificates are served, not renewed), or resume it (None)."""
    tx.execute(update(tls_policies).where(tls_policies.c.id == policy_id).values(paused_at=paused_at, updated_at=now))


def remove(tx: Connection, policy_id: str) -> bool:
    """Delete a policy; say whether there was one. What it alone wanted is not renewed any more."""
    return tx.execute(delete(tls_policies).where(tls_policies.c.id == policy_id)).rowcount == 1


def record_refused(tx: Connection, refused: Mapping[str, list[dict[str, str]]], now: datetime) -> None:
    """Keep which of the wanted names of policies cannot be ordered, and why, by policy id."""
    rows = [{"policy_id": policy_id, "refused": said or None, "now": now} for policy_id, said in refused.items()]
    if rows:
        tx.execute(_SET_REFUSED, rows)


_SET_REFUSED = (
    update(tls_policies)
    .where(tls_policies.c.id == bindparam("policy_id"))
    .values(refused_names=bindparam("refused"), updated_at=bindparam("now"))
)


def refresh_status(tx: Connection, policy_id: str, now: datetime) -> str | None:
    """Bring one policy's status up to date; return it, None if the policy is gone."""
    return refresh_statuses(tx, [policy_id], now).get(policy_id)


def refresh_statuses(tx: Connection, policy_ids: Iterable[str], now: datetime) -> dict[str, str]:
    """Do what `refresh` does, with an audit row for each that flips; return the statuses of those there, by id."""
    refreshed = refresh(tx, policy_ids, now)
    audit.record_flips(tx, refreshed.flips, now)
    return refreshed.statuses


@dataclass(frozen=True, slots=True)
class Refreshed:
    """Policies whose statuses are up to date."""

    statuses: dict[str, str]
    """Of those that are there, by id."""
    flips: list[Flip]
    """The audit rows of those that were not."""


def refresh(tx: Connection, policy_ids: Iterable[str], now: datetime) -> Refreshed:
    """Bring the statuses of policies up to date; whoever calls writes the audit rows.

    `error` if any wanted name is refused, or lacks a valid certificate and its last attempt failed;
    `pending` if any lacks one; else `active`. Locks the policies: whoever locks lineages too does that before.
    """
    refreshed = Refreshed({}, [])
    for page in pages(sorted(set(policy_ids))):
        locked = [_Standing(*row) for row in _LOCK_STANDINGS.fetch(tx, ids=page)]
        known = _known_statuses(tx, locked)
        changed = {one.id: known[one.id] for one in locked if known.get(one.id, one.status) != one.status}
        _set_statuses(tx, changed, now)
        changed |= _judge(tx, [one.id for one in locked if one.id not in known], now)
        refreshed.statuses.update((one.id, changed.get(one.id, one.status)) for one in locked)
        refreshed.flips.extend(_flip(tx, one, changed[one.id]) for one in locked if one.id in changed)
    return refreshed


@dataclass(frozen=True, slots=True)
class _Standing:
    """What a policy's status is judged by, but for its domains, which may be thousands."""

    id: str
    mode: str
    status: str
    refused_names: list[dict[str, str]] | None


_LOCK_STANDINGS = Prepared(
    select(*columns_of(_Standing, tls_policies)).where(_AMONG).order_by(tls_policies.c.id).with_for_update()
)
_LACKING = text("policy_lineages.lineage_status <> 'active'")
"""Word for word as in the partial index, or SQLite reads every link of the policy instead."""
_WORST = (
    select(func.min(policy_lineages.c.lineage_status))  # "error" comes before "pending"
    .where(policy_lineages.c.policy_id == tls_policies.c.id, _LACKING)
    .scalar_subquery()
)
_JUDGED = func.coalesce(_WORST, "active")
_JUDGE = Prepared(
    update(tls_policies)
    .where(_AMONG, tls_policies.c.status != _JUDGED)
    .values(status=_JUDGED, updated_at=bindparam("now"))
    .returning(tls_policies.c.id, tls_policies.c.status)
)
_READ_DOMAINS = select(tls_policies.c.id, tls_policies.c.domains).where(_AMONG)
_SET_STATUS = update(tls_policies).where(_AMONG).values(status=bindparam("to"), updated_at=bindparam("now"))


def _judge(tx: Connection, ids: list[str], now: datetime) -> dict[str, str]:
    """Give locked policies the status that their lineages say; return what has changed.

    It costs one look-up in an index for each, however many lineages they have. Not part of the statement that locks:
    that one sees links as they were before it waited.
    """
    if not ids:
        return {}
    return {row[0]: row[1] for row in _JUDGE.fetch(tx, ids=ids, now=now)}


def _set_statuses(tx: Connection, statuses: Mapping[str, str], now: datetime) -> None:
    for status in sorted(set(statuses.values())):
        ids = [policy_id for policy_id, its in statuses.items() if its == status]
        tx.execute(_SET_STATUS, {"ids": ids, "to": status, "now": now})


def _flip(tx: Connection, policy: _Standing, status: str) -> Flip:
    after = {"status": status, **_reason(tx, policy, status)}
    return Flip("policy", "tls_policies", policy.id, {"status": policy.status}, after)


def _known_statuses(tx: Connection, locked: list[_Standing]) -> dict[str, str]:
    """Return the statuses that no lineage decides: of policies with refused names, and of those that are manual."""
    known = {one.id: "error" for one in locked if one.refused_names}
    ids = [one.id for one in locked if one.mode == "manual" and not one.refused_names]
    if ids:
        rows = tx.execute(_READ_DOMAINS, {"ids": ids})
        wanted = {row[0]: [name for name in row[1] if isinstance(name, str)] for row in rows}
        found = _statuses_by_name(tx, sorted({name for names in wanted.values() for name in names}))
        known |= {policy_id: _manual_status(names, found) for policy_id, names in wanted.items()}
    return known


def _manual_status(names: list[str], found: dict[str, set[str]]) -> str:
    lacking = [found.get(name, set()) for name in names if "active" not in found.get(name, set())]
    if any(lacking):
        return "error"
    return "pending" if lacking else "active"


def _statuses_by_name(tx: Connection, names: list[str]) -> dict[str, set[str]]:
    """Return the statuses of the certificates for each name: filed under it, or an upload that has it among others."""
    found: dict[str, set[str]] = {}
    for page in pages(names):
        filed = select(certificates.c.domain, certificates.c.status).where(certificates.c.domain.in_(page))
        for domain, status in tx.execute(filed):
            found.setdefault(domain, set()).add(status)
    uploads = select(certificates.c.dns_names, certificates.c.status).where(
        certificates.c.lineage_id.is_(None), certificates.c.dns_names.is_not(None)
    )
    for dns_names, status in tx.execute(uploads):
        for name in dns_names:
            found.setdefault(name, set()).add(status)
    return found


def manual_ids(tx: Connection) -> list[str]:
    """Return the policies whose certificates are uploaded."""
    return list(tx.execute(select(tls_policies.c.id).where(tls_policies.c.mode == "manual")).scalars())


def _reason(tx: Connection, policy: _Standing, status: str) -> dict[str, Any]:
    """Return what the audit row of a flip to `error` says besides."""
    if status != "error":
        return {}
    if policy.refused_names:
        return {"reason": policy.refused_names}
    rows = tx.execute(_READ_REASON, {"policy_id": policy.id})
    return {"reason": [{"names": names, "error": error} for names, error in rows]}


_READ_REASON = (
    select(lineages.c.dns_names, lineages.c.error)
    .join(policy_lineages, policy_lineages.c.lineage_id == lineages.c.id)
    .where(policy_lineages.c.policy_id == bindparam("policy_id"))
    .where(policy_lineages.c.lineage_status == "error", _LACKING)
    .limit(5)
)
