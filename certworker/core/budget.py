"""What we allow ourselves at a CA, a step below what it allows, so that it need not say no.

Each limit is a bucket of tokens, kept by the generic cell rate algorithm, as Boulder's `ratelimits` keeps
Let's Encrypt's. A bucket is one instant, `full_at` (GCRA's theoretical arrival time): each token taken moves
it by one `refill`, and from then on the bucket is full. Rows and locks are `store.budget`'s.

| bucket               | belongs to      | a token is taken by                      | Let's Encrypt allows |
|----------------------|-----------------|------------------------------------------|----------------------|
| `orders`             | CA and account  | an order                                 | 300, one per 36 s    |
| `domain:<domain>`    | CA              | an order for new names below this domain | 50, one per 202 min  |
| `names:<hash>`       | CA              | an order for this set of names           | 5, one per 34 h      |
| `validations:<name>` | CA and account  | a failed validation of this name         | 5, one per 12 min    |
| `accounts`           | CA              | a newAccount                             | 10, one per 18 min   |
| `runaway:<hash>`     | CA              | an order for this set, renewals too      | (a guard against us) |
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any

from certworker.core.names import registered_domain
from certworker.errors import InputError

_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1), "s": timedelta(seconds=1)}
_LIMIT = re.compile(r"([1-9][0-9]{0,6})/([1-9][0-9]{0,6})([smhd])")
_LONGEST_WHOLE = timedelta(days=366)
"""An empty bucket that takes longer to be full is a typing error."""
_SHOWN = 60
"""Characters of a wrong word in a message."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A burst of `burst` at once, then one more each `refill`."""

    burst: int
    refill: timedelta

    @property
    def whole(self) -> timedelta:
        """How long an empty bucket takes to be full."""
        return self.refill * self.burst

    def __str__(self) -> str:
        unit, length = next((unit, length) for unit, length in _UNITS.items() if not self.refill % length)
        return f"{self.burst}/{self.refill // length}{unit}"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits for one CA; None: we hold back for nothing. As text it is what `read_limits` reads."""

    orders: Limit | None = None
    domain: Limit | None = None
    names: Limit | None = None
    validations: Limit | None = None
    accounts: Limit | None = None
    runaway: Limit = Limit(10, timedelta(minutes=144))
    """Ten certificates a day for the same names are a fault of ours, whatever asked for them."""

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name) or _OFF}" for field in fields(self))


LETS_ENCRYPT = Limits(
    orders=Limit(50, timedelta(seconds=45)),
    domain=Limit(40, timedelta(minutes=252)),
    names=Limit(3, timedelta(hours=56)),
    validations=Limit(3, timedelta(minutes=20)),
    accounts=Limit(3, timedelta(hours=1)),
)
_OFF = "off"
_BASES = {"letsencrypt": LETS_ENCRYPT, "none": Limits()}


def read_limits(text: str, private: bool) -> Limits:
    """Return the limits of a setting such as `orders=50/45s,names=off`.

    What it does not name stays as it is for a public or a private CA, or as the word says that stands
    first: `letsencrypt` or `none`. Raises InputError with the limit, its value and the rule.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    base = words.pop(0) if words and words[0] in _BASES else "none" if private else "letsencrypt"
    given: dict[str, Any] = {}
    for word in words:
        name, limit = _read_word(word)
        if name in given:
            raise InputError(f"limit {name!r}: is given twice")
        given[name] = limit
    return replace(_BASES[base], **given)


def _read_word(word: str) -> tuple[str, Limit | None]:
    name, _, figures = (part.strip() for part in word.partition("="))
    known = [field.name for field in fields(Limits)]
    if name not in known:
        rule = f"must be one of {', '.join(known)}, or stand first: {', '.join(_BASES)}"
        raise InputError(f"limit {name[:_SHOWN]!r}: {rule}")
    if figures != _OFF:
        return name, _read_limit(name, figures)
    if name == "runaway":
        raise InputError("limit runaway 'off': it is what ends a loop of ours, and can only be changed")
    return name, None


def _read_limit(name: str, figures: str) -> Limit:
    found = _LIMIT.fullmatch(figures)
    if found is not None:
        burst, refill = int(found[1]), int(found[2]) * _UNITS[found[3]]
        if refill <= _LONGEST_WHOLE / burst:
            return Limit(burst, refill)
    rule = "must be a burst and the time of one more, such as 50/45s (s, m, h or d), full within a year"
    raise InputError(f"limit {name} {figures[:_SHOWN]!r}: {rule}")


# -- tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Granted:
    """A token may be taken."""

    full_at: datetime
    """The bucket without it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """No token is there before `until`."""

    full_at: datetime
    """The bucket as it is, to be kept all the same: what was too far ahead has been mended."""
    until: datetime


def spend(full_at: datetime, now: datetime, limit: Limit, *, reserve: int = 0) -> Granted | Refused:
    """Ask for one token of a bucket, of which `reserve` are left for those in need."""
    kept = _mend(full_at, now, limit)
    taken = kept + limit.refill
    until = taken - limit.refill * (limit.burst - reserve)
    return Granted(taken) if until <= now else Refused(kept, until)


def debit(full_at: datetime, now: datetime, limit: Limit) -> datetime:
    """Return the `full_at` of a bucket after one token more, whether there was one or not."""
    return _mend(full_at, now, limit) + limit.refill


def _mend(full_at: datetime, now: datetime, limit: Limit) -> datetime:
    """No bucket is fuller than full, and none emptier than empty.

    Without this a clock that was set back would lock it for as long, and so would another limit's past.
    """
    return min(max(full_at, now), now + limit.whole)


def credit(full_at: datetime, limit: Limit) -> datetime:
    """Return the `full_at` of a bucket that gets a token back; one that is full stays so."""
    return full_at - limit.refill


_LONGEST_QUEUE = timedelta(hours=24)
"""Whoever waits asks again at least once a day, or in the time its bucket takes to be full."""


def promise(promised_at: datetime | None, until: datetime, now: datetime, limit: Limit) -> datetime:
    """Return a moment of its own for one that was refused `until` then; `promised_at` is the last one given.

    Moments are a refill apart, as tokens are, so that those who wait do not wake up together for the one
    token that is there. Nothing is set aside for them. When the queue is a day long, the next round of
    moments begins; a promise that is over, or further ahead than a queue can be, counts for nothing.
    """
    if promised_at is None or promised_at <= now:
        return until
    slot = max(until, promised_at + limit.refill)
    return slot if slot <= now + max(_LONGEST_QUEUE, limit.whole) else until


# -- what asks which bucket ---------------------------------------------------------------------------

_ORDERS, _ACCOUNTS = "orders", "accounts"
_RUNAWAY, _NAMES, _DOMAIN, _VALIDATIONS = "runaway:", "names:", "domain:", "validations:"
_RENEWALS = 4
"""A certificate is renewed twice in its life at most, and the guard lets twice as many through."""
_SHORTEST_REFILL = timedelta(minutes=10)
"""A CA that hands out certificates of minutes is what the guard is for, unless the operator allows it."""
_RESERVE = 5
"""One in so many orders is left for certificates that are about to end."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What one act at the CA wants of one bucket: a token."""

    bucket: str
    limit: Limit
    reserve: int = 0
    """Tokens that have to be left after this one."""
    urgent: bool = False
    """It does not queue behind others: it is told the first moment there is."""
    only_asked: bool = False
    """A token must be there but is not taken: that is done when it turns out to be needed."""


def charges_of_order(
    limits: Limits, dns_names: Collection[str], names_hash: str, *, urgent: bool, renewal: bool, replaces: str | None,
    lifetime: timedelta | None = None,
) -> tuple[Charge, ...]:  # fmt: skip
    """Return what an order for `dns_names` asks; `lifetime` is that of the certificate they have now.

    At Let's Encrypt a `renewal` (this very set had a certificate before) does not count below a registered
    domain, and one that `replaces` a certificate (RFC 9773 §5) not for its set of names either.
    """
    charges = [Charge(f"{_RUNAWAY}{names_hash}", _guard(limits.runaway, lifetime))]
    if limits.orders:
        charges.append(Charge(_ORDERS, limits.orders, reserve=0 if urgent else limits.orders.burst // _RESERVE))
    if limits.names and not replaces:
        charges.append(Charge(f"{_NAMES}{names_hash}", limits.names))
    if limits.domain and not replaces and not renewal:
        domains = {registered_domain(name) for name in dns_names}
        charges += [Charge(f"{_DOMAIN}{domain}", limits.domain) for domain in sorted(domains)]
    if limits.validations:
        names = sorted(set(dns_names))
        charges += [Charge(validations_bucket(name), limits.validations, only_asked=True) for name in names]
    return tuple(replace(charge, urgent=urgent) for charge in charges)


def _guard(limit: Limit, lifetime: timedelta | None) -> Limit:
    """Return the guard for certificates of this lifetime: short ones are renewed more often, and no loop is that."""
    if lifetime is None:
        return limit
    return replace(limit, refill=min(limit.refill, max(lifetime / _RENEWALS, _SHORTEST_REFILL)))


def of_certificates(charges: Sequence[Charge]) -> tuple[Charge, ...]:
    """Return those of an order's charges that CAs count when they issue: what no certificate came of is free."""
    return tuple(charge for charge in charges if charge.bucket.startswith((_NAMES, _DOMAIN)))


def charges_of_account(limits: Limits) -> tuple[Charge, ...]:
    """Return what a newAccount asks."""
    return (Charge(_ACCOUNTS, limits.accounts),) if limits.accounts else ()


def validations_bucket(dns_name: str) -> str:
    """Return the bucket of which a failed validation of `dns_name` takes a token."""
    return f"{_VALIDATIONS}{dns_name}"


def is_per_account(bucket: str) -> bool:
    """Say whether each account at a CA has this bucket of its own."""
    return bucket == _ORDERS or bucket.startswith(_VALIDATIONS)


def turn(bucket: str) -> tuple[bool, str]:
    """Sort buckets by this to lock them: everybody in the same order, the set of names first."""
    return not bucket.startswith(_RUNAWAY), bucket
