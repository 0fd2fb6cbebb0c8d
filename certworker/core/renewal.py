"""When a certificate is renewed, and what its CA has to say about that (RFC 9773).

The time is planned once, when the certificate arrives, and stored: `plan_renewal`. A CA that informs about
renewals suggests a window instead, and one moment of it is drawn and stored: `choose_moment`. Whether a
lineage is due at some moment is `decide_renewal`.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from certworker.core.certificate import Validity
from certworker.errors import Problem

_SHORT_LIFE = timedelta(days=10)
_SPREAD = 0.1
"""Without a CA's advice, renewals of one day are spread over this part of the lifetime."""
_LAST_TENTH = 0.1
_LAST_DAYS = timedelta(hours=48)
"""Of a life that is not short."""


class Reason(StrEnum):
    """Why an issuance is made."""

    FIRST = "first"
    LIFETIME_USED = "lifetime_used"
    CA_SUGGESTED = "ca_suggested"
    EXPIRES_SOON = "expires_soon"
    NAMES_MISSING = "names_missing"
    """The certificate lacks a name that is wanted."""
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
    """Return when this certificate is to be renewed, as long as its CA suggests nothing.

    Up to a tenth of its life before the point of `renew_after`, by a hash of the lineage: a bulk import
    does not renew as a herd, and the same certificate always has the same plan.
    """
    share = int.from_bytes(hashlib.sha256(lineage_id.encode()).digest()[:4], "big") / 2**32
    return validity.not_before + validity.lifetime * (renew_after(validity) - _SPREAD * share)


def due_at(validity: Validity, planned_at: datetime | None) -> datetime:
    """Return when a certificate is due: as planned, but never past the point of last resort.

    A plan may move a renewal either way; a wrong one, the CA's included, must not take a site down.
    """
    last_resort_at = _last_resort_at(validity)
    return last_resort_at if planned_at is None else min(planned_at, last_resort_at)


def decide_renewal(
    now: datetime, validity: Validity | None, planned_at: datetime | None, *, suggested: bool = False
) -> Decision:
    """Say whether a lineage whose certificate is `validity` (None: it has none) is due at `now`.

    `suggested` says that the plan is a moment of the CA's window.
    """
    if validity is None:
        return Renew(Reason.FIRST)
    if now >= _last_resort_at(validity):
        return Renew(Reason.EXPIRES_SOON)
    until = due_at(validity, planned_at)
    if now < until:
        return Wait(until)
    return Renew(Reason.CA_SUGGESTED if suggested else Reason.LIFETIME_USED)


def is_urgent(now: datetime, validity: Validity | None) -> bool:
    """Say whether the certificate that serves is about to end, or has ended.

    That is with less than a tenth of its life left, or less than two days of one that is not short.
    """
    if validity is None:
        return False
    left, lifetime = validity.not_after - now, validity.lifetime
    return left < lifetime * _LAST_TENTH or (left < _LAST_DAYS and lifetime >= _SHORT_LIFE)


def _last_resort_at(validity: Validity) -> datetime:
    return validity.not_before + validity.lifetime * renew_after(validity)


# -- what a CA says of it (RFC 9773) ------------------------------------------------------------------

_MARGIN = timedelta(minutes=15)
"""What is due waits for the scan and for its turn, and an order past the end of the window is none that
the CA expects: Let's Encrypt then counts it against its limits. So no moment this close to the end is drawn."""
_SOONEST_LOOK = timedelta(minutes=1)
_LATEST_LOOK = timedelta(hours=24)
_USUAL_LOOK = timedelta(hours=6)
_BACK_OFF = tuple(timedelta(minutes=minutes) for minutes in (1, 2, 4, 8, 16))


@dataclass(frozen=True, slots=True)
class Window:
    """The time in which a CA wants a certificate renewed; `end` is later than `start`."""

    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class RenewalInfo:
    """What a CA says of the renewal of one certificate (RFC 9773 §4.2)."""

    window: Window
    explanation_url: str | None = None
    """An https URL for a person: why the window is what it is."""
    retry_after: timedelta | None = None
    """When the CA wants to be asked again; None if it does not say."""


def choose_moment(window: Window, validity: Validity, draw: float) -> datetime:
    """Return the moment of the window at which this certificate is to be renewed, in whole seconds.

    `draw` is a uniform number in [0, 1), and the moments are as likely as each other (RFC 9773 §4.2), but for
    those that are past the last resort. None lies before the certificate: a CA that gives or takes a day, however
    short the life, would have every second one renewed as soon as it is there. A window that ended before the
    certificate began means now.
    """
    first = max(window.start, validity.not_before)
    last = window.end - min(_MARGIN, (window.end - window.start) / 10)
    if last <= first:
        return first
    return _whole_second(_before_last_resort(first + (last - first) * draw, first, last, validity))


def _before_last_resort(moment: datetime, first: datetime, last: datetime, validity: Validity) -> datetime:
    """Return the moment, or another one if the certificate is renewed sooner anyway, at the last resort.

    Let's Encrypt's windows lie around that very point: half of a bulk import would be renewed in that one
    second. So what was drawn beyond it is spread over the time before it.
    """
    last_resort_at = _last_resort_at(validity)
    if moment <= last_resort_at:
        return moment
    spread_from = last_resort_at - validity.lifetime * _SPREAD
    if first < last_resort_at:
        spread_from = max(spread_from, first)
    beyond = max(first, last_resort_at)
    return spread_from + (last_resort_at - spread_from) * ((moment - beyond) / (last - beyond))


def _whole_second(moment: datetime) -> datetime:
    """Round up: down could lead out of the window."""
    return moment + timedelta(microseconds=-moment.microsecond % 1_000_000)


def look_after_answer(retry_after: timedelta | None) -> timedelta:
    """Return when to ask the CA again: when it says, within reason, else after six hours (RFC 9773 §4.3.2)."""
    return _USUAL_LOOK if retry_after is None else min(max(retry_after, _SOONEST_LOOK), _LATEST_LOOK)


def look_after_failure(failures: int, *, passing: bool, retry_after: timedelta | None) -> timedelta:
    """Return when to ask again after `failures` (>= 1) in a row (RFC 9773 §4.3.3).

    Five times soon, and ever later, after one that passes (no answer in time, trouble of the CA's own); any
    other one, such as an answer that makes no sense, will hardly be mended sooner than in six hours.
    """
    if passing and retry_after is None and failures <= len(_BACK_OFF):
        return _BACK_OFF[failures - 1]
    return look_after_answer(retry_after)


@dataclass(frozen=True, slots=True)
class Predecessor:
    """The certificate that a new one takes the place of."""

    not_after: datetime
    account_id: str | None
    """The account that ordered it, None if that is not known any more."""
    replaced: bool
    """Whether an order of ours has said that it replaces it, and was not given up."""


def may_replace(predecessor: Predecessor, account_id: str, now: datetime) -> bool:
    """Say whether an order of this account may name what it `replaces` (RFC 9773 §5).

    Only a certificate that the very same account ordered (and with it the same CA) can be replaced, only
    before its end, and only once.
    """
    return predecessor.account_id == account_id and now < predecessor.not_after and not predecessor.replaced


_NOT_ABOUT_REPLACES = frozenset([
    "accountDoesNotExist", "badNonce", "externalAccountRequired", "invalidProfile", "rateLimited",
    "rejectedIdentifier", "unsupportedIdentifier", "userActionRequired",
])  # fmt: skip
_NOT_NOW = frozenset([404, 405, 408, 425, 429, 502, 503, 504])
"""Statuses that speak of the address or of the moment, not of what was asked."""


def drops_replaces(problem: Problem) -> bool:
    """Say whether an order that was refused is worth one more try without `replaces`.

    CAs do not agree on how to refuse it: alreadyReplaced (RFC 9773 §7.4), conflict, malformed, unauthorized, and
    serverInternal have been seen. So it is whatever could be about it.
    """
    about_names = any(part.identifier for part in problem.subproblems)
    if about_names or problem.code in _NOT_ABOUT_REPLACES or problem.status in _NOT_NOW:
        return False
    return problem.code != "" or 400 <= (problem.status or 0) < 500
