"""Laws of when a certificate is renewed, by its age and by what its CA says."""

import random
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from certworker.core.certificate import Validity
from certworker.core.renewal import (
    Predecessor,
    Reason,
    Renew,
    Wait,
    Window,
    choose_moment,
    decide_renewal,
    drops_replaces,
    due_at,
    is_urgent,
    look_after_answer,
    look_after_failure,
    may_replace,
    plan_renewal,
    renew_after,
)
from certworker.errors import Problem

ISSUED = datetime(2026, 1, 1, tzinfo=UTC)
MOMENT = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)

lifetimes = st.timedeltas(timedelta(seconds=20), timedelta(days=825))
ages = st.timedeltas(timedelta(0), timedelta(days=900))
plans = st.timedeltas(timedelta(days=-400), timedelta(days=900))
draws = st.floats(0, 1, exclude_max=True)
ids = st.uuids().map(str)


def validity(lifetime: timedelta) -> Validity:
    return Validity(ISSUED, ISSUED + lifetime)


@given(age=ages, lifetime=lifetimes, plan=st.none() | plans)
def test_wait_is_honest(age: timedelta, lifetime: timedelta, plan: timedelta | None) -> None:
    """A Wait ends in the future, one moment before its end is still a Wait, at its end the answer is Renew."""
    planned_at = None if plan is None else ISSUED + plan
    decision = decide_renewal(ISSUED + age, validity(lifetime), planned_at)
    if isinstance(decision, Wait):
        assert decision.until > ISSUED + age
        assert decide_renewal(decision.until - MOMENT, validity(lifetime), planned_at) == decision
        assert isinstance(decide_renewal(decision.until, validity(lifetime), planned_at), Renew)


@given(age=ages, later=ages, lifetime=lifetimes, plan=st.none() | plans)
def test_due_stays_due(age: timedelta, later: timedelta, lifetime: timedelta, plan: timedelta | None) -> None:
    """Time alone never makes a due renewal wait again."""
    planned_at = None if plan is None else ISSUED + plan
    if isinstance(decide_renewal(ISSUED + age, validity(lifetime), planned_at), Renew):
        assert isinstance(decide_renewal(ISSUED + age + later, validity(lifetime), planned_at), Renew)


@given(lifetime=lifetimes, plan=st.none() | plans, suggested=st.booleans())
def test_no_plan_takes_a_site_down(lifetime: timedelta, plan: timedelta | None, suggested: bool) -> None:
    """Whatever the plan or the CA says, with a third of its life left (half of a short one) it is renewed."""
    planned_at = None if plan is None else ISSUED + plan
    moment = ISSUED + lifetime * (2 / 3 if lifetime >= 10 * DAY else 1 / 2) + MOMENT
    decision = decide_renewal(moment, validity(lifetime), planned_at, suggested=suggested)

    assert decision == Renew(Reason.EXPIRES_SOON)


@given(lifetime=lifetimes, age=ages, plan=st.none() | plans)
def test_due_is_when_the_decision_is_to_renew(lifetime: timedelta, age: timedelta, plan: timedelta | None) -> None:
    """What is stored as the scan's next look is what the scan will decide."""
    planned_at = None if plan is None else ISSUED + plan
    due = isinstance(decide_renewal(ISSUED + age, validity(lifetime), planned_at), Renew)

    assert due == (ISSUED + age >= due_at(validity(lifetime), planned_at))


@given(lifetime=lifetimes, age=ages)
def test_a_plan_in_the_past_is_due_now(lifetime: timedelta, age: timedelta) -> None:
    """A CA may move a renewal to the front, even to before the certificate began."""
    assert isinstance(decide_renewal(ISSUED + age, validity(lifetime), ISSUED - MOMENT), Renew)


def test_without_a_certificate_it_is_due() -> None:
    """The first one has no plan."""
    assert decide_renewal(ISSUED, None, None) == Renew(Reason.FIRST)
    assert decide_renewal(ISSUED, None, ISSUED + timedelta(days=30)) == Renew(Reason.FIRST)


@pytest.mark.parametrize(
    ("lifetime", "share"),
    [(timedelta(days=90), 2 / 3), (timedelta(days=10), 2 / 3), (timedelta(days=9), 1 / 2), (timedelta(hours=6), 1 / 2)],
)
def test_a_short_life_is_renewed_at_half(lifetime: timedelta, share: float) -> None:
    """A six-day certificate needs more days of grace than a third of its life."""
    assert renew_after(validity(lifetime)) == share


@pytest.mark.parametrize(
    ("age_days", "decision"),
    [
        (0, Wait(ISSUED + timedelta(days=55))),
        (54.9, Wait(ISSUED + timedelta(days=55))),
        (55, Renew(Reason.LIFETIME_USED)),
        (60, Renew(Reason.EXPIRES_SOON)),
        (91, Renew(Reason.EXPIRES_SOON)),
    ],
)
def test_ninety_days_with_a_plan(age_days: float, decision: object) -> None:
    """The reason says whether it was the plan or the last resort."""
    now, planned_at = ISSUED + timedelta(days=age_days), ISSUED + timedelta(days=55)
    assert decide_renewal(now, validity(timedelta(days=90)), planned_at) == decision


def test_a_suggestion_is_named_as_the_reason() -> None:
    """Until the last resort, which is nobody's suggestion."""
    leaf, planned_at = validity(90 * DAY), ISSUED + 30 * DAY

    assert decide_renewal(planned_at, leaf, planned_at, suggested=True) == Renew(Reason.CA_SUGGESTED)
    assert decide_renewal(ISSUED + 60 * DAY, leaf, planned_at, suggested=True) == Renew(Reason.EXPIRES_SOON)


@pytest.mark.parametrize(
    ("lifetime", "left", "urgent"),
    [
        (90 * DAY, 9 * DAY + SECOND, False),
        (90 * DAY, 9 * DAY - SECOND, True),
        (12 * DAY, 2 * DAY + SECOND, False),
        (12 * DAY, 2 * DAY - SECOND, True),
        (10 * DAY, 2 * DAY - SECOND, True),
        (6 * DAY, 2 * DAY - SECOND, False),
        (6 * DAY, 0.6 * DAY + SECOND, False),
        (6 * DAY, 0.6 * DAY - SECOND, True),
        (20 * SECOND, 3 * SECOND, False),
        (20 * SECOND, SECOND, True),
        (90 * DAY, timedelta(0), True),
        (90 * DAY, -30 * DAY, True),
        (20 * SECOND, -SECOND, True),
    ],
)
def test_what_is_about_to_end_is_urgent(lifetime: timedelta, left: timedelta, urgent: bool) -> None:
    """The last tenth, or two days of a life of at least ten; what has ended is urgent, too."""
    assert is_urgent(ISSUED + lifetime - left, validity(lifetime)) is urgent


def test_the_first_certificate_is_not_urgent() -> None:
    """Nothing that serves is about to end."""
    assert not is_urgent(ISSUED, None)


@given(lifetime=lifetimes, lineage_id=ids)
def test_a_plan_is_stable_and_early_enough(lifetime: timedelta, lineage_id: str) -> None:
    """Never after the usual point, at most a tenth of a life before it, and always the same."""
    leaf = validity(lifetime)
    planned_at = plan_renewal(leaf, lineage_id)
    latest = ISSUED + lifetime * renew_after(leaf)

    assert latest - lifetime * 0.1 - MOMENT <= planned_at <= latest + MOMENT
    assert plan_renewal(leaf, lineage_id) == planned_at


def test_a_bulk_import_does_not_renew_as_a_herd() -> None:
    """1,000 certificates of one minute are spread evenly over the nine days before day 60."""
    leaf = validity(timedelta(days=90))
    days = [(plan_renewal(leaf, f"lineage-{number}") - ISSUED).days for number in range(1000)]

    assert set(days) == set(range(51, 60))
    assert max(days.count(day) for day in set(days)) < 1000 / 9 * 1.5


# -- what a CA says of it ------------------------------------------------------------------------------

moments = st.datetimes(datetime(2025, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
widths = st.timedeltas(SECOND, timedelta(days=400)).map(lambda width: width // SECOND * SECOND)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """A window as it is read: in whole seconds, and one long at least."""
    start = draw(moments).replace(microsecond=0)
    return Window(start, start + draw(widths))


@given(window=windows(), not_before=moments, lifetime=lifetimes, draw=draws)
def test_a_moment_is_one_of_the_window(window: Window, not_before: datetime, lifetime: timedelta, draw: float) -> None:
    """In whole seconds, never before the certificate, and of the window if that can be waited for."""
    leaf = Validity(not_before, not_before + lifetime)
    moment = choose_moment(window, leaf, draw)

    assert moment.microsecond == 0 or moment == not_before
    assert moment >= not_before
    if not_before <= window.end and window.start < due_at(leaf, None):
        assert window.start <= moment <= window.end + SECOND


@given(window=windows(), draw=draws)
def test_a_moment_leaves_time_to_order(window: Window, draw: float) -> None:
    """A quarter of an hour, or a tenth of a short window: an order past its end is none that the CA expects."""
    moment = choose_moment(window, Validity(ISSUED - 900 * DAY, ISSUED + 9000 * DAY), draw)
    width = window.end - window.start

    assert window.end - moment > min(width / 10, timedelta(minutes=15)) - SECOND


@given(window=windows(), lifetime=lifetimes, draw=draws)
def test_no_suggestion_outlasts_the_last_resort(window: Window, lifetime: timedelta, draw: float) -> None:
    """Also one for the year 9999 is overruled, by a moment that is spread as any plan of ours."""
    leaf, never = validity(lifetime), Window(datetime(9999, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC))
    last_resort_at = due_at(leaf, None)

    assert choose_moment(window, leaf, draw) <= last_resort_at + SECOND
    assert last_resort_at - lifetime * 0.1 <= choose_moment(never, leaf, draw) <= last_resort_at + SECOND


@given(window=windows(), not_before=moments, draw=draws)
def test_a_window_of_the_past_means_now(window: Window, not_before: datetime, draw: float) -> None:
    """Whatever is drawn of it, also when the certificate came this very moment."""
    leaf, now = Validity(not_before, not_before + 90 * DAY), max(window.end, not_before)
    assume(now < due_at(leaf, None))

    assert decide_renewal(now, leaf, choose_moment(window, leaf, draw), suggested=True) == Renew(Reason.CA_SUGGESTED)


def test_every_part_of_a_window_is_as_likely() -> None:
    """Even draws give even moments, from the first second on."""
    window = Window(ISSUED + 10 * DAY, ISSUED + 12 * DAY)
    moments = [choose_moment(window, validity(90 * DAY), number / 1000) for number in range(1000)]
    gaps = {(later - earlier) // SECOND for earlier, later in pairwise(moments)}

    assert moments[0] == window.start
    assert window.end - moments[-1] < timedelta(minutes=20)
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("lifetime", "first", "last", "earliest"),
    [
        pytest.param(90 * DAY, 59.1 * DAY, 60.9 * DAY, 59.1 * DAY, id="90 days at Let's Encrypt"),
        pytest.param(6.66 * DAY, 3.26 * DAY, 3.4 * DAY, 3.26 * DAY, id="160 hours at Let's Encrypt"),
        pytest.param(90 * DAY, 40 * DAY, 80 * DAY, 40 * DAY, id="half of it too late"),
        pytest.param(90 * DAY, 70 * DAY, 80 * DAY, 51 * DAY, id="all of it too late"),
    ],
)
def test_a_window_around_the_last_resort_makes_no_herd(
    lifetime: timedelta, first: timedelta, last: timedelta, earliest: timedelta
) -> None:
    """A bulk import whose windows are the same is spread up to the last resort, not renewed at it."""
    leaf, window = validity(lifetime), Window(ISSUED + first, ISSUED + last)
    ages = [choose_moment(window, leaf, number / 1000) - ISSUED for number in range(1000)]
    last_resort = lifetime * renew_after(leaf)

    assert min(ages) == earliest
    assert max(ages) <= last_resort + SECOND
    parts = [int((age - earliest) / (last_resort - earliest) * 20) for age in ages]
    assert max(parts.count(part) for part in range(20)) <= 1000 / 20 * 2


@pytest.mark.parametrize("lifetime", [20 * SECOND, timedelta(minutes=5), timedelta(hours=6), 6 * DAY, 90 * DAY])
def test_a_fleet_whose_windows_began_before_it_does_not_spin(lifetime: timedelta) -> None:
    """Two thirds of the life, give or take a day, is a window that a CA may have for all its certificates.

    Of a life of seconds, half of that lies before it; drawn from all of it, every second certificate
    would be renewed as soon as it is there, and the next one again.
    """
    dice, leaf = random.Random(7), validity(lifetime)
    window = Window(ISSUED + lifetime * 2 / 3 - DAY, ISSUED + lifetime * 2 / 3 + DAY)
    ages = [due_at(leaf, choose_moment(window, leaf, dice.random())) - ISSUED for _ in range(1000)]

    assert sum(ages, timedelta(0)) / 1000 > lifetime * 0.4


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        (None, timedelta(hours=6)),
        (timedelta(0), timedelta(minutes=1)),
        (-DAY, timedelta(minutes=1)),
        (SECOND, timedelta(minutes=1)),
        (timedelta(hours=6), timedelta(hours=6)),
        (timedelta(days=3650), timedelta(hours=24)),
    ],
)
def test_the_ca_says_when_to_ask_again(asked: timedelta | None, waits: timedelta) -> None:
    """Between a minute and a day; in six hours if it does not say, also after a failure that will not pass soon."""
    assert look_after_answer(asked) == waits
    assert look_after_failure(1, passing=False, retry_after=asked) == waits


def test_trouble_that_passes_is_asked_about_soon_five_times() -> None:
    """RFC 9773 §4.3.3: tries that are capped, and then it counts as lasting."""
    waits = [look_after_failure(n, passing=True, retry_after=None) / timedelta(minutes=1) for n in range(1, 9)]

    assert waits == [1, 2, 4, 8, 16, 360, 360, 360]
    assert look_after_failure(1, passing=True, retry_after=timedelta(minutes=30)) == timedelta(minutes=30)


# -- what an order replaces ----------------------------------------------------------------------------

OURS = Predecessor(ISSUED + 90 * DAY, "account-1", replaced=False)


@pytest.mark.parametrize(
    ("predecessor", "account", "now", "may"),
    [
        (OURS, "account-1", ISSUED, True),
        (OURS, "account-1", ISSUED + 90 * DAY - MOMENT, True),
        (OURS, "account-1", ISSUED + 90 * DAY, False),
        (OURS, "account-2", ISSUED, False),
        (Predecessor(ISSUED + 90 * DAY, None, replaced=False), "account-1", ISSUED, False),
        (Predecessor(ISSUED + 90 * DAY, "account-1", replaced=True), "account-1", ISSUED, False),
    ],
)
def test_what_may_be_replaced(predecessor: Predecessor, account: str, now: datetime, may: bool) -> None:
    """What the same account ordered, that has not ended and that nothing else replaces."""
    assert may_replace(predecessor, account, now) is may


def refusal(code: str, status: int | None, *named: str) -> Problem:
    kind = f"urn:ietf:params:acme:error:{code}" if code else "about:blank"
    return Problem(kind, "no", status, subproblems=tuple(Problem("x", "no", identifier=name) for name in named))


@pytest.mark.parametrize(
    ("code", "status", "once_more"),
    [
        ("alreadyReplaced", 409, True),
        ("conflict", 409, True),
        ("malformed", 400, True),
        ("unauthorized", 403, True),
        ("serverInternal", 500, True),
        ("somethingNew", 400, True),
        ("", 409, True),
        ("", 400, True),
        ("serverInternal", 503, False),
        ("", 500, False),
        ("", 502, False),
        ("", 404, False),
        ("", 429, False),
        ("", None, False),
        ("rateLimited", 429, False),
        ("badNonce", 400, False),
        ("accountDoesNotExist", 400, False),
        ("userActionRequired", 403, False),
        ("rejectedIdentifier", 400, False),
        ("unsupportedIdentifier", 400, False),
        ("externalAccountRequired", 403, False),
        ("invalidProfile", 400, False),
    ],
)
def test_a_refusal_that_may_be_about_replaces(code: str, status: int | None, once_more: bool) -> None:
    """Everything a CA may say of it, but neither what names its own reason nor what says "not now"."""
    assert drops_replaces(refusal(code, status)) is once_more
    assert not drops_replaces(refusal(code, status, "a.test"))
