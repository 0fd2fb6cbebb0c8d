"""When a certificate is renewed.

The time is planned once, when the certificate arrives, and stored: `plan_renewal`. Whether a lineage is
due at some moment is `decide_renewal`.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from certworker.core.certificate import Validity

_SHORT_LIFE = timedelta(days=10)
_SPREAD = 0.1
"""Without a CA's advice, renewals of one day are spread over this part of the lifetime."""


class Reason(StrEnum):
    """Why an issuance is made."""

    FIRST = "first"
    LIFETIME_USED = "lifetime_used"
    EXPIRES_SOON = "expires_soon"
    FORCED = "forced"


@dataclass(frozen=True, slots=True)
class Renew:
    """Issue now."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is due before `until`."""

    until: datetime


Decision = Renew | Wait


def renew_after(validity: Validity) -> float:
    """Return the part of its life after which a certificate is renewed: 2/3, or 1/2 of a short life."""
    return 1 / 2 if validity.lifetime < _SHORT_LIFE else 2 / 3


def plan_renewal(validity: Validity, lineage_id: str) -> datetime:
    """Return when this certificate is to be renewed.

    Up to a tenth of its life before the point of `renew_after`, by a hash of the lineage: a bulk import
    does not renew as a herd, and the same certificate always has the same plan.
    """
    share = int.from_bytes(hashlib.sha256(lineage_id.encode()).digest()[:4], "big") / 2**32
    return validity.not_before + validity.lifetime * (renew_after(validity) - _SPREAD * share)


def decide_renewal(now: datetime, validity: Validity | None, planned_at: datetime | None) -> Decision:
    """Say whether a lineage whose certificate is `validity` (None: it has none) is due at `now`.

    A plan may move a renewal either way, but never past the point of last resort: a wrong plan must
    not take a site down.
    """
    if validity is None:
        return Renew(Reason.FIRST)
    last_resort_at = validity.not_before + validity.lifetime * max(renew_after(validity), 2 / 3)
    if now >= last_resort_at:
        return Renew(Reason.EXPIRES_SOON)
    due_at = last_resort_at if planned_at is None else min(planned_at, last_resort_at)
    return Renew(Reason.LIFETIME_USED) if now >= due_at else Wait(due_at)
