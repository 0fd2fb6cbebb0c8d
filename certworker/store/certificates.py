"""`certificates`: what serves now. One row per lineage, renewed in place, or per uploaded certificate."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from certworker.core.certificate import Leaf
from certworker.store import audit, counters
from certworker.store.audit import Flip
from certworker.store.prepared import Prepared
from certworker.store.rows import among, columns_of, pages, to_value
from certworker.store.tables import certificates, removed_certificates


@dataclass(frozen=True, slots=True)
class StoredCertificate:
    """A row of `certificates`."""

    id: str
    domain: str
    cert_pem: str = field(repr=False)
    key_pem: str = field(repr=False)
    """Sealed, or plain PEM."""
    expires_at: datetime
    status: str
    lineage_id: str | None
    dns_names: list[str] | None
    serial: str | None
    fingerprint: str | None
    issuer: str | None
    not_before: datetime | None
    revision: int | None
    """None: another program wrote it, and reconcile has not seen it."""


_COLUMNS = columns_of(StoredCertificate, certificates)


def find(tx: Connection, certificate_id: str) -> StoredCertificate | None:
    """Return one certificate."""
    row = tx.execute(select(*_COLUMNS).where(certificates.c.id == certificate_id)).first()
    return None if row is None else to_value(StoredCertificate, row)


def lock(tx: Connection, certificate_id: str) -> StoredCertificate | None:
    """Return one certificate, locked until the commit."""
    row = tx.execute(select(*_COLUMNS).where(certificates.c.id == certificate_id).with_for_update()).first()
    return None if row is None else to_value(StoredCertificate, row)


def find_of_lineage(tx: Connection, lineage_id: str) -> StoredCertificate | None:
    """Return a lineage's certificate."""
    row = tx.execute(select(*_COLUMNS).where(certificates.c.lineage_id == lineage_id)).first()
    return None if row is None else to_value(StoredCertificate, row)


@dataclass(frozen=True, slots=True)
class Present:
    """What serves for a lineage until another certificate does."""

    id: str
    dns_names: list[str] | None
    status: str
    serial: str | None


def of_lineages(tx: Connection, lineage_ids: Sequence[str]) -> dict[str, Present]:
    """Return what these lineages have, by lineage."""
    if not lineage_ids:
        return {}
    rows = _OF_LINEAGES.fetch(tx, lineages=lineage_ids)
    return {lineage_id: Present(*row) for lineage_id, *row in rows}


_OF_LINEAGES = Prepared(
    select(certificates.c.lineage_id, *columns_of(Present, certificates)).where(
        among(certificates.c.lineage_id, "lineages")
    )
)


@dataclass(frozen=True, slots=True)
class Activation:
    """A leaf that is to serve for a lineage from now on."""

    certificate_id: str
    """Of the row that is `before`, or a fresh one."""
    before: Present | None
    lineage_id: str
    domain: str
    chain_pem: str
    sealed_key_pem: str = field(repr=False)
    leaf: Leaf


def activate_all(tx: Connection, activations: Sequence[Activation], flips: Sequence[Flip], now: datetime) -> None:
    """Let lineages serve these leaves from the commit on, with their audit rows and those of `flips`.

    The revisions come last.
    """
    audit.record_flips(tx, [*flips, *map(_flip, activations)], now)
    first = counters.next_value(tx, counters.REVISION, len(activations)) - len(activations) + 1
    numbered = list(enumerate(activations, first))
    _ADD.run(tx, [
        {"id": one.certificate_id, "created_at": now, **_serving(one, revision, now)}
        for revision, one in numbered if one.before is None
    ])  # fmt: skip
    _RENEW.run(tx, [
        {"of_id": one.certificate_id, **_serving(one, revision, now)}
        for revision, one in numbered if one.before is not None
    ])  # fmt: skip


_ADD = Prepared(insert(certificates))
_RENEW = Prepared(update(certificates).where(certificates.c.id == bindparam("of_id")))


def _flip(one: Activation) -> Flip:
    was = {} if one.before is None else {"status": one.before.status, "serial": one.before.serial}
    now = {"status": "active", "serial": one.leaf.serial, "fingerprint": one.leaf.fingerprint}
    return Flip("certificate", "certificates", one.certificate_id, was, now)


def _serving(one: Activation, revision: int, now: datetime) -> dict[str, Any]:
    leaf = one.leaf
    return {
        "domain": one.domain, "cert_pem": one.chain_pem, "key_pem": one.sealed_key_pem,
        "expires_at": leaf.validity.not_after, "status": "active", "lineage_id": one.lineage_id,
        "dns_names": list(leaf.dns_names), "serial": leaf.serial, "fingerprint": leaf.fingerprint,
        "issuer": leaf.issuer, "not_before": leaf.validity.not_before, "updated_at": now, "revision": revision,
    }  # fmt: skip


def describe(
    tx: Connection, certificate_id: str, leaf: Leaf, key_pem: str, now: datetime, *, status: str = "active"
) -> None:
    """Complete a row that another program wrote, and give it a revision so that nodes take it over."""
    row = update(certificates).where(certificates.c.id == certificate_id)
    revision = counters.next_value(tx, counters.REVISION)
    tx.execute(
        row.values(
            key_pem=key_pem, dns_names=list(leaf.dns_names), serial=leaf.serial, fingerprint=leaf.fingerprint,
            issuer=leaf.issuer, not_before=leaf.validity.not_before, expires_at=leaf.validity.not_after,
            status=status, revision=revision, updated_at=now,
        )
    )  # fmt: skip


def flip(tx: Connection, certificate: StoredCertificate, status: str, reason: str, now: datetime) -> None:
    """Change a certificate's status, with its audit row and a new revision."""
    record_flip(tx, certificate, status, reason, now)
    set_status(tx, certificate.id, status, now)


def set_status(tx: Connection, certificate_id: str, status: str, now: datetime) -> None:
    """Set a certificate's status, with a new revision."""
    revision = counters.next_value(tx, counters.REVISION)
    row = update(certificates).where(certificates.c.id == certificate_id)
    tx.execute(row.values(status=status, revision=revision, updated_at=now))


def record_flip(tx: Connection, before: StoredCertificate, status: str, reason: str, now: datetime) -> None:
    """Write the audit row of a changed status."""
    after = {"status": status, "reason": reason}
    audit.record_flips(tx, [Flip("certificate", "certificates", before.id, {"status": before.status}, after)], now)


def touch(tx: Connection, lineage_ids: list[str]) -> None:
    """Give the certificates of these lineages new revisions: who wants them has changed, and nodes have to know."""
    ids: list[str] = []
    for page in pages(lineage_ids):
        ids += tx.execute(select(certificates.c.id).where(certificates.c.lineage_id.in_(page))).scalars()
    if not ids:
        return
    first = counters.next_value(tx, counters.REVISION, len(ids)) - len(ids) + 1
    for revision, certificate_id in enumerate(sorted(ids), first):
        tx.execute(update(certificates).where(certificates.c.id == certificate_id).values(revision=revision))


def expired(tx: Connection, now: datetime, limit: int) -> list[StoredCertificate]:
    """Return certificates that are `active` past their end (partial index)."""
    query = (
        select(*_COLUMNS)
        .where(certificates.c.status == "active", certificates.c.expires_at <= now)
        .order_by(certificates.c.expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [to_value(StoredCertificate, row) for row in tx.execute(query)]


def unexpired(tx: Connection, now: datetime, limit: int) -> list[StoredCertificate]:
    """Return certificates that are `expired` before their end (partial index), but for rows not taken over yet."""
    query = (
        select(*_COLUMNS)
        .where(certificates.c.status == "expired", certificates.c.expires_at > now)
        .where(certificates.c.revision.is_not(None))
        .order_by(certificates.c.expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [to_value(StoredCertificate, row) for row in tx.execute(query)]


def not_yet_valid(tx: Connection) -> dict[str, datetime]:
    """Return the uploaded certificates that came too early, and when they become valid. Looks at every row."""
    query = select(certificates.c.id, certificates.c.not_before).where(*_EARLY)
    return {row[0]: row[1] for row in tx.execute(query)}


def came_early(tx: Connection, certificate_id: str) -> bool:
    """Say whether it is one of these."""
    query = select(certificates.c.id).where(certificates.c.id == certificate_id, *_EARLY)
    return tx.execute(query).first() is not None


_EARLY = (
    certificates.c.lineage_id.is_(None),
    certificates.c.status == "error",
    certificates.c.not_before > certificates.c.updated_at,
)


def changed_since(tx: Connection, revision: int, limit: int) -> list[StoredCertificate]:
    """Return a page of what changed after `revision`, in its order."""
    query = select(*_COLUMNS).where(certificates.c.revision > revision).order_by(certificates.c.revision).limit(limit)
    return [to_value(StoredCertificate, row) for row in tx.execute(query)]


def removed_between(tx: Connection, revision: int, end: int) -> list[str]:
    """Return the ids of what was deleted after `revision`, up to `end`."""
    removed = removed_certificates.c
    query = select(removed.certificate_id).where(removed.revision > revision, removed.revision <= end)
    return list(tx.execute(query.order_by(removed.revision)).scalars())


def record_removed(tx: Connection, certificate_id: str, now: datetime) -> None:
    """Leave a tombstone, so that nodes drop a certificate whose row is gone."""
    tx.execute(delete(removed_certificates).where(removed_certificates.c.certificate_id == certificate_id))
    revision = counters.next_value(tx, counters.REVISION)
    tx.execute(insert(removed_certificates).values(certificate_id=certificate_id, revision=revision, removed_at=now))


def forget_removed(tx: Connection, before: datetime) -> int:
    """Delete tombstones older than `before`; return how many.

    A node whose cursor is older than the newest of them would miss it: `counters.FORGOTTEN` tells.
    """
    old = delete(removed_certificates).where(removed_certificates.c.removed_at < before)
    gone = list(tx.execute(old.returning(removed_certificates.c.revision)).scalars())
    counters.raise_to(tx, counters.FORGOTTEN, max(gone, default=0))
    return len(gone)
