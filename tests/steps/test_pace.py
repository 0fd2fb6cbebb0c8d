"""How soon the CA is asked whether it is done, when it does not say: as it turned out before."""

from datetime import timedelta
from itertools import pairwise

from certworker.steps.pace import Pace

MILLISECOND = timedelta(milliseconds=1)


def settle(done_after: timedelta, rounds: int = 400) -> tuple[Pace, float]:
    """Ask a CA that always takes so long; return what was learnt, and the looks per round of the second half."""
    pace, looked = Pace(), []
    for _ in range(rounds):
        waited, looks, first = timedelta(), 0, pace.wait(0)
        while waited < done_after:
            waited += pace.wait(looks)
            looks += 1
        pace.learn(looks, first)
        looked.append(looks)
    return pace, sum(looked[rounds // 2 :]) / (rounds // 2)


def test_a_quick_ca_is_not_waited_for() -> None:
    """A few milliseconds are enough, and nearly every look is the only one."""
    pace, looks = settle(8 * MILLISECOND)

    assert 7 * MILLISECOND < pace.wait(0) < 11 * MILLISECOND
    assert looks < 1.2


def test_a_slow_ca_is_not_pestered() -> None:
    """One that takes two seconds is looked at after two seconds."""
    pace, looks = settle(2000 * MILLISECOND)

    assert 1900 * MILLISECOND < pace.wait(0) < 2600 * MILLISECOND
    assert looks < 1.2


def test_it_never_asks_without_a_wait_nor_waits_for_ever() -> None:
    """Whatever a CA does."""
    quick, _ = settle(timedelta(microseconds=1), 2000)
    slow, _ = settle(timedelta(minutes=5))

    assert quick.wait(0) == 2 * MILLISECOND
    assert slow.wait(0) == timedelta(seconds=4)


def test_many_that_looked_too_soon_together_are_one_step() -> None:
    """They had all waited as long: what the first of them found is what all did."""
    pace = Pace()
    first = pace.wait(0)
    for _ in range(256):
        pace.learn(2, first)
    assert pace.wait(0) == first * 1.25

    for _ in range(256):
        pace.learn(1, first * 1.25)
    assert pace.wait(0) == first * 1.25 / 2


def test_looks_that_are_too_soon_are_farther_apart() -> None:
    """Up to half a minute, as with every CA that is busy."""
    waits = [Pace().wait(looks) for looks in range(12)]

    assert all(later == sooner * 2 for sooner, later in pairwise(waits[:9]))
    assert waits[-1] == timedelta(seconds=30)
