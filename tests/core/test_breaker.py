"""When nobody asks a CA for anything: what opens the breaker, what closes it, and how rarely it is probed."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.core.breaker import (
    Admission,
    Breaker,
    Closed,
    Free,
    State,
    Trial,
    admits,
    after_failure,
    after_probe,
    after_success,
    begin_probe,
    resume,
)
from certworker.core.retry import BAD_NONCE, Endpoint, ErrorClass, Failure, Scope

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
DAY = 24 * HOUR
SCHEDULE = [30 * SECOND, MINUTE, 2 * MINUTE, 5 * MINUTE]
T, V, R, P, X = ErrorClass

draws = st.floats(0, 1, exclude_max=True)


def failure(
    scope: Scope = Scope.CA,
    error_class: ErrorClass = T,
    endpoint: Endpoint | None = Endpoint.NEW_ORDER,
    retry_after: timedelta | None = None,
) -> Failure:
    return Failure(error_class, f"certworker:{error_class}", "said", "hint", retry_after, scope, endpoint)


def fail(breaker: Breaker, met: Failure, now: datetime = NOW, lineage: str = "a", draw: float = 0.0) -> Breaker:
    return after_failure(breaker, met, lineage, "these settings", now, draw)


DOWN = failure()
NO_DIRECTORY = failure(endpoint=Endpoint.DIRECTORY)
NONCES = replace(DOWN, type=BAD_NONCE)
REFUSED = failure(Scope.ACCOUNT, X)
LIMITED = failure(Scope.ISSUANCE, R)


def opened(now: datetime = NOW) -> Breaker:
    breaker = Breaker()
    for _ in range(5):
        breaker = fail(breaker, DOWN, now)
    return breaker


def half_open(now: datetime = NOW) -> Breaker:
    """Return one that was opened at `now`, whose first probe was good."""
    begun = begin_probe(opened(now), now + 30 * SECOND, 0.0)
    assert begun is not None
    return after_probe(begun, None, now + 30 * SECOND, 0.0)


def until(admission: Admission) -> datetime:
    assert isinstance(admission, Closed)
    return admission.until


# -- closed → open --------------------------------------------------------------------------------------


def test_one_that_was_never_in_trouble_is_free() -> None:
    assert admits(Breaker(), NOW) == Free()


@pytest.mark.parametrize(
    ("met", "expected"),
    [
        ([DOWN] * 4, State.CLOSED),
        ([DOWN] * 5, State.OPEN),
        ([NO_DIRECTORY] * 2, State.CLOSED),
        ([NO_DIRECTORY] * 3, State.OPEN),
        ([NO_DIRECTORY] * 2 + [DOWN], State.CLOSED),
        ([DOWN] * 2 + [NO_DIRECTORY], State.OPEN),
        ([NONCES] * 11, State.CLOSED),
        ([NONCES] * 12, State.OPEN),
        ([NONCES] * 5 + [None] + [NONCES] * 11, State.CLOSED),
        ([DOWN] * 4 + [None] + [DOWN] * 4, State.CLOSED),
        ([DOWN] * 4 + [failure(Scope.ISSUANCE, V)] + [DOWN] * 4, State.CLOSED),
        ([DOWN] * 4 + [failure(Scope.ISSUANCE, T)] + [DOWN], State.OPEN),
        ([DOWN] * 4 + [failure(Scope.ISSUANCE, R, None)] + [DOWN], State.OPEN),
        ([failure(Scope.ISSUANCE, c) for c in ErrorClass] * 9, State.CLOSED),
    ],
)
def test_five_in_a_row_open_it(met: list[Failure | None], expected: State) -> None:
    """Or three at the directory, or twelve nonces. What one order meets is an answer, if it was asked and answered."""
    breaker = Breaker()
    for each in met:
        breaker = after_success(breaker, NOW) if each is None else fail(breaker, each)

    assert breaker.state is expected
    assert isinstance(admits(breaker, NOW), Closed) is (expected is State.OPEN)


@given(st.lists(st.sampled_from([DOWN, NO_DIRECTORY, None, failure(Scope.ISSUANCE, P)]), max_size=40))
def test_it_opens_for_a_row_of_failures_and_nothing_else(met: list[Failure | None]) -> None:
    """Counted here in the plainest way."""
    breaker, row = Breaker(), 0
    for each in met:
        breaker = after_success(breaker, NOW) if each is None else fail(breaker, each)
        row = 0 if each is None or each.scope is Scope.ISSUANCE else row + 1
        if row == 5 or (row >= 3 and each is NO_DIRECTORY):
            assert breaker.state is State.OPEN
            return
        assert breaker.state is State.CLOSED


def test_it_says_why() -> None:
    breaker = opened()

    assert breaker.error == {"class": "transient", "type": DOWN.type, "detail": "said", "hint": "hint"}
    assert breaker.state_at == NOW


# -- open → half open → closed --------------------------------------------------------------------------


def test_an_open_one_admits_nobody_and_is_probed() -> None:
    """30 s after it opened, and not before; while somebody reads, the others look again soon."""
    breaker, due = opened(), NOW + 30 * SECOND

    assert begin_probe(breaker, due - SECOND, 0.0) is None
    assert admits(breaker, NOW) == Closed(due)
    assert due < until(admits(breaker, due)) <= due + 10 * SECOND
    assert begin_probe(breaker, due, 0.0) is not None
    assert begin_probe(Breaker(), due, 0.0) is None


def test_a_begun_probe_is_nobody_elses() -> None:
    """Also if who began it dies: the next one keeps the schedule."""
    begun = begin_probe(opened(), NOW + MINUTE, 0.0)
    assert begun is not None

    assert begin_probe(begun, NOW + MINUTE + 59 * SECOND, 0.0) is None
    assert begin_probe(begun, NOW + 2 * MINUTE, 0.0) is not None


@given(st.lists(st.tuples(st.timedeltas(SECOND, 10 * MINUTE), draws), max_size=60))
def test_probes_keep_their_distance(steps: list[tuple[timedelta, float]]) -> None:
    """Whenever somebody comes by: 30 s, 1 min, 2 min, then 5 min each; a draw makes it later only."""
    breaker, now, probed = opened(), NOW, [NOW]
    for step, draw in steps:
        now += step
        begun = begin_probe(breaker, now, draw)
        if begun is not None:
            probed.append(now)
            breaker = after_probe(begun, DOWN, now, draw)

    for number, (before, at) in enumerate(pairwise(probed)):
        assert at - before >= SCHEDULE[min(number, 3)]
        assert at - NOW <= 15 * MINUTE or at - before >= 5 * MINUTE


def test_a_good_probe_lets_one_order_pass() -> None:
    """And three answers close it."""
    breaker = half_open()
    later = NOW + MINUTE
    assert admits(breaker, later) == Trial()

    for _ in range(2):
        breaker = after_success(breaker, later)
        assert admits(breaker, later) == Trial()
    breaker = after_success(breaker, later)

    assert admits(breaker, later) == Free()
    assert (breaker.state, breaker.state_at, breaker.failures, breaker.error) == (State.CLOSED, later, 0, None)


def test_a_refusal_is_an_answer() -> None:
    """The one order may well be for a name that fails."""
    breaker = half_open()
    for error_class in (V, P, R):
        breaker = fail(breaker, failure(Scope.ISSUANCE, error_class))

    assert breaker.state is State.CLOSED


def test_a_failed_order_opens_it_again_where_the_probes_were() -> None:
    """It is one outage: since when it lasts does not change, nor do the probes start over."""
    breaker, now = opened(), NOW
    for _ in range(6):
        now = until(admits(breaker, now))
        begun = begin_probe(breaker, now, 0.0)
        assert begun is not None
        breaker = fail(after_probe(begun, None, now, 0.0), DOWN, now)

    assert (breaker.state, breaker.state_at, breaker.probes) == (State.OPEN, NOW, 6)
    assert until(admits(breaker, now)) == now + 5 * MINUTE


def test_late_answers_neither_open_nor_close_it() -> None:
    """What was asked before it opened says nothing of now."""
    breaker = opened()

    assert after_success(breaker, NOW) == breaker
    assert fail(breaker, NO_DIRECTORY, NOW + SECOND) == breaker


def test_half_open_with_nothing_due_to_try_is_closed_by_the_directory() -> None:
    """Three good answers of it do, as far apart as probes are; a bad one opens it again."""
    breaker = half_open()
    for _ in range(3):
        asked_at = breaker.probe_at
        assert asked_at is not None
        assert begin_probe(breaker, asked_at - SECOND, 0.0) is None
        begun = begin_probe(breaker, asked_at, 0.0)
        assert begun is not None
        assert begun.probe_at is not None
        assert begun.probe_at > asked_at
        assert after_probe(begun, DOWN, asked_at, 0.0).state is State.OPEN
        breaker = after_probe(begun, None, asked_at, 0.0)
    assert breaker.state is State.CLOSED


def test_a_pause_that_was_ended_does_not_last_because_nothing_is_due() -> None:
    """The directory says nothing of the account, but the next order does, and pauses it again."""
    breaker = resume(fail(Breaker(), REFUSED), NOW, 0.0)

    assert begin_probe(breaker, NOW + 5 * MINUTE, 0.0) is not None


def test_a_wait_from_a_clock_that_ran_ahead_ends_when_it_is_put_right() -> None:
    """None is longer than any that we begin."""
    ahead = NOW + 5 * HOUR
    breaker = opened(ahead)

    assert begin_probe(breaker, NOW, 0.0) is not None
    assert isinstance(admits(Breaker(hold_until=NOW + 9 * DAY), NOW), Free)
    assert isinstance(admits(Breaker(hold_until=NOW + DAY), NOW), Closed)


@pytest.mark.parametrize(("calm", "first"), [(14 * MINUTE, 5 * MINUTE), (15 * MINUTE, 30 * SECOND)])
def test_one_that_flaps_is_probed_no_more_often(calm: timedelta, first: timedelta) -> None:
    """A CA that answers three times and is gone again stays with five minutes."""
    breaker = replace(half_open(), probes=7)
    for _ in range(3):
        breaker = after_success(breaker, NOW)
    for _ in range(5):
        breaker = fail(breaker, DOWN, NOW + calm)

    assert until(admits(breaker, NOW + calm)) == NOW + calm + first


# -- waits for everybody --------------------------------------------------------------------------------


@given(st.timedeltas(SECOND, DAY), draws)
def test_what_the_ca_asks_of_everybody_is_kept(asked: timedelta, draw: float) -> None:
    """Retry-After of a 503, or of a limit on what everybody needs; 0 to 10 % longer, never shorter."""
    breaker = fail(Breaker(), failure(error_class=R, endpoint=Endpoint.NEW_NONCE, retry_after=asked), draw=draw)
    end = until(admits(breaker, NOW))

    assert asked <= end - NOW <= asked * 1.1
    assert admits(breaker, end) == Free()


def test_a_shorter_wait_does_not_end_a_longer_one() -> None:
    breaker = fail(Breaker(), failure(retry_after=HOUR))
    breaker = fail(breaker, failure(retry_after=MINUTE))

    assert admits(breaker, NOW) == Closed(NOW + HOUR)


def test_a_wait_holds_probes_and_trials_too() -> None:
    """A CA that is down may say for how long, in the probe's own answer as well."""
    begun = begin_probe(opened(), NOW + MINUTE, 0.0)
    assert begun is not None
    breaker = after_probe(begun, failure(retry_after=HOUR), NOW + MINUTE, 0.0)
    end = NOW + MINUTE + HOUR

    assert admits(breaker, NOW + MINUTE) == Closed(end)
    assert begin_probe(breaker, end - SECOND, 0.0) is None
    assert begin_probe(breaker, end, 0.0) is not None
    assert admits(replace(breaker, state=State.HALF_OPEN), end - SECOND) == Closed(end)


@pytest.mark.parametrize(
    ("lineages", "apart", "waits", "expected"),
    [
        ("abc", MINUTE, [None, None, None], 2 * MINUTE + HOUR),
        ("abc", MINUTE, [3 * HOUR, MINUTE, MINUTE], 3 * MINUTE),
        ("abc", MINUTE, [MINUTE, MINUTE, 9 * DAY], 2 * MINUTE + HOUR),
        ("ababab", SECOND, [None] * 6, None),
        ("abc", 3 * MINUTE, [None, None, None], None),
        ("ab", SECOND, [None, None], None),
    ],
)
def test_three_limited_orders_are_a_limit_on_the_account(
    lineages: str, apart: timedelta, waits: list[timedelta | None], expected: timedelta | None
) -> None:
    """Different ones, within five minutes: everybody waits as long as the last one, but no more than an hour."""
    breaker, now = Breaker(), NOW - apart
    for lineage, wait in zip(lineages, waits, strict=True):
        now += apart
        breaker = fail(breaker, replace(LIMITED, retry_after=wait), now, lineage)

    assert admits(breaker, now) == (Free() if expected is None else Closed(NOW + expected))


def test_limits_elsewhere_are_one_orders() -> None:
    breaker = Breaker()
    for lineage in "abcdef":
        breaker = fail(breaker, failure(Scope.ISSUANCE, R, Endpoint.FINALIZE), lineage=lineage)

    assert breaker == Breaker()


# -- paused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [Breaker(), opened(), half_open()])
@pytest.mark.parametrize("error_class", [X, P])
def test_a_refused_account_pauses_everybody(before: Breaker, error_class: ErrorClass) -> None:
    """At once, whatever else there was; after a day one order is tried all the same."""
    breaker = fail(before, failure(Scope.ACCOUNT, error_class))

    assert (breaker.state, breaker.registration) == (State.PAUSED, "these settings")
    assert admits(breaker, NOW) == Closed(NOW + DAY)
    assert admits(breaker, NOW + DAY) == Trial()
    assert begin_probe(breaker, NOW + DAY, 0.0) is None


def test_an_account_that_was_recovered_pauses_nobody() -> None:
    """The caller says so by the class."""
    assert fail(Breaker(), failure(Scope.ACCOUNT, T)) == Breaker()


def test_a_pause_ends_with_one_order() -> None:
    """Three answers to it, and it is over; refused again, and it is paused for another day."""
    paused = fail(Breaker(), REFUSED)
    tried = resume(paused, NOW, 0.0)
    assert admits(tried, NOW) == Trial()

    again = fail(tried, REFUSED, NOW + HOUR)
    assert (again.state, again.state_at, admits(again, NOW + HOUR)) == (State.PAUSED, NOW, Closed(NOW + HOUR + DAY))
    for _ in range(3):
        tried = after_success(tried, NOW)
    assert (tried.state, tried.registration, tried.error) == (State.CLOSED, None, None)


@pytest.mark.parametrize("breaker", [Breaker(), opened(), half_open()])
def test_only_a_pause_is_resumed(breaker: Breaker) -> None:
    assert resume(breaker, NOW, 0.0) == breaker


def test_late_answers_do_not_end_a_pause() -> None:
    paused = fail(Breaker(), REFUSED)

    assert after_success(paused, NOW) == paused
    assert fail(paused, REFUSED, NOW + HOUR) == paused
    assert fail(paused, DOWN, NOW + HOUR) == paused
    assert fail(paused, failure(retry_after=HOUR)).error == paused.error


# -- all together ---------------------------------------------------------------------------------------

failures = st.builds(
    failure,
    st.sampled_from(Scope),
    st.sampled_from(ErrorClass),
    st.sampled_from(Endpoint),
    st.none() | st.timedeltas(timedelta(0), 3 * DAY),
)
events = st.one_of(failures, st.sampled_from(["success", "probe", "good probe", "resume"]))


@given(st.lists(st.tuples(events, st.timedeltas(timedelta(0), HOUR), st.sampled_from("abcd"), draws), max_size=60))
def test_whatever_happens_it_answers(happened: list[tuple[Failure | str, timedelta, str, float]]) -> None:
    """Closed is closed until later, an open one has a probe ahead, and a day after the last event somebody may ask."""
    breaker, now = Breaker(), NOW
    for event, step, lineage, draw in happened:
        now += step
        match event:
            case Failure():
                breaker = fail(breaker, event, now, lineage, draw)
            case "success":
                breaker = after_success(breaker, now)
            case "resume":
                breaker = resume(breaker, NOW, 0.0)
            case _:
                begun = begin_probe(breaker, now, draw)
                if begun is not None:
                    breaker = after_probe(begun, None if event == "good probe" else DOWN, now, draw)
        answer = admits(breaker, now)
        assert not isinstance(answer, Closed) or answer.until > now
        assert breaker.state is not State.OPEN or isinstance(answer, Closed)
        assert breaker.state not in (State.OPEN, State.PAUSED) or breaker.probe_at is not None
        assert breaker.state is State.CLOSED or breaker.error is not None
        assert breaker.state_at <= now
        assert len(breaker.limited) < 3

    now += DAY * 1.1
    assert begin_probe(breaker, now, 0.0) is not None or isinstance(admits(breaker, now), Free | Trial)
