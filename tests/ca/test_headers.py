"""Retry-After, dates, links and nonces: tables, and properties over whatever a header may hold."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.ca.headers import read_http_date, read_links, read_nonce, read_retry_after

from .conftest import NOW

ZONES = ["UTC", "America/New_York", "Asia/Kolkata", "Pacific/Kiritimati"]
instants = st.integers(788_918_400, 2_524_608_000).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))
"""From 1995 to 2050."""
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def imf(at: datetime) -> str:
    return f"{DAYS[at.weekday()][:3]}, {at:%d} {MONTHS[at.month - 1]} {at:%Y %H:%M:%S} GMT"


def rfc850(at: datetime) -> str:
    return f"{DAYS[at.weekday()]}, {at:%d}-{MONTHS[at.month - 1]}-{at:%y %H:%M:%S} GMT"


def asctime(at: datetime) -> str:
    return f"{DAYS[at.weekday()][:3]} {MONTHS[at.month - 1]} {at.day:2} {at:%H:%M:%S %Y}"


@pytest.fixture(params=ZONES)
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run in another time zone; the machine's own comes back afterwards."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("zone")
@pytest.mark.parametrize("form", [imf, rfc850, asctime])
def test_a_date_means_the_same_everywhere(form) -> None:  # type: ignore[no-untyped-def]
    """600 s ahead is 600 s ahead, in every zone and every form (RFC 9110 §5.6.7)."""
    headers = {"retry-after": form(NOW + timedelta(seconds=600))}

    assert read_retry_after(headers, NOW) == timedelta(seconds=600)


@pytest.mark.usefixtures("zone")
def test_a_date_is_compared_with_the_answers_own() -> None:
    """Our clock may be wrong by hours; the CA's two dates are of one clock."""
    sent_at = NOW + timedelta(hours=7)
    headers = {"retry-after": imf(sent_at + timedelta(seconds=5)), "date": imf(sent_at)}

    assert read_retry_after(headers, NOW) == timedelta(seconds=5)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        (" 120 ", 120),
        ("000120", 120),
        ("999999999", 3650 * 86400),
        ("9" * 5000, 3650 * 86400),
        ("Sun, 06 Nov 2999 08:49:37 GMT", 3650 * 86400),
    ],
)
def test_seconds_are_read(value: str, seconds: int) -> None:
    """However many: nobody's sum overflows for it."""
    assert read_retry_after({"retry-after": value}, NOW) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "-5",
        "+5",
        "1.5",
        "1e3",
        "soon",
        "²",
        "١٢",
        "0x10",
        "120, 60",
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 2999 08:49:37 +0100",
        "Sun, 06 Nov 2999 08:49:37",
        "Sun, 31 Feb 2999 08:49:37 GMT",
        "Sun, 06 Nov 2999 24:49:37 GMT",
        "2999-11-06T08:49:37Z",
        "Sun, 06 Nov 0000 08:49:37 GMT",
    ],
)
def test_nonsense_and_the_past_ask_for_nothing(value: str) -> None:
    """As good as no header."""
    assert read_retry_after({"retry-after": value}, NOW) is None


def test_a_broken_date_is_passed_over() -> None:
    """Then our own clock has to do."""
    headers = {"retry-after": imf(NOW + timedelta(seconds=9)), "date": "yesterday"}

    assert read_retry_after(headers, NOW) == timedelta(seconds=9)


@pytest.mark.parametrize(
    ("year", "near", "meant"), [("94", 2026, 1994), ("26", 2026, 2026), ("76", 2026, 2076), ("77", 2026, 1977)]
)
def test_a_short_year_is_at_most_fifty_years_ahead(year: str, near: int, meant: int) -> None:
    """RFC 9110 §5.6.7."""
    at = read_http_date(f"Sunday, 06-Nov-{year} 08:49:37 GMT", datetime(near, 1, 1, tzinfo=UTC))

    assert at == datetime(meant, 11, 6, 8, 49, 37, tzinfo=UTC)


def test_a_leap_second_is_a_time() -> None:
    assert read_http_date("Sat, 31 Dec 2016 23:59:60 GMT", NOW) == datetime(2016, 12, 31, 23, 59, 59, tzinfo=UTC)


@given(instants, st.sampled_from([imf, rfc850, asctime]))
def test_every_date_is_read_back(at: datetime, form) -> None:  # type: ignore[no-untyped-def]
    """All three forms, near their own time."""
    assert read_http_date(form(at), at) == at


@given(st.text(max_size=60), st.text(max_size=60), instants)
def test_whatever_comes_is_a_wait_or_nothing(value: str, date: str, now: datetime) -> None:
    """Never a crash, never negative."""
    asked = read_retry_after({"retry-after": value, "date": date}, now)

    assert asked is None or timedelta(0) <= asked <= timedelta(days=3650)


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        ("", ()),
        ('<https://a.test/1>;rel="up"', ("https://a.test/1",)),
        ("<https://a.test/1>; rel=up", ("https://a.test/1",)),
        ('<https://a.test/1>; title="a, b; c"; rel="next up"', ("https://a.test/1",)),
        ('<https://a.test/1>;rel="up", <https://a.test/2>;rel="index", </3>;REL=Up', ("https://a.test/1", "/3")),
        ('<https://a.test/1>;rel="upper"', ()),
        ("<https://a.test/1>", ()),
        ("https://a.test/1;rel=up", ()),
    ],
)
def test_links_are_found_by_relation(value: str, targets: tuple[str, ...]) -> None:
    """RFC 8288 §3."""
    assert read_links({"link": value}, "up") == targets


def test_a_long_link_takes_no_time() -> None:
    """A header of 64 KiB made to slow a regular expression down."""
    started = time.perf_counter()
    for value in ("<a>" + "; x=" * 16000, "<a>" + ";" * 64000, "<" * 64000, '<a>; x="' * 8000, "<a>" + " " * 64000):
        read_links({"link": value}, "up")

    assert time.perf_counter() - started < 2


@given(st.text(max_size=200))
def test_any_link_is_read(value: str) -> None:
    """Or not, but without a crash."""
    read_links({"link": value}, "up")


@given(st.text(max_size=80))
def test_a_nonce_can_be_sent_back(value: str) -> None:
    """As it came, or not at all."""
    assert read_nonce({"replay-nonce": value}) in (None, value)
