"""What is due becomes a queued issuance. Costs what is due, not what exists."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.core.renewal import Decision, Reason, Renew, Wait, decide_renewal, is_urgent
from certworker.store import issuances, lineages, settings_kv
from certworker.store.database import Database
from certworker.store.lineages import Lineage

_PAGE = 500
LOOK_AGAIN = timedelta(hours=1)
"""A lineage whose issuance is under way is looked at again after this, in case its end was missed."""


@dataclass(slots=True)
class ScanReport:
    """What a scan found."""

    looked_at: int = 0
    queued: int = 0


def scan(db: Database, clock: Clock, going: Callable[[], bool] = lambda: True) -> ScanReport:
    """Queue an issuance for everything that is due now, while `going`."""
    report = ScanReport()
    while going() and db.write(lambda tx: _scan_page(tx, clock(), report)) == _PAGE:
        pass
    db.write(lambda tx: settings_kv.put(tx, settings_kv.LAST_SCAN_AT, clock().isoformat()))
    return report


def _scan_page(tx: Connection, now: datetime, report: ScanReport) -> int:
    due = lineages.due(tx, now, _PAGE)
    for lineage in due:
        report.looked_at += 1
        report.queued += _scan_one(tx, lineage, now)
    return len(due)


def _scan_one(tx: Connection, lineage: Lineage, now: datetime) -> bool:
    if not lineages.is_wanted(tx, lineage.id):
        lineages.set_next_check(tx, lineage.id, None, now)
        return False
    decision = decide(tx, lineage, now)
    if not isinstance(decision, Renew):
        lineages.set_next_check(tx, lineage.id, decision.until, now)
        return False
    return queue(tx, lineage, decision.reason, now) is not None


def decide(tx: Connection, lineage: Lineage, now: datetime) -> Decision:
    """Say whether a lineage is due: for its certificate's age, or for a name that it has to try again."""
    suggested = lineage.window_start is not None
    decision = decide_renewal(now, lineage.validity, lineage.renew_at, suggested=suggested)
    if isinstance(decision, Renew) or len(lineage.dns_names) == 1:
        return decision
    probes = [name.probe_at for name in lineages.left_out(tx, lineage.id)]
    if not probes:
        return decision
    return Renew(Reason.NAMES_MISSING) if min(probes) <= now else Wait(min(decision.until, *probes))


def queue(tx: Connection, lineage: Lineage, reason: Reason, now: datetime) -> str | None:
    """Queue an issuance unless one is open; return its id."""
    lineages.set_next_check(tx, lineage.id, now + LOOK_AGAIN, now)
    urgent = is_urgent(now, lineage.validity)
    queued = issuances.queue(tx, lineage.id, reason, now, urgent=urgent)
    if queued is None and urgent:
        issuances.mark_urgent(tx, lineage.id)
    return queued
