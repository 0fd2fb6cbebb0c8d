"""The header fields that ACME gives a meaning to: Retry-After, Date, Link, Replay-Nonce.

Sources: RFC 9110 §5.6.7 (dates) and §10.2.3 (Retry-After), RFC 8288 §3 (Link), RFC 8555 §6.5.1 (nonces).
The standard library's date parsers guess, follow the locale or return naive times; these do none of that.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH = f"(?P<month>{'|'.join(_MONTHS)})"
_TIME = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_DATES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"[A-Z][a-z]{{2}}, (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} GMT",  # IMF-fixdate
        rf"[A-Z][a-z]{{5,8}}, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} GMT",  # RFC 850
        rf"[A-Z][a-z]{{2}} {_MONTH} (?P<day>[ 0-9][0-9]) {_TIME} (?P<year>[0-9]{{4}})",  # asctime
    )
)
_SECONDS = re.compile(r"[0-9]+")
_LONGEST_WAIT = timedelta(days=3650)
"""Whatever is longer is cut to this, so that sums with it stay inside the calendar."""
_LINK = re.compile(r'<([^<>]*)>((?:\s*;\s*[\w*-]+\s*(?:=\s*(?:"[^"]*"|[^",;\s]*))?)*)')
_REL = re.compile(r';\s*rel\s*=\s*(?:"([^"]*)"|([^",;\s]+))', re.IGNORECASE)
_NONCE = re.compile(r"[A-Za-z0-9_-]{1,1024}")


def read_http_date(value: str, near: datetime) -> datetime | None:
    """Read any of the three forms of an HTTP date; None if it is none of them.

    A year of two digits is the one that lies at most 50 years after `near` (RFC 9110 §5.6.7).
    """
    found = next((m for pattern in _DATES if (m := pattern.fullmatch(value.strip()))), None)
    if found is None:
        return None
    year, second = int(found["year"]), min(int(found["second"]), 59)
    if len(found["year"]) == 2:
        year += near.year - near.year % 100
        year -= 100 if year > near.year + 50 else 0
    month, day = _MONTHS.index(found["month"]) + 1, int(found["day"])
    try:
        return datetime(year, month, day, int(found["hour"]), int(found["minute"]), second, tzinfo=UTC)
    except ValueError:
        return None


def read_retry_after(headers: Mapping[str, str], now: datetime) -> timedelta | None:
    """Return how long the answer asks us to wait; None if it does not say, or says nonsense.

    A date is compared with the answer's own Date, because it comes from the same clock.
    """
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if _SECONDS.fullmatch(value):
        return timedelta(seconds=int(value)) if len(value) <= 8 else _LONGEST_WAIT
    until = read_http_date(value, now)
    if until is None:
        return None
    sent_at = read_http_date(headers.get("date", ""), now) or now
    return min(until - sent_at, _LONGEST_WAIT) if until >= sent_at else None


def read_links(headers: Mapping[str, str], rel: str) -> tuple[str, ...]:
    """Return the targets of all links with this relation, in order, as they are written."""
    found = []
    for target, parameters in _LINK.findall(headers.get("link", "")):
        relation = _REL.search(parameters)
        if relation and rel in (relation[1] or relation[2] or "").lower().split():
            found.append(target)
    return tuple(found)


def read_nonce(headers: Mapping[str, str]) -> str | None:
    """Return the nonce for a later request; None if there is none that may be used (RFC 8555 §6.5.1)."""
    value = headers.get("replay-nonce", "")
    return value if _NONCE.fullmatch(value) and len(value) % 4 != 1 else None
