"""Renewed means served: a lineage is served when every live node proved that it presents the new leaf."""

from datetime import datetime, timedelta

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.store import lineages, nodes
from certworker.store.database import Database
from certworker.store.lineages import Unserved
from certworker.store.nodes import NodeStatus

_PAGE = 500
OVERDUE = timedelta(minutes=5)
"""A certificate that some node does not serve so long after it came is an alert."""


def verify(db: Database, clock: Clock, silent: timedelta) -> int:
    """Note as served what every node heard of within `silent` has proved; return how many."""
    live = db.read(lambda tx: nodes.live(tx, silent))
    if not live:
        return 0
    served, after = 0, ""
    while True:
        page = db.read(lambda tx: lineages.unserved(tx, after, _PAGE))  # noqa: B023 - called at once
        proved = [unserved for unserved in page if not any(missing(unserved, node) for node in live)]
        if proved:
            db.write(lambda tx: _note(tx, proved, clock()))  # noqa: B023
        served += len(proved)
        if len(page) < _PAGE:
            return served
        after = page[-1].lineage_id


def count_overdue(db: Database, clock: Clock) -> int:
    """Return how many certificates should be served by now and are not; 0 where there never was a node."""

    def count(tx: Connection) -> int:
        return lineages.count_unserved(tx, clock() - OVERDUE) if nodes.is_any(tx) else 0

    return db.read(count)


def missing(unserved: Unserved, node: NodeStatus) -> str | None:
    """Return why this node does not count as serving the certificate, None if it does."""
    why = node.unserved.get(unserved.certificate_id)
    if why is not None:
        return f"{node.node_id}: {why}"
    if node.revision < unserved.revision:
        return f"{node.node_id}: has not proved it yet"
    presented = node.fingerprints.get(unserved.certificate_id)
    if presented is not None and presented != unserved.fingerprint:
        return f"{node.node_id}: presents another certificate"
    return None


def _note(tx: Connection, proved: list[Unserved], now: datetime) -> None:
    for unserved in proved:
        lineages.record_served(tx, unserved, now)
