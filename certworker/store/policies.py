"""`tls_policies`: which names are wanted, and how they stand."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Text, delete, exists, func, select, type_coerce, update
from sqlalchemy.dialects.postgresql import ARRAY

from certworker.store import audit
from certworker.store.rows import columns_of, insert_new, new_id, pages, to_value
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


def lock(tx: Connection, policy_id: str) -> Policy | None:
    """Return one policy, locked until the commit."""
    query = select(*columns_of(Policy, tls_policies)).where(tls_policies.c.id == policy_id).with_for_update()
    row = tx.execute(query).first()
    return None if row is None else to_value(Policy, row)


def list_all(tx: Connection, *, after: str = "", limit: int = 1000) -> list[Policy]:
    """Return a page of policies by id, those after `after`."""
    query = select(*columns_of(Policy, tls_policies)).order_by(tls_policies.c.id).limit(limit)
    if after:
        query = query.where(tls_policies.c.id > after)
    return [to_value(Policy, row) for row in tx.execute(query)]


def wanting(tx: Connection, dns_name: str) -> list[Policy]:
    """Return the policies whose `domains` has exactly this name, by id (GIN index on PostgreSQL)."""
    if tx.dialect.name == "postgresql":
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


def record_refused(tx: Connection, policy_id: str, refused: list[dict[str, str]], now: datetime) -> None:
    """Keep which of the wanted names cannot be ordered, and why."""
    tx.execute(
        update(tls_policies).where(tls_policies.c.id == policy_id).values(refused_names=refused or None, updated_at=now)
    )


def refresh_status(tx: Connection, policy_id: str, now: datetime) -> str | None:
    """Bring a policy's status up to date, with an audit row if it flips; return it, None if it is gone.

    `error` if any wanted name is refused, or lacks a valid certificate and its last attempt failed;
    `pending` if any lacks one; else `active`.
    """
    row = tx.execute(
        select(*columns_of(Policy, tls_policies)).where(tls_policies.c.id == policy_id).with_for_update()
    ).first()
    if row is None:
        return None
    policy = to_value(Policy, row)
    status = _manual_status(tx, policy) if policy.mode == "manual" else _auto_status(tx, policy)
    if status != policy.status:
        tx.execute(update(tls_policies).where(tls_policies.c.id == policy_id).values(status=status, updated_at=now))
        after: dict[str, Any] = {"status": status}
        if status == "error":
            after["reason"] = _reason(tx, policy)
        audit.record_flip(tx, "policy", "tls_policies", policy_id, {"status": policy.status}, after, now)
    return status


def _auto_status(tx: Connection, policy: Policy) -> str:
    if policy.refused_names or _lacks(tx, policy.id, "error"):
        return "error"
    return "pending" if _lacks(tx, policy.id, "pending") else "active"


def _lacks(tx: Connection, policy_id: str, lineage_status: str) -> bool:
    link = policy_lineages.c
    query = select(1).where(
        link.policy_id == policy_id, link.lineage_status == lineage_status, link.lineage_status != "active"
    )
    return tx.execute(query.limit(1)).first() is not None


def _manual_status(tx: Connection, policy: Policy) -> str:
    if policy.refused_names:
        return "error"
    names = [name for name in policy.domains if isinstance(name, str)]
    found = _statuses_by_name(tx, names)
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


def _reason(tx: Connection, policy: Policy) -> Any:
    if policy.refused_names:
        return policy.refused_names
    query = (
        select(lineages.c.dns_names, lineages.c.error)
        .join(policy_lineages, policy_lineages.c.lineage_id == lineages.c.id)
        .where(policy_lineages.c.policy_id == policy.id, policy_lineages.c.lineage_status == "error")
        .limit(5)
    )
    return [{"names": names, "error": error} for names, error in tx.execute(query)]
