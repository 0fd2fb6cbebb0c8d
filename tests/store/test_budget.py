"""The rate ledger's rows: all or nothing, never overspent by two at once, never a circle of waiting."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import Connection, delete, select, text

from certworker.core.budget import (
    LETS_ENCRYPT,
    Charge,
    Limit,
    Limits,
    charges_of_account,
    charges_of_order,
    validations_bucket,
)
from certworker.store import budget
from certworker.store.budget import Refusal
from certworker.store.database import Database
from certworker.store.tables import rate_buckets

from .conftest import NOW
from .plans import explain, wait_for_waiting

CA, OTHER_CA = "https://ca.test/dir", "https://other.test/dir"
ACCOUNT, OTHER_ACCOUNT = "66666666-6666-4666-8666-666666666666", "77777777-7777-4777-8777-777777777777"
REFILL = timedelta(seconds=45)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


def order(
    *names: str, limits: Limits = LETS_ENCRYPT, urgent: bool = False, renewal: bool = False
) -> tuple[Charge, ...]:
    """What an order for these names asks; their hash is the names themselves."""
    return charges_of_order(limits, names, "+".join(names), urgent=urgent, renewal=renewal, replaces=None)


def spend(
    db: Database, charges: tuple[Charge, ...], now: datetime = NOW, account_id: str = ACCOUNT, ca: str = CA
) -> Refusal | None:
    return db.write(lambda tx: budget.spend(tx, ca, charges, account_id, now))


def spend_all(db: Database, charges: tuple[Charge, ...], now: datetime = NOW) -> int:
    """Spend until refused; return how often it was granted."""
    return next(number for number in range(1000) if spend(db, charges, now))


def fail(db: Database, name: str, now: datetime = NOW) -> None:
    """Charge a failed validation."""
    limit = LETS_ENCRYPT.validations
    assert limit
    db.write(lambda tx: budget.charge(tx, CA, validations_bucket(name), ACCOUNT, limit, now))


def spent(db: Database) -> dict[tuple[str, str], timedelta]:
    """Return what is missing in each bucket that is not full."""
    rows = db.read(lambda tx: tx.execute(select(rate_buckets).where(rate_buckets.c.full_at > NOW)).all())
    return {(row.account, row.bucket): row.full_at - NOW for row in rows}


ONLY_ORDERS = Limits(orders=LETS_ENCRYPT.orders, runaway=Limit(10_000, timedelta(seconds=1)))
"""Nothing but the account's orders holds anybody back."""


# -- all or nothing -----------------------------------------------------------------------------------


def test_an_order_takes_a_token_of_every_bucket(db: Database) -> None:
    """Of the account's own, and of the CA's; a failed validation's token is not taken yet."""
    assert spend(db, order("b.a.test", "a.test")) is None

    assert spent(db) == {
        (ACCOUNT, "orders"): REFILL,
        ("", "domain:a.test"): 252 * MINUTE,
        ("", "names:b.a.test+a.test"): 56 * HOUR,
        ("", "runaway:b.a.test+a.test"): 144 * MINUTE,
    }


def test_one_bucket_without_a_token_refuses_everything(db: Database) -> None:
    """Nothing is taken of the others, however often it is asked."""
    assert spend_all(db, order("a.test")) == 3
    before = spent(db)

    refusals = [spend(db, order("a.test")) for _ in range(20)]
    assert {refusal.bucket for refusal in refusals if refusal} == {"names:a.test"}
    assert spent(db) == before
    assert spend(db, order("b.a.test")) is None


def test_the_last_of_the_refusing_buckets_says_when(db: Database) -> None:
    """Before that the order would be refused anew."""
    limits = Limits(orders=Limit(1, REFILL), names=Limit(1, HOUR), domain=Limit(1, MINUTE))
    assert spend(db, order("a.test", limits=limits)) is None

    assert spend(db, order("a.test", limits=limits)) == Refusal("names:a.test", NOW + HOUR)
    assert spend(db, order("b.a.test", limits=limits)) == Refusal("domain:a.test", NOW + MINUTE)
    assert spend(db, order("b.test", limits=limits)) == Refusal("orders", NOW + REFILL)
    assert spend(db, order("a.test", limits=limits), NOW + HOUR) is None


def test_every_ca_and_account_has_its_own(db: Database) -> None:
    """What two accounts share at a CA is what the CA counts together."""
    limits = Limits(orders=Limit(1, REFILL), names=Limit(2, HOUR))
    charges = order("a.test", limits=limits)
    assert spend(db, charges) is None

    assert spend(db, charges) == Refusal("orders", NOW + REFILL)
    assert spend(db, charges, account_id=OTHER_ACCOUNT) is None
    assert spend(db, charges, account_id=OTHER_ACCOUNT) == Refusal("names:a.test", NOW + HOUR)
    assert spend(db, charges, ca=OTHER_CA) is None


def test_a_guard_stands_where_nothing_else_is_limited(db: Database) -> None:
    """At a CA of one's own a loop ends after ten certificates for the same names."""
    assert spend_all(db, order("a.test", limits=Limits(), renewal=True)) == 10
    assert spend(db, order("b.test", limits=Limits())) is None


def test_an_account_is_asked_for_before_it_is_there(db: Database) -> None:
    """Three, then one an hour; without a limit nothing is written."""
    assert spend(db, charges_of_account(Limits()), account_id="") is None
    assert spent(db) == {}
    charges = charges_of_account(LETS_ENCRYPT)

    assert [spend(db, charges, account_id="") for _ in range(4)] == [None] * 3 + [Refusal("accounts", NOW + HOUR)]


def test_names_that_failed_lately_are_not_ordered(db: Database) -> None:
    """Three failures, then one each 20 minutes; orders alone cost a name nothing."""
    for _ in range(3):
        assert spend(db, order("a.test", "b.test", renewal=True)) is None
        fail(db, "a.test")

    refused = Refusal("validations:a.test", NOW + 20 * MINUTE)
    assert spend(db, order("c.test", "a.test")) == refused
    assert spend(db, order("a.test", "d.test"), account_id=OTHER_ACCOUNT) is None
    assert spend(db, order("b.test")) is None
    assert spend(db, order("c.test", "a.test"), refused.until) is None


def test_a_fifth_of_the_orders_is_left_for_the_urgent(db: Database) -> None:
    """In one bucket, whoever comes first."""
    assert spend_all(db, order("a.test", limits=ONLY_ORDERS)) == 40
    assert spend_all(db, order("b.test", limits=ONLY_ORDERS, urgent=True)) == 10
    assert spend(db, order("c.test", limits=ONLY_ORDERS), NOW + 10 * REFILL) is not None
    assert spend(db, order("c.test", limits=ONLY_ORDERS), NOW + 11 * REFILL) is None


def test_a_clock_that_was_set_back_locks_nothing(db: Database) -> None:
    """What lies a month ahead is mended by the first who asks, and full after the time that filling takes."""
    later = NOW + timedelta(days=30)
    assert spend_all(db, order("a.test", limits=ONLY_ORDERS, urgent=True), later) == 50

    assert spend(db, order("b.test", limits=ONLY_ORDERS, urgent=True)) == Refusal("orders", NOW + REFILL)
    assert spent(db)[ACCOUNT, "orders"] == 50 * REFILL
    assert spend_all(db, order("b.test", limits=ONLY_ORDERS, urgent=True), NOW + 50 * REFILL) == 50


# -- promises -----------------------------------------------------------------------------------------


def test_everybody_who_waits_has_a_moment_of_his_own(db: Database) -> None:
    """A refill apart; who then comes is let through, and the others keep their moments."""
    spend_all(db, order("a.test", limits=ONLY_ORDERS))  # the first promise is this one's
    refusals = [spend(db, order(f"{number}.test", limits=ONLY_ORDERS)) for number in range(30)]
    promised = [refusal.until for refusal in refusals if refusal]

    assert promised[0] == NOW + 2 * REFILL
    assert {later - earlier for earlier, later in pairwise(promised)} == {REFILL}
    assert all(spend(db, order("a.test", limits=ONLY_ORDERS), moment) is None for moment in promised)


def test_the_urgent_wait_behind_nobody(db: Database) -> None:
    """They are told the first moment there is, and take none from those who wait."""
    spend_all(db, order("a.test", limits=ONLY_ORDERS))
    spend_all(db, order("a.test", limits=ONLY_ORDERS, urgent=True))
    asked = [(False, 11), (True, 1), (False, 12), (True, 1), (False, 13)]

    for urgent, refills in asked:
        refusal = spend(db, order("b.test", limits=ONLY_ORDERS, urgent=urgent))
        assert refusal == Refusal("orders", NOW + refills * REFILL)


def test_a_promise_spends_nothing(db: Database) -> None:
    """Whoever comes when there is a token takes it."""
    spend_all(db, order("a.test", limits=ONLY_ORDERS))
    assert [spend(db, order("b.test", limits=ONLY_ORDERS)) for _ in range(5)].count(None) == 0

    assert spend(db, order("c.test", limits=ONLY_ORDERS), NOW + REFILL) is None


def test_a_promise_from_before_the_clock_was_set_back_is_forgotten(db: Database) -> None:
    """The queue starts anew."""
    later = NOW + timedelta(days=30)
    spend_all(db, order("a.test", limits=ONLY_ORDERS), later)

    assert spend(db, order("b.test", limits=ONLY_ORDERS)) == Refusal("orders", NOW + 11 * REFILL)
    assert spend(db, order("b.test", limits=ONLY_ORDERS)) == Refusal("orders", NOW + 12 * REFILL)


# -- two at once --------------------------------------------------------------------------------------


@contextmanager
def running(work: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Run `work` in a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(work)


def test_two_at_once_spend_no_token_twice(db: Database, twin: Database) -> None:
    """Of four threads: what is granted is the burst, and each of the refused has a moment of its own."""
    charges = order("a.test", limits=Limits(orders=Limit(25, REFILL), runaway=Limit(1000, REFILL)))
    start = threading.Barrier(4)

    def ask(number: int) -> list[Refusal | None]:
        start.wait(10)
        return [spend((db, twin)[number % 2], charges) for _ in range(15)]

    with ThreadPoolExecutor(4) as threads:
        answers = [answer for part in threads.map(ask, range(4)) for answer in part]

    assert answers.count(None) == 20  # a fifth is for the urgent
    promised = sorted(answer.until for answer in answers if answer)
    assert promised == [NOW + number * REFILL for number in range(1, 41)]


def test_nobody_waits_in_a_circle(db: Database, twin: Database) -> None:
    """Overlapping orders, failed validations and a reaper, on buckets that come and go: none is ever repeated."""
    names = [f"{number:02}.a{number}.test" for number in range(12)]
    runs, rounds = [0] * 4, 40
    start = threading.Barrier(4)

    def counted(number: int, fn: Callable[[Connection], Any]) -> None:
        def run(tx: Connection) -> Any:
            runs[number] += 1
            return fn(tx)

        (db, twin)[number % 2].write(run)

    limit = LETS_ENCRYPT.validations
    assert limit

    def fail_all(tx: Connection) -> None:
        for name in names:
            budget.charge(tx, CA, validations_bucket(name), ACCOUNT, limit, NOW)

    forwards, backwards = order(*names), order(*names)[::-1]
    moves: list[Callable[[Connection], Any]] = [
        lambda tx: budget.spend(tx, CA, forwards, ACCOUNT, NOW),
        lambda tx: budget.spend(tx, CA, backwards, ACCOUNT, NOW),
        fail_all,
        lambda tx: budget.forget_full(tx, NOW + timedelta(days=365), 1000),
    ]

    def work(number: int) -> None:
        for _ in range(rounds):
            start.wait(10)
            counted(number, moves[number])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))

    assert runs == [rounds] * 4


def test_orders_for_the_same_names_go_one_after_the_other(postgresql_db: Database) -> None:
    """The second waits for the set of names, and keeps nobody from any other bucket meanwhile."""
    db = postgresql_db
    with db.engine.connect() as first, db.engine.connect() as third:
        first.begin()
        budget.spend(first, CA, order("a.test", limits=Limits()), ACCOUNT, NOW)
        with running(lambda: spend(db, order("a.test"))) as second:
            wait_for_waiting(db)
            third.execute(text("SET lock_timeout = '100ms'"))
            assert budget.spend(third, CA, order("b.a.test"), ACCOUNT, NOW) is None
            third.commit()
            assert not second.done()
            first.commit()
            assert second.result(10) is None

    assert spent(db)["", "runaway:a.test"] == 288 * MINUTE


def test_a_bucket_that_is_deleted_meanwhile_is_made_anew(postgresql_db: Database) -> None:
    """What the reaper takes away is not what two could both believe to have locked."""
    db = postgresql_db
    spend(db, order("a.test", limits=Limits()))
    with db.engine.connect() as reaper:
        reaper.execute(delete(rate_buckets))
        with running(lambda: spend(db, order("a.test", limits=Limits()))) as second:
            wait_for_waiting(db)
            reaper.commit()
            assert second.result(10) is None

    assert spent(db) == {("", "runaway:a.test"): 144 * MINUTE}


# -- the reaper, plans --------------------------------------------------------------------------------


def test_full_buckets_are_forgotten(db: Database) -> None:
    """The longest full first, a page at a time; those that lack something are kept."""
    for number in range(5):
        spend(db, order(f"{number}.test", limits=Limits()), NOW + number * MINUTE)
    now = NOW + 144 * MINUTE + 3 * MINUTE

    def forget(limit: int) -> int:
        return db.write(lambda tx: budget.forget_full(tx, now, limit))

    assert [forget(2), forget(2), forget(2)] == [2, 1, 0]
    kept = db.read(lambda tx: set(tx.execute(select(rate_buckets.c.bucket)).scalars()))
    assert kept == {"runaway:3.test", "runaway:4.test"}


def test_the_reaper_waits_for_nobody(postgresql_db: Database) -> None:
    """A bucket that is asked right now is not taken away."""
    db, later = postgresql_db, NOW + timedelta(days=1)
    spend(db, order("a.test", limits=Limits()))
    spend(db, order("b.test", limits=Limits()))
    with db.engine.connect() as tx, tx.begin():
        budget.spend(tx, CA, order("a.test", limits=Limits()), ACCOUNT, later)
        assert db.write(lambda other: budget.forget_full(other, later, 10)) == 1

    assert db.read(lambda tx: tx.execute(select(rate_buckets.c.bucket)).scalars().all()) == ["runaway:a.test"]


def ask(tx: Connection) -> None:
    budget.spend(tx, CA, order("a.test"), ACCOUNT, NOW)


def forget(tx: Connection) -> None:
    budget.forget_full(tx, NOW, 10)


@pytest.mark.parametrize(("fn", "verb", "indexes"), [(ask, "UPDATE", ["key"]), (forget, "DELETE", ["full_at", "key"])])
def test_rows_are_found_by_an_index(
    db: Database, fn: Callable[[Connection], None], verb: str, indexes: list[str]
) -> None:
    """However many there are; those to be locked are found by their key, or ON CONFLICT would be refused."""
    spend(db, order("b.test", limits=Limits()), NOW - timedelta(days=9))
    names = {
        "full_at": "ix_rate_buckets_full_at",
        "key": "sqlite_autoindex_rate_buckets_1" if db.embedded else "pk_rate_buckets",
    }
    plan = explain(db, fn, verb)

    assert [index for index, name in names.items() if f"{name} " in plan] == indexes
    assert "Seq Scan" not in plan
    assert "SCAN rate_buckets" not in plan
