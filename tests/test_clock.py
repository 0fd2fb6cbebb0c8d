"""The clock that all workers of a database share, and what it says of a machine that disagrees."""

import logging
from datetime import UTC, datetime, timedelta

import pytest

from certworker.clock import DatabaseClock
from certworker.store.database import Database

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


class Machine:
    """A machine whose two clocks and whose database are moved by hand."""

    def __init__(self) -> None:
        self.database, self.wall, self.monotonic = NOON, NOON, 1000.0
        self.clock = DatabaseClock(lambda: self.database, lambda: self.monotonic, lambda: self.wall)

    def run(self, seconds: float) -> None:
        """Let the same time pass everywhere."""
        self.database += timedelta(seconds=seconds)
        self.wall += timedelta(seconds=seconds)
        self.monotonic += seconds

    def beat(self) -> timedelta:
        return self.clock.anchor(self.database)


@pytest.mark.parametrize("step", [timedelta(days=1), timedelta(days=-1)])
def test_a_step_of_the_wall_clock_moves_nothing(step: timedelta) -> None:
    """Neither at once nor at the next heartbeat: only the database says what time it is."""
    machine = Machine()
    machine.run(10)
    machine.wall += step

    assert machine.clock() == NOON + timedelta(seconds=10)
    assert machine.beat() == timedelta()
    machine.run(0.25)
    assert machine.clock() == NOON + timedelta(seconds=10.25)


def test_two_machines_ten_minutes_apart_agree() -> None:
    """Whatever their own clocks say, and whenever they were started."""
    early, late = Machine(), Machine()
    early.wall -= timedelta(minutes=10)
    late.wall += timedelta(minutes=10)
    for machine in (early, late):
        machine.beat()
        machine.run(3)

    assert early.clock() == late.clock() == machine.database


@pytest.mark.parametrize("step", [timedelta(days=1), timedelta(days=-1), timedelta(seconds=2)])
def test_a_step_of_the_database_s_time_is_followed_and_told(step: timedelta) -> None:
    """The caller learns by how much, once."""
    machine = Machine()
    machine.run(15)
    machine.database += step

    assert machine.clock() == NOON + timedelta(seconds=15)
    assert machine.beat() == step
    assert machine.clock() == machine.database
    assert machine.beat() == timedelta()


def test_a_slow_answer_does_not_move_the_clock_back() -> None:
    """What the database said is a little old when it arrives; that is not its clock."""
    machine = Machine()
    machine.run(15)
    said = machine.database
    machine.run(0.9)

    assert machine.clock.anchor(said) == timedelta()
    assert machine.clock() == machine.database


def test_a_clock_that_runs_fast_is_put_right() -> None:
    """However slowly it drifts away, it is never a second off after a heartbeat."""
    machine = Machine()
    for _ in range(100):
        machine.run(15)
        machine.monotonic += 0.3
        machine.beat()
        assert abs(machine.clock() - machine.database) < timedelta(seconds=1)


def test_a_machine_that_differs_is_told_of_once_per_change(caplog: pytest.LogCaptureFixture) -> None:
    """Not with every heartbeat; and once more when it is put right."""
    machine = Machine()

    def says(ahead: timedelta) -> list[tuple[str, object]]:
        caplog.clear()
        machine.wall = machine.database + ahead
        for _ in range(3):
            machine.beat()
            machine.run(15)
        return [(record.message, record.seconds_ahead) for record in caplog.records]  # type: ignore[attr-defined]

    with caplog.at_level(logging.INFO):
        assert says(timedelta(seconds=30)) == []
        assert says(timedelta(seconds=31)) == [("clock.differs", 31)]
        assert says(timedelta(seconds=35)) == []
        assert says(timedelta(days=-1)) == [("clock.differs", -86400)]
        assert says(timedelta(seconds=1)) == [("clock.agrees", 1)]


def test_it_carries_on_what_a_real_database_says(db: Database) -> None:
    """Aware, and never further off than the two looks at it that enclose it."""
    before = db.now()
    clock = DatabaseClock(db.now)
    now = clock()

    assert now.tzinfo is UTC
    assert before <= now <= db.now() + timedelta(milliseconds=1)
    assert clock.anchor(db.now()) == timedelta()
