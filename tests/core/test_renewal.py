"""Laws of when a certificate is renewed."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.core.certificate import Validity
from certworker.core.renewal import Reason, Renew, Wait, decide_renewal, plan_renewal, renew_after

ISSUED = datetime(2026, 1, 1, tzinfo=UTC)
MOMENT = timedelta(microseconds=1)

lifetimes = st.timedeltas(timedelta(minutes=10), timedelta(days=825))
ages = st.timedeltas(timedelta(0), timedelta(days=900))
plans = st.timedeltas(timedelta(days=-400), timedelta(days=900))
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


@given(lifetime=lifetimes, plan=st.none() | plans)
def test_no_plan_takes_a_site_down(lifetime: timedelta, plan: timedelta | None) -> None:
    """Whatever the plan says, with a third of its life left a certificate is renewed."""
    planned_at = None if plan is None else ISSUED + plan
    moment = ISSUED + lifetime * (2 / 3) + MOMENT
    assert isinstance(decide_renewal(moment, validity(lifetime), planned_at), Renew)


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
