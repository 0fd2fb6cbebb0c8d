"""Laws of the rate ledger: never more than a limit allows, never locked for longer than it takes to fill."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.core.budget import (
    LETS_ENCRYPT,
    Charge,
    Granted,
    Limit,
    Limits,
    Refused,
    charges_of_account,
    charges_of_order,
    debit,
    is_per_account,
    promise,
    read_limits,
    spend,
    turn,
    validations_bucket,
)
from certworker.errors import InputError

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
SECOND, MOMENT = timedelta(seconds=1), timedelta(microseconds=1)
ORDERS = Limit(50, 45 * SECOND)
THEIRS = Limits(
    orders=Limit(300, 36 * SECOND),
    domain=Limit(50, timedelta(minutes=202)),
    names=Limit(5, timedelta(hours=34)),
    validations=Limit(5, timedelta(minutes=12)),
    accounts=Limit(10, timedelta(minutes=18)),
)
"""What Let's Encrypt says it allows."""

limits = st.builds(Limit, st.integers(1, 8), st.integers(1, 600).map(lambda seconds: seconds * SECOND))
steps = st.lists(st.timedeltas(timedelta(minutes=-20), timedelta(minutes=20)), min_size=1, max_size=60)
moments = st.timedeltas(timedelta(days=-400), timedelta(days=400)).map(lambda step: NOW + step)


class Bucket:
    """A bucket in memory; full."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.full_at = NOW

    def ask(self, now: datetime, reserve: int = 0) -> bool:
        answer = spend(self.full_at, now, self.limit, reserve=reserve)
        self.full_at = answer.full_at
        return isinstance(answer, Granted)

    def drain(self, now: datetime, reserve: int = 0) -> int:
        """Ask until refused; return how often it was granted."""
        return next(number for number in range(10**6) if not self.ask(now, reserve))

    def until(self, now: datetime, reserve: int = 0) -> datetime:
        answer = spend(self.full_at, now, self.limit, reserve=reserve)
        assert isinstance(answer, Refused)
        return answer.until


def greedy(limit: Limit, until: datetime) -> Iterator[datetime]:
    """Give the moments at which somebody is let through who asks again as soon as he may."""
    bucket, now = Bucket(limit), NOW
    while now <= until:
        if bucket.ask(now):
            yield now
        else:
            now = bucket.until(now)


# -- tokens -------------------------------------------------------------------------------------------


@given(limit=limits, moves=steps, reserves=st.lists(st.integers(0, 7), min_size=60, max_size=60))
def test_no_window_has_more_than_the_burst_and_what_was_refilled(
    limit: Limit, moves: list[timedelta], reserves: list[int]
) -> None:
    """Between any two requests, whatever their reserve; time that a clock goes back is no time."""
    bucket, now, granted = Bucket(limit), NOW, []
    for move, reserve in zip(moves, reserves, strict=False):
        now += move
        granted.append(bucket.ask(now, min(reserve, limit.burst - 1)))

    ahead = list(accumulate(max(move, timedelta(0)) for move in moves))
    for first in range(len(moves)):
        for last in range(first, len(moves)):
            refilled = (ahead[last] - ahead[first]) / limit.refill
            assert sum(granted[first : last + 1]) <= limit.burst + refilled


def test_290_orders_in_three_hours() -> None:
    """Asked for without a pause; Let's Encrypt allows 300."""
    assert len(list(greedy(ORDERS, NOW + timedelta(hours=3)))) == 290


@pytest.mark.parametrize("kind", ["orders", "domain", "names", "validations", "accounts"])
def test_what_we_allow_the_ca_allows(kind: str) -> None:
    """For three weeks, asked for without a pause, with a burst whenever the bucket is full again."""
    ours, theirs = getattr(LETS_ENCRYPT, kind), Bucket(getattr(THEIRS, kind))
    asked = list(greedy(ours, NOW + timedelta(days=7)))
    again = [moment + timedelta(days=14) for moment in asked]

    assert all(theirs.ask(moment) for moment in asked + again)
    assert asked.count(NOW) == ours.burst


@given(limit=limits, full_at=moments, reserve=st.integers(0, 7))
def test_a_refusal_is_honest(limit: Limit, full_at: datetime, reserve: int) -> None:
    """Its moment is the first at which the same request is granted."""
    reserve = min(reserve, limit.burst - 1)
    answer = spend(full_at, NOW, limit, reserve=reserve)
    if isinstance(answer, Refused):
        assert answer.until > NOW
        assert isinstance(spend(answer.full_at, answer.until, limit, reserve=reserve), Granted)
        assert spend(answer.full_at, answer.until - MOMENT, limit, reserve=reserve) == answer


@given(limit=limits, full_at=moments)
def test_no_clock_locks_a_bucket(limit: Limit, full_at: datetime) -> None:
    """However far ahead `full_at` is: nobody waits for longer than the filling takes, and then it is full."""
    bucket = Bucket(limit)
    bucket.full_at = full_at
    bucket.drain(NOW)

    assert NOW < bucket.until(NOW) <= NOW + limit.whole
    assert bucket.drain(NOW + limit.whole) == limit.burst


def test_a_narrower_limit_counts_from_now() -> None:
    """An operator's change never waits for what the old limit had promised to fill."""
    bucket = Bucket(Limit(3, timedelta(hours=56)))
    assert bucket.drain(NOW) == 3
    bucket.limit = Limit(50, 45 * SECOND)

    assert bucket.until(NOW) == NOW + 45 * SECOND


@given(burst=st.integers(1, 300))
def test_a_fifth_is_left_for_the_urgent(burst: int) -> None:
    """What is not urgent uses four fifths of the orders, and the rest is still there."""
    asked = Limits(orders=Limit(burst, 45 * SECOND))
    bucket = Bucket(Limit(burst, 45 * SECOND))
    granted = {urgent: bucket.drain(NOW, reserve=orders_of(asked, urgent=urgent).reserve) for urgent in (False, True)}

    assert granted[True] == burst // 5
    assert sum(granted.values()) == burst


def orders_of(limits: Limits, *, urgent: bool) -> Charge:
    charges = charges_of_order(limits, ["a.test"], "hash", urgent=urgent, renewal=False, replaces=None)
    return next(charge for charge in charges if charge.bucket == "orders")


@given(limit=limits, times=st.integers(0, 30))
def test_what_has_happened_is_owed(limit: Limit, times: int) -> None:
    """A debit without asking takes what is there; an empty bucket owes one token at the most."""
    bucket = Bucket(limit)
    for _ in range(times):
        bucket.full_at = debit(bucket.full_at, NOW, limit)

    assert bucket.full_at == NOW + limit.refill * min(times, limit.burst + 1)
    assert bucket.drain(NOW) == max(limit.burst - times, 0)


# -- promises -----------------------------------------------------------------------------------------


def queue_up(bucket: Bucket, count: int, reserve: int = 0) -> Iterator[datetime]:
    """Give the moments promised to so many who were refused at once."""
    promised_at = None
    for _ in range(count):
        promised_at = promise(promised_at, bucket.until(NOW, reserve), NOW, bucket.limit)
        yield promised_at


@pytest.mark.parametrize("reserve", [0, 10])
def test_who_waits_is_let_through_at_the_promised_moment(reserve: int) -> None:
    """500 who were refused at once come back one by one, a refill apart, and nobody is refused again."""
    bucket = Bucket(ORDERS)
    bucket.drain(NOW, reserve)
    promised = list(queue_up(bucket, 500, reserve))

    assert promised[0] == NOW + ORDERS.refill
    assert {later - earlier for earlier, later in pairwise(promised)} == {ORDERS.refill}
    assert all(bucket.ask(moment, reserve) for moment in promised)


@given(limit=limits, waits=st.lists(st.timedeltas(timedelta(0), timedelta(minutes=5)), max_size=40))
def test_promises_are_a_refill_apart(limit: Limit, waits: list[timedelta]) -> None:
    """Whenever somebody comes; never before there is a token."""
    bucket, now, promised = Bucket(limit), NOW, [NOW]
    for wait in waits:
        now += wait
        bucket.drain(now)
        promised.append(promise(promised[-1], bucket.until(now), now, limit))
        assert promised[-1] >= bucket.until(now)
        assert promised[-1] - promised[-2] >= limit.refill or promised[-2] <= now


def test_a_queue_is_a_day_long() -> None:
    """Then the moments are given out once more, so that everybody asks again within a day."""
    bucket = Bucket(ORDERS)
    bucket.drain(NOW)
    promised = list(queue_up(bucket, 5000))
    in_a_day = timedelta(days=1) // ORDERS.refill

    assert len(set(promised)) == in_a_day
    assert max(promised) == NOW + timedelta(days=1)
    assert promised[in_a_day:][:in_a_day] == promised[:in_a_day]


def test_a_slow_bucket_has_a_longer_queue() -> None:
    """As long as it takes to fill: all 40 of a week are given out before one is given twice."""
    bucket = Bucket(Limit(40, timedelta(minutes=252)))
    bucket.drain(NOW)

    assert len(set(queue_up(bucket, 40))) == 40


@pytest.mark.parametrize("promised_at", [None, NOW, NOW - 20 * SECOND, NOW + timedelta(days=30)])
def test_a_promise_that_cannot_be_meant_counts_for_nothing(promised_at: datetime | None) -> None:
    """It is over, or from before a clock was set back."""
    until = NOW + 5 * SECOND
    assert promise(promised_at, until, NOW, ORDERS) == until


# -- what is asked ------------------------------------------------------------------------------------

RUNAWAY = Limits().runaway
SHARED = ["b.example.co.uk", "www.example.com", "example.com"]


def asked(charges: Iterable[Charge]) -> list[str]:
    return [charge.bucket for charge in charges]


VALIDATIONS = ["validations:b.example.co.uk", "validations:example.com", "validations:www.example.com"]


@pytest.mark.parametrize(
    ("renewal", "replaces", "buckets"),
    [
        (False, None, ["names:h", "domain:example.co.uk", "domain:example.com"]),
        (True, None, ["names:h"]),
        (True, "aki.serial", []),
        (False, "aki.serial", []),
    ],
)
def test_what_an_order_asks(renewal: bool, replaces: str | None, buckets: list[str]) -> None:
    """The guard and the account's orders always; what a renewal is free of at Let's Encrypt is not asked."""
    charges = charges_of_order(LETS_ENCRYPT, SHARED, "h", urgent=False, renewal=renewal, replaces=replaces)

    assert asked(charges) == ["runaway:h", "orders", *buckets, *VALIDATIONS]
    assert [charge.reserve for charge in charges if charge.reserve] == [10]
    assert asked(charge for charge in charges if charge.only_asked) == VALIDATIONS
    assert [charge.limit for charge in charges[:2]] == [RUNAWAY, LETS_ENCRYPT.orders]
    assert not any(charge.urgent for charge in charges)


def test_an_urgent_order_asks_the_same() -> None:
    """It may use the reserve, waits behind nobody, and is bound by every limit."""
    charges = charges_of_order(LETS_ENCRYPT, SHARED, "h", urgent=True, renewal=False, replaces=None)
    calm = charges_of_order(LETS_ENCRYPT, SHARED, "h", urgent=False, renewal=False, replaces=None)

    assert asked(charges) == asked(calm)
    assert all(charge.urgent and charge.reserve == 0 for charge in charges)


def test_without_limits_only_the_guard_is_asked() -> None:
    """At a CA of one's own."""
    charges = charges_of_order(Limits(), SHARED, "h", urgent=False, renewal=False, replaces=None)

    assert charges == (Charge("runaway:h", RUNAWAY),)
    assert charges_of_account(Limits()) == ()


def test_a_new_account_asks_one_bucket() -> None:
    """Of the CA: there is no account yet."""
    assert charges_of_account(LETS_ENCRYPT) == (Charge("accounts", Limit(3, timedelta(hours=1))),)


def test_whose_a_bucket_is_and_which_is_locked_first() -> None:
    """An account has its own orders and failures; the set of names comes before everything."""
    charges = charges_of_order(LETS_ENCRYPT, ["a.test"], "h", urgent=False, renewal=False, replaces=None)
    buckets = sorted(asked((*charges, *charges_of_account(LETS_ENCRYPT))), key=turn)

    assert buckets == ["runaway:h", "accounts", "domain:a.test", "names:h", "orders", validations_bucket("a.test")]
    assert [bucket for bucket in buckets if is_per_account(bucket)] == ["orders", "validations:a.test"]


# -- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "private", "expected"),
    [
        ("", False, LETS_ENCRYPT),
        ("", True, Limits()),
        (" , ", True, Limits()),
        ("letsencrypt", True, LETS_ENCRYPT),
        ("none", False, Limits()),
        ("orders=5/10s", True, Limits(orders=Limit(5, timedelta(seconds=10)))),
        ("none, orders = 5/10s", False, Limits(orders=Limit(5, timedelta(seconds=10)))),
        ("none,runaway=20/1h", False, Limits(runaway=Limit(20, timedelta(hours=1)))),
        ("none,accounts=1/366d", False, Limits(accounts=Limit(1, timedelta(days=366)))),
        ("none,validations=1/1m", False, Limits(validations=Limit(1, timedelta(minutes=1)))),
        ("orders=off,domain=off,names=off,validations=off,accounts=off", False, Limits()),
    ],
)
def test_a_setting_is_read(text: str, private: bool, expected: Limits) -> None:
    """A base, by its word or by what the CA is; then one limit after the other."""
    assert read_limits(text, private) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("orders", "limit orders '': must be a burst"),
        ("nonsense=1/1s", "limit 'nonsense': must be one of orders, domain, names, validations, accounts, runaway, or"),
        ("orders=1/1s,none", "limit 'none': must be one of orders"),
        ("none,letsencrypt", "stand first: letsencrypt, none"),
        ("runaway=off", "limit runaway 'off': it is what ends a loop"),
        ("names=off,names=1/1s", "limit 'names': is given twice"),
        ("letsencrypts", "limit 'letsencrypts': must be one of"),
        ("orders=5", "limit orders '5': must be a burst and the time of one more, such as 50/45s"),
        ("orders=0/1s", "limit orders '0/1s'"),
        ("orders=-1/1s", "limit orders '-1/1s'"),
        ("orders=1/0s", "limit orders '1/0s'"),
        ("orders=1/1", "limit orders '1/1'"),
        ("orders=1/1w", "limit orders '1/1w'"),
        ("orders=1/1.5h", "limit orders '1/1.5h'"),
        ("orders=٣/1h", "limit orders '٣/1h'"),
        ("orders=1/367d", "full within a year"),
        ("orders=9999999/9999999d", "full within a year"),
        ("a\nb=1/1s", r"limit 'a\nb'"),
        (f"{'x' * 5000}=1/1s", f"limit '{'x' * 60}':"),
        (f"orders={'9' * 5000}/1s", f"limit orders '{'9' * 60}':"),
    ],
)
def test_a_wrong_setting_is_named(text: str, fault: str) -> None:
    """The limit, its value and the rule, in one short line."""
    with pytest.raises(InputError) as refused:
        read_limits(text, False)
    said = str(refused.value)

    assert fault in said
    assert said.isprintable()
    assert len(said) < 250


def test_every_limit_but_the_guard_can_be_off() -> None:
    """By its own name."""
    for field in fields(Limits):
        if field.name != "runaway":
            assert getattr(read_limits(f"{field.name}=off", False), field.name) is None


@given(
    limits=st.builds(Limits, *[st.none() | limits] * 5, limits),
    private=st.booleans(),
)
def test_limits_are_written_as_they_are_read(limits: Limits, private: bool) -> None:
    """Their text says all of them, whatever the base."""
    assert read_limits(str(limits), private) == limits


def test_limits_are_written_in_short() -> None:
    """With the largest unit that fits."""
    assert str(LETS_ENCRYPT) == (
        "orders=50/45s,domain=40/252m,names=3/56h,validations=3/20m,accounts=3/1h,runaway=10/144m"
    )
    assert str(Limit(1, timedelta(days=7))) == "1/7d"


words = st.sampled_from(["orders", "names", "runaway", "none", "letsencrypt", "off", "1", "/", "=", ",", "s", "d", " "])


@given(text=st.lists(words | st.text(max_size=3)).map("".join), private=st.booleans())
def test_nothing_else_can_come_of_a_text(text: str, private: bool) -> None:
    """Limits, or an InputError."""
    with suppress(InputError):
        assert read_limits(text, private).runaway
