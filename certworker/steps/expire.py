"""What is past its end is said to be so: certificate `expired`, its lineage and policies `error`."""

from datetime import datetime

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.store import certificates, lineages, policies
from certworker.store.certificates import StoredCertificate
from certworker.store.database import Database

_PAGE = 100


def expire(db: Database, clock: Clock) -> int:
    """Flip every certificate that is `active` past `expires_at`; return how many."""
    flipped = 0
    while count := db.write(lambda tx: _expire_page(tx, clock)):
        flipped += count
    return flipped


def _expire_page(tx: Connection, clock: Clock) -> int:
    now = clock()
    page = certificates.expired(tx, now, _PAGE)
    for certificate in page:
        reason = f"valid until {certificate.expires_at.isoformat()}"
        certificates.record_flip(tx, certificate, "expired", reason, now)
        if certificate.lineage_id is not None:
            lineages.record_status(tx, certificate.lineage_id, "error", now)
    # The revisions late: whoever takes the counter keeps every activation waiting until the commit.
    for certificate in page:
        certificates.set_status(tx, certificate.id, "expired", now)
    for certificate in page:
        if certificate.lineage_id is None:
            _tell(tx, certificate, now)
    return len(page)


def _tell(tx: Connection, certificate: StoredCertificate, now: datetime) -> None:
    for policy in policies.wanting(tx, certificate.domain):
        policies.refresh_status(tx, policy.id, now)
