"""What a node is given: a version, and certificates with their keys opened, as far as it may have them.

The embedded node takes the published version and every certificate. A node on another machine takes the
version that is released to it, and the certificates that its listeners can answer with.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

from sqlalchemy import Connection

from certworker.core.certificate import normalise_pair
from certworker.core.delivery import Canary, Scope, Standing, scope_of, why_held_back
from certworker.core.rollout import CertificateChanges, Cursor, NodeCertificate
from certworker.errors import InputError, SealError
from certworker.store import (
    certificates,
    counters,
    enrolments,
    gateway,
    lineages,
    nodes,
    settings_kv,
    thumbprints,
    versions,
)
from certworker.store.certificates import StoredCertificate
from certworker.store.database import Database
from certworker.store.seal import Sealer

PAGE = 500
"""Certificates in one answer: with their keys some 3 MB."""
_REMEMBERED = 100
"""Versions whose scope is remembered; a fleet serves two or three."""


def look(db: Database, silent: timedelta) -> Standing:
    """Return where the control plane is, and release the published version when its canaries have proved it.

    Costs some index probes, and a write for each version.
    """
    standing = db.read(_standing)
    if standing.published_id in (None, standing.released_id) or db.read(lambda tx: held_back(tx, silent)) is not None:
        return standing
    return db.write(lambda tx: _release(tx, silent))


def _release(tx: Connection, silent: timedelta) -> Standing:
    # Whoever looked before another version was published must not write after it: nodes would go back to the older one.
    versions.lock(tx)
    standing = _standing(tx)
    if standing.published_id in (None, standing.released_id) or held_back(tx, silent) is not None:
        return standing  # another worker was faster
    if standing.released_id is not None:
        settings_kv.put(tx, settings_kv.RELEASED_BEFORE, standing.released_id)
    settings_kv.put(tx, settings_kv.RELEASED_VERSION, standing.published_id)
    return replace(standing, released_id=standing.published_id)


def _standing(tx: Connection) -> Standing:
    return Standing(
        published_id=versions.published_id(tx),
        released_id=settings_kv.find(tx, settings_kv.RELEASED_VERSION),
        epoch=counters.value(tx, counters.EPOCH),
        revision=counters.value(tx, counters.REVISION),
    )


def held_back(tx: Connection, silent: timedelta) -> str | None:
    """Return why nodes that are no canaries do not get the published version yet; None if they do."""
    published_id = versions.published_id(tx)
    if published_id is None or published_id == settings_kv.find(tx, settings_kv.RELEASED_VERSION):
        return None
    names = [node.name for node in enrolments.list_present(tx) if node.canary]
    live = {node.node_id: node.version_id for node in nodes.live(tx, silent)} if names else {}
    return why_held_back(published_id, [Canary(name, name in live, live.get(name)) for name in names])


class Scopes:
    """Which certificates a node needs to serve a version; each is read once, because a version never changes."""

    def __init__(self) -> None:
        self._known: dict[str, Scope | None] = {}

    def of(self, tx: Connection, version_ids: Iterable[str | None]) -> list[Scope]:
        """Return the scopes of these versions, as far as there are such and this release can read them."""
        scopes = (self._find(tx, version_id) for version_id in version_ids if version_id is not None)
        return [scope for scope in scopes if scope is not None]

    def _find(self, tx: Connection, version_id: str) -> Scope | None:
        if version_id not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[version_id] = _read_scope(tx, version_id)
        return self._known[version_id]


def _read_scope(tx: Connection, version_id: str) -> Scope | None:
    from certworker.core.snapshot import read_snapshot  # with pydantic: slow to import, and without nodes not needed

    found = versions.find_by_id(tx, version_id)
    try:
        return None if found is None else scope_of(read_snapshot(found.snapshot_json))
    except InputError:  # whoever is to serve it says so
        return None


def read_changes(
    tx: Connection, sealer: Sealer, cursor: Cursor, scope: Scope, *, continued: bool = False, limit: int = PAGE
) -> CertificateChanges:
    """Return a page of what changed after `cursor`; from the beginning if the cursor is of another epoch or scope.

    `continued`: the pages before it began with a `complete` one (`core.delivery.collect_changes`).
    """
    epoch = counters.value(tx, counters.EPOCH)
    complete = (cursor.epoch, cursor.scope) != (epoch, scope.tag)
    if not continued:
        complete = complete or cursor.revision < counters.value(tx, counters.FORGOTTEN)
    after = 0 if complete else cursor.revision
    # The counter first: what commits between the two statements is delivered twice then, not never.
    newest = counters.value(tx, counters.REVISION)
    page, rows = certificates.changed_since(tx, after, limit), thumbprints.changed_since(tx, after, limit)
    # What the shorter of two full pages ends with is where both have everything.
    ends = [full[-1].revision or after for full in (page, rows) if len(full) == limit]
    more, end = bool(ends), min(ends, default=newest)
    page = [one for one in page if (one.revision or 0) <= end]
    rows = [row for row in rows if row.revision <= end]
    changed, gone = _sort(tx, sealer, page, scope)
    if not complete:
        tombstones = set(certificates.removed_between(tx, after, end))
        gone |= tombstones - {one.id for one in page}  # a row that is there again is newer than its tombstone
    removed = frozenset() if complete else frozenset(gone)
    return CertificateChanges(
        Cursor(epoch, end, scope.tag), tuple(changed), removed, complete,
        thumbprints={row.host: row.thumbprint for row in rows if row.thumbprint is not None},
        removed_hosts=frozenset() if complete else frozenset(row.host for row in rows if row.thumbprint is None),
        more=more,
    )  # fmt: skip


def _sort(
    tx: Connection, sealer: Sealer, page: Sequence[StoredCertificate], scope: Scope
) -> tuple[list[NodeCertificate], set[str]]:
    """Return what is to be served, and the ids of what is not, or not by nodes of this scope."""
    active = [one for one in page if one.status == "active"]
    linked = lineages.policy_ids_of(tx, {one.lineage_id for one in active if one.lineage_id})
    policies_of = _policy_ids(tx, active, linked)
    allowed = [one for one in active if scope.covers(policies_of[one.id])]
    changed = [_open(sealer, one, policies_of[one.id], linked) for one in allowed]
    gone = {one.id for one in page} - {one.id for one in allowed}
    return [one for one in changed if one is not None], gone


Linked = Mapping[str | None, list[str]]
"""The policies that name a lineage, by its id."""


def _policy_ids(tx: Connection, page: Sequence[StoredCertificate], linked: Linked) -> dict[str, frozenset[str]]:
    """Return the policies that want each of these, by the certificate's id.

    Without any, those that name what it is for: it may serve for them until theirs is there.
    """
    found = {one.id: frozenset(linked.get(one.lineage_id, ())) for one in page}
    others = [one for one in page if not found[one.id]]
    if others:
        naming = gateway.policies_naming(tx, (name for one in others for name in one.dns_names or ()))
        found |= {one.id: frozenset().union(*(naming.get(name, ()) for name in one.dns_names or ())) for one in others}
    return found


def _open(
    sealer: Sealer, certificate: StoredCertificate, policy_ids: frozenset[str], linked: Linked
) -> NodeCertificate | None:
    try:
        key_pem = sealer.open(certificate.key_pem, table="certificates", column="key_pem", row_id=certificate.id)
        chain_pem, key_pem = normalise_pair(certificate.cert_pem, key_pem)
    except (SealError, InputError):
        return None  # reconcile flips it to `error` when the row is noted
    return NodeCertificate(
        certificate.id, policy_ids, tuple(certificate.dns_names or ()), chain_pem, key_pem,
        certificate.fingerprint or "", certificate.expires_at, certificate.revision or 0,
        wanted=certificate.lineage_id is None or certificate.lineage_id in linked,
    )  # fmt: skip
