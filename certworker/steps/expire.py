"""What is past its end is said to be so: certificate `expired`, its lineage and policies `error`.

What was uploaded before its time is looked at again when that comes.

And back: `expired` says nothing but the time. When a clock ran ahead and is put right, certificates that
have not ended after all are `active` again.
"""

import logging
from collections.abc import Callable
from datetime import datetime

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.store import certificates, changes, lineages, policies, settings_kv
from certworker.store.certificates import StoredCertificate
from certworker.store.database import Database

_log = logging.getLogger(__name__)

_PAGE = 100

_Flip = Callable[[Connection, datetime], int]


def expire(db: Database, clock: Clock) -> int:
    """Flip every certificate that is `active` past `expires_at`, or `expired` before it; return how many expired."""
    db.write(lambda tx: _start(tx, clock()))
    back = _all_pages(db, clock, _bring_back_page)
    if back:
        _log.warning("certificates.not_expired_after_all", extra={"count": back})
    return _all_pages(db, clock, _expire_page)


def _start(tx: Connection, now: datetime) -> None:
    """Note the uploaded certificates that have become valid, so that they are taken over."""
    first = settings_kv.find(tx, settings_kv.NOT_YET_VALID)
    if first is None or datetime.fromisoformat(first) > now:
        return
    waiting = certificates.not_yet_valid(tx)
    changes.note(tx, changes.CERTIFICATE, [one for one, not_before in waiting.items() if not_before <= now])
    later = [not_before for not_before in waiting.values() if not_before > now]
    if later:
        settings_kv.put(tx, settings_kv.NOT_YET_VALID, min(later).isoformat())
    else:
        settings_kv.forget(tx, settings_kv.NOT_YET_VALID)


def _all_pages(db: Database, clock: Clock, flip_page: _Flip) -> int:
    flipped = 0
    while count := db.write(lambda tx: flip_page(tx, clock())):
        flipped += count
    return flipped


def _expire_page(tx: Connection, now: datetime) -> int:
    page = certificates.expired(tx, now, _PAGE)
    _flip(tx, page, "expired", "error", now)
    return len(page)


def _bring_back_page(tx: Connection, now: datetime) -> int:
    page = certificates.unexpired(tx, now, _PAGE)
    for certificate in page:
        lineage = None if certificate.lineage_id is None else lineages.find(tx, certificate.lineage_id)
        if lineage is not None and lineage.next_check_at is not None:
            # What the clock that ran ahead put off may lie behind the certificate's real end.
            lineages.set_next_check(tx, lineage.id, now, now)
    _flip(tx, page, "active", "active", now)
    return len(page)


def _flip(tx: Connection, page: list[StoredCertificate], status: str, lineage_status: str, now: datetime) -> None:
    for certificate in page:
        reason = f"valid until {certificate.expires_at.isoformat()}"
        certificates.record_flip(tx, certificate, status, reason, now)
        if certificate.lineage_id is not None:
            lineages.record_status(tx, certificate.lineage_id, lineage_status, now)
    # The revisions late: whoever takes the counter keeps every activation waiting until the commit.
    for certificate in page:
        certificates.set_status(tx, certificate.id, status, now)
    uploads = [certificate for certificate in page if certificate.lineage_id is None]
    wanting = [policy.id for upload in uploads for policy in policies.wanting(tx, upload.domain)]
    policies.refresh_statuses(tx, wanting, now)
