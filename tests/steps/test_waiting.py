"""Issuances that wait for the CA, by their time."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from certworker.steps.waiting import Waiting

from .world import START

SECOND = timedelta(seconds=1)


def session(name: str, after: int) -> Any:
    return SimpleNamespace(issuance=SimpleNamespace(id=name, attempt_at=START), wait_until=START + after * SECOND)


def test_who_is_due_longest_comes_first() -> None:
    """And nobody before their time."""
    waiting = Waiting()
    late, soon, later = session("late", 3), session("soon", 1), session("later", 9)
    for one in (late, soon, later):
        waiting.put(one)

    assert waiting.first() == START + SECOND
    assert [waiting.take(START + 3 * SECOND) for _ in range(3)] == [soon, late, None]
    assert list(waiting) == [later]


def test_a_new_time_takes_the_place_of_the_old_one() -> None:
    """Sooner, because the CA was seen at work, or later."""
    waiting = Waiting()
    sooner, later = session("sooner", 25), session("later", 1)
    waiting.put(sooner)
    waiting.put(later)
    sooner.wait_until, later.wait_until = START + 2 * SECOND, START + 9 * SECOND
    waiting.put(sooner)
    waiting.put(later)

    assert waiting.first() == START + 2 * SECOND
    assert waiting.take(START + 60 * SECOND) is sooner
    assert waiting.take(START + 60 * SECOND) is later
    assert waiting.take(START + 60 * SECOND) is None


def test_what_is_taken_out_never_comes() -> None:
    """Its lease is lost; it may be claimed again, and then comes once."""
    waiting = Waiting()
    one = session("one", 1)
    waiting.put(one)
    waiting.remove(one)

    assert waiting.first() is None
    assert len(waiting) == 0
    waiting.put(one)
    assert [waiting.take(START + SECOND) for _ in range(2)] == [one, None]
