"""What a node is given: certificates with their keys opened, as far as it may have them.

The embedded node and the node API both read here.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection

from certworker.core.certificate import normalise_pair
from certworker.core.delivery import Scope
from certworker.core.rollout import CertificateChanges, Cursor, NodeCertificate
from certworker.errors import InputError, SealError
from certworker.store import certificates, counters, lineages, policies
from certworker.store.certificates import StoredCertificate
from certworker.store.seal import Sealer

PAGE = 500
"""Certificates in one answer: with their keys some 3 MB."""


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
    page = certificates.changed_since(tx, after, limit)
    more = len(page) == limit
    end = (page[-1].revision or after) if more else newest
    changed, gone = _sort(tx, sealer, page, scope)
    if not complete:
        tombstones = {name for name, revision in certificates.removed_since(tx, after) if revision <= end}
        gone |= tombstones - {one.id for one in page}  # a row that is there again is newer than its tombstone
    return CertificateChanges(
        Cursor(epoch, end, scope.tag), tuple(changed), frozenset() if complete else frozenset(gone), complete, more
    )


def _sort(
    tx: Connection, sealer: Sealer, page: Sequence[StoredCertificate], scope: Scope
) -> tuple[list[NodeCertificate], set[str]]:
    """Return what is to be served, and the ids of what is not, or not by nodes of this scope."""
    active = [one for one in page if one.status == "active"]
    linked = lineages.policy_ids_of(tx, {one.lineage_id for one in active if one.lineage_id})
    policies_of = {one.id: _policy_ids(tx, one, linked) for one in active}
    allowed = [one for one in active if scope.covers(policies_of[one.id])]
    changed = [_open(sealer, one, policies_of[one.id], linked) for one in allowed]
    gone = {one.id for one in page} - {one.id for one in allowed}
    return [one for one in changed if one is not None], gone


Linked = Mapping[str | None, list[str]]
"""The policies that name a lineage, by its id."""


def _policy_ids(tx: Connection, certificate: StoredCertificate, linked: Linked) -> frozenset[str]:
    """Return the policies that want it.

    Without any, those that name what it is for: it may serve for them until theirs is there.
    """
    if wanting := linked.get(certificate.lineage_id):
        return frozenset(wanting)
    return frozenset(policy.id for name in certificate.dns_names or () for policy in policies.wanting(tx, name))


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
