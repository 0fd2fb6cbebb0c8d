"""`thumbprints`: what proxies answer HTTP-01 challenges with by themselves, host by host (RFC 8555 §8.1).

Rows travel to the nodes by revision, as certificates do; one that is taken away stays as a row without a
thumbprint until every node must have heard of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, select

from certworker.store import counters
from certworker.store.rows import columns_of, pages, put_rows, to_value
from certworker.store.tables import lineage_names, policy_lineages, thumbprints


@dataclass(frozen=True, slots=True)
class Thumbprint:
    """A row of `thumbprints`."""

    host: str
    thumbprint: str | None
    """Of the account whose challenges are answered for this host; None: of none any more."""
    revision: int


_COLUMNS = columns_of(Thumbprint, thumbprints)


def of_hosts(tx: Connection, hosts: Sequence[str]) -> dict[str, Thumbprint]:
    """Return the rows of these hosts."""
    found = [
        to_value(Thumbprint, row)
        for page in pages(list(hosts))
        for row in tx.execute(select(*_COLUMNS).where(thumbprints.c.host.in_(page)))
    ]
    return {row.host: row for row in found}


def changed_since(tx: Connection, revision: int, limit: int) -> list[Thumbprint]:
    """Return a page of what changed after `revision`, in its order."""
    query = select(*_COLUMNS).where(thumbprints.c.revision > revision).order_by(thumbprints.c.revision).limit(limit)
    return [to_value(Thumbprint, row) for row in tx.execute(query)]


def keep(tx: Connection, lineage_ids: Sequence[str], thumbprint: str | None, now: datetime) -> int:
    """Let the hosts of these lineages answer with `thumbprint`, those that no policy wants with none.

    Returns how many rows changed. The last statements before the commit, for the revision's sake.
    """
    hosts = _hosts(tx, lineage_ids)
    wanted = _wanted_among(tx, hosts) if thumbprint is not None else set()
    there = of_hosts(tx, hosts)
    shall = {host: thumbprint if host in wanted else None for host in hosts}
    changed = [host for host, value in shall.items() if value != (there[host].thumbprint if host in there else None)]
    if changed:
        first = counters.next_value(tx, counters.REVISION, len(changed)) - len(changed) + 1
        rows = [
            {"host": host, "thumbprint": shall[host], "revision": revision, "updated_at": now}
            for revision, host in enumerate(changed, first)
        ]
        put_rows(tx, thumbprints, rows)
    return len(changed)


def forget_removed(tx: Connection, before: datetime) -> int:
    """Delete rows without a thumbprint that are older than `before`; return how many.

    A node whose cursor is older than the newest of them would miss it: `counters.FORGOTTEN` tells.
    """
    old = delete(thumbprints).where(thumbprints.c.thumbprint.is_(None), thumbprints.c.updated_at < before)
    gone = list(tx.execute(old.returning(thumbprints.c.revision)).scalars())
    counters.raise_to(tx, counters.FORGOTTEN, max(gone, default=0))
    return len(gone)


def _hosts(tx: Connection, lineage_ids: Sequence[str]) -> list[str]:
    found: set[str] = set()
    for page in pages(list(lineage_ids)):
        query = select(lineage_names.c.dns_name).where(lineage_names.c.lineage_id.in_(page)).distinct()
        found |= set(tx.execute(query).scalars())
    return sorted(host for host in found if not host.startswith("*."))


def _wanted_among(tx: Connection, hosts: list[str]) -> set[str]:
    found: set[str] = set()
    for page in pages(hosts):
        query = (
            select(lineage_names.c.dns_name)
            .join(policy_lineages, policy_lineages.c.lineage_id == lineage_names.c.lineage_id)
            .where(lineage_names.c.dns_name.in_(page))
            .distinct()
        )
        found |= set(tx.execute(query).scalars())
    return found
