"""Renewed means served: a lineage is served when every live node proved that it presents the new leaf.

Or another one, for all of its names, that lasts longer. One that no listener names its policy is served by
nobody, whatever the nodes say.
"""

from collections.abc import Iterable
from datetime import timedelta

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.steps.deliver import Scopes
from certworker.store import enrolments, lineages, nodes, settings_kv, versions
from certworker.store.database import Database
from certworker.store.lineages import Unserved
from certworker.store.nodes import NodeStatus

_PAGE = 500
OVERDUE = timedelta(minutes=5)
"""A certificate that some node does not serve so long after it came is an alert."""


NOWHERE = "no https listener of the version that nodes are given names its policy"


def verify(db: Database, clock: Clock, scopes: Scopes, silent: timedelta) -> int:
    """Note as served what every node heard of within `silent` has proved; return how many."""
    if db.read(lambda tx: nodes.newest_heartbeat(tx, silent)) is None:
        return 0
    served, after, full = 0, "", True
    live: list[NodeStatus] | None = None
    while full and (page := db.read(lambda tx: lineages.unserved(tx, after, _PAGE))):  # noqa: B023 - called at once
        live = db.read(lambda tx: nodes.live(tx, silent)) if live is None else live
        ids = [unserved.lineage_id for unserved in page]
        nowhere = db.read(lambda tx: unlisted(tx, ids, scopes))  # noqa: B023
        proved = [one for one in page if one.lineage_id not in nowhere and _is_proved(one, live)]
        if proved:
            db.write(lambda tx: lineages.record_served(tx, proved, clock()))  # noqa: B023
        served += len(proved)
        after, full = page[-1].lineage_id, len(page) == _PAGE
    return served


def _is_proved(unserved: Unserved, live: list[NodeStatus]) -> bool:
    return bool(live) and not any(missing(unserved, node) for node in live)


def count_overdue(db: Database, clock: Clock) -> int:
    """Return how many certificates should be served by now and are not; 0 where there never was a node."""

    def count(tx: Connection) -> int:
        return lineages.count_unserved(tx, clock() - OVERDUE) if nodes.is_any(tx) else 0

    return db.read(count)


def unlisted(tx: Connection, lineage_ids: Iterable[str], scopes: Scopes) -> set[str]:
    """Return the lineages among these whose policies no https listener names of the version that nodes are given."""
    asked = scopes.of(tx, _to_be_served(tx))
    linked = lineages.policy_ids_of(tx, lineage_ids)
    return {
        lineage_id
        for lineage_id, policy_ids in linked.items()
        if lineage_id is not None and not all(scope.covers(policy_ids) for scope in asked)
    }


def _to_be_served(tx: Connection) -> set[str | None]:
    """Return the published version, and what enrolled nodes get as long as canaries try that one.

    There is none where what the proxies serve is not ours.
    """
    follow = any(not node.canary for node in enrolments.list_present(tx))
    return {versions.published_id(tx), settings_kv.find(tx, settings_kv.RELEASED_VERSION) if follow else None}


def missing(unserved: Unserved, node: NodeStatus) -> str | None:
    """Return why this node does not count as serving the certificate, None if it does."""
    why = node.unserved.get(unserved.certificate_id)
    if why is not None:
        return f"{node.node_id}: {why}"
    if node.revision < unserved.revision:
        return f"{node.node_id}: has not proved it yet"
    if node.untold:
        return f"{node.node_id}: has more that it does not serve than it can name"
    presented = node.fingerprints.get(unserved.certificate_id)
    if presented is not None and presented != unserved.fingerprint:
        return f"{node.node_id}: presents another certificate"
    return None
