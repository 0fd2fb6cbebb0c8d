"""`config_versions`: draft -> published (at most one) -> archived."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update

from certworker.store import counters
from certworker.store.rows import columns_of, new_id, to_value
from certworker.store.tables import config_versions


@dataclass(frozen=True, slots=True)
class Version:
    """A row of `config_versions`."""

    id: str
    number: int | None
    """Grows strictly; None in a row that another program wrote."""
    digest: str | None
    status: str
    snapshot_json: dict[str, Any]
    created_by: str
    created_at: datetime


def find_published(tx: Connection) -> Version | None:
    """Return the version that nodes are to serve."""
    query = select(*columns_of(Version, config_versions)).where(config_versions.c.status == "published")
    row = tx.execute(query).first()
    return None if row is None else to_value(Version, row)


def lock(tx: Connection) -> None:
    """Let no other transaction publish until the commit.

    To be called before the rows are read: whoever read them first could otherwise publish last.
    """
    counters.lock(tx, counters.CONFIG_VERSION)


def publish(tx: Connection, document: dict[str, Any], digest: str, created_by: str, now: datetime) -> Version:
    """Archive the published version and publish this one in its place."""
    # First, because it locks: two publishers would archive the same version and then both insert theirs.
    number = counters.next_value(tx, counters.CONFIG_VERSION)
    published = config_versions.c.status == "published"
    tx.execute(update(config_versions).where(published).values(status="archived"))
    version = Version(
        id=new_id(), number=number, digest=digest, status="published",
        snapshot_json=document, created_by=created_by, created_at=now,
    )  # fmt: skip
    tx.execute(
        insert(config_versions).values(
            id=version.id, number=version.number, digest=digest, status="published", snapshot_json=document,
            created_by=created_by, created_at=now,
        )
    )  # fmt: skip
    return version
