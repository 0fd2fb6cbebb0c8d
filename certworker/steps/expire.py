"""What is past its end is said to be so: certificate `expired`, its lineage and policies `error`."""

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
        certificates.flip(tx, certificate, "expired", f"valid until {certificate.expires_at.isoformat()}", now)
        _tell(tx, certificate, clock)
    return len(page)


def _tell(tx: Connection, certificate: StoredCertificate, clock: Clock) -> None:
    if certificate.lineage_id is not None:
        lineages.record_status(tx, certificate.lineage_id, "error", clock())
        return
    for policy in policies.wanting(tx, certificate.domain):
        policies.refresh_status(tx, policy.id, clock())
