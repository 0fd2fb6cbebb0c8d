"""When a failed attempt is followed by the next one."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.core.retry import LONGEST_RETRY_AFTER, ErrorClass, Failure, retry_at

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
draws = st.floats(0, 1, exclude_max=True)
failures = st.builds(
    Failure,
    st.sampled_from(ErrorClass),
    st.just("urn:ietf:params:acme:error:serverInternal"),
    st.just("said"),
    st.just("hint"),
    st.none() | st.timedeltas(timedelta(0), timedelta(days=400)),
)


def pause(error_class: ErrorClass, count: int, draw: float = 0.5) -> timedelta:
    return retry_at(Failure(error_class, "t", "d", "h"), count, NOW, draw) - NOW


@given(failures, st.integers(1, 10_000), draws)
def test_the_next_attempt_is_ahead_and_within_reason(failure: Failure, count: int, draw: float) -> None:
    """Never now, never later than a day and what spreads it."""
    wait = retry_at(failure, count, NOW, draw) - NOW

    assert timedelta(0) < wait <= timedelta(hours=24) * 1.2


@given(failures.filter(lambda failure: failure.retry_after is not None), st.integers(1, 50), draws)
def test_the_cas_wish_is_never_undercut(failure: Failure, count: int, draw: float) -> None:
    """Retry-After + 0 to 10 %, cut at a day."""
    assert failure.retry_after is not None
    asked = min(failure.retry_after, LONGEST_RETRY_AFTER)
    wait = retry_at(failure, count, NOW, draw) - NOW

    assert wait >= asked
    assert wait <= max(asked, timedelta(seconds=1)) * 1.1


@given(st.sampled_from(ErrorClass), draws)
def test_patience_grows(error_class: ErrorClass, draw: float) -> None:
    """Each failure in a row waits at least as long as the one before, for the same draw."""
    waits = [pause(error_class, count, draw) for count in range(1, 20)]

    assert waits == sorted(waits)


@pytest.mark.parametrize(
    ("error_class", "minutes"),
    [
        (ErrorClass.VALIDATION, [1, 10, 100, 1440, 1440]),
        (ErrorClass.RATE_LIMITED, [60, 180, 720, 1440, 1440]),
        (ErrorClass.PERMANENT, [1440, 1440]),
        (ErrorClass.ACTION_REQUIRED, [1440, 1440]),
    ],
)
def test_schedules(error_class: ErrorClass, minutes: list[int]) -> None:
    """Let's Encrypt's advice for validations; a day for what only a person can mend."""
    assert [pause(error_class, n) for n in range(1, len(minutes) + 1)] == [timedelta(minutes=m) for m in minutes]


def test_three_validations_in_the_first_hours_then_one_a_day() -> None:
    """Stays under 5 failed validations per name, account and hour, with the shortest draws."""
    at, tried = timedelta(0), [timedelta(0)]
    for count in range(1, 10):
        at += pause(ErrorClass.VALIDATION, count, draw=0.0)
        tried.append(at)

    for start in tried:
        assert sum(start <= moment < start + timedelta(hours=1) for moment in tried) <= 3
