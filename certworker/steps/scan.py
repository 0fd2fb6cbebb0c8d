"""What is due becomes a queued issuance. Costs what is due, not what exists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.core.renewal import Decision, Reason, Renew, Wait, decide_renewal, is_urgent
from certworker.store import issuances, lineages, settings_kv
from certworker.store.database import Database
from certworker.store.lineages import LeftOut, Planned

_PAGE = 500
LOOK_AGAIN = timedelta(hours=1)
"""A lineage whose issuance is under way is looked at again after this, in case its end was missed."""


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What a scan found."""

    looked_at: int = 0
    queued: int = 0


def scan(db: Database, clock: Clock, going: Callable[[], bool] = lambda: True) -> ScanReport:
    """Queue an issuance for everything that is due now, while `going`."""
    report, full = ScanReport(), True
    while full and going():
        page = db.write(lambda tx: _scan_page(tx, clock()))
        report = ScanReport(report.looked_at + page.looked_at, report.queued + page.queued)
        full = page.looked_at == _PAGE
    return report


def _scan_page(tx: Connection, now: datetime) -> ScanReport:
    due = lineages.due(tx, now, _PAGE)
    wanted = lineages.wanted_among(tx, [lineage.id for lineage in due])
    left_out = names_left_out(tx, due)
    reasons: dict[str, Reason] = {}
    later: dict[str, datetime | None] = {}
    for lineage in due:
        decision = decide(lineage, left_out.get(lineage.id, []), now) if lineage.id in wanted else None
        if isinstance(decision, Renew):
            reasons[lineage.id] = decision.reason
        else:
            later[lineage.id] = None if decision is None else decision.until
    lineages.set_next_checks(tx, later, now)
    queued = queue(tx, [lineage for lineage in due if lineage.id in reasons], reasons, now)
    settings_kv.put(tx, settings_kv.LAST_SCAN_AT, now.isoformat())
    return ScanReport(len(due), len(queued))


def names_left_out(tx: Connection, found: Sequence[Planned]) -> dict[str, list[LeftOut]]:
    """Return the names that these lineages have to try again, by lineage id."""
    return lineages.left_out_among(tx, [lineage.id for lineage in found if len(lineage.dns_names) > 1])


def decide(lineage: Planned, left_out: list[LeftOut], now: datetime) -> Decision:
    """Say whether a lineage is due: for its certificate's age, or for a name that it has to try again."""
    suggested = lineage.window_start is not None
    decision = decide_renewal(now, lineage.validity, lineage.renew_at, suggested=suggested)
    if isinstance(decision, Renew) or not left_out:
        return decision
    probe_at = min(name.probe_at for name in left_out)
    return Renew(Reason.NAMES_MISSING) if probe_at <= now else Wait(min(decision.until, probe_at))


def queue(tx: Connection, due: Sequence[Planned], reasons: Mapping[str, Reason], now: datetime) -> dict[str, str]:
    """Queue an issuance for each of these lineages unless one is open; return those queued, by lineage id."""
    lineages.set_next_checks(tx, {lineage.id: now + LOOK_AGAIN for lineage in due}, now)
    urgent = {lineage.id for lineage in due if is_urgent(now, lineage.validity)}
    queued = issuances.queue_all(tx, {lineage.id: reasons[lineage.id] for lineage in due}, now, urgent=urgent)
    issuances.mark_urgent(tx, urgent - queued.keys())
    return queued
