"""`config_versions`: draft -> published (at most one) -> archived.

Other programs may write rows of their own there; what they write has no number, and the commands that
name a version by its number do not see it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Text, cast, delete, func, insert, literal, select, update

from certworker.store import counters, settings_kv
from certworker.store.rows import columns_of, new_id, to_value
from certworker.store.tables import config_versions, node_status
from certworker.store.types import seconds_from_now


@dataclass(frozen=True, slots=True)
class VersionRow:
    """What a version is, without what it holds: that may be megabytes."""

    id: str
    number: int | None
    """Grows strictly; None in a row that another program wrote."""
    status: str
    digest: str | None
    restores: int | None
    """The number of the version that this one brought back."""
    created_by: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Version(VersionRow):
    """A row of `config_versions`."""

    snapshot_json: dict[str, Any]


def find_published(tx: Connection) -> Version | None:
    """Return the version that nodes are to serve."""
    return _find(tx, config_versions.c.status == "published")


def published_number(tx: Connection) -> int | None:
    """Return the number of the published version, without reading what it holds."""
    return tx.execute(select(config_versions.c.number).where(config_versions.c.status == "published")).scalar()


def find(tx: Connection, number: int) -> Version | None:
    """Return the version of this number."""
    return _find(tx, config_versions.c.number == number)


def find_by_id(tx: Connection, version_id: str) -> Version | None:
    """Return the version of this id, which need not have a number."""
    return _find(tx, config_versions.c.id == version_id)


def find_newest_draft(tx: Connection) -> VersionRow | None:
    """Return the draft that was made last."""
    drafts = select(*columns_of(VersionRow, config_versions)).where(
        config_versions.c.status == "draft", config_versions.c.number.is_not(None)
    )
    row = tx.execute(drafts.order_by(config_versions.c.number.desc()).limit(1)).first()
    return None if row is None else to_value(VersionRow, row)


def find_before(tx: Connection, number: int, digest: str | None) -> Version | None:
    """Return what was published before the version `number`, and holds something else than `digest`."""
    before = select(*columns_of(Version, config_versions)).where(
        config_versions.c.status == "archived", config_versions.c.number < number
    )
    if digest is not None:
        before = before.where(config_versions.c.digest.is_distinct_from(digest))
    row = tx.execute(before.order_by(config_versions.c.number.desc()).limit(1)).first()
    return None if row is None else to_value(Version, row)


def list_all(tx: Connection) -> list[VersionRow]:
    """Return every version, the newest first; those without a number by when they were written."""
    query = select(*columns_of(VersionRow, config_versions))
    order = config_versions.c.number.desc().nulls_last(), config_versions.c.created_at.desc()
    return [to_value(VersionRow, row) for row in tx.execute(query.order_by(*order))]


def serving(tx: Connection) -> Mapping[str, list[str]]:
    """Return the nodes whose last heartbeat proved a version, by the version's id."""
    rows = select(node_status.c.version_id, node_status.c.node_id).where(node_status.c.version_id.is_not(None))
    nodes: dict[str, list[str]] = {}
    for version_id, node_id in tx.execute(rows.order_by(node_status.c.node_id)):
        nodes.setdefault(version_id, []).append(node_id)
    return nodes


def published_id(tx: Connection) -> str | None:
    """Return the id of the published version, without its content."""
    return tx.execute(select(config_versions.c.id).where(config_versions.c.status == "published")).scalar()


def is_first_within(tx: Connection, within: timedelta) -> bool:
    """Say whether something is published, and nothing was before so much of the database's time."""
    since = seconds_from_now(literal(-int(within.total_seconds())))
    ever = config_versions.c.status.in_(("published", "archived"))
    return bool(tx.execute(select(func.min(config_versions.c.created_at) > since).where(ever)).scalar())


def published_mentions(tx: Connection, word: str) -> bool:
    """Say whether the published version has this word as a value somewhere."""
    text = cast(config_versions.c.snapshot_json, Text)
    published = select(config_versions.c.id).where(config_versions.c.status == "published")
    return tx.execute(published.where(text.contains(f'"{word}"', autoescape=True))).first() is not None


def lock(tx: Connection) -> None:
    """Let no other transaction publish until the commit.

    To be called before the rows are read: whoever read them first could otherwise publish last.
    """
    counters.lock(tx, counters.CONFIG_VERSION)


def add_draft(
    tx: Connection,
    document: dict[str, Any],
    digest: str,
    created_by: str,
    now: datetime,
    *,
    restores: int | None = None,
) -> Version:
    """Store a draft with the next number."""
    version = Version(
        id=new_id(), number=counters.next_value(tx, counters.CONFIG_VERSION), status="draft", digest=digest,
        restores=restores, created_by=created_by, created_at=now, snapshot_json=document,
    )  # fmt: skip
    values = {column.name: getattr(version, column.name) for column in columns_of(Version, config_versions)}
    tx.execute(insert(config_versions).values(**values))
    return version


def publish(tx: Connection, version: Version) -> Version:
    """Archive the published version, let this one take its place, and return it as it is then."""
    published = config_versions.c.status == "published"
    tx.execute(update(config_versions).where(published).values(status="archived"))
    tx.execute(update(config_versions).where(config_versions.c.id == version.id).values(status="published"))
    return replace(version, status="published")


def forget_old(tx: Connection, kept: int) -> int:
    """Delete all but the newest `kept` archived versions and drafts, and return how many went.

    What a node serves stays, and what nodes are to serve while the canaries have a newer one.
    """
    numbered = config_versions.c.number.is_not(None), config_versions.c.status != "published"
    newest = select(config_versions.c.number).where(*numbered).order_by(config_versions.c.number.desc()).limit(kept)
    served = select(node_status.c.version_id).where(node_status.c.version_id.is_not(None))
    released = settings_kv.find(tx, settings_kv.RELEASED_VERSION) or new_id()
    old = delete(config_versions).where(
        *numbered,
        config_versions.c.id != released,
        config_versions.c.number.not_in(newest),
        config_versions.c.id.not_in(served),
    )
    return tx.execute(old).rowcount


def _find(tx: Connection, condition: Any) -> Version | None:
    row = tx.execute(select(*columns_of(Version, config_versions)).where(condition)).first()
    return None if row is None else to_value(Version, row)
